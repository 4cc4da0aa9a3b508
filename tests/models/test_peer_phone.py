"""CAS-ViT and MLLA as phones get them: the same function, and for MLLA in float16 too."""
import copy

import pytest
import torch
from reference import filled_model
from torch.fx.experimental.proxy_tensor import make_fx

from caretrans.fuse import fuse, is_fused, to_form
from caretrans.models.attention import EPS, linear_attention
from caretrans.models.casvit import CasVit
from caretrans.models.inference.mlla_phone import PhoneRotaryAttention, make_rotary_tables
from caretrans.models.mlla import Mlla, RotaryLinearAttention, rotary_code, to_map, to_tokens

NAMES = ('casvit_xs', 'mlla_t')
CHS, HEADS = 128, 4
# Added to the biases of queries and keys: features vanish, or are as large as float16 holds.
SHIFTS = [(0, 0), (-8, -15), (-15, -8), (-30, 0), (0, -30), (-30, -30), (-30, 6e4), (6e4, -30), (6e4, 6e4)]


def measure_error(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def make_attention(scale=1.):
    torch.manual_seed(0)
    attention = RotaryLinearAttention(CHS, HEADS).double().requires_grad_(False)
    attention.qk.weight.normal_(std=scale * CHS ** -0.5)
    attention.qk.bias.normal_(std=scale)
    return attention


def attend(attention, x, eps=EPS):
    """The definition."""
    B, C, H, W = x.shape
    q, k = to_map(attention.qk(to_tokens(x))).reshape(B, 2 * HEADS, C // HEADS, H * W).chunk(2, dim=1)
    rotate = rotary_code(x).reshape(2, HEADS, C // HEADS // 2, H * W)
    out = linear_attention(q, k, x.reshape(B, HEADS, C // HEADS, H * W), eps, rotate)
    return out.reshape(x.shape) + attention.lepe(x)


def attend_on_phone(attention, x):
    return PhoneRotaryAttention(copy.deepcopy(attention)).to(x.dtype)(x, make_rotary_tables(x, HEADS))


# The same function ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings', [{}, dict(distilled=True), dict(global_pool='max'), dict(num_classes=0)], ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_phone_form_computes_the_same(name, settings):
    model = filled_model(name, **settings).double()
    images = torch.randn(2, 3, 101, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        phone = to_form(model, 'phone')
        assert measure_error(phone(images), model(images)) < 1e-13
    assert is_fused(phone) and isinstance(phone, (CasVit, Mlla))
    with pytest.raises(RuntimeError, match='for inference only'):
        phone.train()


@pytest.mark.parametrize('size, scale', [(1e-3, 4.), (1., 4.), (1e3, 1 / 8)])
def test_scale_of_the_stream_follows_its_values(size, scale):
    model = filled_model('mlla_t', depths=(1, 1, 1, 1)).double()
    last = model.stem.conv3[1].norm
    with torch.no_grad():
        last.weight *= size
        last.bias *= size
        images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
        phone = to_form(model, 'phone', images)
        assert measure_error(phone(images), model(images)) < 1e-12
    assert phone.stages[0].blocks[0].norm1.eps == model.stages[0].blocks[0].norm1.eps * scale ** 2


@pytest.mark.parametrize('name', NAMES)
def test_phone_form_does_not_change_the_network(name):
    model = filled_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in to_form(model, 'phone').parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('size', [(5, 7), (1, 1), (14, 14)])
@pytest.mark.parametrize('shifts', SHIFTS, ids=str)
def test_phone_attention_is_rotary_linear_attention_with_its_eps(size, shifts):
    """Where queries or keys nearly vanish, the eps decides; in float16 all is finite."""
    attention = make_attention()
    for part, shift in zip(attention.qk.bias.chunk(2), shifts, strict=True):
        part += shift
    x = torch.randn(2, CHS, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = attend(attention, x)
    assert measure_error(attend_on_phone(attention, x), expected) < 1e-13
    assert (measure_error(attend(attention, x, eps=0.), expected) > 1e-3) == (min(shifts) < -14)
    found = attend_on_phone(attention, x.half())
    assert found.isfinite().all() and measure_error(found, expected) < 2e-3


def test_tables_with_rows_and_columns_exchanged_are_another_function():
    attention = make_attention()
    x = torch.randn(1, CHS, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tables = make_rotary_tables(x, HEADS)
    exchanged = tables.reshape(1, HEADS, -1, 6, 6).transpose(-2, -1).reshape(tables.shape)
    assert measure_error(PhoneRotaryAttention(attention)(x, exchanged), attend(attention, x)) > 1e-2


# float16 --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('side', [7, 14, 56])
def test_phone_attention_survives_float16_where_the_usual_form_overflows(side):
    attention = make_attention(scale=30.)
    attention.qk.weight.mul_(1 / 100)
    attention.lepe.weight.zero_()
    x = 2000 * torch.randn(1, CHS, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = attend(attention, x)
    k = to_map(attention.qk(to_tokens(x)))[:, CHS:].half().reshape(HEADS, CHS // HEADS, -1)
    v = x.half().reshape(HEADS, CHS // HEADS, -1)
    usual = (v / side ** 2) @ torch.nn.functional.elu(k).add(1).transpose(-2, -1)
    found = attend_on_phone(attention, x.half())
    assert not usual.isfinite().all() and found.isfinite().all()
    assert measure_error(found, expected) < 2e-2


# Operations -----------------------------------------------------------------------------------------------------------

def test_phone_form_of_mlla_has_no_transposes_and_two_reshapes_for_each_attention():
    graph = torch.export.export(to_form(filled_model('mlla_t'), 'phone'), (torch.zeros(1, 3, 64, 64),))
    kinds = [str(node.target) for node in graph.graph.nodes if node.op == 'call_function']
    assert not [kind for kind in kinds if 'permute' in kind]
    assert sum('transpose' in kind for kind in kinds) == 18  # of a factor of a product, which takes it so
    assert sum('reshape' in kind for kind in kinds) == 2 * 18 + 4  # of the attentions, and of the tables of each stage


def test_phone_form_of_casvit_has_no_norms_and_no_reshapes():
    phone = to_form(filled_model('casvit_xs'), 'phone')
    assert not [module for module in phone.modules() if 'Norm' in type(module).__name__]
    kinds = [str(node.target) for node in make_fx(phone)(torch.zeros(1, 3, 64, 64)).graph.nodes]
    assert not [kind for kind in kinds if any(word in kind for word in ('reshape', 'flatten', 'permute'))]


@pytest.mark.parametrize('name', NAMES)
def test_form_for_xnnpack_is_the_fused_one(name):
    model = filled_model(name)
    assert str(to_form(model, 'bmm')) == str(fuse(model))
