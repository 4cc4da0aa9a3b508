"""benchmark.py beyond inference: profiles, training steps and plots together; failures in one leave the others."""
import csv
import dataclasses
import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch

from caretrans.bench import infer, run
from caretrans.bench.config import BenchConfig
from caretrans.bench.device_rates import DeviceRates
from caretrans.bench.record import BenchResult, Record

pytestmark = pytest.mark.slow

CARE = ['--device', 'cpu', '--img-size', '64', '--model', 'care_s0', '--batch-size', '2']
QUICK = [*CARE, '--backend', 'eager', 'fused']
ALL = [*QUICK, '--runs', '2', '--warmup', '1', '--ways', 'channels_last']


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One block per stage where networks are profiled and timed, few runs, and rates that are not measured."""
    create = partial(timm.create_model, depths=(1, 1, 1, 1))
    monkeypatch.setattr(infer, 'timm', SimpleNamespace(create_model=create))
    monkeypatch.setattr(run, 'profile_call', partial(run.profile_call, runs=2, warmup=1))
    monkeypatch.setattr(run, 'measure_rates', lambda device, dtype: DeviceRates(
        bandwidth=1e10, cached=2e10, matmul=1e11, vector=5e10, launch=1e-6))
    monkeypatch.setattr(run, 'ROUNDS', 2)
    monkeypatch.setattr(run, 'GROWTH_ROUNDS', 2)
    growth = run.measure_growth
    monkeypatch.setattr(run, 'measure_growth', lambda name, **kwargs: growth(name, sizes=(64, 96), **kwargs))


def test_everything_is_measured_printed_written_and_drawn(call, tmp_path):
    code, out, err = call('--bench', 'all', '--plots', tmp_path / 'plots', '--output', tmp_path, *ALL)
    assert code == 0, err
    for text in ('stages.2', 'A call takes', 'roofline:', 'Training steps of care_s0', 'channels_last'):
        assert text in out
    result = json.loads((tmp_path / 'results.json').read_text(encoding='utf-8'))
    assert [r['backend'] for r in result['records']] == ['eager', 'fused']
    assert [r['way'] for r in result['training']] == ['published', 'channels_last']
    assert [rows[0]['backend'] for rows in result['profiles'].values()] == ['eager', 'fused']
    with open(tmp_path / 'training.csv', newline='', encoding='utf-8') as file:
        assert [row['bench'] for row in csv.DictReader(file)] == ['train', 'train']
    drawn = sorted(path.name for path in (tmp_path / 'plots').glob('*.png'))
    assert drawn == ['accuracy_latency_batch2_64x64.png', 'growth.png', 'parts_care_s0.png']
    assert 'plot skipped: ' in out, 'multiply-adds are drawn at 224 x 224 alone'


def test_a_single_plot_is_drawn(call, tmp_path):
    picture = tmp_path / 'images' / 'latency.png'
    code, out, _ = call('--plots', picture, '--output', tmp_path, *QUICK, '--runs', '1')
    assert code == 0 and picture.read_bytes().startswith(b'\x89PNG') and f'plot: {picture}' in out
    assert [path.name for path in tmp_path.rglob('*.png')] == ['latency.png']


def test_a_backend_that_fails_under_the_profiler_is_reported_and_the_others_are_profiled(call, tmp_path, monkeypatch):
    prepare = run.prepare

    def prepare_or_fail(network, setup):
        if setup.backend == 'eager':
            raise ValueError('a kernel is missing')
        return prepare(network, setup)

    monkeypatch.setattr(run, 'prepare', prepare_or_fail)
    code, _, err = call('--bench', 'profile', '--output', tmp_path, *QUICK)
    assert code == 1 and 'failed: profile of care_s0 eager float32 nchw, 2 x 64 x 64: ValueError: a kernel' in err
    assert len(json.loads((tmp_path / 'results.json').read_text(encoding='utf-8'))['profiles']) == 1


def test_the_roofline_is_printed_beside_the_time_of_every_backend_of_the_fused_network(call, tmp_path, monkeypatch):
    prepare = run.prepare

    def prepare_without_parts(network, setup):  # as if it were compiled, without the minute that takes
        runner = prepare(network, dataclasses.replace(setup, backend='fused'))
        return dataclasses.replace(runner, module=None) if setup.backend == 'compile' else runner

    monkeypatch.setattr(run, 'prepare', prepare_without_parts)
    code, out, err = call('--bench', 'profile', '--output', tmp_path, *QUICK, '--backend', 'eager', 'fused', 'compile')
    assert code == 0, err
    _, fused, compiled = out.split('care_s0 ')[-3:]
    for text in (fused, compiled):
        total = float(re.search(r'A call takes ([\d.]+) ms', text)[1])
        found = re.findall(r': ([\d.]+) ms for .* measured ([\d.]+) ms = ([\d.]+) times', text)
        assert len(found) == 1 and float(found[0][1]) == total
        assert float(found[0][2]) == pytest.approx(total / float(found[0][0]), rel=0.02)
    assert 'Farthest above' in fused and 'Farthest above' not in compiled


@pytest.mark.parametrize('batches, taken, remarks', [
    ([1, 64], [64], ['training steps have a batch of 64, not 1: mixup pairs the images']), ([], [16], []),
    ([1], [16], ['training steps have a batch of 16, not 1: mixup pairs the images']), ([2, 4], [2, 4], [])])
def test_training_uses_only_even_batches_with_bench_all(monkeypatch, batches, taken, remarks):
    config, device = BenchConfig(bench='all', batch_size=batches), torch.device('cpu')
    result, found = BenchResult(''), []
    monkeypatch.setattr(run, 'bench_training', lambda bench, *args, **kwargs: found.append(bench.batch) or [])
    monkeypatch.setattr(run, 'describe_training', lambda records: '')
    run._check_training(config, ['care_s0'], device)
    run._train_all(config, ['care_s0'], device, result, None)
    assert (found, result.remarks, result.failures) == (taken, remarks, [])


def fail(*args, **kwargs):
    raise AssertionError('not as it should be')


def test_late_failures_keep_earlier_measurements(call, tmp_path, monkeypatch):
    for function in ('bench_training', 'build_network', 'draw_accuracy_by_latency', 'measure_growth'):
        monkeypatch.setattr(run, function, fail)
    code, out, err = call('--bench', 'all', '--plots', tmp_path / 'plots', '--output', tmp_path, *ALL)
    for failure in ('training of care_s0, teacher none', 'profiles of care_s0 at 64 x 64', 'a plot'):
        assert code == 1 and f'failed: {failure}: AssertionError: not as it should be' in err
    assert err.count('failed: a plot') == 2
    records = json.loads((tmp_path / 'results.json').read_text(encoding='utf-8'))['records']
    assert len(records) == 2 and 'median ms' in out


def test_each_model_has_a_plot_of_its_parts(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(run, 'draw_parts', lambda profiles, path: drawn.setdefault(path.name, profiles))
    result = BenchResult('cpu', profiles={
        f'{model} {setup}': [Record(model=model)] for model, setup in (
            ('care_s0', 'eager, 1 x 64 x 64'), ('care_s1', 'eager, 1 x 64 x 64'), ('care_s0', 'fused, 1 x 64 x 64'))})
    run._draw_all(BenchConfig(plots=str(tmp_path)), ['resnet18'], torch.device('cpu'), result, None)
    assert {name: list(profiles) for name, profiles in drawn.items()} == {
        'parts_care_s0.png': ['eager, 1 x 64 x 64', 'fused, 1 x 64 x 64'], 'parts_care_s1.png': ['eager, 1 x 64 x 64']}


def test_threads_are_those_of_the_flag_and_as_before_afterwards(call, tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(run, '_profile_all', lambda *args: seen.append(torch.get_num_threads()))
    assert call('--bench', 'profile', '--threads', 2, '--output', tmp_path, *QUICK)[0] == 0
    assert seen == [2] and torch.get_num_threads() == before
