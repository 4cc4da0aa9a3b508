"""The bound of a forward pass, against bytes and operations written out by hand, and against PyTorch's own counter."""
import pytest
import timm
import torch
import torch.nn as nn
from registered import CARE, one_of_each_file
from torch.utils.flop_counter import FlopCounterMode

from caretrans.bench.bounds import (
    FUSIONS, Layer, bound_layer, bound_time, describe_bounds, list_bounds, list_layers, trace_operations)
from caretrans.bench.device_rates import DeviceRates, allow_tf32, measure_rates
from caretrans.bench.profiling import profile_forward
from caretrans.fuse import fuse

RATES = DeviceRates(bandwidth=1e9, cached=4e9, matmul=1e12, vector=1e11, launch=1e-6)


class Tiny(nn.Module):
    """Expansion, GELU, depth-wise convolution, projection and a residual, as in Inter1: 8 channels, ratio 2."""

    def __init__(self):
        super().__init__()
        self.expand, self.act = nn.Conv2d(8, 16, 1), nn.GELU()
        self.dwconv, self.project = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        return x + self.project(self.dwconv(self.act(self.expand(x))))


class Strips(nn.Module):
    """Slices of one map, each with its depth-wise convolution, two of them on the same slice and summed."""

    def __init__(self):
        super().__init__()
        self.rows, self.columns = (nn.Conv2d(4, 4, size, padding='same', groups=4) for size in ((3, 1), (1, 3)))
        self.local = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x):
        a, b = (x + 1).split(4, dim=1)
        return torch.cat([self.rows(a) + self.columns(a), self.local(b)], dim=1)


def trace(model, channels, side=10, **kwargs):
    model.in_chans = channels
    return trace_operations(model, (side, side), **kwargs)


def count_flops(model, size=64, batch=1):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(batch, 3, size, size))
    return counter.get_total_flops()


def test_bytes_and_operations_of_a_tiny_network_are_those_written_out():
    """Maps of 8 and 16 channels of 10 x 10 float32 values are 3200 and 6400 bytes; weights and biases 4 bytes each."""
    small, large, pixels = 3200, 6400, 100
    layers = list_layers(trace(Tiny(), 8))
    assert [(layer.kind, layer.bytes, layer.flops, layer.vector_flops) for layer in layers] == [
        ('conv 1x1', small + 4 * (8 * 16 + 16) + large, 2 * pixels * 8 * 16, 0),
        ('activation', 2 * large, 0, 0),
        ('conv depth-wise', 2 * large + 4 * (16 * 9 + 16), 0, 2 * pixels * 16 * 9),
        ('conv 1x1', large + 4 * (8 * 16 + 8) + small, 2 * pixels * 8 * 16, 0),
        ('element-wise', 3 * small, 0, 0)]


def test_fused_element_wise_operations_and_kept_expansions_move_nothing():
    operations = trace(Tiny(), 8)
    single, fused, on_chip = (list_layers(operations, fusion) for fusion in FUSIONS)
    assert fused == [layer for layer in single if layer.kind.startswith('conv')]
    assert len(on_chip) == 2 and on_chip[1] == fused[2]
    assert on_chip[0].bytes == 3200 + 4 * (8 * 16 + 16) + 4 * (16 * 9 + 16) + 6400, 'no map between the two'
    assert (on_chip[0].flops, on_chip[0].vector_flops) == (fused[0].flops, fused[1].vector_flops)


def test_parallel_depthwise_convolutions_read_and_write_their_slices_once():
    operations = trace(Strips(), 8)
    slice_bytes, weights = 4 * 4 * 100, 4 * (3 * 4 + 4) * 2 + 4 * (9 * 4 + 4)
    separate, together = (list_layers(operations, fusion) for fusion in FUSIONS[1:])
    assert sum(layer.bytes for layer in separate) == 6 * slice_bytes + weights
    assert [layer.bytes for layer in together] == [4 * slice_bytes + weights], 'two slices in, two out'


def test_a_map_that_others_read_is_not_kept_on_the_chip():
    class Shared(Tiny):
        def forward(self, x):
            hidden = self.act(self.expand(x))
            return self.project(self.dwconv(hidden)), hidden

    assert list_layers(trace(Shared(), 8), 'on chip') == list_layers(trace(Shared(), 8), 'element-wise')


def test_the_core_of_attention_is_one_layer():
    """Queries, keys and values are read, the result is written: four maps of 32 channels at 14 x 14, in bfloat16."""
    operations = trace_operations(timm.create_model('care_s0'), (224, 224), 2, torch.bfloat16)
    cores = [layer for layer in list_layers(operations) if layer.kind == 'attention']
    assert len(cores) == 12
    stage2 = [layer for layer in cores if layer.part == 'stages.2']
    assert len(stage2) == 8 and {layer.bytes for layer in stage2} == {4 * 2 * 32 * 14 * 14 * 2}
    positions, head = 14 * 14, 16  # context and its use, and the product with the sum of the keys, for 2 heads of 16
    assert {layer.flops for layer in stage2} == {2 * 2 * 2 * positions * head * (2 * head + 1)}


@pytest.mark.parametrize('fusion', FUSIONS)
@pytest.mark.parametrize('name', [*CARE, *one_of_each_file()[1:], 'fastvit_t8', 'mobileone_s1', 'resnet18'])
def test_operations_add_up_to_those_that_pytorch_counts(name, fusion):
    model = timm.create_model(name)
    layers = list_layers(trace_operations(model, (64, 64), 2), fusion)
    assert sum(layer.flops + layer.vector_flops for layer in layers) == count_flops(model, batch=2)


@pytest.mark.parametrize('name', [*CARE, *one_of_each_file()[1:]])
def test_each_fusion_moves_less(name):
    operations = trace_operations(timm.create_model(name), (224, 224))
    moved = [sum(layer.bytes for layer in list_layers(operations, fusion)) for fusion in FUSIONS]
    assert moved[0] > moved[1] > moved[2] > 0


def test_every_depthwise_convolution_of_inter1_and_inter2_stays_on_the_chip():
    layers = list_layers(trace_operations(timm.create_model('care_s0'), (224, 224)), 'on chip')
    expansions = [layer for layer in layers if layer.flops and layer.vector_flops]
    mixers = [layer for layer in layers if layer.kind == 'conv depth-wise']
    assert len(expansions) == 2 * 18 and len(mixers) == 18, 'two and one for each of the blocks'


def test_a_fused_network_moves_less_in_fewer_layers():
    model = timm.create_model('care_s0').eval()
    plain, fused = (list_layers(trace_operations(network, (224, 224))) for network in (model, fuse(model)))
    assert len(fused) < len(plain) and sum(layer.bytes for layer in fused) < sum(layer.bytes for layer in plain)


def test_half_precision_halves_the_bytes_and_the_batch_multiplies_the_maps():
    model = Tiny()
    full, half, two = (list_layers(trace(model, 8, **kwargs)) for kwargs in
                       (dict(), dict(dtype=torch.bfloat16), dict(batch=2)))
    assert [layer.bytes for layer in half] == [layer.bytes // 2 for layer in full]
    assert two[0].bytes == full[0].bytes + 3200 + 6400 and two[0].flops == 2 * full[0].flops


def test_tracing_changes_nothing():
    model = timm.create_model('care_s0').train()
    before = [(name, value.clone()) for name, value in model.state_dict().items()]
    trace_operations(model, (64, 64), dtype=torch.bfloat16)
    assert model.training and next(model.parameters()).dtype == torch.float32
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before)


def test_the_slower_of_moving_and_working_bounds_a_layer():
    assert bound_layer(Layer('a', 'conv 1x1', '', 1000, 10 ** 5), RATES) == (1e-6, 'bytes')
    assert bound_layer(Layer('a', 'conv 1x1', '', 1000, 10 ** 7), RATES) == (1e-5, 'operations')
    assert bound_layer(Layer('a', 'conv depth-wise', '', 1000, 0, 10 ** 7), RATES) == (1e-4, 'operations')
    assert bound_layer(Layer('a', 'conv 1x1', '', 1000, 10 ** 5), RATES, RATES.cached) == (0.25e-6, 'bytes')


def test_records_sum_up_to_the_bound_and_stand_beside_what_was_measured():
    model = timm.create_model('care_s0').eval()
    operations = trace_operations(model, (64, 64))
    layers = list_layers(operations, 'element-wise')
    profile = profile_forward(model, torch.randn(1, 3, 64, 64), runs=1, warmup=1)
    records = list_bounds(layers, RATES, profile, model='care_s0')
    assert sum(record['bound_ms'] for record in records) == pytest.approx(1e3 * bound_time(layers, RATES))
    assert sum(record['share'] for record in records) == pytest.approx(1)
    assert sum(record['layers'] for record in records) == len(layers)
    assert all(record['measured_ms'] == profile.cells[record['part'], record['kind']] for record in records)
    text = describe_bounds(operations, RATES, profile)
    assert all(record['part'] in text for record in records)
    assert f'measured {profile.total_ms:.3f} ms' in text and 'Taken to be free, but measured: ' in text
    assert 'Left out: ' in describe_bounds(operations, RATES) and 'measured ms' in describe_bounds(operations, RATES)


def test_a_layer_measured_faster_than_its_bound_is_said_to_be():
    model = timm.create_model('care_s0').eval()
    slow = DeviceRates(bandwidth=1e3, cached=1e3, matmul=1e3, vector=1e3, launch=1e-6)
    profile = profile_forward(model, torch.randn(1, 3, 64, 64), runs=1, warmup=1)
    assert 'Measured faster than bound: ' in describe_bounds(trace_operations(model, (64, 64)), slow, profile)


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="fusion='all', choose from none, element-wise, on chip"):
        list_layers([], 'all')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rates_are_measured(dtype):
    rates = measure_rates(torch.device('cpu'), dtype, copy_mib=8, sides=(64,), count=2)
    assert min(rates.bandwidth, rates.matmul, rates.vector, rates.launch) > 0 and rates.cached >= rates.bandwidth
    assert 'copy of 8 MiB' in rates.how and dtype in rates.how


def test_tf32_is_allowed_inside_of_its_context_alone():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError, match='broken'), allow_tf32(True):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        raise RuntimeError('broken')
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
