"""Ways to run a network, profiles, bounds and training steps on a GPU. No test asserts a speed."""
import dataclasses

import pytest
import timm
import torch
from photos import FRUIT

from caretrans.bench.backends import Setup, check_output, prepare
from caretrans.bench.bounds import FUSIONS, bound_time, describe_bounds, list_layers, trace_operations
from caretrans.bench.config import BenchConfig, list_setups
from caretrans.bench.device_rates import measure_rates
from caretrans.bench.growth import measure_growth
from caretrans.bench.infer import build_network, run_inference, take_batch
from caretrans.bench.setups import KERNELS
from caretrans.bench.profiling import describe_profile, profile_call, profile_forward
from caretrans.bench.report import describe_result
from caretrans.bench.training import TrainingBench, bench_training, describe_training
from caretrans.bench.training_curves import compare_curves, describe_curves
from caretrans.bench.training_ways import list_ways
from caretrans.config import TrainConfig, read_recipe
from caretrans.kernels import why_unavailable
from caretrans.measure.counts import OUTSIDE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')

CUDA = torch.device('cuda')
BENCH = TrainingBench(batch=16, img_size=64, device=CUDA, rounds=2, block_seconds=0.05)


needs_kernels = pytest.mark.skipif(bool(why_unavailable('cuda')), reason=why_unavailable('cuda'))


@needs_kernels
@pytest.mark.parametrize('dtype', ['float32', 'tf32', 'bfloat16', 'float16'])
def test_all_kernels_are_checked_and_timed(dtype):
    config = BenchConfig(
        model=['care_s0', 'mobilenetv2_035'], device='cuda', backend=['eager', 'fused', 'cudagraph'], dtype=[dtype],
        batch_size=[4], img_size=['96'], runs=10)
    result = run_inference(config)
    print('\n'.join(describe_result(result)))
    assert not result.failures
    assert [(r['backend'], r['kernels']) for r in result.records if r['model'] == 'care_s0'] == [
        ('eager', 'torch'), *((backend, kernels) for backend in ('fused', 'cudagraph') for kernels in KERNELS)]
    assert {r['kernels'] for r in result.records if r['model'] != 'care_s0'} == {'torch'}


@needs_kernels
@pytest.mark.parametrize('kernels', [kernels for kernels in KERNELS if kernels != 'torch'])
def test_a_compiled_network_with_kernels_is_right(kernels):
    network = take_batch(build_network('care_s0', (96, 96)), 4)
    runner = prepare(network, Setup('compile', 'bfloat16', 'channels_last', CUDA, kernels=kernels))
    print(check_output(network, runner, 'bfloat16'))
    assert runner.kernels == kernels


@needs_kernels
def test_kernels_of_ours_in_a_cuda_graph_are_told_by_kind():
    network = take_batch(build_network('care_s0', (96, 96)), 4)
    runner = prepare(network, Setup('cudagraph', 'bfloat16', 'channels_last', CUDA, kernels='triton+expansion'))
    profile = profile_call(runner.run, CUDA, runs=3)
    print(describe_profile(profile))
    names = {name for _, name, _ in profile.operations}
    assert {'_forward', '_convolve', '_expand'} <= names
    assert {'attention', 'conv depth-wise', 'conv 1x1'} <= set(profile.sum_by(1))


def test_the_published_way_is_without_kernels():
    setup, = list_setups(BenchConfig(published=True), CUDA)[0]
    assert str(setup) == 'eager tf32 nchw' and setup.kernels == 'torch'


@pytest.fixture
def network():
    return timm.create_model('care_s0').eval().to(CUDA), torch.randn(8, 3, 224, 224, device=CUDA)


def test_kernels_are_told_by_part_and_kind(network):
    profile = profile_forward(*network, runs=3)
    print(describe_profile(profile))
    assert {('stages.2', 'attention'), ('stages.0', 'conv depth-wise'), ('stages.3', 'conv 1x1'),
            ('head', 'linear')} <= {cell for cell, ms in profile.cells.items() if ms > 0}
    outside = sum(ms for (part, _), ms in profile.cells.items() if part == OUTSIDE)
    assert outside < 0.1 * profile.busy_ms and profile.busy_ms < 1.2 * profile.profiled_ms


def test_kernels_of_a_cuda_graph_are_told_by_name(network):
    model, images = network
    with torch.inference_mode():
        for _ in range(3):
            model(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(images)
    eager, replayed = profile_forward(model, images, runs=3), profile_forward(lambda _: graph.replay(), images, runs=3)
    print(describe_profile(replayed))
    assert replayed.busy_ms == pytest.approx(eager.busy_ms, rel=0.3) and len(replayed.sum_by(1)) > 2


def test_generated_kernels_are_told(network):
    profile = profile_forward(torch.compile(network[0]), network[1], runs=3)
    print(describe_profile(profile))
    assert profile.sum_by(1)['generated'] > 0


@pytest.mark.parametrize('dtype', ['float32', 'tf32', 'bfloat16'])
def test_the_bound_is_below_what_is_measured(network, dtype):
    model, images = network
    rates = measure_rates(CUDA, dtype)
    operations = trace_operations(model.cpu(), (224, 224), 8, torch.bfloat16 if dtype == 'bfloat16' else torch.float32)
    model = model.to(CUDA, torch.bfloat16 if dtype == 'bfloat16' else torch.float32)
    profile = profile_forward(model, images.to(next(model.parameters()).dtype), runs=3)
    print(describe_bounds(operations, rates, profile))
    bounds = [1e3 * bound_time(list_layers(operations, fusion), rates) for fusion in FUSIONS]
    assert profile.total_ms > bounds[1] > bounds[2] > 0


@pytest.mark.parametrize('teacher', ['none', 'resnet18'])
def test_all_ways_of_training_compute_the_same(teacher):
    records = bench_training(dataclasses.replace(BENCH, teacher=teacher))
    print(describe_training(records))
    assert [record['way'] for record in records] == list(list_ways(CUDA))
    assert all(record['median_ms'] for record in records), [record['notes'] for record in records]


def test_a_batch_that_does_not_fit_is_halved():
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.set_per_process_memory_fraction(min(2 ** 31 / free, 1.))
    try:
        record, = bench_training(dataclasses.replace(BENCH, batch=256, img_size=224), ['published'])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)
    assert 2 <= record['batch'] < 256 and 'did not fit' in ' '.join(record['notes'])


@pytest.mark.parametrize('way', ['channels_last+bf16', pytest.param('channels_last+bf16+kernels', marks=needs_kernels)])
def test_curves_of_a_faster_way_are_within_noise(way):
    config = TrainConfig(**{**read_recipe('care_s0_fruit14'), 'data': str(FRUIT), 'batch_size': 32, 'img_size': 64})
    comparison = compare_curves(config, way, CUDA, steps=60)
    print(describe_curves(comparison))
    assert comparison.is_within_noise


def test_growth_is_measured():
    records = measure_growth('care_s0', (224, 512), CUDA, torch.bfloat16, batch=4, rounds=2)
    assert all(record['median_ms'] > 0 for record in records)
