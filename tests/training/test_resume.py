"""Resuming: killed, stopped or with a damaged checkpoint, the same command ends with bit-identical results."""
import csv
import json
import random
import shutil
import time
from pathlib import Path
from signal import SIGSTOP, SIGTERM

import pytest
import torch
import yaml
from forkserver import Running
from launch import ROOT, configure, kill, list_differences, read_tensors, run, start, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import caretrans.training.run
from caretrans.errors import CheckpointError, ConfigError, Preempted
from caretrans.training.run import train

EPOCHS = 3
FLAGS = [
    '--recipe', 'care_s0_fruit14', '--epochs', EPOCHS, '--warmup-epochs', 1, '--batch-size', 8, '--device-batch', 4,
    '--img-size', 32, '--val-img-size', 32, '--workers', 1, '--device', 'cpu', '--save-steps', 2, '--val-interval', 1,
    '--drop-path', 0.1, '--drop', 0.1, '--mixup', 0.8, '--cutmix', 1.0, '--random-erasing', 0.5, '--ema',
    '--auto-augment', 'rand-m9-mstd0.5-inc1', '--no-channels-last', '--model-args', 'depths=[1,1,1,1]']
NARROW = [  # where neither size nor time of a checkpoint matters; convolutions of float16 are slow on a CPU
    '--model-args', 'depths=[1,1,1,1]', 'slice_chs=[4,4,8,8]', 'ratios=[[1,1],[1,1],[1,1],[1,1]]',
    'num_heads=[0,0,1,1]']
TIMES = ('images_per_s', 'seconds', 'data_wait')


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp('runs') / 'undisturbed'
    run('train.py', data, *FLAGS, '--output', folder)
    return folder


@pytest.fixture(scope='module')
def stopped(data, tmp_path_factory) -> Path:
    """The folder of a run that SIGTERM stopped in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp('runs') / 'stopped'
    log = folder.with_name('log.txt')
    process = start('train.py', data, *FLAGS, '--output', folder, log=log)
    assert wait_for(lambda: 'epoch 1/' in log.read_text(encoding='utf-8'), process), log.read_text(encoding='utf-8')
    began = time.monotonic()
    assert kill(process, SIGTERM) == 0, log.read_text(encoding='utf-8')
    assert time.monotonic() - began < 10, 'it took too long to stop'
    assert 'Asked to stop (SIGTERM) in epoch 2' in log.read_text(encoding='utf-8')
    return folder


@pytest.fixture
def half_way(stopped, tmp_path) -> Path:
    """A copy of `stopped`."""
    return shutil.copytree(stopped, tmp_path / 'half')


def resume(data: Path, folder: Path, *flags) -> None:
    """Train in this process with `FLAGS` and `flags` over them."""
    train(configure(data, *FLAGS, '--output', folder, *flags))


def read_rows(folder: Path):
    with open(folder / 'summary.csv', encoding='utf-8') as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def assert_same_run(folder: Path, expected: Path) -> None:
    """Weights, average, optimizer, scaler, scores, table and events: nothing differs and nothing is duplicated."""
    for name in ('last.pth.tar', 'best.pth.tar'):
        for entry in ('state_dict', 'state_dict_ema'):
            assert not list_differences(read_tensors(folder / name, entry), read_tensors(expected / name, entry))
    mine, theirs = (torch.load(path / 'last.pth.tar', weights_only=True) for path in (folder, expected))
    for key, state in theirs['optimizer']['state'].items():
        assert all(torch.equal(value, mine['optimizer']['state'][key][name]) for name, value in state.items())
    assert mine['scaler'] == theirs['scaler'] and mine['steps'] == theirs['steps']
    assert {k: v for k, v in mine['best'].items() if k not in TIMES} == \
        {k: v for k, v in theirs['best'].items() if k not in TIMES}
    assert read_rows(folder) == read_rows(expected) and len(read_rows(folder)) == EPOCHS
    events, before = (EventAccumulator(str(path)).Reload() for path in (folder, expected))
    for tag in ('train_loss', 'val_loss', 'val_top1', 'lr'):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(e.step, e.value) for e in before.Scalars(tag)]


# Killed and stopped ---------------------------------------------------------------------------------------------------

def kill_somewhere(process: Running, folder: Path, log: Path, seconds: float, while_writing: bool) -> str:
    """Kill the run `seconds` after it began to train, or in the middle of the checkpoint after that.

    Returns where it was; '' if it ended before.
    """
    begun = log.read_text(encoding='utf-8').count('steps per epoch') + 1
    if not wait_for(lambda: log.read_text(encoding='utf-8').count('steps per epoch') == begun, process):
        return ''
    time.sleep(seconds)
    part = f'.next.pth.tar.{process.pid}.part'
    if while_writing and not wait_for((folder / part).exists, process, pause=0.0005):
        return ''
    if process.poll() is not None:
        return ''
    kill(process)
    return 'writing a checkpoint' if (folder / part).exists() else 'training'


def test_ten_kills_at_random_moments_change_nothing(data, undisturbed, tmp_path):
    """At least three of them while a checkpoint is written: its temporary file is not yet renamed."""
    seed = random.randrange(10 ** 6)
    chance, tally = random.Random(seed), []
    folder, log = tmp_path / 'run-0', tmp_path / 'log.txt'
    while len(tally) < 10:
        log.touch()
        process = start('train.py', data, *FLAGS, '--output', folder, log=log)
        where = kill_somewhere(process, folder, log, chance.uniform(0, 0.8), while_writing=len(tally) % 3 == 1)
        if where:
            tally.append(where)
        else:  # it ended before: another run gets the other kills
            assert process.wait() == 0, log.read_text(encoding='utf-8')[-3000:]
            assert_same_run(folder, undisturbed)
            folder = tmp_path / f'run-{len(tally)}'
    run('train.py', data, *FLAGS, '--output', folder)
    print(f'killed while {", ".join(tally)} (seed {seed})')
    assert_same_run(folder, undisturbed)
    assert tally.count('writing a checkpoint') >= 3 and tally.count('training') >= 1, tally
    assert not list(folder.glob('.*.part'))


def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(data, undisturbed, half_way):
    state = torch.load(half_way / 'last.pth.tar', weights_only=True)['standing']
    assert state['epoch'] == 1 and state['step'] < 6
    resume(data, half_way)
    assert_same_run(half_way, undisturbed)
    assert len(json.loads((half_way / 'environment.json').read_text(encoding='utf-8'))['resumed']) == 1


def test_a_kill_between_the_renames_of_a_checkpoint_changes_nothing(data, undisturbed, half_way):
    """The new file is complete but not yet renamed to last.pth.tar; the previous one already is previous.pth.tar."""
    (half_way / 'last.pth.tar').rename(half_way / 'next.pth.tar')
    (half_way / 'previous.pth.tar').write_bytes(b'older')
    resume(data, half_way)
    assert_same_run(half_way, undisturbed)
    assert not (half_way / 'next.pth.tar').exists()


@pytest.fixture
def stop_after(monkeypatch):
    """Simulate a SIGTERM that the next run sees after so many checks; `None` ends that."""
    call = caretrans.training.run.StopRequest.__call__

    def set_checks(checks):
        counter = iter(range(10 ** 9))
        monkeypatch.setattr(caretrans.training.run.StopRequest, '__call__', call if checks is None else (
            lambda self: next(counter) >= checks))
    return set_checks


def test_a_run_stops_during_evaluation(data, undisturbed, tmp_path, stop_after):
    stop_after(6)  # steps of an epoch
    with pytest.raises(Preempted, match='in epoch 1 after step 6'):
        resume(data, tmp_path / 'run')
    stop_after(None)
    resume(data, tmp_path / 'run')
    assert_same_run(tmp_path / 'run', undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    ['--amp', 'fp16'], ['--amp', 'bf16', '--clip-grad', 1], ['--no-step-schedule'], ['--workers', 0],
    ['--train-img-sizes', 32, 48, '--device-batch', 8], ['--opt', 'sgd']], ids=lambda flags: flags[0])
def test_every_mode_of_training_resumes_bit_for_bit(data, tmp_path, stop_after, flags):
    flags = [*NARROW, *flags, '--epochs', 2, '--val-interval', 2]
    resume(data, tmp_path / 'expected', *flags)
    stop_after(8)  # 6 steps, the end of the epoch, a step
    with pytest.raises(Preempted, match='in epoch 2 after step 2'):
        resume(data, tmp_path / 'run', *flags)
    stop_after(None)
    resume(data, tmp_path / 'run', *flags)
    mine, theirs = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=True) for name in ('run', 'expected'))
    assert not list_differences(mine['state_dict'], theirs['state_dict']) and mine['scaler'] == theirs['scaler']
    assert read_rows(tmp_path / 'run') == read_rows(tmp_path / 'expected')


def test_three_processes_resume_with_their_own_statistics(data, tmp_path):
    """Killed in the middle of an epoch, when each process has its own running statistics.

    Three, because a sum of two is rounded the same in any order.
    """
    flags = [data, *FLAGS, '--batch-size', 12, '--device-batch', 4, '--save-steps', 1, '--epochs', 2]
    expected, folder, log = tmp_path / 'expected', tmp_path / 'run', tmp_path / 'log.txt'
    run('train.py', *flags, '--output', expected, processes=3)
    process = start('train.py', *flags, '--output', folder, log=log, processes=3)
    assert wait_for((folder / 'last.pth.tar').exists, process), log.read_text(encoding='utf-8')
    kill(process)
    state = torch.load(folder / 'last.pth.tar', weights_only=True)['standing']
    first, second, _ = (part['statistics']['model']['stem.norm.running_mean'] for part in state['processes'])
    assert state['step'] < 4 and not torch.equal(first, second)
    out, _ = run('train.py', *flags, '--output', folder, processes=3)
    assert out.count('resumes from') == 1
    assert not list_differences(read_tensors(folder / 'last.pth.tar'), read_tensors(expected / 'last.pth.tar'))
    assert read_rows(folder) == read_rows(expected)


def test_another_number_of_processes_resumes_and_reports_the_differences(data, undisturbed, half_way, tmp_path, capsys):
    """From one to two and back to one, in the middle of epochs."""
    log = tmp_path / 'log.txt'
    process = start('train.py', data, *FLAGS, '--output', half_way, log=log, processes=2)
    before = (half_way / 'last.pth.tar').stat().st_mtime_ns
    assert wait_for(lambda: 'resumes from' in log.read_text(encoding='utf-8')
                    and any(path.stat().st_mtime_ns > before for path in half_way.glob('last.pth.tar')), process), \
        log.read_text(encoding='utf-8')
    kill(process)
    assert 'resumes with 2 processes instead of 1' in log.read_text(encoding='utf-8')
    resume(data, half_way)
    assert 'resumes with 1 process instead of 2: the images of each step are the same' in capsys.readouterr().out
    expected = read_tensors(undisturbed / 'last.pth.tar')
    differences = list_differences(read_tensors(half_way / 'last.pth.tar'), expected)
    weights = {key: value for key, value in differences.items() if 'running' not in key and 'num_batches' not in key}
    assert max(weights.values(), default=0.) < 1e-5  # sums in another order
    rows, others = read_rows(half_way), read_rows(undisturbed)
    assert [float(row['train_loss']) for row in rows] == pytest.approx([float(row['train_loss']) for row in others])


# Damaged and changed --------------------------------------------------------------------------------------------------

def test_a_truncated_checkpoint_is_replaced_by_the_one_before(data, undisturbed, half_way, capsys):
    last = half_way / 'last.pth.tar'
    last.write_bytes(last.read_bytes()[:last.stat().st_size // 2])
    resume(data, half_way)
    printed = capsys.readouterr().out
    assert 'is truncated' in printed and 'previous.pth.tar' in printed
    assert_same_run(half_way, undisturbed)


def test_a_run_with_nothing_but_damaged_checkpoints_is_refused(data, half_way):
    for name in ('last.pth.tar', 'previous.pth.tar'):
        (half_way / name).write_bytes(b'PK')
    with pytest.raises(CheckpointError, match='No checkpoint to resume from'):
        resume(data, half_way)


@pytest.mark.parametrize('flags, message', [
    (['--model', 'care_s1'], "model 'care_s0' there, 'care_s1' here"),
    (['--lr', 1e-3], 'lr 0.004 there, 0.001 here'),
    (['--no-ema'], 'ema True there, False here'),
    (['--no-resume'], 'already holds a run'),
], ids=lambda value: value[0] if isinstance(value, list) else '')
def test_a_run_of_other_settings_is_refused(data, half_way, flags, message):
    with pytest.raises(ConfigError, match=message):
        resume(data, half_way, *flags)


def test_a_run_on_other_classes_is_refused(data, half_way, tmp_path):
    other = shutil.copytree(data, tmp_path / 'other')
    for split in ('train', 'val'):
        shutil.copytree(other / split / 'orange', other / split / 'third')
    with pytest.raises(ConfigError, match=r'was trained on 2 classes \(kaiser, orange\), the data has 3'):
        resume(other, half_way)


def test_settings_without_effect_on_the_numbers_may_change(data, undisturbed, half_way, tmp_path):
    moved = shutil.copytree(data, tmp_path / 'moved')
    resume(moved, half_way, '--workers', 0, '--save-steps', 5)
    assert_same_run(half_way, undisturbed)


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_checkpoint(data, undisturbed, half_way):
    before = (half_way / 'last.pth.tar').read_bytes()
    log = half_way.with_name('log.txt')
    process = start('train.py', data, *FLAGS, '--output', half_way, log=log, file_size=5_000_000)
    code, printed = process.wait(timeout=120), log.read_text(encoding='utf-8')
    assert code == 2 and 'could not be written' in printed and 'make room for' in printed, printed
    assert (half_way / 'last.pth.tar').read_bytes() == before and not list(half_way.glob('.*.part'))
    resume(data, half_way)
    assert_same_run(half_way, undisturbed)


def test_a_folder_in_use_or_finished_is_refused(data, undisturbed, half_way, tmp_path):
    with pytest.raises(ConfigError, match='holds a finished run'):
        resume(data, undisturbed)
    log = tmp_path / 'log.txt'
    process = start('train.py', data, *FLAGS, '--output', half_way, log=log)
    assert wait_for(lambda: 'resumes from' in log.read_text(encoding='utf-8'), process), log.read_text(encoding='utf-8')
    process.send_signal(SIGSTOP)  # so that it does not end meanwhile
    with pytest.raises(ConfigError, match=r'Another process is training into .* \(process \d+ on .*stop it'):
        resume(data, half_way)
    kill(process)


def test_without_a_folder_the_same_command_finds_its_unfinished_run(data, tmp_path, monkeypatch, stop_after):
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, '--recipe', ROOT / 'caretrans/recipes/care_s0_fruit14.yaml', '--epochs', 2]
    config = configure(data, *flags)
    stop_after(0)
    with pytest.raises(Preempted):
        train(config)
    stop_after(None)
    other = configure(data, *flags, '--lr', 0.001)
    assert train(other).folder != train(config).folder
    folders = list((tmp_path / 'runs').iterdir())
    assert len(folders) == 2 and all((folder / 'result.json').exists() for folder in folders)
    rates = {yaml.safe_load((folder / 'config.yaml').read_text(encoding='utf-8'))['lr'] for folder in folders}
    assert rates == {0.004, 0.001} and all(len(read_rows(folder)) == 2 for folder in folders)
