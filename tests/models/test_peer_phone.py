"""CAS-ViT and MLLA as phones get them: the same function, and for MLLA in float16 too."""
import copy

import pytest
import torch
from reference import filled_model
from torch.fx.experimental.proxy_tensor import make_fx

from caretrans.fuse import fuse, is_fused, to_form
from caretrans.models.attention import linear_attention
from caretrans.models.casvit import CasVit
from caretrans.models.inference.phone import watch_least_mass
from caretrans.models.inference.mlla_phone import PhoneRotaryAttention, make_rotary_tables
from caretrans.models.mlla import Mlla, RotaryLinearAttention, rotary_code, to_map, to_tokens

# Without the eps of its attention MLLA differs by 1e-9 here; CAS-ViT by rounding alone, 8e-16.
CLOSE = {'casvit_xs': 1e-13, 'mlla_t': 1e-7}
CHS, HEADS = 128, 4


def measure_error(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def make_attention(scale=1.):
    torch.manual_seed(0)
    attention = RotaryLinearAttention(CHS, HEADS).double().requires_grad_(False)
    attention.qk.weight.normal_(std=scale * CHS ** -0.5)
    attention.qk.bias.normal_(std=scale)
    return attention


def attend(attention, x, eps=0.):
    """The definition, with another eps."""
    B, C, H, W = x.shape
    q, k = to_map(attention.qk(to_tokens(x))).reshape(B, 2 * HEADS, C // HEADS, H * W).chunk(2, dim=1)
    rotate = rotary_code(x).reshape(2, HEADS, C // HEADS // 2, H * W)
    out = linear_attention(q, k, x.reshape(B, HEADS, C // HEADS, H * W), eps, rotate)
    return out.reshape(x.shape) + attention.lepe(x)


def attend_on_phone(attention, x):
    return PhoneRotaryAttention(copy.deepcopy(attention)).to(x.dtype)(x, make_rotary_tables(x, HEADS))


# The same function ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings', [{}, dict(distilled=True), dict(global_pool='max'), dict(num_classes=0)], ids=str)
@pytest.mark.parametrize('name', CLOSE)
def test_phone_form_computes_the_same(name, settings):
    model = filled_model(name, **settings).double()
    images = torch.randn(2, 3, 101, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        phone = to_form(model, 'phone')
        assert measure_error(phone(images), model(images)) < CLOSE[name]
    assert is_fused(phone) and isinstance(phone, (CasVit, Mlla))
    with pytest.raises(RuntimeError, match='for inference only'):
        phone.train()


@pytest.mark.parametrize('name', CLOSE)
def test_phone_form_does_not_change_the_network(name):
    model = filled_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in to_form(model, 'phone').parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('size', [(5, 7), (1, 1), (14, 14)])
def test_phone_attention_is_rotary_linear_attention_without_its_eps(size):
    attention = make_attention()
    x = torch.randn(2, CHS, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert measure_error(attend_on_phone(attention, x), attend(attention, x)) < 1e-13


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


def test_phone_attention_keeps_keys_and_queries_whose_features_vanish_in_float16():
    attention = make_attention()
    attention.qk.bias -= 30  # phi is 1e-13: 0 in float16, and below the eps of the usual form
    x = torch.randn(1, CHS, 14, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = attend_on_phone(attention, x.half())
    assert found.isfinite().all()
    assert measure_error(found, attend(attention, x)) < 3e-2


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


@pytest.mark.parametrize('name', CLOSE)
def test_form_for_xnnpack_is_the_fused_one(name):
    model = filled_model(name)
    assert str(to_form(model, 'bmm')) == str(fuse(model))


def test_least_mass_of_mlla_is_the_least_denominator():
    model = filled_model('mlla_t').double()
    found = []

    def look(module, args):
        x = args[0]
        q, k = to_map(module.qk(to_tokens(x))).reshape(
            1, 2 * module.num_heads, module.head_chs, -1).chunk(2, dim=1)
        q, k = (torch.nn.functional.elu(t) + 1 for t in (q, k))
        found.append(torch.einsum('bhdn,bhdm->bhnm', q, k).mean(dim=-1).min().item())
    for module in model.modules():
        if isinstance(module, RotaryLinearAttention):
            module.register_forward_pre_hook(look)
    with torch.no_grad(), watch_least_mass(model) as masses:
        model(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert len(masses) == len(found) == 18 and min(masses) == pytest.approx(min(found), rel=1e-9)
