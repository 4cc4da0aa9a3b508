"""benchmark.py beyond inference: profiles, training steps, plots."""
import csv
import json

import pytest
import torch

import benchmark
from caretrans import bench_sections
from caretrans.bench_config import BenchConfig

QUICK = ['--device', 'cpu', '--img-size', '64', '--runs', '2', '--warmup', '1', '--model', 'care_s0', '--backend',
         'eager', 'fused', '--batch-size', '2', '--ways', 'channels_last']


@pytest.fixture
def call(monkeypatch, capsys):
    """Run benchmark.py in this process: its exit code, stdout and stderr."""
    def main(*flags):
        monkeypatch.setattr('sys.argv', ['benchmark.py', *map(str, flags)])
        code = benchmark.main()
        return code, *capsys.readouterr()
    return main


@pytest.mark.parametrize('bench, plots, benches', [
    ('infer', '', ['infer']), ('train', '', ['train']), ('all', '', ['infer', 'profile', 'train']),
    ('infer', 'here', ['infer', 'profile'])])
def test_what_is_measured_is_what_was_asked_for_and_what_plots_need(bench, plots, benches):
    assert BenchConfig(bench=bench, plots=plots).list_benches() == benches


def test_everything_is_measured_printed_written_and_drawn(call, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_sections, 'ROUNDS', 2)
    growth = bench_sections.measure_growth
    monkeypatch.setattr(
        bench_sections, 'measure_growth', lambda name, device: growth(name, sizes=(64, 96), device=device, rounds=2))
    code, out, err = call('--bench', 'all', '--plots', tmp_path / 'plots', '--output', tmp_path, *QUICK)
    assert code == 0, err
    for text in ('stages.2', 'The longest operations', 'bound, each operation by itself', 'Training steps of care_s0',
                 'channels_last'):
        assert text in out
    result = json.loads((tmp_path / 'results.json').read_text())
    assert [r['backend'] for r in result['records']] == ['eager', 'fused']
    assert [r['way'] for r in result['training']] == ['published', 'channels_last']
    assert [rows[0]['backend'] for rows in result['profiles'].values()] == ['eager', 'fused']
    with open(tmp_path / 'training.csv', newline='') as file:
        assert [row['bench'] for row in csv.DictReader(file)] == ['train', 'train']
    drawn = sorted(path.name for path in (tmp_path / 'plots').glob('*.png'))
    assert drawn == ['accuracy_latency_batch2_64x64.png', 'growth.png', 'parts.png']
    assert 'plot left out: ' in out, 'multiply-adds are drawn at 224 x 224 alone'


def test_a_way_that_fails_under_the_profiler_is_reported_and_the_others_go_on(call, tmp_path, monkeypatch):
    prepare = bench_sections.prepare

    def prepare_or_fail(network, setup):
        if setup.backend == 'eager':
            raise ValueError('a kernel is missing')
        return prepare(network, setup)

    monkeypatch.setattr(bench_sections, 'prepare', prepare_or_fail)
    code, _, err = call('--bench', 'profile', '--output', tmp_path, *QUICK)
    assert code == 1 and 'failed: profile of care_s0 eager float32 nchw, 2 x 64 x 64: ValueError: a kernel' in err
    assert len(json.loads((tmp_path / 'results.json').read_text())['profiles']) == 1


@pytest.mark.parametrize('flags, message', [
    (['--img-size', '64x96'], '--img-size 64x96 with --bench train: training takes square images'),
    (['--batch-size', '1'], '--batch-size 1 with --bench train: mixup'), (['--ways', 'faster'], 'faster'),
    (['--teacher', 'regnety_161'], '--teacher regnety_161: no such model'), (['--ways', 'tf32'], 'tf32')])
def test_what_cannot_be_trained_is_refused_before_any_work(call, monkeypatch, flags, message):
    monkeypatch.setattr(bench_sections, 'run_inference', None)
    code, out, err = call('--device', 'cpu', '--bench', 'train', *flags)
    assert code == 2 and out == '' and message in err and err.count('\n') == 1


def test_threads_are_as_before_afterwards(call, tmp_path):
    before = torch.get_num_threads()
    assert call('--bench', 'profile', '--threads', 2, '--output', tmp_path, *QUICK)[0] == 0
    assert torch.get_num_threads() == before
