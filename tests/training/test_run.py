"""Failures during long runs and their messages; modes of computing a step."""
import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
from launch import configure, kill, list_differences, read_tensors, run as run_script, start, wait_for
from photos import copy_images

import caretrans.training.run
import caretrans.training.folder
from caretrans.checkpoint import read_checkpoint
from caretrans.data import EvalTransform, samples
from caretrans.distributed import Processes
from caretrans.errors import TrainingError
from caretrans.training.folder import RunFolder
from caretrans.training.run import train
from caretrans.training.steps import Stepper, train_steps
from caretrans.training.classification import ClassificationTrainer

FLAGS = [
    '--recipe', 'care_s0_fruit14', '--epochs', 1, '--warmup-epochs', 0, '--batch-size', 4, '--img-size', 32,
    '--val-img-size', 32, '--workers', 0, '--device', 'cpu', '--no-channels-last', '--model-args', 'depths=[1,1,1,1]']


@pytest.fixture
def data(tmp_path) -> Path:
    return copy_images(tmp_path / 'data', per_class=20)


def run(data, folder, *flags):
    return train(configure(data, *FLAGS, '--output', folder, *flags))


def build(data, *flags):
    return ClassificationTrainer(configure(data, *FLAGS, *flags), Processes(), torch.device('cpu'))


# Images that cannot be read -------------------------------------------------------------------------------------------

def test_unreadable_images_are_counted_listed_and_skipped(data, tmp_path, capsys):
    for split in ('train', 'val'):
        bad = sorted((data / split / 'kaiser').glob('*.jpg'))[3]
        bad.write_bytes(bad.read_bytes()[:1000])
    run(data, tmp_path / 'run', '--max-unreadable', 0.05, '--workers', 2, '--epochs', 2)
    printed = capsys.readouterr().out
    train_image, val_image = (sorted((data / split / 'kaiser').glob('*.jpg'))[3] for split in ('train', 'val'))
    assert printed.count(f'1 of 40 training images could not be read and were replaced by others: {train_image}') == 2
    assert f'1 of 40 validation images could not be read and are skipped: {val_image}' in printed
    for epoch in (1, 2):
        listed = (tmp_path / 'run' / f'unreadable-epoch-{epoch}.txt').read_text(encoding='utf-8')
        assert listed.startswith(f'{train_image}\t') and listed.count('\n') == 1


@pytest.mark.parametrize('count, stops', [(2, False), (3, True)])
def test_more_than_the_set_share_of_unreadable_images_stops_the_run(data, tmp_path, count, stops):
    for bad in sorted((data / 'train' / 'orange').glob('*.jpg'))[:count]:
        bad.write_bytes(b'')
    flags = ['--max-unreadable', 0.05]  # 2 of 40
    if not stops:
        assert run(data, tmp_path / 'run', *flags).last.epoch == 1
        return
    with pytest.raises(TrainingError, match='3 of 40 training images cannot be read, more than max_unreadable=0.05'):
        run(data, tmp_path / 'run', *flags)


# Losses that are not finite -------------------------------------------------------------------------------------------

def spoil_step(monkeypatch, *steps):
    """Set the images of these steps of the run to NaN."""
    original = caretrans.training.run.train_steps
    seen = []

    def spoiled(task, passes, *arguments, **options):
        def spoil():
            for batch in passes:
                if len(seen) in steps:
                    batch.images.fill_(float('nan'))
                seen.append(batch.step)
                yield batch
        return original(task, spoil(), *arguments, **options)
    monkeypatch.setattr(caretrans.training.run, 'train_steps', spoiled)


def test_a_loss_that_is_not_finite_stops_with_a_helpful_message(data, tmp_path, monkeypatch):
    spoil_step(monkeypatch, 13)
    with pytest.raises(TrainingError) as error:
        run(data, tmp_path / 'run', '--epochs', 2, '--amp', 'fp16')
    message = str(error.value)
    for part in ('The loss is nan', 'at step 13', 'learning rate 0.00', 'loss scale ', 'Its 4 images are listed in',
                 f'Last good checkpoint: {tmp_path}/run/last.pth.tar', 'the same command resumes from it'):
        assert part in message, message
    trainer = build(data)
    trainer.train_loader.epoch = 1
    text = (tmp_path / 'run' / 'nonfinite-images.txt').read_text(encoding='utf-8')
    listed = [line.strip() for line in text.splitlines()]
    assert listed == trainer.train_loader.name_images(3) and all(Path(name).exists() for name in listed)
    last = read_tensors(tmp_path / 'run' / 'last.pth.tar')
    assert all(torch.isfinite(value).all() for value in last.values())


def test_some_steps_may_be_skipped(data, tmp_path, monkeypatch, capsys):
    spoil_step(monkeypatch, 3, 5)
    kept, count = [], caretrans.training.run.Run._count
    monkeypatch.setattr(caretrans.training.run.Run, '_count', lambda self, step: (
        kept.append(step) if not step.skipped else None, count(self, step)))
    result = run(data, tmp_path / 'run', '--on-nan', 'skip', '--max-skips', 2)
    printed = capsys.readouterr().out
    assert 'step 3 was skipped: loss nan' in printed and '(2 of 2)' in printed
    losses = [float(loss) for loss in re.findall(r'loss ([0-9.]+)  val', printed)]
    assert losses == [pytest.approx(result.last.train_loss, abs=1e-3)] and result.last.train_loss == \
        pytest.approx(sum(step.loss for step in kept) / 8)
    spoil_step(monkeypatch, 3, 5)
    with pytest.raises(TrainingError, match='after 1 skipped steps'):
        run(data, tmp_path / 'other', '--on-nan', 'skip', '--max-skips', 1)


def test_weights_that_are_not_finite_are_never_saved(data, tmp_path, monkeypatch):
    original = ClassificationTrainer.__init__

    def spoil(self, *arguments):
        original(self, *arguments)
        self.stepper.optimizer.step = lambda: self.model.stem.conv.weight.data.fill_(float('nan'))
    monkeypatch.setattr(ClassificationTrainer, '__init__', spoil)
    with pytest.raises(TrainingError, match=r'\(stem.conv.weight\); no checkpoint|loss is nan'):
        run(data, tmp_path / 'run', '--save-steps', 1)
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()


# Data that come late, or never ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('slow, warns', [('images', True), ('steps', False)])
def test_waiting_for_data_is_reported_with_a_remedy(data, tmp_path, monkeypatch, capsys, slow, warns):
    def slowed(function):
        def wait(*arguments):
            time.sleep(0.05)
            return function(*arguments)
        return wait
    owner, name = (samples, 'read_image') if slow == 'images' else (Stepper, 'update')
    monkeypatch.setattr(owner, name, slowed(getattr(owner, name)))
    share = run(data, tmp_path / 'run').last.data_wait
    printed = capsys.readouterr().out
    assert 0.25 < share < 1 if warns else 0 <= share < 0.1
    assert ('The device waited for data' in printed and '--workers than 0' in printed) == warns


def test_an_error_inside_a_worker_is_reported(data, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError('the cause')
    monkeypatch.setattr(samples, 'read_image', fail)
    with pytest.raises(TrainingError, match=r'^.*\.jpg: RuntimeError: the cause\. There is no checkpoint yet'):
        run(data, tmp_path / 'run', '--workers', 1)


def test_a_worker_that_dies_in_an_evaluation_ends_the_run_too(data, tmp_path, monkeypatch):
    def die(*arguments):
        os.kill(os.getpid(), 9)
    monkeypatch.setattr(EvalTransform, '__call__', die)
    with pytest.raises(TrainingError, match='An image loading process died .* same command'):
        run(data, tmp_path / 'run', '--workers', 1)


def test_a_full_disk_is_reported_for_any_file(data, tmp_path, monkeypatch, caplog):
    def fill(*arguments):
        raise OSError(28, 'No space left on device', 'a file')
    monkeypatch.setattr(caretrans.training.folder.RunFolder, 'draw_curves', fill)
    assert run(data, tmp_path / 'run').last.epoch == 1, 'the weights are saved'
    assert 'curves and events are incomplete (No space left on device)' in caplog.text
    monkeypatch.setattr(caretrans.training.folder.RunFolder, '_publish', fill)
    with pytest.raises(TrainingError, match='^a file: No space left on device. Last good checkpoint: .*last.pth.tar'):
        run(data, tmp_path / 'other')


def test_out_of_memory_names_a_smaller_batch_that_resumes(data, tmp_path, monkeypatch):
    original, steps = Stepper.update, []

    def update(self, norm):
        steps.append(norm)
        if len(steps) == 3:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return original(self, norm)
    monkeypatch.setattr(Stepper, 'update', update)
    with pytest.raises(TrainingError, match='Out of memory with 4 images .* use --device-batch 2'):
        run(data, tmp_path / 'run', '--save-steps', 1)
    assert run(data, tmp_path / 'run', '--save-steps', 1, '--device-batch', 2).last.epoch == 1


def test_a_worker_that_dies_ends_the_run_with_the_reason(data, tmp_path):
    """Killed as by the kernel when memory runs out: the run ends within seconds instead of waiting forever."""
    folder, log = tmp_path / 'run', tmp_path / 'log.txt'
    process = start(
        'train.py', data, *FLAGS, '--workers', 2, '--epochs', 300, '--val-interval', 300, '--output', folder, log=log)
    assert wait_for((folder / 'last.pth.tar').exists, process), log.read_text(encoding='utf-8')
    began = time.monotonic()
    os.kill(random.choice(process.list_children()), 9)
    assert process.wait(timeout=60) == 2 and time.monotonic() - began < 30
    printed = log.read_text(encoding='utf-8')
    assert 'An image loading process died' in printed and 'fewer --workers' in printed
    assert 'the same command resumes from it' in printed and 'Traceback' not in printed


def test_ctrl_c_prints_how_to_resume(data, tmp_path):
    log = tmp_path / 'log.txt'
    process = start('train.py', data, *FLAGS, '--epochs', 300, '--output', tmp_path / 'run', log=log)
    assert wait_for(lambda: 'epoch 1/' in log.read_text(encoding='utf-8'), process)
    assert kill(process, 2) == 130
    text = log.read_text(encoding='utf-8')
    assert 'the same command resumes' in text and 'Traceback' not in text


def test_a_damaged_report_of_versions_is_written_again(data, tmp_path):
    config, path = configure(data, *FLAGS), tmp_path / 'run'
    RunFolder(path, config, {}).close()
    (path / 'environment.json').write_text('{', encoding='utf-8')
    RunFolder(path, config, {}, is_new=False).close()
    assert len(json.loads((path / 'environment.json').read_text(encoding='utf-8'))['resumed']) == 1


# Modes of computing a step --------------------------------------------------------------------------------------------

def train_one_step(data, *flags):
    """The trainer after one step from the same weights on the same images."""
    trainer = build(data, *flags)
    trainer.schedule.step_update(0)
    if trainer.stepper.scaler is not None:  # low enough that the first step does not overflow
        trainer.stepper.scaler = torch.amp.GradScaler('cpu', init_scale=16.)
    next(train_steps(trainer.task, trainer.run_passes(0, 0), trainer.stepper, trainer.config.amp))
    return trainer


def get_change(trainer, start):
    return torch.cat([(p.detach() - q).flatten() for p, q in zip(trainer.model.parameters(), start, strict=True)])


@pytest.mark.parametrize('flags, tolerance', [
    (['--channels-last'], 1e-4), (['--grad-checkpointing'], 1e-6), (['--sync-bn'], 1e-6),
    pytest.param(['--compile', '--ema'], 1e-3, marks=pytest.mark.slow),
    (['--amp', 'bf16'], 0.2), (['--amp', 'fp16'], 0.05)],
    ids=lambda value: value[0][2:] if isinstance(value, list) else '')
def test_every_mode_computes_the_same_step(data, flags, tolerance, monkeypatch):
    """Plain gradient descent, so that the change of the weights is the gradient; error relative to the largest."""
    same = ['--opt', 'sgd', '--lr', 1, '--drop-path', 0.1]
    if '--compile' in flags:  # without code generation, which takes minutes; test_backends.py has it
        compile = torch.compile
        monkeypatch.setattr(torch, 'compile', lambda model, backend, **options: compile(model, backend='aot_eager'))
    plain, other = train_one_step(data, *same), train_one_step(data, *same, *flags)
    start = [p.detach().clone() for p in build(data, *same).model.parameters()]
    expected, found = get_change(plain, start), get_change(other, start)
    error = (found - expected).abs().max() / expected.abs().max()
    print(flags, f'{error:.1e}')
    assert expected.norm() > 0 and error <= tolerance
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():  # what evaluation calls
        plain = other.modules.get('ema', other.model).eval()
        assert torch.allclose(other.eval_model.eval()(images), plain(images), atol=1e-4)


def test_the_average_of_the_weights_is_kept_and_evaluated(data, tmp_path):
    result = run(data, tmp_path / 'run', '--ema', '--ema-decay', 0.5, '--epochs', 2)
    averaged, last = (read_tensors(tmp_path / 'run' / 'last.pth.tar', entry) for entry in (
        'state_dict_ema', 'state_dict'))
    assert list_differences(averaged, last)
    checkpoint = read_checkpoint(tmp_path / 'run' / 'last.pth.tar')
    assert checkpoint.entry == 'state_dict_ema'
    out, _ = run_script('validate.py', tmp_path / 'run' / 'last.pth.tar', '--json')
    assert f'"top1": {result.last.scores["val_top1"]}' in out


def test_a_teacher_from_a_file_trains_the_second_head(data, tmp_path, capsys):
    torch.manual_seed(0)
    teacher = timm.create_model('regnety_002', num_classes=2)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    flags = ['--teacher', 'regnety_002', '--teacher-checkpoint', tmp_path / 'teacher.pth']
    run(data, tmp_path / 'run', *flags, '--mixup', 0.8, '--amp', 'bf16')
    assert 'teacher regnety_002, 0.5 of the loss' in capsys.readouterr().out
    assert 'state_dict' in torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)


# Data that does not fit -----------------------------------------------------------------------------------------------

def test_classes_of_training_and_validation_must_be_the_same(data, tmp_path):
    shutil.move(data / 'val' / 'orange', data / 'val' / 'lemon')
    with pytest.raises(ValueError, match='missing orange; unknown lemon'):
        run(data, tmp_path / 'run')
    assert not (tmp_path / 'run').exists(), 'nothing is written before all checks'
