"""A fused network computes what the network it was made from computes, and nothing else is done to either."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from reference import SHALLOW, shallow_model
from registered import CARE, MODELS, gmacs, one_of_each_file
from timm.utils import reparameterize_model
from torch.optim.swa_utils import AveragedModel

from caretrans.checkpoint import save_checkpoint
from caretrans.fuse import fuse, is_fused, measure_fusion_error
from caretrans.models import CareTransformer, folding
from caretrans.models.care_ablations import ABLATIONS
from caretrans.models.inference import care_fused

EXACT = 1e-13  # of the largest logit, in float64; measured 2e-15
FLOAT32 = 5e-6  # measured 5e-7, as the unfused network


@pytest.fixture(scope='module', params=[*CARE, *(name for name in one_of_each_file() if name not in CARE)])
def model(request):
    return shallow_model(request.param)


def test_fused_equals_unfused_in_float64(model):
    exact = copy.deepcopy(model).double()
    assert measure_fusion_error(exact, fuse(exact)) < EXACT


def test_fused_float32_is_as_close_to_float64_as_unfused(model):
    assert measure_fusion_error(model, fuse(model)) < FLOAT32


def test_reparameterize_model_of_timm_returns_the_fused_network(model):
    found, expected = reparameterize_model(model), fuse(model)
    assert str(found) == str(expected)
    assert all(torch.equal(a, b) for a, b in zip(
        found.state_dict().values(), expected.state_dict().values(), strict=True))


def test_fused_has_no_norms_of_batches_and_one_head(model):
    fused = fuse(model)
    modules = list(fused.modules())
    assert not [m for m in modules if isinstance(m, nn.BatchNorm2d) and m is not fused.norm]  # of the last map
    if isinstance(model, CareTransformer):
        assert not [m for m in modules if isinstance(m, (nn.BatchNorm2d, nn.Dropout))]
        assert len([m for m in modules if isinstance(m, nn.Linear)]) == 1
    assert len([m for m in modules if isinstance(m, nn.Linear) and m.out_features == model.num_classes]) == 1
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name', MODELS)
def test_every_model_is_fused(name):
    """With fresh weights, but for the statistics and the scales of norms."""
    model = timm.create_model(name, depths=SHALLOW).eval()
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            for value in norm.running_mean, norm.running_var, norm.weight, norm.bias:
                value.uniform_(0.5, 1.5)
    assert measure_fusion_error(model, fuse(model), torch.randn(1, 3, 64, 64)) < FLOAT32


@pytest.mark.parametrize('name', one_of_each_file())
class TestOneOfEachFile:
    def test_the_original_is_unchanged(self, name):
        model = shallow_model(name)
        before = copy.deepcopy(model)
        fused = fuse(model)
        for parameter in fused.parameters():
            parameter.data.zero_()
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
        assert not any(p.requires_grad for p in fused.parameters())

    def test_any_size_dtype_and_features(self, name):
        model = shallow_model(name)
        fused = fuse(model)
        x = torch.randn(2, 3, 65, 96)
        torch.testing.assert_close(fused.forward_features(x), model.forward_features(x), rtol=1e-4, atol=1e-4)
        assert measure_fusion_error(model, fuse(copy.deepcopy(model).bfloat16()), x) < 0.1
        with pytest.raises(ValueError, match='31 x 64'):
            fused(torch.zeros(1, 3, 31, 64))
        extractor = timm.create_model(name, features_only=True, depths=SHALLOW).eval()
        for found, expected in zip(fuse(extractor)(x), extractor(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_graphs_of_the_fused_network_compute_the_same(self, name):
        fused, x = fuse(shallow_model(name)), torch.randn(2, 3, 64, 96)
        for graph in torch.jit.script(fused), torch.fx.symbolic_trace(fused), torch.export.export(fused, (x,)).module():
            torch.testing.assert_close(graph(x), fused(x))

    def test_training_is_refused_before_and_after(self, name):
        model = timm.create_model(name, depths=SHALLOW)
        with pytest.raises(ValueError, match=r'training mode.*call eval\(\)'):
            fuse(model)
        for fused in fuse(model.eval()), reparameterize_model(timm.create_model(name, depths=SHALLOW)):
            with pytest.raises(RuntimeError, match='for inference only'):
                fused.train()
            assert not fused.eval().training

    def test_one_part_in_training_mode_is_enough_to_refuse(self, name):
        model = timm.create_model(name, depths=SHALLOW).eval()
        model.stages[1].train()
        with pytest.raises(ValueError, match='training mode'):
            fuse(model)

    def test_fusing_twice_or_a_wrapped_network_is_refused(self, name):
        model = timm.create_model(name, depths=SHALLOW).eval()
        with pytest.raises(ValueError, match='fused already'):
            fuse(fuse(model))
        for wrapped in AveragedModel(model).eval(), torch.compile(model), torch.jit.script(model):
            with pytest.raises(ValueError, match='wraps a network'):
                fuse(wrapped)

    def test_a_fused_network_is_not_saved_as_a_checkpoint(self, name, tmp_path):
        with pytest.raises(ValueError, match='fused networks are not saved'):
            save_checkpoint(tmp_path / 'fused.pth', fuse(timm.create_model(name, depths=SHALLOW).eval()), arch=name)
        assert not list(tmp_path.iterdir())


def test_a_foreign_network_is_refused():
    with pytest.raises(ValueError, match='ResNet has no parts to fuse'):
        fuse(timm.create_model('resnet18').eval())


def test_a_replaced_head_is_refused():
    model = timm.create_model('care_s0').eval()
    model.head_dist = copy.deepcopy(model.head_dist)
    with pytest.raises(ValueError, match='replaced from outside'):
        fuse(model)
    model.reset_classifier(10)
    assert fuse(model.eval())(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_without_heads_and_without_classes():
    x = torch.randn(1, 3, 64, 64)
    model = shallow_model('care_s0', num_classes=0)
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-4, atol=1e-4)
    assert is_fused(fuse(model)) and not is_fused(model)


@pytest.mark.parametrize('ablation', ABLATIONS)
def test_ablations_are_fused_too(ablation):
    model = shallow_model('care_s0', ablation=ablation).double()
    assert measure_fusion_error(model, fuse(model)) < EXACT


def test_a_norm_before_a_convolution_that_pads_is_refused():
    with pytest.raises(ValueError, match='pads by'):
        folding.fold_norm_into_next(nn.BatchNorm2d(4).eval(), nn.Conv2d(4, 4, 3, padding=1))


def test_fusing_adds_no_multiply_adds_but_those_of_the_border_around_the_3x3():
    model = timm.create_model('care_s0').eval()
    positions = {width: side * side for width, side in zip((8, 16, 32, 64), (56, 28, 14, 7), strict=True)}
    border = sum((7 * 7 - 3 * 3) * block.memory_chs * positions[block.memory_chs]
                 for stage in model.stages for block in stage.blocks)
    heads = model.head.fc.weight.numel()
    assert gmacs(fuse(model))['total'] * 1e9 == pytest.approx(gmacs(model)['total'] * 1e9 + border - heads, abs=1)


# Errors in the rewrites, each of which the comparison must notice ----------------------------------------------------

def drop_a_shift(monkeypatch):
    found = folding._scale_and_shift
    monkeypatch.setattr(folding, '_scale_and_shift', lambda norm: (found(norm)[0], 0 * found(norm)[1]))


def drop_the_eps_of_a_norm(monkeypatch):
    def without_eps(norm):
        scale = norm.weight.double() / norm.running_var.double().sqrt()
        return scale, norm.bias.double() - norm.running_mean.double() * scale
    monkeypatch.setattr(folding, '_scale_and_shift', without_eps)


def fold_into_the_wrong_side(monkeypatch):
    def fold(norm, conv):
        weight = conv.weight.double().flip(1)
        return folding._make_conv(conv, weight, folding._get_bias(conv))
    monkeypatch.setattr(folding, 'fold_norm_into_next', fold)
    monkeypatch.setattr(care_fused, 'fold_norm_into_next', fold)


def omit_the_layer_scale(monkeypatch):
    monkeypatch.setattr(care_fused, 'scale_outputs', lambda conv, scale: conv)


def scale_the_weight_but_not_the_bias(monkeypatch):
    monkeypatch.setattr(care_fused, 'scale_outputs', lambda conv, scale: folding._make_conv(
        conv, conv.weight.double() * scale.double()[:, None, None, None], conv.bias.double()))


def put_the_3x3_into_a_corner(monkeypatch):
    join = care_fused.join_depthwise

    def shifted(convs):
        joined = join(convs)
        joined.weight.data[:len(convs[0].weight)] = joined.weight.data[:len(convs[0].weight)].roll(1, -1)
        return joined
    monkeypatch.setattr(care_fused, 'join_depthwise', shifted)


def take_one_head_alone(monkeypatch):
    init = care_fused.FusedHead.__init__
    monkeypatch.setattr(care_fused.FusedHead, '__init__', lambda self, heads: init(self, heads[:1]))


@pytest.mark.parametrize('break_it', [
    drop_a_shift, drop_the_eps_of_a_norm, fold_into_the_wrong_side, omit_the_layer_scale,
    scale_the_weight_but_not_the_bias, put_the_3x3_into_a_corner, take_one_head_alone], ids=lambda f: f.__name__)
def test_a_wrong_fusion_is_detected(break_it, monkeypatch):
    model = shallow_model('care_s0').double()
    assert measure_fusion_error(model, fuse(model)) < EXACT
    break_it(monkeypatch)
    assert measure_fusion_error(model, fuse(model)) > 1e6 * EXACT


def drop_the_residual(monkeypatch):
    monkeypatch.setattr(folding.ResidualConv, 'fuse', lambda conv: folding._make_conv(
        conv, conv.weight.double(), conv.bias.double()))


def use_one_linear_head(monkeypatch):
    init = folding.FusedLinearHead.__init__
    monkeypatch.setattr(folding.FusedLinearHead, '__init__', lambda self, heads: init(self, heads[:1]))


@pytest.mark.parametrize('name, break_it', [
    ('casvit_xs', drop_a_shift), ('casvit_xs', drop_the_eps_of_a_norm), ('casvit_xs', fold_into_the_wrong_side),
    ('casvit_xs', use_one_linear_head), ('mlla_t', drop_a_shift), ('mlla_t', drop_the_residual),
    ('mlla_t', use_one_linear_head)], ids=lambda value: getattr(value, '__name__', value))
def test_a_wrong_fusion_of_other_networks_is_detected(name, break_it, monkeypatch):
    model = shallow_model(name, distilled=True).double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert measure_fusion_error(model, fuse(model), images) < EXACT
    break_it(monkeypatch)
    assert measure_fusion_error(model, fuse(model), images) > 1e6 * EXACT
