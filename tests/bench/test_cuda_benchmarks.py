"""Setups, profiles, rooflines and training steps on a GPU. No test asserts a speed."""
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch

from caretrans.bench.backends import check_output, prepare
from caretrans.bench.config import BenchConfig, list_setups
from caretrans.bench.device_rates import measure_rates
from caretrans.bench.growth import measure_growth
from caretrans.bench.infer import build_network, run_inference, take_batch
from caretrans.bench.profile import describe_profile, profile_call
from caretrans.bench.report import describe_result
from caretrans.bench.roofline import bound_time, describe_roofline, trace_layers
from caretrans.bench.setups import KERNELS, Setup
from caretrans.bench.train import TrainingBench, bench_training, describe_training, list_modes
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
    assert [(r.backend, r.kernels) for r in result.records if r.model == 'care_s0'] == [
        ('eager', 'torch'), *((backend, kernels) for backend in ('fused', 'cudagraph') for kernels in KERNELS)]
    assert {r.kernels for r in result.records if r.model != 'care_s0'} == {'torch'}


@needs_kernels
def test_a_compiled_network_with_kernels_is_right():
    network = take_batch(build_network('care_s0', (96, 96)), 4)
    runner = prepare(network, Setup('compile', 'bfloat16', 'channels_last', CUDA, kernels='triton'))
    print(check_output(network, runner, 'bfloat16'))
    assert runner.kernels == 'triton'


@needs_kernels
def test_mixers_with_kernels_are_a_kind_of_their_own():
    network = take_batch(build_network('care_s0', (96, 96)), 4)
    runner = prepare(network, Setup('fused', 'bfloat16', 'channels_last', CUDA, kernels='triton'))
    profile = profile_call(runner.run, CUDA, runner.module, runs=3)
    print(describe_profile(profile))
    assert {'mixer', 'conv 1x1', 'conv depth-wise'} <= set(profile.sum_by(1))


def test_the_published_setup_is_without_kernels():
    setup, = list_setups(BenchConfig(published=True), CUDA)[0]
    assert str(setup) == 'eager tf32 nchw' and setup.kernels == 'torch'


@pytest.fixture
def network():
    return timm.create_model('care_s0').eval().to(CUDA), torch.randn(8, 3, 224, 224, device=CUDA)


@torch.inference_mode()
def test_time_is_reported_by_part_and_kind(network):
    model, images = network
    profile = profile_call(partial(model, images), CUDA, model, runs=3)
    print(describe_profile(profile))
    assert {('stages.2', 'attention'), ('stages.0', 'conv depth-wise'), ('stages.3', 'conv 1x1'),
            ('head', 'linear')} <= {cell for cell, ms in profile.cells.items() if ms > 0}
    outside = sum(ms for (part, _), ms in profile.cells.items() if part == OUTSIDE)
    assert outside < 0.1 * profile.busy_ms and profile.busy_ms < 1.2 * profile.profiled_ms


@torch.inference_mode()
@pytest.mark.parametrize('dtype', ['float32', 'tf32', 'bfloat16'])
def test_the_roofline_is_below_the_measured_time(network, dtype):
    model, images = network
    rates, number = measure_rates(CUDA, dtype), torch.bfloat16 if dtype == 'bfloat16' else torch.float32
    trace = trace_layers(model, (224, 224), 8, number)
    profile = profile_call(partial(model.to(number), images.to(number)), CUDA, model, runs=3)
    print(describe_roofline(trace, rates, profile))
    assert profile.total_ms > 1e3 * bound_time(trace.layers, rates) > 0


@pytest.mark.parametrize('teacher', ['none', 'resnet18'])
def test_all_training_modes_compute_the_same(teacher):
    records = bench_training(replace(BENCH, teacher=teacher))
    print(describe_training(records))
    assert [record.way for record in records] == list(list_modes(CUDA))
    assert all(record.median_ms for record in records), [record.notes for record in records]


def test_a_batch_that_does_not_fit_is_halved():
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.set_per_process_memory_fraction(min(2 ** 31 / free, 1.))
    try:
        record, = bench_training(replace(BENCH, batch=256, img_size=224), ['published'])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)
    assert 2 <= record.batch < 256 and 'did not fit' in ' '.join(record.notes)


def test_growth_is_measured():
    records = measure_growth('care_s0', (224, 512), CUDA, torch.bfloat16, batch=4, rounds=2)
    assert all(record.median_ms > 0 for record in records)
