"""The network as phones get it: the same function, in float16 too."""
import copy

import pytest
import timm
import torch
from reference import filled_model, published_model

import caretrans  # noqa: F401 (registers the models)
from caretrans.fuse import FORMS, fuse, to_form
from caretrans.models.attention import linear_attention
from caretrans.models.care import CareTransformer, LinearAttention, StripConv
from caretrans.models.folding import fold_pixels
from caretrans.models.inference.care_phone import ConvMixer, CrossConv, PhoneAttention, PhoneHead

CARE = [name for name in timm.list_models('care_*')]


def make_attention(chs=32, heads=2, scale=1.):
    attention = LinearAttention(chs, heads).double()
    with torch.no_grad():
        attention.qk.weight.normal_(std=scale * chs ** -0.5)
        attention.qk.bias.normal_(std=scale)
    return attention


def list_error(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize('name', CARE)
def test_phone_form_computes_the_same(name):
    model = filled_model(name).double()
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        error = list_error(to_form(model, 'phone')(images), expected)
    assert error < 1e-13


# Added to the biases of queries and keys: features vanish, or are as large as float16 holds.
SHIFTS = [(0, 0), (-5, -5), (-8, -15), (-15, -8), (-30, 0), (0, -30), (-30, -30), (-30, 6e4), (6e4, -30), (6e4, 6e4)]


@pytest.mark.parametrize('shifts', SHIFTS, ids=str)
def test_phone_attention_is_linear_attention_with_its_eps(shifts):
    """Where queries or keys nearly vanish, the eps decides; in float16 all is finite."""
    attention = make_attention()
    with torch.no_grad():
        for part, shift in zip(attention.qk.bias.chunk(2), shifts, strict=True):
            part += shift
    x = torch.randn(2, 32, 5, 7, dtype=torch.float64)
    expected, phone = attention(x), PhoneAttention(attention)
    assert list_error(phone(x), expected) < 1e-14
    q, k = attention.qk(x).reshape(2, 4, 16, 35).chunk(2, dim=1)
    without = linear_attention(q, k, x.reshape(2, 2, 16, 35), eps=0.).reshape(x.shape)
    assert (list_error(without, expected) > 1e-3) == (min(shifts) < -14)
    found = phone.half()(x.half())
    assert found.isfinite().all() and (found - expected).abs().max() < 1e-3 * x.abs().max()


@pytest.mark.parametrize('positions', [49, 196, 3136])
def test_phone_attention_survives_float16_where_the_usual_form_overflows(positions):
    attention = make_attention(scale=30.)
    x = 2000 * torch.randn(1, 32, positions, 1, dtype=torch.float64)  # keys and queries up to 2e5 are beyond float16
    attention.qk.weight.data *= 1 / 100
    expected = attention(x)
    half = PhoneAttention(attention).half()
    with torch.no_grad():
        found = half(x.half())
        q, k = copy.deepcopy(attention).half().qk(x.half()).reshape(1, 4, 16, positions).chunk(2, dim=1)
        v = x.half().reshape(1, 2, 16, positions)
        usual = (v / positions) @ torch.nn.functional.elu(k).add(1).transpose(-2, -1)
    assert not usual.isfinite().all()
    assert found.isfinite().all()
    assert list_error(found, expected) < 2e-2


def test_phone_form_of_the_reference_network_is_finite_in_float16():
    """Activations reach 5,000 with these weights, and the usual form of the attention overflows."""
    model = published_model('care_s0')
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        found = to_form(model, 'phone').half()(images.half())
    assert found.isfinite().all()
    assert list_error(found, expected) < 0.05


@pytest.mark.parametrize('size', [1e-6, 1., 1e3])
def test_scaled_features_are_the_same_function(size):
    """The LayerNorm of the head has an input between 32 and 64, and an eps that fits."""
    model = filled_model('care_s0', depths=(1, 1, 2, 1)).double()
    with torch.no_grad():
        last = model.stages[-1].blocks[-1].inter2.dwconv
        last.weight *= size
        last.bias *= size
        images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
        phone = to_form(model, 'phone', images)
        largest = []
        phone.head.norm.register_forward_pre_hook(lambda module, args: largest.append(args[0].abs().max().item()))
        assert list_error(phone(images), model(images)) < 1e-12
        others = phone(images[:, :, :32]), model(images[:, :, :32])
        assert list_error(*others) < 1e-12
    assert isinstance(phone.head, PhoneHead)
    assert largest[0] <= 64 and (32 < largest[0] or phone.head.norm.eps == 1e-6 * 512 ** 2)


def test_cross_is_the_sum_of_both_strips():
    strips = StripConv(8).double()
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    assert list_error(CrossConv(strips)(x), strips(x)) < 1e-14


def test_early_mixers_are_one_convolution():
    block = fuse(filled_model('care_s0').double()).stages[0].blocks[0]
    x = torch.randn(2, 32, 13, 9, dtype=torch.float64)
    assert sum(block.mixer.slices) == 32
    mixer = ConvMixer(block.mixer)
    for found, expected in zip(mixer(x), block.mixer(x), strict=True):
        assert list_error(found, expected) < 1e-14
    assert [type(module).__name__ for module in mixer.children()] == ['Conv2d']


def test_pixels_fold_into_a_convolution():
    conv = torch.nn.Conv2d(3, 8, 4, stride=4).double()
    pixels = torch.randint(256, (2, 3, 32, 32)).double()
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normalised = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert list_error(fold_pixels(conv, mean, std)(pixels), conv(normalised)) < 1e-6  # mean and std are float32 above


def test_rounding_of_folded_weights_does_not_darken_or_brighten():
    conv = torch.nn.Conv2d(3, 64, 4, stride=4).double()
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    grey = (255 / 256 * torch.tensor(mean, dtype=torch.float64))[:, None, None].expand(1, 3, 4, 4)
    folded = fold_pixels(conv, mean, std, white=255 / 256, half=True)
    assert torch.equal(folded.weight, folded.weight.half().double())
    assert folded.weight.abs().min() > torch.finfo(torch.float16).tiny
    expected = conv(torch.zeros(1, 3, 4, 4, dtype=torch.float64))  # grey is 0 to the network
    plain = fold_pixels(conv, mean, std, white=255 / 256)
    plain.weight.data = plain.weight.half().double()
    assert list_error(folded(grey), expected) < 1e-12 < 1e-5 < list_error(plain(grey), expected)


@pytest.mark.parametrize('conv, mean', [(torch.nn.Conv2d(3, 8, 3, padding=1), [0.5] * 3), (
    torch.nn.Conv2d(1, 8, 3), [0.5] * 3)])
def test_pixels_do_not_fold_where_that_would_be_wrong(conv, mean):
    with pytest.raises(ValueError, match='cannot be folded into'):
        fold_pixels(conv, mean, mean)


def test_phone_form_has_no_transposes_and_two_reshapes_for_each_attention():
    model = to_form(filled_model('care_s0'), 'phone')
    graph = torch.export.export(model, (torch.zeros(1, 3, 64, 64),)).run_decompositions({}).graph
    names = [str(node.target) for node in graph.nodes]
    attentions = sum(isinstance(module, PhoneAttention) for module in model.modules())
    assert attentions == 12
    assert sum('reshape' in name or 'view' in name or 'flatten' in name for name in names) == 2 * attentions


def test_forms_do_not_change_the_network():
    model = filled_model('care_s0')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for form in FORMS:
        to_form(model, form)
    assert isinstance(model, CareTransformer)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form is 'tiny', choose from trained, fused, phone"):
        to_form(filled_model('care_s0'), 'tiny')


@pytest.mark.parametrize('ablation', ['no_inter1', 'no_inter2', 'no_memory', 'symmetrical', 'stacked'])
def test_ablations_have_a_phone_form(ablation):
    model = filled_model('care_s0', ablation=ablation).double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert list_error(to_form(model, 'phone')(images), model(images)) < 1e-13


def test_phone_form_of_a_fused_network_still_refuses_training():
    with pytest.raises(RuntimeError, match='for inference only'):
        to_form(filled_model('care_s0'), 'phone').stages[2].blocks[0].mixer.train()


def test_fuse_is_the_fused_form():
    model = filled_model('care_s0')
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(to_form(model)(images), fuse(model)(images))
