"""The parity tests can fail: each of these small errors, put into the network on purpose, breaks parity."""
import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
from definitions import assert_head, assert_linear_attention, random_rotation
from parity import assert_evaluation_parity, assert_training_parity, largest
from reference import published_model

from caretrans.models import attention, care


@pytest.fixture(scope='module')
def published():
    return published_model('care_s0', torch.float64)


@pytest.fixture
def model(published):
    return copy.deepcopy(published)


# Errors in the order of channels --------------------------------------------------------------------------------------

def swap_local_slices(model, monkeypatch):
    def forward(self, x):
        attn, local_7x7, local_3x3 = x.split(self.slices, dim=1)
        return torch.cat([self.long_range(attn), self.local_3x3(local_3x3), self.local_7x7(local_7x7)], dim=1)
    monkeypatch.setattr(care.DecoupledMixer, 'forward', forward)


def swap_attention_and_3x3_slices_of_one_block(model, monkeypatch):
    mixer = model.stages[2].blocks[3].mixer

    def forward(x):
        local_3x3, attn, local_7x7 = x.split(mixer.slices, dim=1)
        return torch.cat([mixer.long_range(attn), mixer.local_3x3(local_3x3), mixer.local_7x7(local_7x7)], dim=1)
    monkeypatch.setattr(mixer, 'forward', forward)


def concatenate_mixed_slices_in_another_order(model, monkeypatch):
    def forward(self, x):
        attn, local_3x3, local_7x7 = x.split(self.slices, dim=1)
        return torch.cat([self.local_3x3(local_3x3), self.long_range(attn), self.local_7x7(local_7x7)], dim=1)
    monkeypatch.setattr(care.DecoupledMixer, 'forward', forward)


def take_the_memory_from_the_other_end(model, monkeypatch):
    def forward(self, x):
        features, memory = x.split([self.mixed_chs, self.memory_chs], dim=1)
        features = self.inter1(self.mixer(features))
        y = self.drop_path(self.layer_scale(self.inter2(torch.cat([memory, features], dim=1))))
        return y if self.last else x + y
    monkeypatch.setattr(care.CareBlock, 'forward', forward)


def drop_the_memory(model, monkeypatch):
    def forward(self, x):
        memory, features = x.split([self.memory_chs, self.mixed_chs], dim=1)
        features = self.inter1(self.mixer(features))
        y = self.inter2(torch.cat([torch.zeros_like(memory), features], dim=1))
        y = self.drop_path(self.layer_scale(y))
        return y if self.last else x + y
    monkeypatch.setattr(care.CareBlock, 'forward', forward)


def interleave_the_channels_of_heads(model, monkeypatch):
    def forward(self, x):
        B, C, H, W = x.shape

        def heads(t):
            return t.reshape(B, self.head_chs, self.num_heads, H * W).transpose(1, 2)

        q, k = self.qk(x).chunk(2, dim=1)
        return linear_attention(heads(q), heads(k), heads(x)).transpose(1, 2).reshape(B, C, H, W)
    monkeypatch.setattr(care.LinearAttention, 'forward', forward)


# Errors in the long range ---------------------------------------------------------------------------------------------

linear_attention = attention.linear_attention


def swap_queries_and_keys(model, monkeypatch):
    monkeypatch.setattr(care, 'linear_attention', lambda q, k, v: linear_attention(k, q, v))


def change_eps(model, monkeypatch, eps):
    monkeypatch.setattr(care, 'linear_attention', partial(linear_attention, eps=eps))


def leave_eps_out_of_the_mean(model, monkeypatch):
    monkeypatch.setattr(care, 'linear_attention', lambda q, k, v: linear_attention(q, k, v, eps=1e-6 / q.shape[-1]))


def take_relu_for_the_feature_map(model, monkeypatch):
    monkeypatch.setattr(attention, 'positive_feature', torch.relu)


def chain_the_strips(model, monkeypatch):
    monkeypatch.setattr(care.StripConv, 'forward', lambda self, x: self.conv_1x11(self.conv_11x1(x)))


# Errors in convolutions, norms and activations ------------------------------------------------------------------------

def set_on_7x7(model, monkeypatch, **attributes):
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (7, 7):
            set_everywhere(module, monkeypatch, nn.Conv2d, **attributes)


def shift_7x7(model, monkeypatch):
    for block in [block for stage in model.stages for block in stage.blocks]:
        block.mixer.local_7x7.register_forward_hook(lambda module, args, y: y.roll(1, dims=-1))


def shift_7x7_of_one_block(model, monkeypatch):
    model.stages[3].blocks[2].mixer.local_7x7.register_forward_hook(lambda module, args, y: y.roll(1, dims=-2))


def set_everywhere(model, monkeypatch, module_type, **attributes):
    for module in model.modules():
        if isinstance(module, module_type):
            for name, value in attributes.items():
                assert hasattr(module, name)
                setattr(module, name, value)


def leave_out_the_gelu_of_the_heads(model, monkeypatch):
    model.head.act = model.head_dist.act = nn.Identity()


# Errors in residuals and heads ----------------------------------------------------------------------------------------

def leave_out_the_residual_of_inter1(model, monkeypatch):
    for block in [block for stage in model.stages for block in stage.blocks]:
        block.inter1.forward = partial(lambda self, x: self.project(self.hidden(x)), block.inter1)


def keep_gamma_off_the_inner_residual(model, monkeypatch):
    def forward(self, x):
        memory, features = x.split([self.memory_chs, self.mixed_chs], dim=1)
        c = torch.cat([memory, self.inter1(self.mixer(features))], dim=1)
        y = self.inter2(c)
        return y if self.last else x + c + self.layer_scale(y - c)
    monkeypatch.setattr(care.CareBlock, 'forward', forward)


def scale_the_last_block(model, monkeypatch):
    model.stages[3].blocks[3].layer_scale = care.LayerScale2d(1024, 0.5, dtype=torch.float64)


def answer_with_one_head(model, monkeypatch, head):
    def forward_head(x):
        x = model.global_pool(x)
        return dict(head=model.head(x), head_dist=model.head_dist(x))[head]
    monkeypatch.setattr(model, 'forward_head', forward_head)


def answer_with_the_sum_of_heads(model, monkeypatch):
    monkeypatch.setattr(model, 'forward', lambda x: 2 * care.CareTransformer.forward(model, x))


MUTATIONS = {
    'local slices swapped': swap_local_slices,
    'attention and 3x3 slices of one block swapped': swap_attention_and_3x3_slices_of_one_block,
    'mixed slices in another order': concatenate_mixed_slices_in_another_order,
    'memory at the other end': take_the_memory_from_the_other_end,
    'no memory': drop_the_memory,
    'channels of heads interleaved': interleave_the_channels_of_heads,
    'queries and keys swapped': swap_queries_and_keys,
    'eps 1e-3': partial(change_eps, eps=1e-3),
    'eps 1e-5': partial(change_eps, eps=1e-5),
    'eps 2e-6': partial(change_eps, eps=2e-6),
    'eps 0': partial(change_eps, eps=0.),
    'eps divided by N': leave_eps_out_of_the_mean,
    'relu as feature map': take_relu_for_the_feature_map,
    'strips chained': chain_the_strips,
    '7x7 padded by reflection': partial(set_on_7x7, padding_mode='reflect'),
    '7x7 padded by replication': partial(set_on_7x7, padding_mode='replicate'),
    '7x7 dilated': partial(set_on_7x7, padding=(6, 6), dilation=(2, 2)),
    '7x7 shifted': shift_7x7,
    '7x7 of one block shifted': shift_7x7_of_one_block,
    'GELU by tanh': partial(set_everywhere, module_type=nn.GELU, approximate='tanh'),
    'BatchNorm eps 1e-3': partial(set_everywhere, module_type=nn.BatchNorm2d, eps=1e-3),
    'BatchNorm eps 1e-6': partial(set_everywhere, module_type=nn.BatchNorm2d, eps=1e-6),
    'heads without GELU': leave_out_the_gelu_of_the_heads,
    'Inter1 without residual': leave_out_the_residual_of_inter1,
    'gamma off the inner residual': keep_gamma_off_the_inner_residual,
    'gamma in the last block': scale_the_last_block,
    'head only': partial(answer_with_one_head, head='head'),
    'head_dist only': partial(answer_with_one_head, head='head_dist'),
    'sum of the heads': answer_with_the_sum_of_heads,
}

TRAINING_MUTATIONS = {
    'BatchNorm momentum 0.01': partial(set_everywhere, module_type=nn.BatchNorm2d, momentum=0.01),
    'GELU by tanh': partial(set_everywhere, module_type=nn.GELU, approximate='tanh'),
    'eps 1e-3': partial(change_eps, eps=1e-3),
    'drop path': partial(set_everywhere, module_type=care.CareBlock, drop_path=care.DropPath(0.1)),
    'heads exchanged': lambda model, monkeypatch: setattr(
        model, 'forward', lambda x: care.CareTransformer.forward(model, x)[::-1]),
}


def test_the_unmodified_network_has_parity(model):
    print(f'largest error {largest(assert_evaluation_parity(model, "care_s0"))}')


@pytest.mark.parametrize('mutate', MUTATIONS.values(), ids=MUTATIONS.keys())
def test_evaluation_parity_catches(mutate, model, monkeypatch):
    mutate(model, monkeypatch)
    with pytest.raises(AssertionError, match='off by') as caught:
        assert_evaluation_parity(model, 'care_s0')
    print(caught.value)


@pytest.mark.parametrize('mutate', TRAINING_MUTATIONS.values(), ids=TRAINING_MUTATIONS.keys())
def test_training_parity_catches(mutate, model, monkeypatch):
    mutate(model, monkeypatch)
    with pytest.raises(AssertionError, match='off by') as caught:
        assert_training_parity(model, 'care_s0')
    print(caught.value)


# What parity misses: the features before the heads are in the thousands, so that the variance in their LayerNorm hides
# its eps, and eps of the attention shows in float64 only. Both have their own test against the definition.

@pytest.mark.parametrize('eps', [1.001e-6, 1e-5, 1e-3, 0.])
def test_definition_of_linear_attention_catches_another_eps(eps):
    assert_linear_attention(linear_attention)
    with pytest.raises(AssertionError, match='off by'):
        assert_linear_attention(partial(linear_attention, eps=eps))


@pytest.mark.parametrize('mutated', [
    lambda q, k, v: linear_attention(k, q, v),
    lambda q, k, v: linear_attention(q, k, v, eps=1e-6 / q.shape[-1]),
    lambda q, k, v: linear_attention(q, k, v.flip(-1)),
])
def test_definition_of_linear_attention_catches(mutated):
    with pytest.raises(AssertionError, match='off by'):
        assert_linear_attention(mutated)


# Errors in the rotation: parity of CARE knows none.

turn_pairs = attention.turn_pairs


def rotate_the_denominator_too(q, k, v, rotate):
    q, k = (turn_pairs(attention.positive_feature(x), rotate) for x in (q, k))
    return (v @ k.transpose(-2, -1)) @ q / (k.sum(dim=-1).unsqueeze(-2) @ q + 1e-6 * q.shape[-1])


def rotate_by(turn):
    """Linear attention with `turn` (x, rotate) in the place of `turn_pairs`."""
    def attend(q, k, v, rotate):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, 'turn_pairs', turn)
            return linear_attention(q, k, v, rotate=rotate)
    return attend


def turn_halves(x, rotate):
    (first, second), (cos, sin) = x.chunk(2, dim=2), rotate
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=2)


def turn_before_the_feature_map(q, k, v, rotate):
    return linear_attention(turn_pairs(q, rotate), turn_pairs(k, rotate), v)


ROTATIONS = {
    'none': lambda q, k, v, rotate: linear_attention(q, k, v),
    'of the denominator too': rotate_the_denominator_too,
    'before the feature map': turn_before_the_feature_map,
    'of halves': rotate_by(turn_halves),
    'the other way': rotate_by(lambda x, rotate: turn_pairs(x, torch.stack([rotate[0], -rotate[1]]))),
    'sine and cosine exchanged': rotate_by(lambda x, rotate: turn_pairs(x, rotate.flip(0))),
    'of another head': rotate_by(lambda x, rotate: turn_pairs(x, rotate.roll(1, dims=1))),
    'of another frequency': rotate_by(lambda x, rotate: turn_pairs(x, rotate.roll(1, dims=2))),
}


@pytest.mark.parametrize('attend', ROTATIONS.values(), ids=ROTATIONS.keys())
def test_definition_of_linear_attention_catches_another_rotation(attend):
    rotate = random_rotation(3, 8, 35)
    assert_linear_attention(partial(rotate_by(turn_pairs), rotate=rotate), rotate=rotate)
    with pytest.raises(AssertionError, match='off by') as caught:
        assert_linear_attention(partial(attend, rotate=rotate), rotate=rotate)
    print(caught.value)


@pytest.mark.parametrize('eps', [1.001e-6, 1e-5, 0.])
def test_definition_of_the_heads_catches_another_eps(eps, model, monkeypatch):
    assert_head(model)
    set_everywhere(model, monkeypatch, nn.LayerNorm, eps=eps)
    with pytest.raises(AssertionError, match='off by'):
        assert_head(model)


def test_parity_misses_the_eps_of_the_heads(model, monkeypatch):
    set_everywhere(model, monkeypatch, nn.LayerNorm, eps=1e-5)
    assert_evaluation_parity(model, 'care_s0')
