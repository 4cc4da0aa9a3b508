"""Models trained on equal terms: what is equal, what is refused, how it resumes, and what the tables say."""
import csv
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from launch import kill, list_differences, read_tensors, run, start, wait_for
from photos import copy_images

from caretrans.__main__ import main
from caretrans.bench import compare as command
from caretrans.bench.compare import compare
from caretrans.bench.compare_plan import TITLE, parse_plan
from caretrans.bench.compare_report import RunFacts, describe_comparison, draw_comparison
from caretrans.errors import ConfigError, TrainingError
from caretrans.measure.sample_network import SAMPLE_IMAGES
from caretrans.models.backbone import find_family

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('no_curves')]

MODELS = ('care_s0', 'casvit_xs', 'mlla_t')
TINY = [
    '--recipe', 'care_s0_fruit14', '--epochs', '2', '--warmup-epochs', '1', '--val-interval', '1', '--img-size', '32',
    '--val-img-size', '32', '--batch-size', '4', '--workers', '0', '--device', 'cpu', '--runs', '1', '--model-args',
    'depths=[1,1,1,1]']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return copy_images(tmp_path_factory.mktemp('data'), 4)


@pytest.fixture(scope='module')
def compared(data, tmp_path_factory):
    """Two families with two seeds: the plan, and the results."""
    plan = parse_plan([str(data), *TINY, '--model', 'care_s0', 'casvit_xs', '--seeds', '0', '1', '--output',
                       str(tmp_path_factory.mktemp('comparison') / 'out')])
    return plan, compare(plan)


# Flags ----------------------------------------------------------------------------------------------------------------

def test_all_models_share_every_setting_but_the_arguments_of_the_recipes_family(data):
    plan = parse_plan([str(data), *TINY[:-2], '--model', *MODELS, '--lr', '2e-3', '--model-args', 'drop_rate=0.1'])
    assert plan.models == list(MODELS) and plan.seeds == [42]
    configs = [plan.configs[model, 42] for model in MODELS]
    shared = [{key: value for key, value in config.to_dict().items() if key not in ('model', 'model_args', 'output')}
              for config in configs]
    assert shared[0] == shared[1] == shared[2] and shared[0]['lr'] == 2e-3 and shared[0]['batch_size'] == 4
    assert [config.model_args for config in configs] == [
        dict(ls_init_value=0.1, drop_rate=0.1), dict(drop_rate=0.1), dict(drop_rate=0.1)]
    assert plan.skipped_args == dict(casvit_xs=dict(ls_init_value=0.1), mlla_t=dict(ls_init_value=0.1))


def test_the_folder_depends_on_the_settings_however_the_data_are_written(data, monkeypatch):
    def folder(*flags, written=data):
        return parse_plan([str(written), *TINY, '--model', 'care_s0', 'casvit_xs', *flags]).folder

    assert folder() == folder('--workers', '1') and folder().parent == Path('runs')
    assert len({folder(), folder('--lr', '2e-3'), folder('--seeds', '1', '2'), folder('--device-batch', '2')}) == 4
    monkeypatch.chdir(data.parent)
    assert folder() == folder(written=data.name) == folder(written=f'{data.name}/')


def test_without_data_and_recipe_one_of_each_family_trains_on_the_bundled_images(monkeypatch):
    monkeypatch.chdir(SAMPLE_IMAGES.parents[1])
    plan = parse_plan(['--seeds', '0', '1'])
    assert plan.models == list(MODELS) and plan.seeds == [0, 1] and plan.recipe == 'care_s0_fruit14'
    assert parse_plan([]).folder == parse_plan(
        ['data/fruit14', '--recipe', 'care_s0_fruit14', '--model', *MODELS]).folder
    assert parse_plan(['DATA']).recipe == '' and parse_plan(['DATA', '--epochs', '9']).models == list(MODELS)


def test_wildcards_families_and_aliases_are_accepted():
    assert parse_plan(['DATA', '--model', 'casvit_*']).models == ['casvit_m', 'casvit_s', 'casvit_t', 'casvit_xs']
    assert parse_plan(['DATA', '--model', 'casvit_xs', 'rcvit_xs', 'mila_t']).models == ['casvit_xs', 'mlla_t']
    assert [find_family(name) for name in ('rcvit_xs', 'casvit_xs', 'mila_t', 'fastvit_t8.apple_in1k')] == [
        'casvit', 'casvit', 'mlla', 'fastvit']


# Refusals before any training -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, message', [
    (['--model', 'casvit_xx'], 'no such model'), (['--frobnicate'], 'frobnicate'),
    (['--seeds', '1', '1'], 'each once'), (['--seeds', '1', '--seed', '2'], 'one of them'), (['--seeds', '-1'], '-1'),
    (['--no-resume'], '--no-resume'), (['--recipe', 'care_s9'], 'No recipe'),
    (['--checkpoint', 'x.pth'], 'it fits only one model'),
    (['--model', 'care_s0', 'casvit_xs', '--teacher', 'resnet18'], 'casvit_xs has no second head'),
    (['--model', 'care_s0', 'casvit_xs', '--model-args', 'ablation=no_inter1'], 'casvit_xs: .*ablation'),
    (['--kernels'], 'kernels'), (['--batch-size', '64'], 'do not fill a batch'),
    (['--update', 'README.md'], 'README.md: it is not a writable page with the heading'),
    (['--update', 'LICENSE/a.md'], '--update LICENSE')])
def test_bad_input_is_one_line_before_any_training(data, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(command, 'train', None)
    monkeypatch.chdir(SAMPLE_IMAGES.parents[1])
    tiny = TINY if '--recipe' not in flags else TINY[2:]
    models = [] if '--model' in flags else ['--model', 'care_s0']
    assert main(['compare', str(data), *tiny, '--output', str(tmp_path / 'out'), *models, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('caretrans compare: ') and err.count('\n') == 1
    assert re.search(message, err)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('change, message', [
    (['--lr', '2e-3'], 'lr 0.004 there, 0.002 here'), (['--smoothing', '0'], 'smoothing'),
    (['--val-interval', '2'], 'val_interval'), (['--on-nan', 'skip'], 'on_nan'),
    (['--device-batch', '2'], 'device_batch'), (['--max-unreadable', '0.5'], 'max_unreadable'),
    (['--model', 'care_s0', '--seeds', '1'], 'model casvit_xs not here; seed 0 not here')])
def test_a_folder_of_another_comparison_is_refused(data, compared, change, message):
    flags = [f'{data}/', *TINY, '--output', str(compared[0].folder)]
    same = [] if '--model' in change else ['--model', 'care_s0', 'casvit_xs', '--seeds', '0', '1']
    with pytest.raises(ConfigError, match=f'another comparison .*{message}'):
        compare(parse_plan([*flags, *change, *same]))


def test_a_folder_of_something_else_is_refused(compared, tmp_path):
    (tmp_path / 'file').write_text('mine', encoding='utf-8')
    with pytest.raises(ConfigError, match='other files than a comparison'):
        compare(replace(compared[0], folder=tmp_path))


# Results --------------------------------------------------------------------------------------------------------------

def test_every_run_is_one_of_train_py_with_the_same_steps(compared):
    plan, result = compared
    runs = [(model, seed) for model in ('care_s0', 'casvit_xs') for seed in (0, 1)]
    folders = [plan.folder / f'{model}-seed{seed}' for model, seed in runs]
    facts = [json.loads((folder / 'environment.json').read_text(encoding='utf-8')) for folder in folders]
    assert {(f['train_images'], f['batch_size'], f['epochs'], f['steps_per_epoch']) for f in facts} == {(8, 4, 2, 2)}
    assert [f['model'] for f in facts] == ['care_s0'] * 2 + ['casvit_xs'] * 2
    assert yaml.safe_load((folders[3] / 'config.yaml').read_text(encoding='utf-8'))['seed'] == 1
    assert [(r.model, r.seed) for r in result.runs] == runs


def test_means_and_spreads_are_those_of_the_runs(compared):
    for figures in compared[1].models:
        record, top1 = figures.to_dict(), [run.top1 for run in figures.runs]
        assert record['top1'] == pytest.approx(sum(top1) / 2)
        assert record['top1_std'] == pytest.approx(abs(top1[0] - top1[1]) / 2 ** 0.5)
        assert record['eager_median_ms'] > 0 and record['fused_median_ms'] > 0 and record['fused_error'] < 5e-5
        assert record['gmacs_fused'] > 0 and record['height'] == 32


def test_tables_and_plot_are_written(compared):
    plan, result = compared
    contents = json.loads((plan.folder / 'comparison.json').read_text(encoding='utf-8'))
    assert contents['models'] == [figures.to_dict() for figures in result.models] and contents['settings']['lr'] == 4e-3
    assert set(contents) == {'models', 'runs', 'latencies', 'facts', 'settings', 'recipe', 'left_out', 'model_args',
                             'device', 'versions', 'commit', 'failures'}
    with open(plan.folder / 'comparison.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [(row['model'], row['family'], row['seeds']) for row in rows] == [
        ('care_s0', 'care', '0 1'), ('casvit_xs', 'casvit', '0 1')]
    assert (plan.folder / 'comparison.png').read_bytes().startswith(b'\x89PNG')
    text = (plan.folder / 'comparison.md').read_text(encoding='utf-8')
    assert '| `care_s0` | ' in text and ' ± ' in text
    for said in ('not of the published accuracies', '2 epochs = 4 steps of 4 images = 16 images of 32 px',
                 '8 training and 8 validation images, 2 classes (chance: 50.0 %)',
                 'ls_init_value=0.1, which the recipe sets for its own model family, does not apply to casvit_xs',
                 'standard deviation over 2 seeds', '1 thread, batch 1, float32'):
        assert said in text, said


def test_differences_between_models_and_machines_are_named(compared):
    _, result = compared
    assert not any('evaluated images,' in line or 'of the runs' in line for line in describe_comparison(result))
    other = dict(result.facts['casvit_xs'].described, eval_config=dict(
        result.facts['care_s0'].eval_config, crop_pct=0.9))
    changed = replace(result, facts=dict(result.facts, casvit_xs=RunFacts(other)))
    assert any(line.startswith('differs: crop_pct of evaluated images, 1.0 of care_s0, 0.9 of casvit_xs')
               for line in describe_comparison(changed))
    care, casvit = result.models
    moved = replace(care.runs[0], machine=replace(care.runs[0].machine, torch='2.6.0', compile=True))
    lines = describe_comparison(replace(result, models=[replace(care, runs=[moved, care.runs[1]]), casvit]))
    assert any(line.startswith('differs: torch of the runs, 2.6.0 of care_s0 (seed 0); ') for line in lines)
    assert any(line.startswith('differs: compile of the runs, True of care_s0 (seed 0); False of ') for line in lines)


def test_one_colour_for_each_family_and_bars_for_several_seeds(compared, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: figures.append(self))
    _, result = compared
    second = replace(result.models[0], counts=replace(result.models[0].counts, model='care_s1'))
    draw_comparison(replace(result, models=[*result.models, second]), tmp_path / 'plot.png')
    axes = figures[0].axes[0]
    assert {text.get_text() for text in axes.texts} == {'care_s0', 'casvit_xs', 'care_s1'}
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ['care', 'casvit', 'fused', 'eager'] and len(axes.containers) == 6
    assert len({container.lines[0].get_color() for container in axes.containers}) == 2
    assert all(container.has_yerr for container in axes.containers)


# Resuming -------------------------------------------------------------------------------------------------------------

def test_a_finished_comparison_trains_nothing_again_and_can_grow(data, compared, monkeypatch):
    plan, _ = compared
    trained, train = [], command.train
    monkeypatch.setattr(command, 'train', lambda config: (trained.append(Path(config.output).name), train(config)))
    page = plan.folder / 'page.md'
    page.write_text(f'{TITLE}\nold\n', encoding='utf-8')
    flags = [str(data), *TINY, '--output', str(plan.folder), '--update', str(page), '--model', 'care_s0', 'casvit_xs']
    result = compare(parse_plan([*flags, '--seeds', '0', '1']))
    assert trained == [] and len(result.runs) == 4
    text = page.read_text(encoding='utf-8')
    assert text.startswith(f'{TITLE}\n\n') and '| model |' in text and 'old' not in text
    result = compare(parse_plan([*flags, '--seeds', '0', '1', '2']))
    assert trained == ['care_s0-seed2', 'casvit_xs-seed2'] and len(result.runs) == 6


def test_a_run_that_fails_is_reported_and_the_others_are_compared(data, tmp_path, monkeypatch, capsys):
    train = command.train

    def train_or_fail(config):
        if config.model == 'care_s0':
            raise TrainingError('the loss is not finite')
        return train(config)

    monkeypatch.setattr(command, 'train', train_or_fail)
    assert main(['compare', str(data), *TINY, '--model', 'care_s0', 'casvit_xs', '--output', str(tmp_path / 'o')]) == 1
    out, err = capsys.readouterr()
    assert 'failed: care_s0, seed 42: the loss is not finite' in err
    contents = json.loads((tmp_path / 'o' / 'comparison.json').read_text(encoding='utf-8'))
    assert [r['model'] for r in contents['models']] == ['casvit_xs']


def test_killed_and_started_again_it_ends_with_the_same_weights(data, compared, tmp_path):
    flags = ('compare', str(data), *TINY, '--save-steps', '1', '--model', 'casvit_xs', 'care_s0', '--seed', '0')
    whole, broken = compared[0].folder, tmp_path / 'broken'
    process = start('-m', 'caretrans', *flags, '--output', broken, log=tmp_path / 'log')
    first, second = broken / 'casvit_xs-seed0', broken / 'care_s0-seed0'
    assert wait_for(lambda: (second / 'last.pth.tar').exists(), process)
    kill(process)
    before = (first / 'result.json').stat().st_mtime_ns
    time.sleep(0.01)
    out, _ = run('-m', 'caretrans', *flags, '--output', broken)
    assert 'run 1 of 1: care_s0, seed 0' in out and f' from {second / "last.pth.tar"}: epoch ' in out
    assert (first / 'result.json').stat().st_mtime_ns == before
    for name in (first.name, second.name):
        assert not list_differences(*(read_tensors(folder / name / 'last.pth.tar') for folder in (whole, broken)))
    assert torch.load(second / 'last.pth.tar', weights_only=True)['epoch'] == 2
