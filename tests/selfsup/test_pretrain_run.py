"""Pre-training as a run: data of any kind, exact resume, one and two processes, a collapse, and what comes after it."""
import csv
import json
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path
from signal import SIGTERM

import launch
import pytest
import torch
from launch import kill, list_differences, read_tensors, run, start, wait_for
from photos import copy_images
from published import SMALL, fill_tensor, golden, views

import caretrans.selfsup.training
from caretrans import config
from caretrans.__main__ import main
from caretrans.config import parse_train_config, read_recipe
from caretrans.data import EvalTransform, name_image, open_dataset
from caretrans.data.datasets import open_unlabelled
from caretrans.data.lmdb_reader import write_lmdb
from caretrans.data.loaders import Pass
from caretrans.data.samples import load_images, read_image
from caretrans.distributed import Processes
from caretrans.errors import ConfigError, DataError, TrainingError
from caretrans.selfsup import Design, Pretraining, demo
from caretrans.selfsup.config import PretrainConfig
from caretrans.selfsup.features import load_trunk
from caretrans.selfsup.optimizer import build_optimizer, build_schedule
from caretrans.selfsup.pretraining import momentum_at
from caretrans.selfsup.probe import ProbeSettings
from caretrans.selfsup.probing import ProbeConfig, score_neighbours
from caretrans.selfsup.training import PretrainTask, PretrainTrainer
from caretrans.training.run import train
from caretrans.training.steps import Stepper, train_steps

FLAGS = ['--model', 'test_resnet', '--img-size', 32, '--epochs', 3, '--warmup-epochs', 1, '--batch-size', 8,
         '--hidden', 16, '--out', 8, '--blocks', 1, '--attention-weight', 3, '--workers', 1, '--device', 'cpu',
         '--save-steps', 2, '--val-interval', 2, '--collapse', 0]
TIMES = ('images_per_s', 'seconds', 'data_wait')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return copy_images(tmp_path_factory.mktemp('images'), per_class=24)


def configure(*flags) -> PretrainConfig:
    return parse_train_config([str(flag) for flag in flags], config_type=PretrainConfig)


def pretrain(*flags):
    return train(configure(*flags), PretrainTrainer)


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp('runs') / 'undisturbed'
    pretrain(data, *FLAGS, '--output', folder)
    return folder


def read_rows(folder: Path) -> list:
    with open(folder / 'summary.csv', encoding='utf-8') as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def assert_same_run(folder: Path, expected: Path) -> None:
    """Student, teacher, optimizer and table are bit-identical."""
    assert not list_differences(*(read_tensors(path / 'last.pth.tar', 'pretraining') for path in (folder, expected)))
    mine, theirs = (torch.load(path / 'last.pth.tar', weights_only=True) for path in (folder, expected))
    for key, state in theirs['optimizer']['state'].items():
        assert all(torch.equal(value, mine['optimizer']['state'][key][name]) for name, value in state.items())
    assert mine['steps'] == theirs['steps'] and read_rows(folder) == read_rows(expected)


def test_a_run_writes_every_figure(undisturbed):
    rows = read_rows(undisturbed)
    assert [row['val_knn'] != '' for row in rows] == [False, True, True]
    for name in ('c', 't', 'attention', 'attention_student', 'spread_c', 'spread_t', 'momentum'):
        assert all(float(row[f'train_{name}']) > 0 for row in rows)
    total = [sum(float(row[f'train_{name}']) for name in ('c', 't', 'attention')) for row in rows]
    assert total == pytest.approx([float(row['train_loss']) for row in rows], rel=1e-5)
    momenta = [float(row['train_momentum']) for row in rows]
    expected = [sum(momentum_at(6 * epoch + step, 18) for step in range(6)) / 6 for epoch in range(3)]
    assert momenta == pytest.approx(expected, abs=1e-6)  # 1 after the last step
    facts = json.loads((undisturbed / 'environment.json').read_text(encoding='utf-8'))
    assert facts['method'] == 'care' and facts['train_images'] == 48 and facts['steps_per_epoch'] == 6
    parts = read_tensors(undisturbed / 'last.pth.tar', 'pretraining')
    student, teacher = ({key.partition('.')[2]: value for key, value in parts.items() if key.startswith(owner)}
                        for owner in ('student', 'teacher'))
    assert list_differences({key: student[key] for key in teacher}, teacher)  # they are not the same
    optimizer = torch.load(undisturbed / 'last.pth.tar', weights_only=True)['optimizer']
    assert len(optimizer['state']) == sum(not key.endswith(('mean', 'var', 'tracked')) for key in student)
    assert optimizer['param_groups'][0]['nesterov'] is False and len(optimizer['param_groups']) == 1


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(data, undisturbed, tmp_path):
    folder, log = tmp_path / 'killed', tmp_path / 'log.txt'
    flags = ['-m', 'caretrans', 'pretrain', data, *FLAGS, '--output', folder]
    for line in ('epoch 1/3', 'epoch 2/3'):
        process = start(*flags, log=log)
        assert wait_for(lambda line=line: line in log.read_text(encoding='utf-8'), process)
        kill(process)
    out, _ = run(*flags)
    assert 'resumes from' in out
    assert_same_run(folder, undisturbed)


def test_a_stopped_run_resumes_to_the_bit(data, undisturbed, tmp_path, monkeypatch):
    """SIGTERM in the middle of an epoch, between two steps."""
    folder, count = tmp_path / 'stopped', 0
    update = PretrainTask.update_ema

    def stop_at_step_8(self, step=None):
        nonlocal count
        update(self, step)
        count += 1
        if count == 8:
            os.kill(os.getpid(), SIGTERM)
    monkeypatch.setattr(PretrainTask, 'update_ema', stop_at_step_8)
    assert main(['pretrain', *map(str, (data, *FLAGS, '--output', folder))]) == 0
    monkeypatch.undo()
    assert torch.load(folder / 'last.pth.tar', weights_only=True)['steps'] == 9
    pretrain(data, *FLAGS, '--output', folder)
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_two_processes_compute_what_one_does_where_batch_norm_allows(data, tmp_path):
    """With passes of the same 4 images, weights agree; running statistics are updated in another order."""
    flags = [*FLAGS, '--device-batch', 4, '--epochs', 2, '--val-interval', 1]
    folders = [tmp_path / name for name in ('one', 'two')]
    pretrain(data, *flags, '--output', folders[0])
    run('-m', 'caretrans', 'pretrain', data, *flags, '--output', folders[1], processes=2)
    one, two = (read_tensors(folder / 'last.pth.tar', 'pretraining') for folder in folders)
    differences = list_differences(one, two)
    weights = {key: value for key, value in differences.items() if 'running' not in key and 'tracked' not in key}
    print(f'largest difference of a weight: {max(weights.values(), default=0):.1e}')
    assert max(weights.values(), default=0) < 1e-5
    assert any('running_mean' in key for key in differences)
    first, second = read_rows(folders[0]), read_rows(folders[1])
    for name in ('train_loss', 'train_momentum'):
        assert [float(row[name]) for row in first] == pytest.approx([float(row[name]) for row in second], rel=1e-4)


def test_a_run_computes_the_published_steps(tmp_path):
    """The loop of a run, with its task, optimizer and schedule, on the images and weights of the reference."""
    arrays, module = golden('care_r18_small'), Pretraining(SMALL).double()
    module.load_state_dict({
        key: fill_tensor(key.replace('student.', 'student_encoder.').replace('teacher.', 'teacher_encoder.')
                         .replace('trunk.', ''), tuple(value.shape))
        for key, value in module.state_dict().items()})
    steps, total = 3, int(arrays['total_iters'])
    task = PretrainTask(module, total, torch.device('cpu'))
    optimizer = build_optimizer(module.student, .1)
    stepper = Stepper(optimizer, build_schedule(optimizer, 6, 1, 2))
    passes = [Pass(tuple(views(arrays, k)), torch.zeros(6), k) for k in range(steps)]
    task.update_ema(0)  # the reference starts from a teacher that is no copy
    found = []
    for step in train_steps(task, passes, stepper):
        task.update_ema(step=stepper.steps)
        found.append([step.loss, *step.terms[:3]])
    difference = (torch.tensor(found) - torch.from_numpy(arrays['losses'][:steps])).abs().max()
    print(f'largest difference {difference:.1e}')
    assert difference < 1e-5  # the loop sums figures in float32


def test_a_run_in_bf16_with_accumulation_and_lars(data, tmp_path):
    pretrain(data, *FLAGS, '--epochs', 1, '--warmup-epochs', 0, '--amp', 'bf16', '--device-batch', 4, '--opt', 'lars',
             '--channels-last', '--output', tmp_path / 'run')
    row, = read_rows(tmp_path / 'run')
    assert 0 < float(row['train_c']) < 16 and 0 < float(row['train_spread_c']) < 1.5
    parts = read_tensors(tmp_path / 'run' / 'last.pth.tar', 'pretraining')
    assert all(value.dtype == torch.float32 for key, value in parts.items() if 'tracked' not in key)


def test_the_demonstration_scores_every_kind_of_features(data, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'PROBE', ProbeSettings(epochs=2, batch_size=16))
    rows = [demo._run(str(data), tmp_path, name, 0, 1) for name in (demo.COLOUR, demo.RANDOM, *demo.METHODS)]
    lines = list(demo._tabulate(rows))
    assert [row.features for row in rows] == [line.split('  ')[0] for line in lines[1:]]
    assert all(0 <= row.neighbours <= 100 and 0 <= row.linear <= 100 for row in rows)
    assert f'{rows[2].neighbours:.1f} %' in lines[3]
    assert 'epoch 1/1' in (tmp_path / 'care-0.txt').read_text(encoding='utf-8')
    preparation = load_trunk('', 'test_resnet', random_weights=True, img_size=64, orientation='exif')[1]
    colours = []
    for dataset in (open_dataset(str(data), split) for split in ('train', 'val')):
        pixels, labels = load_images(dataset, range(len(dataset)), EvalTransform(preparation))
        colours.append((pixels.mean((2, 3)), labels))
    assert rows[0].neighbours == pytest.approx(score_neighbours(*colours, 2).top1, abs=2.1)  # one image of 48


def _hang(data, folder, name, seed, epochs) -> demo.Row:
    """In place of `demo._run`: all but the first row never end."""
    if name != demo.COLOUR:
        time.sleep(600)
    return demo.Row(name, seed, 0., 0.)


def test_an_interrupted_demonstration_leaves_no_process(data, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, '_run', _hang)
    monkeypatch.setattr(demo, 'get_context', lambda method: multiprocessing.get_context('fork'))
    rows = demo.compare(str(data), tmp_path / 'runs', [0])
    assert next(rows).features == demo.COLOUR
    others = multiprocessing.active_children()
    rows.close()  # what an exception of a signal does, too
    assert len(others) == 2 and not any(process.is_alive() for process in others)


# Data -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['flat', 'one level', 'split without classes', 'lmdb', 'shards'])
def test_images_of_any_kind_are_pre_trained_on(kind, data, tmp_path, capsys):
    root = tmp_path / 'images'
    images = sorted((data / 'train').rglob('*.jpg'))
    if kind in ('flat', 'split without classes'):
        folder = root / 'train' if kind == 'split without classes' else root
        folder.mkdir(parents=True)
        for image in images[:20]:
            shutil.copy(image, folder)
    elif kind == 'one level':
        shutil.copytree(data / 'train', root)
    elif kind == 'lmdb':
        for split in ('train', 'val'):
            write_lmdb(data / split, root / f'{split}.lmdb')
    else:
        assert main(['shard', str(data), str(root)]) == 0
    pretrain(root, *FLAGS, '--epochs', 1, '--warmup-epochs', 0, '--method', 'byol', '--output', tmp_path / 'run')
    out = capsys.readouterr().out
    count = 20 if kind in ('flat', 'split without classes') else 48
    assert f'byol: {count} images without labels, two views of 32 pixels' in out
    labelled = kind in ('lmdb', 'shards')
    scored = '20 nearest neighbours (temperature 0.07) among 48 of them classify the 48 images of val'
    assert (scored in out) == labelled
    assert ('no scores while training: the images have no labels' in out) == (not labelled)
    assert (read_rows(tmp_path / 'run')[0]['val_knn'] != '') == labelled


def test_batch_norm_spans_devices_but_not_in_the_t_stream(data):
    trainer = PretrainTrainer(configure(data, *FLAGS, '--sync-bn'), Processes(), torch.device('cpu'))
    trainer.train_loader.close()
    for encoder in (trainer.model.student, trainer.model.teacher):
        kinds = {name: {type(part) for part in child.modules() if 'BatchNorm' in type(part).__name__}
                 for name, child in encoder.named_children()}
        spanning = {torch.nn.SyncBatchNorm}
        assert kinds['fc1'] == kinds['fc2'] == spanning and kinds['trans'] == {torch.nn.BatchNorm2d}
        assert all(issubclass(kind, torch.nn.SyncBatchNorm) for kind in kinds['trunk']) and kinds['trunk']
    optimized = [p for group in trainer.stepper.optimizer.param_groups for p in group['params']]
    assert {id(p) for p in optimized} == {id(p) for p in trainer.model.student.parameters()}


def test_the_bank_of_neighbours_is_thinned_out(data):
    trainer = PretrainTrainer(configure(data, *FLAGS, '--knn-bank', 10), Processes(), torch.device('cpu'))
    trainer.train_loader.close()
    assert len(trainer.train_set) == 48 and len(trainer.bank_set) == 10
    loaded = [read_image(trainer.bank_set, i) for i in range(10)]
    assert [label for _, label in loaded] == 5 * [0] + 5 * [1] and len({data for data, _ in loaded}) == 10
    for place in (0, -1):  # the last class is never lost
        assert name_image(trainer.bank_set, range(10)[place]) == name_image(trainer.train_set, range(48)[place])


def test_neighbours_are_those_of_the_student_also_without_all_labels(data):
    trainer = PretrainTrainer(configure(data, *FLAGS, '--knn-bank', 1), Processes(), torch.device('cpu'))
    trainer.train_loader.close()
    for parameter in trainer.model.teacher.parameters():
        parameter.data.fill_(float('nan'))
    scores = trainer.evaluate(lambda number: None).scores
    assert 0 < scores['val_knn'] < 100  # of two classes, one has the only neighbour


def test_settings_reach_the_module_and_the_images(data):
    trainer = PretrainTrainer(configure(
        data, *FLAGS, '--momentum', .9, '--mean', .1, .2, .3, '--std', .4, .5, .6), Processes(), torch.device('cpu'))
    trainer.train_loader.close()
    assert trainer.model.design.momentum == .9 and trainer.model.design.attention_weight == 3
    images = trainer.eval_config
    assert images.mean == (.1, .2, .3) and images.std == (.4, .5, .6)
    assert (images.interpolation, images.crop_pct) == ('bilinear', .875)  # of the published evaluation
    assert trainer.task.total_steps == 3 * trainer.train_loader.steps == 18


@pytest.mark.parametrize('flags, error, message', [
    (['--batch-size', 64], DataError, 'The 48 training images do not fill a batch of 64'),
    (['--device-batch', 1], ConfigError, 'A forward pass of 1 image leaves BatchNorm of the heads one value'),
    (['--ema'], ConfigError, 'the teacher is an average of the weights already'),
    (['--no-step-schedule'], ConfigError, 'pre-training changes the rate at every step: omit'),
    (['--scale', 1, .5], ConfigError, 'scale is 1 0.5 but must be two positive numbers'),
    (['--mean', .5, .5], ConfigError, r'mean is \[0.5, 0.5\] but must be three numbers'),
    (['--model', 'test_vit', '--img-size', 160], ConfigError, 'or --method byol')])
def test_what_cannot_be_is_named(flags, error, message, data, tmp_path):
    with pytest.raises(error, match=message):
        pretrain(data, *FLAGS, '--output', tmp_path / 'run', *flags)


def test_folders_without_labels_are_asked_for_as_such(data, tmp_path, caplog):
    (tmp_path / 'train.lmdb').write_bytes(b'')
    for place, message in (('', 'No data: give a folder of images, with or without folders for classes'),
                           (tmp_path / 'nowhere', 'nowhere is no folder: give a folder of images, with or without'),
                           (tmp_path / 'train.lmdb', f'train.lmdb is no folder: give {tmp_path}, the folder that')):
        with pytest.raises(DataError, match=message):
            open_unlabelled(str(place), 'train')
    for name in ('train', 'val', 'plane', 'car'):
        shutil.copytree(data / 'train' / 'orange', tmp_path / 'kinds' / name)
    dataset, has_labels = open_unlabelled(str(tmp_path / 'kinds'), 'train')
    assert len(dataset) == 24 and not has_labels
    assert 'only the images in train are used, not those in car, plane.' in caplog.text


def test_a_collapse_stops_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(caretrans.selfsup.pretraining, 'measure_spread', lambda outputs: torch.tensor(.05))
    flags = [data, *FLAGS, '--epochs', 2, '--output', tmp_path / 'run']
    with pytest.raises(TrainingError, match='outputs of the C-stream collapsed in epoch 1: they spread 0.050') as error:
        pretrain(*flags, '--collapse', .1)
    assert 'resumes' not in str(error.value)  # it would collapse again
    assert pretrain(*flags, '--collapse', 0).last.epoch == 2  # as the message says


def test_outputs_of_the_predictor_that_come_close_are_no_collapse():
    module = Pretraining(Design(model='test_resnet', img_size=32, hidden=16, out=8, blocks=1)).train()
    torch.nn.init.zeros_(module.student.fc1[-1].weight)
    seen = module(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32), details=True)
    assert seen['spread_c'] > .3 and seen['spread_t'] > .3


def test_a_small_pass_is_pointed_out(data, capsys, tmp_path):
    trainer = PretrainTrainer(configure(data, *FLAGS, '--device-batch', 4), Processes(), torch.device('cpu'))
    assert any('BatchNorm sees 4 images at a time; with fewer than 32' in line for line in trainer.introduce())
    trainer.train_loader.close()


# Weights to start from, and after -------------------------------------------------------------------------------------

def test_a_run_starts_from_other_weights(data, undisturbed, tmp_path):
    last = undisturbed / 'last.pth.tar'
    whole = read_tensors(last, 'pretraining')

    def build(*flags):
        trainer = PretrainTrainer(configure(data, *FLAGS, *flags), Processes(), torch.device('cpu'))
        trainer.train_loader.close()
        return trainer.model
    assert not list_differences(build('--checkpoint', last).state_dict(), whole)
    torch.save(read_tensors(last), tmp_path / 'trunk.pth')
    model = build('--checkpoint', tmp_path / 'trunk.pth')
    for part in (model.student, model.teacher):
        assert not list_differences(part.trunk.state_dict(), read_tensors(last))
    with pytest.raises(ConfigError, match='was pre-trained with other settings'):
        build('--checkpoint', last, '--hidden', 8)


def test_a_classifier_starts_from_the_trunk(data, undisturbed, tmp_path, capsys):
    flags = ['--model', 'test_resnet', '--checkpoint', undisturbed / 'last.pth.tar', '--new-heads', '--epochs', 1,
             '--warmup-epochs', 0, '--batch-size', 8, '--img-size', 32, '--workers', 0, '--device', 'cpu',
             '--lr', 1e-12, '--min-lr', 0, '--drop-path', 0, '--output', tmp_path / 'run']
    train(launch.configure(data, *flags))
    before, after = read_tensors(undisturbed / 'last.pth.tar'), read_tensors(tmp_path / 'run' / 'last.pth.tar')
    for key, value in before.items():
        if 'running' not in key and 'tracked' not in key:
            torch.testing.assert_close(after[key], value)


RECIPES = sorted(path for path in config.RECIPES.glob('selfsup_*.yaml'))


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_described(path):
    lines = path.read_text(encoding='utf-8').splitlines()
    for word in ('command', 'hardware', 'time', 'top-1'):
        assert any(re.match(rf'# {word} +\S', line) for line in lines), word
    assert any(f'--recipe {path.stem}' in line for line in lines)
    if path.stem == 'selfsup_r50_probe':
        assert ProbeConfig(**read_recipe(path.stem, ProbeConfig)).probe == ProbeSettings()
        return
    settings = PretrainConfig(**{**read_recipe(path.stem, PretrainConfig), 'workers': 0})
    if path.stem != 'selfsup_fruit14':
        assert settings.views == PretrainConfig().views
        assert (settings.batch_size, settings.lr, settings.warmup_epochs) == (1024, .2, 10)
    if path.stem.startswith('selfsup_r50'):
        assert settings.design == PretrainConfig().design and f'_{settings.epochs}e' in path.stem
