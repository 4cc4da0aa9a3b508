"""Several processes on the CPU over gloo: the same numbers as one, and the scripts that start and stop them."""
import os
import shutil
import subprocess
import time
from pathlib import Path
from signal import SIGTERM

import pytest
import torch
from launch import (
    ROOT, SHELL_ENVIRONMENT, configure, kill, list_differences, read_tensors, run, start, wait_for)

from caretrans.distributed import Processes
from caretrans.training import ClassificationTrainer
from caretrans.training.steps import train_steps

pytestmark = pytest.mark.slow

FLAGS = [
    '--recipe', 'care_s0_fruit14', '--epochs', 2, '--warmup-epochs', 1, '--batch-size', 8, '--device-batch', 4,
    '--img-size', 32, '--val-img-size', 32, '--workers', 1, '--device', 'cpu', '--drop-path', 0.1, '--mixup', 0.8,
    '--cutmix', 1.0, '--random-erasing', 0.5, '--auto-augment', 'rand-m9-mstd0.5-inc1', '--no-channels-last',
    '--model-args', 'depths=[1,1,1,1]']


def train(data, folder, *flags, processes=1):
    out, err = run('train.py', data, *FLAGS, *flags, '--output', folder, processes=processes)
    return read_tensors(folder / 'last.pth.tar'), out, err


@pytest.fixture(scope='module')
def one_process(data, tmp_path_factory):
    """The weights of one process that does two forward passes per step."""
    return train(data, tmp_path_factory.mktemp('one') / 'run')[0]


def is_statistic(key: str) -> bool:
    return key.endswith(('running_mean', 'running_var', 'num_batches_tracked'))


def measure_difference(weights, others) -> float:
    """The largest difference of a weight, without the statistics of BatchNorm."""
    return max((value for key, value in list_differences(weights, others).items() if not is_statistic(key)), default=0.)


def test_two_processes_end_with_the_weights_of_one_with_the_same_global_batch(data, one_process, tmp_path):
    """Within 1e-6; bit-identical where the sums happen to be rounded the same.

    In both, BatchNorm normalises each forward pass by its own 4 images. Only its running statistics differ: one process
    updates them twice per step, two processes once each, and they average them at the end of the epoch.
    """
    two, out, _ = train(data, tmp_path / 'run', processes=2)
    assert 'batch of 8 = 4 images x 1 forward pass x 2 processes' in out
    print('largest difference of a weight', measure_difference(two, one_process))
    assert measure_difference(two, one_process) < 1e-6
    assert any(is_statistic(key) for key in list_differences(two, one_process))
    assert out.count('epoch 2/2') == 1, 'one process prints'


def test_statistics_are_the_mean_of_the_processes(data, tmp_path):
    """With a learning rate near zero they depend on the images alone, whichever process saw them."""
    flags = ['--epochs', 1, '--warmup-epochs', 0, '--lr', 1e-12, '--min-lr', 1e-12, '--mixup', 0, '--cutmix', 0]
    two, _, _ = train(data, tmp_path / 'two', *flags, processes=2)
    halves = []
    for rank in (0, 1):  # each half of the images of every step, as the two processes take them
        trainer = ClassificationTrainer(configure(data, *FLAGS, *flags), Processes(rank, 2), torch.device('cpu'))
        trainer.schedule.step_update(0)
        for _ in train_steps(trainer.task, trainer.train_loader.run(0), trainer.stepper):
            pass
        trainer.train_loader.close()
        halves.append(trainer.model.state_dict())
    for key in (key for key in two if key.endswith(('running_mean', 'running_var'))):
        assert torch.allclose(two[key], (halves[0][key] + halves[1][key]) / 2, rtol=1e-5, atol=1e-6), key
        assert not torch.allclose(halves[0][key], halves[1][key], rtol=1e-5, atol=1e-6), key


def test_an_error_is_printed_once_and_ends_all_processes(data, tmp_path):
    broken = shutil.copytree(data, tmp_path / 'broken')
    shutil.rmtree(broken / 'val' / 'orange')
    out, err = run('train.py', broken, *FLAGS, '--output', tmp_path / 'run', processes=2, code=2)
    assert err.count('has images of one class only') == 1, err
    out, err = run('train.py', data, *FLAGS, '--sync-bn', '--output', tmp_path / 'run', processes=2, code=2)
    assert err.count("SyncBatchNorm does not run on cpu") == 1, err


@pytest.mark.parametrize('share, code', [(0.025, 0), (0.02, 2)])
def test_unreadable_images_are_counted_over_all_processes(data, tmp_path, share, code):
    bad = shutil.copytree(data, tmp_path / 'bad')
    image = sorted((bad / 'train' / 'orange').glob('*.jpg'))[5]
    image.write_bytes(b'')
    out, err = run(
        'train.py', bad, *FLAGS, '--max-unreadable', share, '--output', tmp_path / 'run', processes=2, code=code)
    assert code or out.count(f'1 of 48 training images could not be read and were replaced by others: {image}') == 2
    assert err.count('1 of 48 training images cannot be read') == bool(code), err


def test_all_processes_are_stopped_in_an_evaluation(data, tmp_path):
    """SIGTERM to every process including the workers, as a scheduler sends it: a checkpoint and a quick end."""
    many = shutil.copytree(data, tmp_path / 'many')
    for image in list((many / 'val').rglob('*.jpg')):
        for i in range(60):
            os.link(image, image.with_name(f'{i}-{image.name}'))
    folder, log = tmp_path / 'run', tmp_path / 'log.txt'
    flags = [many, *FLAGS, '--val-img-size', 160, '--val-interval', 1, '--output', folder]
    process = start('train.py', *flags, log=log, processes=2)
    assert wait_for((folder / 'last.pth.tar').exists, process), log.read_text(encoding='utf-8')
    time.sleep(2)  # into the evaluation of some 3,000 images
    began = time.monotonic()
    for pid in process.list_children():
        os.kill(pid, SIGTERM)
    kill(process, SIGTERM)
    text = log.read_text(encoding='utf-8')
    assert time.monotonic() - began < 15 and 'Asked to stop' in text, text
    assert 'Alarm clock' not in log.read_text(encoding='utf-8')
    assert torch.load(folder / 'last.pth.tar', weights_only=True)['standing']['trained']


def script(*flags, log: Path, **variables: str) -> subprocess.Popen:
    """Start cmd/train.sh with its output in a file."""
    with open(log, 'ab') as file:
        return subprocess.Popen(
            ['bash', 'cmd/train.sh', *map(str, flags)], cwd=ROOT, stdout=file, stderr=file,
            env=dict(SHELL_ENVIRONMENT, **variables))


def test_the_script_stops_cleanly_and_resumes(data, one_process, tmp_path):
    """SIGTERM to cmd/train.sh with two processes: a checkpoint and exit code 0, from which the same flags go on."""
    folder, log = tmp_path / 'run', tmp_path / 'log.txt'
    process = script(data, *FLAGS, '--output', folder, log=log, NPROC='2')
    assert wait_for(
        lambda: 'steps per epoch' in log.read_text(encoding='utf-8'), process), log.read_text(encoding='utf-8')
    assert kill(process, SIGTERM) == 0, log.read_text(encoding='utf-8')
    assert log.read_text(encoding='utf-8').count('Asked to stop') == 1 and (folder / 'last.pth.tar').exists()
    weights, out, _ = train(data, folder, processes=2)
    assert out.count('resumes from /') == 1
    assert measure_difference(weights, one_process) < 1e-6


@pytest.mark.parametrize('name', ['train', 'eval'])
def test_an_invalid_number_of_processes_is_refused(name):
    done = subprocess.run(
        ['bash', f'cmd/{name}.sh', 'x'], cwd=ROOT, capture_output=True, text=True,
        env=dict(SHELL_ENVIRONMENT, NPROC='0'), encoding='utf-8')
    assert done.returncode == 2 and done.stderr == "NPROC is '0' but must be a positive number of processes.\n"


def test_two_machines_connect_and_survive_the_death_of_a_process(data, one_process, tmp_path):
    """Simulated by two launchers; a process of one is killed, and all restart from the checkpoint."""
    folder, logs = tmp_path / 'run', [tmp_path / '0.txt', tmp_path / '1.txt']
    flags = [data, *FLAGS, '--output', folder, '--save-steps', 1]
    where = dict(NPROC='1', NNODES='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29517', MAX_RESTARTS='3')
    machines = [script(*flags, log=log, NODE_RANK=str(rank), **where) for rank, log in enumerate(logs)]
    assert wait_for((folder / 'last.pth.tar').exists, machines[0]), logs[0].read_text(encoding='utf-8')
    oldest = subprocess.run(['pgrep', '-o', '-f', f'python[^ ]* -u .*train.py .*{folder} '], capture_output=True)
    os.kill(int(oldest.stdout), 9)
    for machine in machines:
        assert machine.wait(timeout=120) == 0, logs[0].read_text(encoding='utf-8')
    printed = logs[0].read_text(encoding='utf-8') + logs[1].read_text(encoding='utf-8')
    assert printed.count('resumes from /') >= 1 and printed.count('epoch 2/2') == 1
    assert measure_difference(read_tensors(folder / 'last.pth.tar'), one_process) < 1e-6


def test_the_slurm_script_starts_every_node_and_requeues_when_stopped(data, tmp_path):
    """Fake srun and scontrol record their arguments."""
    for name, line in dict(
            scontrol='echo "$@" >> "$NOTES"; [ "$1" = requeue ] || echo 127.0.0.1',
            srun='echo "$NNODES $MASTER_ADDR ${@: -1}" >> "$NOTES"; shift; export NODE_RANK=0; exec "$@"').items():
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\n{line}\n', encoding='utf-8')
        (tmp_path / name).chmod(0o755)
    notes, log, folder = tmp_path / 'notes', tmp_path / 'log.txt', tmp_path / 'run'
    with open(log, 'ab') as file:
        process = subprocess.Popen(
            ['bash', 'cmd/train.sbatch', *map(str, [data, *FLAGS, '--output', folder])], cwd=ROOT, stdout=file,
            stderr=file, env=dict(
                SHELL_ENVIRONMENT, PATH=f'{tmp_path}:{SHELL_ENVIRONMENT["PATH"]}', NOTES=str(notes), NPROC='1',
                SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NUM_NODES='1', SLURM_JOB_NODELIST='n[1]', SLURM_JOB_ID='7'))
    assert wait_for(
        lambda: 'steps per epoch' in log.read_text(encoding='utf-8'), process), log.read_text(encoding='utf-8')
    assert kill(process, SIGTERM) == 0, log.read_text(encoding='utf-8')
    assert 'Asked to stop' in log.read_text(encoding='utf-8') and (folder / 'last.pth.tar').exists()
    assert notes.read_text(encoding='utf-8').splitlines() == [
        'show hostnames n[1]', f'1 127.0.0.1 {folder}', 'requeue 7']
