"""benchmark.py beyond inference: profiles, training steps, loss curves, plots."""
import csv
import dataclasses
import json
import re

import pytest
import torch
from photos import FRUIT, copy_images

from caretrans.bench import learning, sections
from caretrans.bench.config import BenchConfig
from caretrans.bench.device_rates import DeviceRates
from caretrans.bench.learning import list_comparisons

QUICK = ['--device', 'cpu', '--img-size', '64', '--model', 'care_s0', '--backend', 'eager', 'fused', '--batch-size',
         '2']
BRIEF = [*QUICK, '--runs', '2', '--warmup', '1']
ALL = [*BRIEF, '--ways', 'channels_last']


@pytest.mark.parametrize('bench, plots, benches', [
    ('infer', '', ['infer']), ('train', '', ['train']), ('all', '', ['infer', 'profile', 'train']),
    ('infer', 'here', ['infer', 'profile'])])
def test_what_is_measured_is_what_was_asked_for_and_what_plots_need(bench, plots, benches):
    assert BenchConfig(bench=bench, plots=plots).list_benches() == benches


def test_everything_is_measured_printed_written_and_drawn(call, tmp_path, monkeypatch):
    monkeypatch.setattr(sections, 'ROUNDS', 2)
    growth = sections.measure_growth
    monkeypatch.setattr(sections, 'GROWTH_ROUNDS', 2)
    monkeypatch.setattr(sections, 'measure_growth', lambda name, **kwargs: growth(name, sizes=(64, 96), **kwargs))
    code, out, err = call('--bench', 'all', '--plots', tmp_path / 'plots', '--output', tmp_path, *ALL)
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
    assert drawn == ['accuracy_latency_batch2_64x64.png', 'growth.png', 'parts_care_s0.png']
    assert 'plot left out: ' in out, 'multiply-adds are drawn at 224 x 224 alone'


def test_a_way_that_fails_under_the_profiler_is_reported_and_the_others_go_on(call, tmp_path, monkeypatch):
    prepare = sections.prepare

    def prepare_or_fail(network, setup):
        if setup.backend == 'eager':
            raise ValueError('a kernel is missing')
        return prepare(network, setup)

    monkeypatch.setattr(sections, 'prepare', prepare_or_fail)
    code, _, err = call('--bench', 'profile', '--output', tmp_path, *QUICK)
    assert code == 1 and 'failed: profile of care_s0 eager float32 nchw, 2 x 64 x 64: ValueError: a kernel' in err
    assert len(json.loads((tmp_path / 'results.json').read_text())['profiles']) == 1


def test_the_bound_stands_beside_the_time_of_every_way_to_run_the_rewritten_network(call, tmp_path, monkeypatch):
    prepare = sections.prepare

    def prepare_without_parts(network, setup):  # as if it were compiled, without the minute that takes
        runner = prepare(network, dataclasses.replace(setup, backend='fused'))
        return dataclasses.replace(runner, module=None) if setup.backend == 'compile' else runner

    rates = DeviceRates(bandwidth=1e10, cached=2e10, matmul=1e11, vector=5e10, launch=1e-6)
    monkeypatch.setattr(sections, 'measure_rates', lambda device, dtype: rates)
    monkeypatch.setattr(sections, 'prepare', prepare_without_parts)
    code, out, err = call('--bench', 'profile', '--output', tmp_path, *QUICK, '--backend', 'eager', 'fused', 'compile')
    assert code == 0, err
    _, fused, compiled = out.split('care_s0 ')[-3:]
    for text in (fused, compiled):
        total = float(re.search(r'A call takes ([\d.]+) ms', text)[1])
        found = re.findall(
            r'^bound, .*: ([\d.]+) ms for .* measured ([\d.]+) ms = ([\d.]+) times the bound$', text, re.M)
        assert len(found) == 3 and all(float(measured) == total for _, measured, _ in found)
        assert all(float(ratio) == pytest.approx(total / float(bound), rel=0.02) for bound, _, ratio in found)
    assert 'Farthest above their bounds' in fused and 'Farthest above their bounds' not in compiled


@pytest.mark.parametrize('flags, message', [
    (['--img-size', '64x96'], '--img-size 64x96 with --bench train: training takes square images'),
    (['--batch-size', '1'], '--batch-size 1 with --bench train: mixup'),
    (['--batch-size', '2', '7'], '--batch-size 7 with --bench train: mixup'),
    (['--batch-size', '7', '--bench', 'curves'], '--batch-size 7 with --bench curves: mixup'),
    (['--teacher', 'resnet18', '--model', 'care_s0', 'mobilenetv2_035'],
     '--teacher resnet18 with --model mobilenetv2_035: it has no head that learns from one'),
    (['--ways', 'faster'], 'faster'),
    (['--teacher', 'resnet18', '--model', 'care_s0', 'casvit_xs'],
     '--teacher resnet18 with --model casvit_xs: it has no head that learns from one'),
    (['--teacher', 'regnety_161'], '--teacher regnety_161: no such model'), (['--ways', 'tf32'], 'tf32')])
def test_what_cannot_be_trained_is_refused_before_any_work(call, monkeypatch, flags, message):
    monkeypatch.setattr(sections, 'run_inference', None)
    code, out, err = call('--device', 'cpu', '--bench', 'train', *flags)
    assert code == 2 and out == '' and message in err and err.count('\n') == 1


@pytest.mark.parametrize('bench, flags, message', [
    ('train', ['--backend', 'eager', 'fused'], '--backend eager fused with --bench train: it is for --bench infer, '),
    ('train', ['--dtype', 'bfloat16'], '--dtype bfloat16'), ('train', ['--runs', '7'], '--runs 7'),
    ('train', ['--checkpoint', 'x.pth'], '--checkpoint x.pth'), ('train', ['--channels-last'], '--channels-last with'),
    ('train', ['--kernels', 'torch'], '--kernels torch'), ('train', ['--published'], '--published with'),
    ('profile', ['--runs', '7'], '--runs 7'), ('profile', ['--warmup', '7'], '--warmup 7'),
    ('infer', ['--teacher', 'resnet18'], '--teacher resnet18 with --bench infer: it is for --bench train'),
    ('infer', ['--ways', 'published'], '--ways published'), ('all', ['--steps', '7'], '--steps 7 with --bench all'),
    ('accuracy', ['--checkpoint', 'x.pth', '--batch-size', '7'], '--batch-size 7')])
def test_flags_that_nothing_heeds_are_refused(call, bench, flags, message):
    code, out, err = call('--device', 'cpu', '--bench', bench, *flags)
    assert code == 2 and out == '' and message in err and err.count('\n') == 1


def test_all_benches_take_the_flags_of_each():
    config = BenchConfig(bench='all', backend=['eager'], teacher=['resnet18'], ways=['published'], runs=7, warmup=2)
    assert config.list_benches() == ['infer', 'profile', 'train']


def test_of_all_benches_training_takes_the_even_batches():
    device = torch.device('cpu')
    for batches, taken, remark in (
            ([1, 64], [64], ['training steps have a batch of 64, not 1: mixup pairs the images']), ([], [], []),
            ([1], [], ['training steps have a batch of 16, not 1: mixup pairs the images']), ([2, 4], [2, 4], [])):
        config = BenchConfig(bench='all', batch_size=batches)
        sections._check_training(config, ['care_s0'], device)
        assert config.list_training_batches() == taken
        assert sections._describe_odd_batches(config, device) == remark


# What fails after measuring has begun ---------------------------------------------------------------------------------

def fail(*args, **kwargs):
    raise AssertionError('not as it should be')


@pytest.mark.parametrize('function, failure', [
    ('bench_training', 'training of care_s0, teacher none'), ('build_network', 'profiles of care_s0 at 64 x 64'),
    ('draw_accuracy_by_latency', 'a plot'), ('measure_growth', 'a plot')])
def test_what_fails_late_does_not_cost_what_was_measured(call, tmp_path, monkeypatch, function, failure):
    parts = ('_profile', 'bench_training', 'draw_accuracy_by_latency', 'draw_accuracy_by_gmacs', 'measure_growth')
    for part in parts:
        monkeypatch.setattr(sections, part, lambda *args, **kwargs: [])
    monkeypatch.setattr(sections, 'describe_training', lambda records: '')
    monkeypatch.setattr(sections, 'draw_growth', lambda records, path: path)
    monkeypatch.setattr(sections, function, fail)
    code, out, err = call('--bench', 'all', '--plots', tmp_path / 'plots', '--output', tmp_path, *ALL)
    assert code == 1 and f'failed: {failure}: AssertionError: not as it should be' in err
    assert len(json.loads((tmp_path / 'results.json').read_text())['records']) == 2 and 'median ms' in out


def test_each_model_has_a_plot_of_its_parts(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(sections, 'draw_parts', lambda profiles, path: drawn.setdefault(path.name, profiles))
    result = sections.BenchResult('cpu', profiles={
        'care_s0 eager, 1 x 64 x 64': [dict(model='care_s0')], 'care_s1 eager, 1 x 64 x 64': [dict(model='care_s1')],
        'care_s0 fused, 1 x 64 x 64': [dict(model='care_s0')]})
    for draw in sections._list_parts_plots(result, tmp_path):
        draw()
    assert {name: list(profiles) for name, profiles in drawn.items()} == {
        'parts_care_s0.png': ['eager, 1 x 64 x 64', 'fused, 1 x 64 x 64'], 'parts_care_s1.png': ['eager, 1 x 64 x 64']}


def test_threads_are_as_before_afterwards(call, tmp_path):
    before = torch.get_num_threads()
    assert call('--bench', 'profile', '--threads', 2, '--output', tmp_path, *QUICK)[0] == 0
    assert torch.get_num_threads() == before


# Curves ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    return copy_images(tmp_path_factory.mktemp('photographs'), per_class=8)


def test_curves_are_trained_written_and_drawn(call, tmp_path, photographs):
    code, out, err = call(
        '--bench', 'curves', '--model', 'care_s0', '--device', 'cpu', '--steps', 4, '--img-size', 64, '--batch-size', 8,
        '--ways', 'channels_last', '--data', photographs, '--output', tmp_path)
    assert code == 0, err
    assert re.search(r'channels_last is [\d.]+ from the published way .* seeds are [\d.]+ apart: within noise', out)
    with open(tmp_path / 'curves.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        'step', 'published, seed 0', 'published, seed 1', 'published, seed 2', 'channels_last, seed 0']
    assert [row['step'] for row in rows] == ['1', '2', '3', '4']
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG') and f'plot: {tmp_path}/curves.png' in out
    record, = json.loads((tmp_path / 'results.json').read_text())['curves']
    assert record['way'] == 'channels_last' and record['steps'] == 4 and record['within_noise'] is True


def test_by_default_500_steps_of_the_way_with_most_changes_are_compared():
    config = BenchConfig(bench='curves', model=['care_s0', 'mobilenetv2_035'])
    comparisons = list_comparisons(config, config.model, torch.device('cpu'))
    assert [(train.model, train.model_args, way) for train, way in comparisons] == [
        ('care_s0', {'ls_init_value': 0.1}, 'channels_last+bf16+compile'),
        ('mobilenetv2_035', {}, 'channels_last+bf16+compile')]
    assert config.steps == 500 and comparisons[0][0].data == str(FRUIT) and comparisons[0][0].img_size == 224


@pytest.mark.parametrize('flags, message', [
    (['--teacher', 'resnet18'], 'leave --teacher and --checkpoint out'), (['--ways', 'published'], 'published way is'),
    (['--img-size', '64x96'], '--img-size 64x96 with --bench curves'), (['--steps', '1'], 'steps is 1'),
    (['--ways', 'kernels'], 'not on cpu'), (['--data', 'nowhere'], "No data at 'nowhere'"),
    (['--data', 'nowhere', '--bench', 'train'],
     '--data nowhere with --bench train: it is for --bench accuracy and curves')])
def test_curves_that_cannot_be_are_one_line_and_exit_code_2(call, flags, message):
    code, out, err = call('--bench', 'curves', '--device', 'cpu', *flags)
    assert code == 2 and out == '' and message in err and err.count('\n') == 1


def test_curves_that_fail_are_reported_and_the_others_go_on(call, tmp_path, monkeypatch, photographs):
    compare = learning.compare_curves

    def compare_or_fail(config, way, *args, **kwargs):
        if config.model == 'care_s0':
            raise RuntimeError('a kernel is missing')
        return compare(config, way, *args, **kwargs)

    monkeypatch.setattr(learning, 'compare_curves', compare_or_fail)
    code, _, err = call(
        '--bench', 'curves', '--model', 'care_s0', 'mobilenetv2_035', '--device', 'cpu', '--steps', 2, '--img-size', 32,
        '--batch-size', 8, '--ways', 'channels_last', '--data', photographs, '--output', tmp_path)
    assert code == 1 and 'failed: curves of care_s0, channels_last: RuntimeError: a kernel is missing' in err
    assert (tmp_path / 'curves.csv').exists()
