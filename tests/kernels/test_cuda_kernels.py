"""The Triton kernels on a GPU: compared with their definitions, compiled, captured and in training."""
import copy

import caretrans.fuse
import caretrans.kernels
import pytest
import torch
import torch.nn.functional as F
from kernel_checks import ATTENTIONS, MIXERS, check_attention, check_mixer, error_of, rotation_of, slice_of
from reference import filled_model

DEVICE = 'cuda'
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NETWORKS = ['care_s0', 'mlla_t']
reason = caretrans.kernels.why_unavailable(DEVICE)
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


def with_and_without(name: str, **kwargs):
    """A network with kernels on the GPU, and its like without."""
    model = filled_model(name, num_classes=7, **kwargs).to(DEVICE, memory_format=torch.channels_last)
    reference = copy.deepcopy(model)
    placements = caretrans.kernels.use_kernels(model)
    assert {p.runs for p in placements} == {'triton'}
    return model, reference


def images(batch: int = 4, side: int = 96) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, device=DEVICE).to(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def no_tf32():
    """The references in full float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


# Kernels --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape, rotated', [*ATTENTIONS, *(
    (shape, rotated) for rotated in (False, True)
    for shape in ((64, 2, 16, 16, 196), (1, 2, 32, 32, 4096), (3, 8, 32, 32, 3136)))], ids=str)
def test_linear_attention_equals_its_definition(shape, rotated, channels_last, dtype):
    from caretrans.kernels.linear_attention import attend
    check_attention(attend, shape, dtype, channels_last, device=DEVICE, rotated=rotated)


@pytest.mark.parametrize('rotated', [False, True])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_large_queries_and_keys_do_not_overflow(dtype, rotated):
    from caretrans.kernels.linear_attention import attend
    check_attention(attend, (2, 2, 16, 16, 196), dtype, scale=1e4, device=DEVICE, rotated=rotated)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', [
    *MIXERS, (8, (8, 8), 0, 56, 56), (8, (32, 32), 2, 14, 14), (64, (64, 64), 2, 7, 7), (128, (24, 24), 0, 17, 13),
    (128, (32, 32), 2, 14, 14)], ids=str)
def test_mixers_equal_their_modules(shape, channels_last, dtype):
    check_mixer(shape, dtype, channels_last, device=DEVICE)


def test_results_are_bit_identical_when_repeated():
    from caretrans.kernels.linear_attention import attend
    from caretrans.kernels.mixer import mix_with_strips_backward
    q, k, v = (slice_of(64, 0, (1, 1, 4096), True, torch.bfloat16, DEVICE).reshape(1, 2, 32, 4096) for _ in range(3))
    for rotate in None, rotation_of((1, 2, 32, 32, 4096), q.dtype, device=DEVICE):
        assert all(torch.equal(attend(q, k, v, rotate=rotate), attend(q, k, v, rotate=rotate)) for _ in range(5))
    x, grad = images(16, 56).repeat(1, 8, 1, 1), images(16, 56).repeat(1, 8, 1, 1)
    weights = [torch.randn(8, 1, *size, device=DEVICE) for size in ((11, 1), (1, 11), (3, 3), (7, 7))]
    first = mix_with_strips_backward(grad, x, weights)
    for _ in range(5):
        assert all(map(torch.equal, mix_with_strips_backward(grad, x, weights), first))


# Networks -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('name', ['care_s0', 'care_s2', 'mlla_t'])
def test_a_network_agrees_with_torch(name, fused):
    model, reference = with_and_without(name)
    if fused:
        model = caretrans.fuse.fuse(reference)
        placements = caretrans.kernels.use_kernels(model)
        assert {p.runs for p in placements} == {'triton'}
    x = images()
    with torch.no_grad():
        assert error_of([model(x)], [reference.double()(x.double())]) <= 1e-4


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
def test_a_compiled_network_computes_the_same(mode, name):
    model, reference = with_and_without(name)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    x = images()
    with torch.no_grad():
        for _ in range(3):  # reduce-overhead records at the second call and replays at the third
            found = compiled(x).clone()
            assert error_of([found], [reference(x)]) <= 1e-4


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('fused', [False, True])
def test_a_network_is_captured_in_a_cuda_graph(fused, name):
    model, reference = with_and_without(name)
    if fused:
        model = caretrans.fuse.fuse(reference)
        caretrans.kernels.use_kernels(model)
    model, x = model.to(torch.bfloat16), images().to(torch.bfloat16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)  # compiles and tunes the kernels
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            out = model(x)
        for _ in range(2):
            x.copy_(images())
            out.fill_(float('nan'))
            graph.replay()
            assert error_of([out], [model(x)]) <= 1e-2


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_equals_that_of_torch(dtype, compiled, name):
    """Losses and gradients, the latter by their directions: in bfloat16 each is a sum of many roundings."""
    model, reference = with_and_without(name)
    x, labels = images(16), torch.arange(16, device=DEVICE) % 7
    losses = []
    for network in model, reference:
        network.train()
        call = torch.compile(network) if compiled else network
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(call(x).float(), labels)
        loss.backward()
        losses.append(loss.item())
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert abs(losses[0] - losses[1]) <= tolerance * abs(losses[1])
    found, expected = (torch.cat([p.grad.flatten() for p in n.parameters()]) for n in (model, reference))
    assert F.cosine_similarity(found, expected, dim=0) >= 1 - tolerance


@pytest.mark.parametrize('name', NETWORKS)
def test_training_needs_no_more_memory_than_in_torch(name):
    peaks = []
    for network in with_and_without(name):
        network.train()
        for step in range(2):  # the first compiles and tunes
            if step:
                torch.cuda.reset_peak_memory_stats()
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                network(images(32, 224)).float().sum().backward()
            network.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] <= 1.02 * peaks[1]


def test_a_network_with_kernels_goes_to_the_cpu_and_back():
    model, reference = with_and_without('care_s0')
    x = images(2, 64)
    with torch.no_grad():
        on_gpu = model(x)
        on_cpu = model.cpu()(x.cpu())
        assert torch.equal(on_cpu, reference.cpu()(x.cpu()))
        assert error_of([on_gpu.cpu()], [on_cpu]) <= 1e-4
        assert torch.equal(model.to(DEVICE)(x), on_gpu)
