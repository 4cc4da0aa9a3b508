"""The kernels, interpreted on the CPU: tests/kernels/test_kernels.py runs this in a process of its own.

Triton reads TRITON_INTERPRET when it is first imported, and a process that interprets can do nothing else with it.
"""
import copy
from functools import partial

import caretrans.kernels
import caretrans.kernels.depthwise as depthwise
import caretrans.kernels.linear_attention as linear_attention
import pytest
import torch
import torch.nn as nn
from caretrans.kernels.launch import INTERPRETED
from caretrans.kernels.mixer import mix_with_attention, mix_with_strips
from caretrans.models.attention import linear_attention as attend_in_torch
from caretrans.models.care import CareBlock
from caretrans.models.mlla import MllaBlock, MllaStage, rotary_code
from definitions import assert_linear_attention, random_rotation
from kernel_checks import (
    ATTENTIONS, MIXERS, check_attention, check_mixer, error_of, run, run_with_parameters, slice_of)
from reference import filled_model

attend = linear_attention.attend
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BLOCKS = {  # of 16 channels
    'strips': lambda: CareBlock(4, (2, 2), 0, ls_init_value=1.),
    'attention': lambda: CareBlock(4, (2, 2), 1, ls_init_value=1.),
    'rotary attention': lambda: MllaStage(None, 16, [MllaBlock(16, 2, mlp_ratio=2.)]),
}


class Launches:
    """Stands in for a kernel of a module, launches it and keeps the grids."""

    def __init__(self, monkeypatch, module, name: str) -> None:
        self.kernel, self.grids = getattr(module, name), []
        monkeypatch.setattr(module, name, self)

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def test_this_process_interprets():
    assert INTERPRETED and not caretrans.kernels.why_unavailable('cpu')
    assert 'interpreter' in caretrans.kernels.why_unavailable('cuda')


# Linear attention -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape, rotated', ATTENTIONS, ids=str)
def test_linear_attention_equals_its_definition(shape, rotated, channels_last):
    check_attention(attend, shape, torch.float64, channels_last, rotated=rotated)


@pytest.mark.parametrize('dtype', DTYPES[1:], ids=str)
@pytest.mark.parametrize('shape, rotated', [((2, 2, 16, 16, 33), False), ((1, 1, 24, 16, 33), True)], ids=str)
def test_linear_attention_in_lower_precision(shape, rotated, dtype):
    check_attention(attend, shape, dtype, rotated=rotated)


@pytest.mark.parametrize('rotate', [None, random_rotation(3, 8, 35)], ids=['plain', 'rotated'])
def test_linear_attention_at_small_weights_and_large(rotate):
    assert_linear_attention(partial(attend, rotate=rotate), rotate=rotate)


@pytest.mark.parametrize('rotated', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_queries_and_keys_do_not_overflow(dtype, rotated):
    for scale in 100., 1e4:
        check_attention(attend, (1, 1, 16, 16, 33), dtype, scale=scale, rotated=rotated)


@pytest.mark.parametrize('rotated', [False, True])
@pytest.mark.parametrize('shape, dtype', [
    ((1, 2, 16, 16, 100), torch.float64), ((1, 1, 32, 24, 131), torch.bfloat16)], ids=str)
def test_heads_split_over_programs(monkeypatch, shape, dtype, rotated):
    monkeypatch.setattr(linear_attention, 'POSITIONS_OF_A_PROGRAM', 30)
    launches = [Launches(monkeypatch, linear_attention, name) for name in ('_forward', '_backward')]
    check_attention(attend, shape, dtype, rotated=rotated)
    for kernel, steps in zip(launches, (3, 2), strict=True):  # sums and queries, again the sums; queries and keys
        assert len(kernel.grids) == steps and all(splits > 2 for _, splits in kernel.grids)


def test_a_wrong_eps_is_caught():
    with pytest.raises(AssertionError, match='off by'):
        assert_linear_attention(lambda q, k, v: attend(q, k, v, 1e-5))


@pytest.mark.parametrize('rotated', [False, True])
def test_a_wrong_gradient_is_caught(monkeypatch, rotated):
    """Kernels with another eps, or with the opposite rotation."""
    backward = linear_attention.attend_backward_into

    def wrong(*args):
        *tensors, eps, rotate = args
        if rotate is None:
            eps = 1e-2
        else:
            rotate = torch.stack([rotate[0], -rotate[1]])
        backward(*tensors, eps, rotate)

    monkeypatch.setattr(linear_attention, 'attend_backward_into', wrong)
    with pytest.raises(AssertionError, match='off by'):
        check_attention(attend, (2, 2, 16, 16, 49), torch.float64, rotated=rotated)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_the_rotation_is_not_rounded_to_the_dtype_of_queries_and_keys(dtype):
    q, k = torch.randn(2, 1, 1, 16, 60).bfloat16()
    v, rotate = torch.randn(1, 1, 16, 60), random_rotation(1, 16, 60).to(dtype)
    expected = attend_in_torch(q.double(), k.double(), v.double(), rotate=rotate)
    assert error_of([attend(q, k, v, rotate=rotate)], [expected]) <= 1e-6


@pytest.mark.parametrize('shape', [(2, 2, 8, 8), (2, 2, 4, 9), (1, 2, 4, 8), (2, 1, 4, 8)], ids=str)
def test_rotations_of_another_shape_are_refused(shape):
    q = torch.zeros(1, 2, 8, 8)
    with pytest.raises(ValueError, match='rotate must be'):
        attend(q, q, q, rotate=torch.zeros(shape))


def test_a_rotation_that_asks_for_a_gradient_is_refused():
    q = torch.zeros(1, 2, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match='no gradient of rotate'):
        attend(q, q, q, rotate=torch.zeros(2, 2, 4, 8, requires_grad=True))


def test_outputs_are_written_completely_and_nothing_else_is():
    q, k, v = (torch.randn(2, 2, 12, 37) for _ in range(3))
    room = torch.full((2, 30, 37), float('nan'))
    out = room[:, 3:27].unflatten(1, (2, 12))
    linear_attention.attend_into(q, k, v, out, 1e-6)
    torch.testing.assert_close(out, attend(q, k, v))
    assert room[:, :3].isnan().all() and room[:, 27:].isnan().all()


# Mixer ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', MIXERS, ids=str)
def test_mixers_equal_their_modules(shape, channels_last):
    check_mixer(shape, torch.float64, channels_last)


@pytest.mark.parametrize('dtype', DTYPES[1:], ids=str)
@pytest.mark.parametrize('shape', [MIXERS[0], MIXERS[3]], ids=str)
def test_mixers_in_lower_precision(shape, dtype):
    check_mixer(shape, dtype, channels_last=True)


@pytest.mark.parametrize('name', ['local_3x3', 'local_7x7', 'long_range.conv_11x1', 'long_range.conv_1x11'])
def test_a_lost_bias_is_caught(monkeypatch, name):
    def lose(mixer: nn.Module) -> None:
        torch_forward = type(mixer).forward

        def forward(self, x):
            nn.init.zeros_(self.get_submodule(name).bias)
            return torch_forward(self, x)
        monkeypatch.setattr(type(mixer), 'forward', forward)

    with pytest.raises(AssertionError, match='off by'):
        check_mixer((1, (4, 4), 0, 3, 4), torch.float64, spoil=lose)


def test_convolutions_are_written_completely_and_nothing_else_is():
    x, weights = torch.randn(1, 12, 5, 6), [torch.randn(6, 1, n, n) for n in (3, 7)]
    biases = [torch.randn(6) for _ in weights]
    room = torch.full((1, 15, 5, 6), float('nan'))
    depthwise.convolve_into(x, room[:, 2:14], weights, biases)
    torch.testing.assert_close(room[:, 2:14], depthwise.convolve_in_torch(x, weights, biases))
    assert room[:, :2].isnan().all() and room[:, 14:].isnan().all()


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('strips', [False, True])
@pytest.mark.parametrize('shape', [(1, 5, 7), (2, 3, 7)], ids=str)
def test_gradients_of_weights_are_summed_over_splits(monkeypatch, shape, strips, channels_last):
    """Splits whose lengths are no multiples of those of the tiles: the last tile of each reaches into the next."""
    monkeypatch.setattr(depthwise, 'POSITIONS_OF_A_PROGRAM', 20)
    launches = Launches(monkeypatch, depthwise, '_weight_gradients')
    sizes = [(11, 1), (1, 11), (3, 3), (7, 7)] if strips else [(3, 3), (7, 7)]
    x = slice_of(9 if strips else 6, 2, shape, channels_last, torch.float64, 'cpu')
    parameters = [torch.randn(3, 1, *size, dtype=torch.float64) for size in sizes]
    parameters += [torch.randn(3, dtype=torch.float64) for _ in sizes]

    def call(convolve):
        return lambda x, *p: convolve(x, list(p[:len(sizes)]), list(p[len(sizes):]))

    found, expected = (
        run(call(convolve), (x, *parameters)) for convolve in (mix_with_strips, depthwise.convolve_in_torch))
    assert error_of(found, expected) <= 1e-12
    (_, splits), = launches.grids
    assert splits > 1


# Modules, operators ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make', BLOCKS.values(), ids=BLOCKS)
def test_a_block_trains_as_it_does_in_torch_also_compiled_to_one_graph(make):
    block = make().double().train()
    with_kernels = copy.deepcopy(block)
    assert {placement.runs for placement in caretrans.kernels.use_kernels(with_kernels)} >= {'triton'}
    compiled = torch.compile(copy.deepcopy(with_kernels), fullgraph=True, backend='aot_eager')
    x = slice_of(16, 0, (2, 2, 3), True, torch.float64, 'cpu')
    found = run(with_kernels, [x])
    assert error_of(found, run(block, [x])) <= 1e-10 and error_of(run(compiled, [x]), found) <= 1e-12
    assert list(with_kernels.state_dict()) == list(block.state_dict())


def test_a_network_trains_as_it_does_in_torch():
    """One block per stage, on images that are not square."""
    network = filled_model('mlla_t', num_classes=7, depths=(1, 1, 1, 1), width=32).double().train()
    with_kernels = copy.deepcopy(network)
    assert [placement.runs for placement in caretrans.kernels.use_kernels(with_kernels)] == 4 * ['triton']
    x = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    assert error_of(run_with_parameters(with_kernels, x), run_with_parameters(network, x)) <= 1e-10


def test_rotary_attention_under_autocast_agrees_with_torch():
    stage = MllaStage(None, 16, [MllaBlock(16, 2, mlp_ratio=2.)]).eval()
    with_kernels, x = copy.deepcopy(stage), torch.randn(2, 16, 4, 5)
    caretrans.kernels.use_kernels(with_kernels)
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.no_grad():
        found, expected = with_kernels(x), stage(x)
    assert found.dtype == expected.dtype and found.stride() == expected.stride()
    assert error_of([found], [expected]) <= 2e-2


def test_rotary_attention_reads_and_writes_tokens_without_copies(monkeypatch):
    """Queries, keys and values where they lie, and gradients whose channels are neighbours as well."""
    block, strides = MllaBlock(32, 2, mlp_ratio=2.), []
    caretrans.kernels.use_kernels(block)
    backward = linear_attention.attend_backward_into

    def look(*args):
        grad, q, k, v, gradients, *_ = args
        strides.extend(x.stride() for x in (grad, q, k, v, *gradients))
        backward(*args)

    monkeypatch.setattr(linear_attention, 'attend_backward_into', look)
    x = torch.randn(2, 32, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
    block(x, rotary_code(x)).sum().backward()
    halves, whole = (15 * 64, 16, 1, 64), (15 * 32, 16, 1, 32)
    assert strides == [whole, halves, halves, *[whole] * 4]


@pytest.mark.parametrize('num_heads', [0, 1])
def test_under_autocast_the_layout_and_the_dtype_of_the_input_stay(num_heads):
    block = CareBlock(8, (2, 2), num_heads, ls_init_value=1.).eval()
    with_kernels = copy.deepcopy(block)
    caretrans.kernels.use_kernels(with_kernels)
    x = torch.randn(1, 32, 4, 5).to(memory_format=torch.channels_last)
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.no_grad():
        assert error_of([with_kernels.mixer(x[:, 8:])], [block.mixer(x[:, 8:])]) <= 2e-2
        assert error_of([with_kernels(x)], [block(x)]) <= 2e-2
        assert with_kernels.mixer(x[:, 8:]).dtype == torch.float32


@pytest.mark.parametrize('num_heads', [0, 1])
def test_a_fused_block_runs_as_kernels(num_heads):
    block = CareBlock(8, (2, 2), num_heads, ls_init_value=1.).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    fused = block.fuse()
    runs = {placement.name: placement.runs for placement in caretrans.kernels.use_kernels(fused)}
    assert runs == dict(mixer='triton')
    x = slice_of(32, 1, (1, 4, 5), True, torch.float32, 'cpu')
    with torch.no_grad():
        assert error_of([fused(x)], [copy.deepcopy(block).double()(x.double())]) <= 1e-5
        with torch.autocast('cpu', dtype=torch.bfloat16):
            compiled = torch.compile(fused, fullgraph=True, backend='aot_eager')(x)
            assert error_of([compiled], [fused(x)]) <= 1e-5


def test_a_local_convolution_that_is_no_joined_one_stays():
    fused = CareBlock(4, (2, 2), 0).eval().fuse()
    nn.init.ones_(fused.mixer.local.weight)
    placement, = [p for p in caretrans.kernels.use_kernels(fused) if p.part == 'mixer']
    assert placement.runs == 'torch' and 'larger than 3x3' in placement.reason


def test_operators_keep_the_rules_of_pytorch():
    """Schemas, shapes and strides under FakeTensor, autograd, and what torch.compile traces: PyTorch's own checks."""
    q, k, v = (torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(3))
    torch.library.opcheck(attend, (q, k, v, 1e-6, random_rotation(1, 2, 3)))
    torch.library.opcheck(attend, (q, k, v, 1e-6, None), test_utils=('test_schema', 'test_faketensor'))
    x = slice_of(6, 2, (1, 2, 3), True, torch.float32, 'cpu').requires_grad_()
    weights = [torch.randn(2, 1, *size, requires_grad=True) for size in ((11, 1), (1, 11), (3, 3), (7, 7))]
    biases = [torch.randn(2, requires_grad=True) for _ in weights]
    torch.library.opcheck(mix_with_strips, (x, weights, biases))
    qk = torch.randn(1, 4, 2, 3, requires_grad=True)
    torch.library.opcheck(mix_with_attention, (x, qk, weights[2:], biases[2:], 1, 1e-6))
