"""The Triton kernels without a GPU: interpreted, compiled for one, and replaced by PyTorch.

On a GPU: tests/kernels/test_cuda_kernels.py.
"""
import copy
import inspect
from importlib.util import find_spec

import caretrans.fuse
import caretrans.kernels
import pytest
import torch
from caretrans.models.care import LinearAttention
from kernel_checks import rotation_of
from launch import run
from reference import filled_model

pytestmark = pytest.mark.slow

needs_triton = pytest.mark.skipif(find_spec('triton') is None, reason='Triton is not installed')

HOPPER = ('cuda', 90, 32)
NUMBERS = {int: 'i32', float: 'fp32'}
POINTERS = {torch.float32: '*fp32', torch.bfloat16: '*bf16'}


@needs_triton
def test_interpreted_kernels_equal_their_definitions():
    """tests/kernels/interpreted_kernels.py in a process of its own, which says why."""
    out, _ = run('-m', 'pytest', 'tests/kernels/interpreted_kernels.py', '-q', '-p', 'no:xdist', TRITON_INTERPRET='1')
    assert ' passed' in out and ' skipped' not in out


def test_without_triton_pytorch_runs():
    run('-c', """if True:
        import sys
        sys.modules['triton'] = None  # importing it fails
        import caretrans, caretrans.kernels, timm
        placements = caretrans.kernels.use_kernels(timm.create_model('care_s0'))
        assert {(p.runs, p.reason) for p in placements} == {('torch', 'Triton is not installed')}""")


# Compiled for a GPU ---------------------------------------------------------------------------------------------------

class Compiled:
    """Replaces a kernel: compiles it for a Hopper GPU where it would be launched, and keeps the assembly."""

    def __init__(self, kernel, **arguments):
        self.kernel, self.arguments, self.assembly = kernel, arguments, []

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **kwargs):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        values = dict(zip(self.kernel.arg_names, args, strict=False), **kwargs, **self.arguments)
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = values.pop(parameter.name)
            constant = parameter.is_constexpr or value is None or type(value) is int and value == 1
            if constant:  # a launch specialises on None and ones ...
                signature[parameter.name], constants[(i,)] = 'constexpr', value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = POINTERS[value.dtype] if is_tensor else NUMBERS[type(value)]
            if is_tensor or type(value) is int and value % 16 == 0:  # ... and on sixteens
                attributes[(i,)] = [['tt.divisibility', 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        self.assembly.append(triton.compile(source, target=GPUTarget(*HOPPER), options=values).asm)


@pytest.fixture
def stand_in(monkeypatch):
    """Put a `Compiled` in the place of a kernel of a module of caretrans.kernels."""
    ASTSource = pytest.importorskip('triton.compiler').ASTSource
    if 'constexprs' not in inspect.signature(ASTSource).parameters:
        pytest.skip('this release of Triton is told otherwise what to compile')

    def replace(module, name, **arguments):
        kernel = getattr(module, name)
        compiled = Compiled(getattr(kernel, 'fn', kernel) if arguments else kernel, **arguments)
        monkeypatch.setattr(module, name, compiled)
        return compiled
    return replace


def channels_last(chs, height, width):
    return torch.randn(2, chs, height, width, dtype=torch.bfloat16).to(memory_format=torch.channels_last)


def loads_16_bytes(assembly) -> bool:
    return 'ld.global.v4' in assembly['ptx'] and len(assembly['cubin']) > 0


@pytest.mark.parametrize('rotated', [False, True])
@pytest.mark.parametrize('num_positions, launches', [(196, (1, 1)), (1100, (3, 2))])
def test_linear_attention_compiles_for_a_gpu(stand_in, monkeypatch, num_positions, launches, rotated):
    import caretrans.kernels.linear_attention as module
    from caretrans.kernels.launch import accumulation_types
    monkeypatch.setattr(module, 'accumulation_types', lambda x: dict(accumulation_types(x), PRECISION='tf32'))
    forward, backward = stand_in(module, '_forward'), stand_in(module, '_backward')
    x = channels_last(128, 1, num_positions)[:, 32:]
    q, k, v = (part.reshape(2, 2, 16, num_positions) for part in x.chunk(3, dim=1))
    rotate = rotation_of((2, 2, 16, 16, num_positions), v.dtype, channels_last=True) if rotated else None
    module.attend_into(q, k, v, torch.empty_like(v), 1e-6, rotate)
    module.attend_backward_into(v, q, k, v, [torch.empty_like(x) for x in (q, k, v)], 1e-6, rotate)
    assert (len(forward.assembly), len(backward.assembly)) == launches
    assert loads_16_bytes(forward.assembly[0])


def test_depthwise_convolutions_compile_for_a_gpu(stand_in):
    import caretrans.kernels.depthwise as module
    convolve = stand_in(module, '_convolve', BLOCK_P=256, BLOCK_C=16, num_warps=8)
    gradients = stand_in(module, '_weight_gradients')
    x, out = channels_last(32, 8, 8)[:, 8:], channels_last(24, 8, 8)  # 24: no multiple of 16
    weights = [torch.randn(8, 1, *size) for size in ((11, 1), (1, 11), (3, 3), (7, 7))]
    module.convolve_into(x, out, weights, [torch.randn(8) for _ in weights])
    module.sum_weight_gradients(x, out, weights)
    assert loads_16_bytes(convolve.assembly[0]) and loads_16_bytes(gradients.assembly[0])
    assert 'st.global.v4' in convolve.assembly[0]['ptx']


# Replaced by PyTorch -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('name, parts', [('care_s0', {'mixer', 'attention'}), ('mlla_t', {'attention'})])
def test_on_the_cpu_pytorch_runs_and_is_named(name, parts, fused):
    model = filled_model(name, num_classes=7, depths=(1, 1, 2, 1))
    model = caretrans.fuse.fuse(model) if fused else model
    x = torch.randn(1, 3, 32, 32)
    expected, classes = model(x), [type(module) for module in model.modules()]
    placements = caretrans.kernels.use_kernels(model)
    assert {placement.part for placement in placements} == parts
    assert {placement.runs for placement in placements} == {'torch'}
    assert all('CUDA' in placement.reason for placement in placements)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('name, fused, parts', [
    ('care_s0', False, {'mixer'}), ('care_s0', True, {'mixer'}), ('mlla_t', False, {'attention'}),
    ('mlla_t', True, {'attention'})])
def test_a_network_with_kernels_runs_in_pytorch_when_it_comes_to_the_cpu(monkeypatch, name, fused, parts):
    model = filled_model(name, num_classes=7, depths=(1, 1, 2, 1))
    model = caretrans.fuse.fuse(model) if fused else model
    x = torch.randn(1, 3, 32, 32)
    expected, keys = model(x), list(model.state_dict())
    monkeypatch.setattr(caretrans.kernels, 'why_unavailable', lambda device: '')  # as if it had been on a GPU
    placements = caretrans.kernels.use_kernels(model)
    assert {placement.part for placement in placements if placement.runs == 'triton'} == parts
    named = {placement.name for placement in placements if placement.runs == 'triton'}
    assert all(isinstance(model.get_submodule(name), caretrans.kernels.KernelModule) for name in named)
    assert torch.equal(model(x), expected) and torch.equal(copy.deepcopy(model)(x), expected)
    assert list(model.state_dict()) == keys
    caretrans.kernels.use_kernels(model, parts=())
    assert not any(isinstance(module, caretrans.kernels.KernelModule) for module in model.modules())


def test_attention_within_a_mixer_is_named_where_it_runs_as_a_kernel_of_its_own(monkeypatch):
    model = filled_model('care_s0', num_classes=7, depths=(1, 1, 2, 1))
    attention = [name for name, module in model.named_modules() if isinstance(module, LinearAttention)]
    monkeypatch.setattr(caretrans.kernels, 'why_unavailable', lambda device: '')

    def place(*parts):
        """Attentions that are named, by where they run; and those that have a kernel of their own."""
        named = {p.name: p.runs for p in caretrans.kernels.use_kernels(model, parts) if p.part == 'attention'}
        return named, [
            name for name in attention if isinstance(model.get_submodule(name), caretrans.kernels.KernelModule)]

    assert attention
    assert place('attention') == (dict.fromkeys(attention, 'triton'), attention)
    assert place('mixer', 'attention') == ({}, [])
    assert place() == (dict.fromkeys(attention, 'torch'), [])


def test_why_there_are_no_kernels(monkeypatch):
    assert 'not on cpu' in caretrans.kernels.why_unavailable('cpu')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'sees no CUDA GPU' in caretrans.kernels.why_unavailable('cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    assert 'compute capability 7.5' in caretrans.kernels.why_unavailable('cuda')
    monkeypatch.setattr(caretrans.kernels, 'find_spec', lambda name: None)
    assert caretrans.kernels.why_unavailable('cuda') == 'Triton is not installed'


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match='Unknown parts stem: choose from mixer, attention'):
        caretrans.kernels.use_kernels(torch.nn.Linear(2, 2), parts=['mixer', 'stem'])
