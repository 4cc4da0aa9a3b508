"""Models trained on equal terms: what is equal, what is refused, what goes on, and what the tables say."""
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
from caretrans.bench import comparison
from caretrans.bench.comparison import compare, parse_plan
from caretrans.bench.comparison_report import describe_comparison, draw_comparison
from caretrans.bench.readme import BEGIN, END, find_place
from caretrans.errors import ConfigError, TrainingError
from caretrans.measure.sample_network import SAMPLE_IMAGES
from caretrans.models.backbone import find_family

MODELS = ('care_s0', 'casvit_xs', 'mlla_t')
TINY = [
    '--recipe', 'care_s0_fruit14', '--epochs', '2', '--warmup-epochs', '1', '--val-interval', '1', '--img-size', '32',
    '--val-img-size', '32', '--batch-size', '4', '--workers', '0', '--device', 'cpu', '--runs', '1']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return copy_images(tmp_path_factory.mktemp('data'), 4)


@pytest.fixture(scope='module')
def compared(data, tmp_path_factory):
    """Two families with two seeds: the plan, and what came out."""
    plan = parse_plan([str(data), *TINY, '--model', 'care_s0', 'casvit_xs', '--seeds', '0', '1', '--output',
                       str(tmp_path_factory.mktemp('comparison') / 'out')])
    return plan, compare(plan)


# What is asked for ----------------------------------------------------------------------------------------------------

def test_all_models_share_every_setting_but_the_arguments_of_the_recipes_family(data):
    plan = parse_plan([str(data), *TINY, '--model', *MODELS, '--lr', '2e-3', '--model-args', 'drop_rate=0.1'])
    assert plan.models == list(MODELS) and plan.seeds == [42]
    configs = [plan.configs[model, 42] for model in MODELS]
    shared = [{key: value for key, value in config.to_dict().items() if key not in ('model', 'model_args', 'output')}
              for config in configs]
    assert shared[0] == shared[1] == shared[2] and shared[0]['lr'] == 2e-3 and shared[0]['batch_size'] == 4
    assert [config.model_args for config in configs] == [
        dict(ls_init_value=0.1, drop_rate=0.1), dict(drop_rate=0.1), dict(drop_rate=0.1)]
    assert plan.left_out == dict(casvit_xs=dict(ls_init_value=0.1), mlla_t=dict(ls_init_value=0.1))


def test_the_folder_is_that_of_the_settings(data):
    def folder(*flags):
        return parse_plan([str(data), *TINY, '--model', 'care_s0', 'casvit_xs', *flags]).folder

    assert folder() == folder('--workers', '1') and folder().parent == Path('runs')
    assert len({folder(), folder('--lr', '2e-3'), folder('--seeds', '1', '2'), folder('--device-batch', '2')}) == 4


def test_the_folder_is_the_same_however_the_data_are_written(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    assert len({parse_plan([written, *TINY]).folder for written in (str(data), data.name, f'{data.name}/')}) == 1


def test_without_data_and_recipe_one_of_each_family_takes_the_bundled_photographs(monkeypatch):
    monkeypatch.chdir(SAMPLE_IMAGES.parents[1])
    plan = parse_plan(['--seeds', '0', '1'])
    assert plan.models == list(MODELS) and plan.seeds == [0, 1] and plan.recipe == 'care_s0_fruit14'
    assert parse_plan([]).folder == parse_plan(
        ['data/fruit14', '--recipe', 'care_s0_fruit14', '--model', *MODELS]).folder
    assert parse_plan(['DATA']).recipe == '' and parse_plan(['DATA', '--epochs', '9']).models == list(MODELS)


def test_wildcards_families_and_other_names_are_understood():
    assert parse_plan(['DATA', '--model', 'casvit_*']).models == ['casvit_m', 'casvit_s', 'casvit_t', 'casvit_xs']
    assert parse_plan(['DATA', '--model', 'casvit_xs', 'rcvit_xs', 'mila_t']).models == ['casvit_xs', 'mlla_t']
    assert [find_family(name) for name in ('rcvit_xs', 'casvit_xs', 'mila_t', 'fastvit_t8.apple_in1k')] == [
        'casvit', 'casvit', 'mlla', 'fastvit']


# Refused before any training ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, message', [
    (['--model', 'casvit_xx'], 'no such model'), (['--model', 'care_s0', '--frobnicate'], 'frobnicate'),
    (['--model', 'care_s0', '--seeds', '1', '1'], 'each once'),
    (['--model', 'care_s0', '--seeds', '1', '--seed', '2'], 'one of them'),
    (['--model', 'care_s0', '--seeds', '-1'], '-1'), (['--model', 'care_s0', '--no-resume'], '--no-resume'),
    (['--model', 'care_s0', '--recipe', 'care_s9'], 'No recipe'),
    (['--model', 'care_s0', '--checkpoint', 'x.pth'], 'it is of one model'),
    (['--model', 'care_s0', 'casvit_xs', '--teacher', 'resnet18'], 'casvit_xs has one head'),
    (['--model', 'care_s0', 'casvit_xs', '--model-args', 'ablation=no_inter1'], 'casvit_xs: .*ablation'),
    (['--model', 'care_s0', 'casvit_xs', '--kernels'], 'kernels'),
    (['--model', 'care_s0', '--batch-size', '64'], 'do not fill a batch'),
    (['--model', 'care_s0', '--update', 'none.md'], 'none.md is not a file')])
def test_bad_input_is_one_line_before_any_training(data, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(comparison, 'train', None)
    tiny = TINY if '--recipe' not in flags else TINY[2:]
    assert main(['compare', str(data), *tiny, '--output', str(tmp_path / 'out'), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('caretrans compare: ') and err.count('\n') == 1
    assert re.search(message, err)
    assert not (tmp_path / 'out').exists()


def test_a_folder_of_something_else_is_refused(data, compared, tmp_path):
    (tmp_path / 'file').write_text('mine')
    plan, _ = compared
    with pytest.raises(ConfigError, match='something else than a comparison'):
        compare(replace(plan, folder=tmp_path))
    flags = [f'{data}/', *TINY, '--output', str(plan.folder)]
    for change, message in ((['--lr', '2e-3'], 'lr 0.004 there, 0.002 here'), (['--smoothing', '0'], 'smoothing'),
                            (['--val-interval', '2'], 'val_interval'), (['--on-nan', 'skip'], 'on_nan'),
                            (['--device-batch', '2'], 'device_batch'), (['--max-unreadable', '0.5'], 'max_unreadable')):
        with pytest.raises(ConfigError, match=f'another comparison .*{message}'):
            compare(parse_plan([*flags, *change, '--model', 'care_s0', 'casvit_xs', '--seeds', '0', '1']))
    with pytest.raises(ConfigError, match='model casvit_xs not here; seed 0 not here'):
        compare(parse_plan([*flags, '--model', 'care_s0', '--seeds', '1']))


# What is trained and written ------------------------------------------------------------------------------------------

def test_every_run_is_one_of_train_py_with_the_same_steps(compared):
    plan, result = compared
    folders = [plan.folder / f'{model}-seed{seed}' for model in ('care_s0', 'casvit_xs') for seed in (0, 1)]
    facts = [json.loads((folder / 'environment.json').read_text()) for folder in folders]
    assert {(f['train_images'], f['batch_size'], f['epochs'], f['steps_per_epoch']) for f in facts} == {(8, 4, 2, 2)}
    assert [f['model'] for f in facts] == ['care_s0'] * 2 + ['casvit_xs'] * 2
    assert yaml.safe_load((folders[3] / 'config.yaml').read_text())['seed'] == 1
    assert [(r['model'], r['seed']) for r in result.runs] == [
        ('care_s0', 0), ('care_s0', 1), ('casvit_xs', 0), ('casvit_xs', 1)]


def test_means_and_spreads_are_those_of_the_runs(compared):
    _, result = compared
    for record in result.models:
        top1 = [run['top1'] for run in result.runs if run['model'] == record['model']]
        assert record['top1'] == pytest.approx(sum(top1) / 2)
        assert record['top1_std'] == pytest.approx(abs(top1[0] - top1[1]) / 2 ** 0.5)
        assert record['eager_median_ms'] > 0 and record['fused_median_ms'] > 0 and record['fused_error'] < 5e-5
        assert record['gmacs_fused'] > 0 and record['height'] == 32


def test_tables_and_plot_are_written(compared):
    plan, result = compared
    contents = json.loads((plan.folder / 'comparison.json').read_text())
    assert contents['models'] == result.models and contents['settings']['lr'] == 4e-3
    with open(plan.folder / 'comparison.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['model'], row['family'], row['seeds']) for row in rows] == [
        ('care_s0', 'care', '0 1'), ('casvit_xs', 'casvit', '0 1')]
    assert (plan.folder / 'comparison.png').read_bytes().startswith(b'\x89PNG')
    text = (plan.folder / 'comparison.md').read_text()
    assert '| `care_s0` | ' in text and ' ± ' in text
    for said in ('not of the published accuracies', '2 epochs = 4 steps of 4 images = 16 images of 32 px',
                 '8 training and 8 validation images, 2 classes (chance: 50.0 %)',
                 'ls_init_value=0.1, which the recipe gives to its own family, is not given to casvit_xs',
                 'standard deviation over 2 seeds', '1 thread(s), batch 1, float32'):
        assert said in text, said


def test_the_page_of_comparisons_has_a_place_for_the_table():
    before, after = find_place(Path(comparison.__file__).parents[2] / 'docs' / 'comparison.md')
    assert before.endswith(BEGIN) and after.startswith(END)


def test_what_is_prepared_otherwise_is_named(compared):
    _, result = compared
    other = dict(result.facts['care_s0']['eval_config'], crop_pct=0.9)
    changed = replace(result, facts=dict(result.facts, casvit_xs=dict(result.facts['casvit_xs'], eval_config=other)))
    assert any(line.startswith('differs: crop_pct of evaluated images, 1.0 of care_s0, 0.9 of casvit_xs')
               for line in describe_comparison(changed))
    assert not any('evaluated images,' in line for line in describe_comparison(result))


def test_runs_of_other_machines_and_versions_are_named(compared):
    _, result = compared
    first, *others = result.runs
    changed = replace(result, runs=[dict(first, machine=dict(first['machine'], torch='2.6.0', compile=True)), *others])
    lines = describe_comparison(changed)
    assert any(line.startswith('differs: torch of the runs, 2.6.0 of care_s0 (seed 0); ') for line in lines)
    assert any(line.startswith('differs: compile of the runs, True of care_s0 (seed 0); False of ') for line in lines)
    assert not any('of the runs' in line for line in describe_comparison(result))


def test_one_colour_for_each_family_and_bars_for_several_seeds(compared, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: (figures.append(self), save(
        self, *args, **kwargs)))
    _, result = compared
    second = dict(result.models[0], model='care_s1')
    draw_comparison(replace(result, models=[*result.models, second]), tmp_path / 'plot.png')
    axes = figures[0].axes[0]
    assert {text.get_text() for text in axes.texts} == {'care_s0', 'casvit_xs', 'care_s1'}
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ['care', 'casvit', 'fused', 'eager'] and len(axes.containers) == 6
    assert len({container.lines[0].get_color() for container in axes.containers}) == 2
    assert all(container.has_yerr for container in axes.containers)


# Going on -------------------------------------------------------------------------------------------------------------

def test_a_finished_comparison_trains_nothing_again_and_can_grow(data, compared, monkeypatch):
    plan, _ = compared
    trained, train = [], comparison.train
    monkeypatch.setattr(comparison, 'train', lambda config: (trained.append(Path(config.output).name), train(config)))
    page = plan.folder / 'page.md'
    page.write_text(f'above\n{BEGIN}\nwhat was there\n{END}\nbelow\n')
    flags = [str(data), *TINY, '--output', str(plan.folder), '--update', str(page)]
    result = compare(parse_plan([*flags, '--model', 'care_s0', 'casvit_xs', '--seeds', '0', '1']))
    assert trained == [] and len(result.runs) == 4
    assert page.read_text().startswith(f'above\n{BEGIN}\n| model |') and 'what was there' not in page.read_text()
    result = compare(parse_plan([*flags, '--model', 'care_s0', 'casvit_xs', '--seeds', '0', '1', '2']))
    assert trained == ['care_s0-seed2', 'casvit_xs-seed2'] and len(result.runs) == 6


def test_a_run_that_fails_is_reported_and_the_others_are_compared(data, tmp_path, monkeypatch, capsys):
    train = comparison.train

    def train_or_fail(config):
        if config.model == 'care_s0':
            raise TrainingError('the loss is not finite')
        return train(config)

    monkeypatch.setattr(comparison, 'train', train_or_fail)
    assert main(['compare', str(data), *TINY, '--model', 'care_s0', 'casvit_xs', '--output', str(tmp_path / 'o')]) == 1
    out, err = capsys.readouterr()
    assert 'failed: care_s0, seed 42: the loss is not finite' in err
    assert [r['model'] for r in json.loads((tmp_path / 'o' / 'comparison.json').read_text())['models']] == ['casvit_xs']


def test_killed_and_started_again_it_ends_with_the_same_weights(data, tmp_path):
    command = ('compare', str(data), *TINY, '--save-steps', '1', '--model', 'casvit_xs', 'care_s0')
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    assert main([*command, '--output', str(whole)]) == 0
    process = start('-m', 'caretrans', *command, '--output', broken, log=tmp_path / 'log')
    first, second = broken / 'casvit_xs-seed42', broken / 'care_s0-seed42'
    assert wait_for(lambda: (second / 'last.pth.tar').exists(), process)
    kill(process)
    before = (first / 'result.json').stat().st_mtime_ns
    time.sleep(0.01)
    out, _ = run('-m', 'caretrans', *command, '--output', broken)
    assert 'run 1 of 1: care_s0, seed 42' in out and 'resumes from' in out
    assert (first / 'result.json').stat().st_mtime_ns == before
    for name in (first.name, second.name):
        assert not list_differences(*(read_tensors(folder / name / 'last.pth.tar') for folder in (whole, broken)))
    assert torch.load(second / 'last.pth.tar', weights_only=True)['epoch'] == 2
