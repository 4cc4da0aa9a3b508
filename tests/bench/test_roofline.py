"""The roofline of a forward pass, against bytes and operations written out by hand, and against PyTorch's counter."""
import pytest
import timm
import torch
import torch.nn as nn
from registered import CARE, one_of_each_file
from torch.utils.flop_counter import FlopCounterMode

from caretrans.bench.device_rates import DeviceRates, allow_tf32, measure_rates
from caretrans.bench.profile import profile_call
from caretrans.bench.roofline import Layer, bound_layer, bound_time, describe_roofline, list_bounds, trace_layers
from caretrans.fuse import fuse

RATES = DeviceRates(bandwidth=1e9, cached=4e9, matmul=1e12, vector=1e11, launch=1e-6)
CPU = torch.device('cpu')


class Tiny(nn.Module):
    """Expansion, GELU, depth-wise convolution, projection and a residual, as in Inter1: 8 channels, ratio 2."""

    in_chans = 8

    def __init__(self):
        super().__init__()
        self.expand, self.act = nn.Conv2d(8, 16, 1), nn.GELU()
        self.dwconv, self.project = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        return x + self.project(self.dwconv(self.act(self.expand(x))))


@pytest.fixture(scope='module')
def care():
    """A network, its trace, and a profile of the same forward pass."""
    model = timm.create_model('care_s0', depths=(1, 1, 2, 1)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        profile = profile_call(lambda: model(images), CPU, model, runs=1, warmup=1)
    return model, trace_layers(model, (64, 64)), profile


def test_bytes_and_operations_of_a_tiny_network_are_those_written_out():
    """Maps of 8 and 16 channels of 10 x 10 float32 values are 3200 and 6400 bytes; weights and biases 4 bytes each."""
    small, large, pixels = 3200, 6400, 100
    trace = trace_layers(Tiny(), (10, 10))
    assert [(layer.kind, layer.bytes, layer.flops, layer.vector_flops) for layer in trace.layers] == [
        ('conv 1x1', small + 4 * (8 * 16 + 16) + large, 2 * pixels * 8 * 16, 0),
        ('conv depth-wise', 2 * large + 4 * (16 * 9 + 16), 0, 2 * pixels * 16 * 9),
        ('conv 1x1', large + 4 * (8 * 16 + 8) + small, 2 * pixels * 8 * 16, 0)]
    assert trace.launches == 5, 'three convolutions, the GELU and the sum'


def test_the_core_of_attention_is_one_layer():
    """Queries, keys and values are read, the result is written: four maps of 32 channels at 14 x 14, in bfloat16."""
    cores = [layer for layer in trace_layers(timm.create_model('care_s0'), (224, 224), 2, torch.bfloat16).layers
             if layer.kind == 'attention']
    stage2 = [layer for layer in cores if layer.part == 'stages.2']
    assert len(cores) == 12 and len(stage2) == 8 and {layer.bytes for layer in stage2} == {4 * 2 * 32 * 14 * 14 * 2}
    positions, head = 14 * 14, 16  # context and its use, and the product with the sum of the keys, for 2 heads of 16
    assert {layer.flops for layer in stage2} == {2 * 2 * 2 * positions * head * (2 * head + 1)}


@pytest.mark.parametrize('name', [*CARE, *one_of_each_file()[1:], 'fastvit_t8', 'resnet18'])
def test_operations_add_up_to_those_that_pytorch_counts(name):
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 3, 64, 64, device='meta'))
    layers = trace_layers(model, (64, 64), 2).layers
    assert sum(layer.flops + layer.vector_flops for layer in layers) == counter.get_total_flops()


def test_a_fused_network_moves_less_in_fewer_layers(care):
    model, trace, _ = care
    fused = trace_layers(fuse(model), (64, 64))
    assert len(fused.layers) < len(trace.layers) and fused.launches < trace.launches
    assert sum(layer.bytes for layer in fused.layers) < sum(layer.bytes for layer in trace.layers)


def test_half_precision_halves_the_bytes_and_the_batch_multiplies_the_maps():
    full, half, two = (trace_layers(Tiny(), (10, 10), **kwargs).layers for kwargs in
                       (dict(), dict(dtype=torch.bfloat16), dict(batch=2)))
    assert [layer.bytes for layer in half] == [layer.bytes // 2 for layer in full]
    assert two[0].bytes == full[0].bytes + 3200 + 6400 and two[0].flops == 2 * full[0].flops


def test_tracing_changes_nothing(care):
    model = care[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace_layers(model, (64, 64), dtype=torch.bfloat16)
    assert model.training and next(model.parameters()).dtype == torch.float32
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model.eval()


def test_the_slower_of_moving_and_working_bounds_a_layer():
    assert bound_layer(Layer('a', 'conv 1x1', 1000, 10 ** 5), RATES) == (1e-6, 'bytes')
    assert bound_layer(Layer('a', 'conv 1x1', 1000, 10 ** 7), RATES) == (1e-5, 'operations')
    assert bound_layer(Layer('a', 'conv depth-wise', 1000, 0, 10 ** 7), RATES) == (1e-4, 'operations')
    assert bound_layer(Layer('a', 'conv 1x1', 1000, 10 ** 5), RATES, RATES.cached) == (0.25e-6, 'bytes')


def test_layers_sum_up_to_the_roofline_and_have_measured_times(care):
    _, trace, profile = care
    bounds = list_bounds(trace.layers, RATES)
    assert sum(bound.ms for bound in bounds) == pytest.approx(1e3 * bound_time(trace.layers, RATES))
    assert sum(bound.layers for bound in bounds) == len(trace.layers)
    assert all(profile.cells[bound.part, bound.kind] > 0 for bound in bounds)
    text, alone = describe_roofline(trace, RATES, profile), describe_roofline(trace, RATES)
    assert all(f'{bound.ms:.4f}' in text and bound.part in text for bound in bounds)
    assert f'measured {profile.total_ms:.3f} ms' in text and 'Assumed to be free, but measured: ' in text
    assert 'Not included: ' in alone and 'measured ms' in alone and '; measured' not in alone
    slow = DeviceRates(bandwidth=1e3, cached=1e3, matmul=1e3, vector=1e3, launch=1e-6)
    assert 'Measured faster than the roofline: ' in describe_roofline(trace, slow, profile)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rates_are_measured(dtype):
    rates = measure_rates(CPU, dtype, copy_mib=8, sides=(64,), count=2)
    assert min(rates.bandwidth, rates.matmul, rates.vector, rates.launch) > 0 and rates.cached >= rates.bandwidth
    assert 'copy of 8 MiB' in rates.how and dtype in rates.how


def test_tf32_is_allowed_inside_of_its_context_alone():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError, match='broken'), allow_tf32(True):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        raise RuntimeError('broken')
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
