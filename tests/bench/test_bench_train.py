"""Training steps are measured as they are made, and only where they compute the same. No test asserts a speed."""
import csv
import dataclasses
import json
import math

import pytest
import torch
from photos import copy_images

import caretrans.bench.training
import caretrans.training.trainer
from caretrans.bench import training_ways
from caretrans.bench.training import TrainingBench, bench_training, describe_training
from caretrans.bench.training_curves import (
    Comparison, compare_curves, describe_curves, draw_curves, measure_distance, record_curves, smooth_curve,
    write_curves)
from caretrans.bench.training_ways import PUBLISHED, Way, list_ways, parse_way, training_precision
from caretrans.config import TrainConfig, read_recipe
from caretrans.errors import ConfigError, TrainingError

CPU = torch.device('cpu')
TINY = TrainingBench(
    batch=8, img_size=64, rounds=2, warmup=2, block_seconds=0., model_args=(('depths', (1, 1, 1, 1)),))
SHARED = {'model', 'bench', 'backend', 'device', 'dtype', 'layout', 'batch', 'height', 'width', 'threads', 'warmup',
          'runs', 'median_ms', 'p10_ms', 'p90_ms', 'mean_ms', 'images_per_s', 'peak_mib', 'ratio', 'ratio_p10',
          'ratio_p90', 'noisy', 'error', 'kernels', 'versions', 'notes'}


@pytest.fixture(scope='module', params=['none', 'mobilenetv2_035'])
def records(request):
    return bench_training(dataclasses.replace(TINY, teacher=request.param), ['channels_last', 'bf16'])


def test_each_way_gets_a_record_with_all_that_it_hangs_on(records):
    assert [record['way'] for record in records] == [PUBLISHED, 'channels_last', 'bf16']
    for record in records:
        assert SHARED | {'way', 'teacher'} == set(record) and json.dumps(record)
        assert record['bench'] == 'train' and record['runs'] == 2 and record['batch'] == 8
        assert record['median_ms'] > 0 and record['peak_mib'] > 0
        assert record['images_per_s'] == pytest.approx(8e3 / record['median_ms'])
    assert [record['dtype'] for record in records] == ['float32', 'float32', 'bfloat16']
    assert [record['layout'] for record in records] == ['nchw', 'channels_last', 'nchw']
    assert records[0]['ratio'] == 1


def test_first_steps_agree_with_float64(records):
    published, channels_last, bf16 = (record['error'] for record in records)
    assert 0 < published < 1e-4 and 0 < channels_last < 1e-4 < bf16 < 0.2
    assert 'against float64' in records[0]['notes'][-1]


@pytest.mark.parametrize('model, args', [
    ('casvit_xs', (('depths', (1, 1, 1, 1)),)), ('mlla_t', (('depths', (1, 1, 1, 1)), ('width', 32)))])
@pytest.mark.parametrize('teacher', ['none', 'mobilenetv2_035'])
def test_the_comparison_systems_take_the_same_steps(model, args, teacher):
    """With a teacher they need the second head that they do not have by default.

    Their gradient jumps where rounding carries an input of a ReLU over 0, by up to 3.1e-3 here (5e-7 with SiLU in place
    of ReLU): then a way that only orders numbers otherwise is off by more than is allowed, and is not timed.
    """
    bench = dataclasses.replace(TINY, model=model, teacher=teacher, model_args=args)
    if teacher != 'none':
        with pytest.raises(Exception, match='one head'):
            bench_training(bench, [PUBLISHED])
        bench = dataclasses.replace(bench, model_args=(*args, ('distilled', True)))
    records = bench_training(bench, ['channels_last', 'bf16'])
    assert [r['model'] for r in records] == [model] * 3 and records[0]['median_ms'] > 0 and records[2]['median_ms'] > 0
    assert records[1]['median_ms'] or 'not timed: its first step is off by' in records[1]['notes'][0]
    assert 0 < records[0]['error'] < 2e-3 and 0 < records[1]['error'] < 1e-2 < records[2]['error'] < 0.2


def test_the_table_names_teacher_batch_device_and_the_fastest(records):
    text = describe_training(records)
    assert f'teacher {records[0]["teacher"]}, batch 8 at 64 x 64, cpu' in text
    assert all(record['way'] in text for record in records) and 'fastest: ' in text
    assert ('with random weights' in text) == (records[0]['teacher'] != 'none')


def test_a_teacher_takes_memory():
    peaks = [bench_training(dataclasses.replace(TINY, teacher=teacher), [PUBLISHED])[0]['peak_mib']
             for teacher in ('none', 'resnet18')]
    assert peaks[1] > peaks[0] + 40  # MiB of the weights of resnet18


@pytest.mark.parametrize('broken', ['gradient', 'forward'])
def test_a_way_that_computes_something_else_is_not_timed(monkeypatch, broken):
    def change(module, args, out):
        return (out + out.detach()) / 2 if broken == 'gradient' else out + 0.1 * out.roll(1, dims=1)

    def spoil(model, config):
        if config.channels_last:
            model.stages[2].register_forward_hook(change)

    monkeypatch.setattr(caretrans.bench.training, 'put_kernels', spoil)
    published, spoiled = bench_training(TINY, ['channels_last'])
    assert published['median_ms'] > 0
    assert spoiled['median_ms'] is None and spoiled['ratio'] is None and spoiled['error'] > 2e-4
    assert 'not timed: its first step is off by' in spoiled['notes'][0]
    assert 'not timed' in describe_training([published, spoiled])


def test_a_way_that_fails_is_reported_and_the_others_are_measured(monkeypatch):
    def fail(model, config):
        if config.amp == 'bf16':
            raise RuntimeError('no such kernel')

    monkeypatch.setattr(caretrans.bench.training, 'put_kernels', fail)
    published, failed = bench_training(TINY, ['bf16'])
    assert published['ratio'] == 1 and failed['median_ms'] is None
    assert failed['notes'][0] == 'not timed: RuntimeError: no such kernel'


def test_a_published_way_that_is_wrong_itself_says_so_and_excuses_no_other(monkeypatch):
    def spoil(model, config):
        if model.stem.conv.weight.dtype == torch.float32:  # all but the reference
            model.stages[2].register_forward_hook(lambda module, args, out: out + 0.1 * out.roll(1, dims=1))

    monkeypatch.setattr(caretrans.bench.training, 'put_kernels', spoil)
    published, other = bench_training(TINY, ['channels_last'])
    assert published['error'] > 2e-3 and 'the published way is not exact itself' in published['notes'][0]
    assert other['error'] == pytest.approx(published['error'], rel=1e-2) and other['median_ms'] is None
    assert 'the published way is not exact itself' in describe_training([published, other])


def make_candidate(way=None):
    subject = caretrans.bench.training.Subject.make(TINY, 8)
    return caretrans.bench.training.Candidate(TINY, subject, way or Way())


def test_a_first_step_that_overflows_is_made_again_with_a_smaller_scale():
    wanted = make_candidate().make_first()
    candidate = make_candidate(Way(frozenset({'fp16'})))
    candidate.stepper.scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 26)
    first = candidate.make_first()
    assert candidate.stepper.steps > 1 and candidate.stepper.scaler.get_scale() < 2. ** 26
    assert caretrans.bench.training._measure_error(first, wanted) < caretrans.bench.training.TOLERANCES['float16']


def test_a_first_step_that_overflows_at_every_scale_is_given_up(monkeypatch):
    monkeypatch.setattr(caretrans.bench.training, 'ATTEMPTS', 2)
    candidate = make_candidate(Way(frozenset({'fp16'})))
    candidate.stepper.scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 40)
    with pytest.raises(TrainingError, match='left out 2 times: every gradient overflows'):
        candidate.make_first()


def test_parameters_without_a_gradient_are_left_out_and_others_must_be_the_same():
    candidate = make_candidate()
    candidate.parameters['stages.0.blocks.0.gamma_of_none'] = torch.nn.Parameter(torch.zeros(3))
    first, wanted = candidate.make_first(), make_candidate().make_first()
    assert caretrans.bench.training._measure_error(first, wanted) == 0
    name, gradient = next(iter(first.gradient.items()))
    for changed in ({**first.gradient, name: gradient.flatten()[1:]}, {**first.gradient, 'more': gradient},
                    {key: value for key, value in first.gradient.items() if key != name}):
        with pytest.raises(TrainingError, match='is in one alone'):
            caretrans.bench.training._measure_error(first._replace(gradient=changed), wanted)


def test_a_batch_that_does_not_fit_is_halved_for_all_ways(monkeypatch):
    fits = caretrans.bench.training.Candidate.__call__

    def run_out(self):
        if len(self.images) > 2:
            raise torch.OutOfMemoryError('out of memory')
        return fits(self)

    monkeypatch.setattr(caretrans.bench.training.Candidate, '__call__', run_out)
    records = bench_training(dataclasses.replace(TINY, batch=10), ['channels_last'])
    assert {record['batch'] for record in records} == {2}
    assert all('a batch of 10 did not fit: 2' in record['notes'] for record in records)
    monkeypatch.setattr(caretrans.bench.training.Candidate, '__call__', lambda self: (_ for _ in ()).throw(
        torch.OutOfMemoryError('out of memory')))
    with pytest.raises(ConfigError, match='does not fit into the memory of cpu, not even with 2 images'):
        bench_training(TINY, [PUBLISHED])


@pytest.mark.parametrize('name, message', [
    ('fast', "No way of training 'fast': take published, or some of tf32, channels_last"),
    ('bf16+fp16', 'has two precisions'), ('tf32', 'tf32 needs a GPU, the device is cpu'),
    ('channels_last+kernels', "'channels_last.kernels': the kernels run on CUDA GPUs, not on cpu: leave")])
def test_ways_that_cannot_be_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        bench_training(TINY, [name])


@pytest.mark.parametrize('changes, message', [
    (dict(model='care_s7'), "No model 'care_s7'"), (dict(teacher='nobody'), "No teacher 'nobody'"),
    (dict(model='resnet18', model_args=(), teacher='resnet18'), 'resnet18 has no second head')])
def test_models_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        bench_training(dataclasses.replace(TINY, **changes), [PUBLISHED])


def test_names_of_ways_come_back():
    for device in (CPU, torch.device('cuda')):
        names = [name for name in list_ways(device) if 'kernels' not in name]
        assert [parse_way(name, device).name for name in names] == names and names[0] == PUBLISHED
    assert parse_way('bf16+channels_last', CPU).name == 'channels_last+bf16'


def test_kernels_are_a_way_where_they_run(monkeypatch):
    cuda = torch.device('cuda')
    monkeypatch.setattr(training_ways, 'why_unavailable', lambda device: '')
    assert 'channels_last+bf16+compile+kernels' in list_ways(cuda)
    assert parse_way('kernels', cuda).settings == dict(
        amp='off', tf32=False, channels_last=False, compile=False, kernels=True)
    monkeypatch.setattr(training_ways, 'why_unavailable', lambda device: 'Triton is not installed')
    assert not any('kernels' in name for name in list_ways(cuda))
    with pytest.raises(ConfigError, match="'kernels': Triton is not installed: leave kernels out"):
        parse_way('kernels', cuda)


def test_kernels_that_do_not_run_are_no_way_of_training(monkeypatch):
    monkeypatch.setattr(training_ways, 'why_unavailable', lambda device: '')  # those of caretrans.kernels stay
    published, kernels = bench_training(TINY, ['kernels'])
    assert published['kernels'] == 'torch' and kernels['kernels'] == 'triton' and kernels['median_ms'] is None
    assert 'not timed: ConfigError: kernels: none runs in care_s0' in kernels['notes'][0]


def test_precision_is_that_of_the_way_and_comes_back():
    def flags():
        return (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark)

    before = flags()
    with training_precision(Way(frozenset({'tf32'}))):
        assert flags() == (True, True, True)
    with training_precision(Way()):
        assert flags() == (False, False, True)
    assert flags() == before


# Curves ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def config(tmp_path_factory):
    root = copy_images(tmp_path_factory.mktemp('photographs'), per_class=8)
    return TrainConfig(**{
        **read_recipe('care_s0_fruit14'), 'data': str(root), 'img_size': 64, 'batch_size': 8, 'workers': 0,
        'model_args': dict(ls_init_value=0.1, depths=(1, 1, 1, 1))})


@pytest.fixture(scope='module')
def comparison(config):
    reports = []
    result = compare_curves(config, 'channels_last+bf16', CPU, steps=6, seeds=(0, 1), report=lambda: reports.append(1))
    assert len(reports) == 18
    return result


def test_runs_of_one_seed_see_the_same_images_in_the_same_order(comparison):
    same, other, faster = comparison.curves.values()
    assert list(comparison.curves) == ['published, seed 0', 'published, seed 1', 'channels_last+bf16, seed 0']
    assert len(same) == len(other) == len(faster) == 6 and all(map(math.isfinite, same + other + faster))
    assert faster[0] == pytest.approx(same[0], rel=2e-2) and faster != same
    assert abs(other[0] - same[0]) > abs(faster[0] - same[0])
    assert comparison.is_within_noise and comparison.distance < comparison.spread


def test_a_run_is_repeated_to_the_bit(config, comparison):
    again = compare_curves(config, 'channels_last', CPU, steps=6, seeds=(0, 1))
    for seed in (0, 1):
        assert again.curves[f'published, seed {seed}'] == comparison.curves[f'published, seed {seed}']


def test_a_way_that_learns_something_else_is_not_within_noise(config, monkeypatch):
    def spoil(model, config):
        if config.amp == 'bf16':
            for parameter in model.stages.parameters():
                parameter.requires_grad_(False)
            model.register_forward_hook(lambda module, args, out: 30 * out)

    monkeypatch.setattr(caretrans.training.trainer, 'put_kernels', spoil)
    wrong = compare_curves(config, 'bf16', CPU, steps=4, seeds=(0, 1))
    assert not wrong.is_within_noise and 'NOT within noise' in describe_curves(wrong)


def test_curves_are_written_and_drawn(comparison, tmp_path):
    with open(write_curves(comparison, tmp_path / 'curves.csv')) as file:
        rows = list(csv.DictReader(file))
    assert [row['step'] for row in rows] == ['1', '2', '3', '4', '5', '6']
    for name, losses in comparison.curves.items():
        assert [float(row[name]) for row in rows] == losses
    assert draw_curves(comparison, tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert f'seeds are {comparison.spread:.4f} apart: within noise' in describe_curves(comparison)
    assert json.dumps(record_curves(comparison)) and record_curves(comparison)['within_noise']


def test_curves_are_smoothed_by_means():
    assert smooth_curve([1, 2, 3, 4], 2).tolist() == pytest.approx([1.5, 2.5, 3.5])
    assert len(smooth_curve(range(500))) == 500 - 25 + 1
    assert measure_distance([1, 2, 3], [2, 3, 1]) == pytest.approx(4 / 3)


def test_noise_is_the_mean_of_the_seeds():
    make = {'way': 'bf16', 'curves': {}, 'final': {}, 'steps': 2, 'description': ''}
    assert Comparison(distance=0.1, spread=0.1, **make).is_within_noise
    assert not Comparison(distance=0.11, spread=0.1, **make).is_within_noise


@pytest.mark.parametrize('options, message', [
    (dict(way='published'), "way='published' is the published one: name another"),
    (dict(way='bf16', seeds=(0, 0)), 'needs two different seeds'), (dict(way='bf16', steps=1), 'and two steps'),
    (dict(way='quick'), "No way of training 'quick'")])
def test_comparisons_that_cannot_be_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        compare_curves(config, device=CPU, **options)
