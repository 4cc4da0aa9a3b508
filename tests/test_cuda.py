"""Training on GPUs: a few steps in every mode."""
import json

import pytest
import torch
from launch import read_tensors, run
from photos import copy_images

from caretrans.kernels import why_unavailable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')

FLAGS = [
    '--recipe', 'care_s0_imagenet_no_teacher', '--epochs', 2, '--warmup-epochs', 1, '--cooldown-epochs', 0,
    '--batch-size', 32, '--device-batch', 32, '--workers', 2, '--device', 'cuda']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return copy_images(tmp_path_factory.mktemp('data'), per_class=48)


def skip_without_kernels(flags):
    if '--kernels' in flags and why_unavailable('cuda'):
        pytest.skip(why_unavailable('cuda'))


@pytest.mark.parametrize('flags', [
    [], ['--tf32'], ['--channels-last'], ['--amp', 'bf16'], ['--amp', 'fp16', '--clip-grad', 1],
    ['--amp', 'bf16', '--channels-last', '--compile', '--ema'], ['--grad-checkpointing'], ['--sync-bn'],
    ['--train-img-sizes', 160, 224], ['--device-batch', 16], ['--kernels'],
    ['--kernels', '--grad-checkpointing', '--train-img-sizes', 160, 224],
    ['--kernels', '--amp', 'bf16', '--channels-last', '--compile', '--ema']], ids=lambda flags: str(flags[:4]))
@pytest.mark.parametrize('processes', [1, 2])
def test_every_training_mode_runs_and_says_how_fast(data, tmp_path, flags, processes):
    if processes > torch.cuda.device_count():
        pytest.skip('one GPU')
    skip_without_kernels(flags)
    out, _ = run('train.py', data, *FLAGS, *flags, '--output', tmp_path / 'run', processes=processes)
    print(f'{processes} process(es) {flags}: {out.splitlines()[-4]}')
    assert json.loads((tmp_path / 'run' / 'result.json').read_text(encoding='utf-8'))['last']['epoch'] == 2
    kernels = json.loads((tmp_path / 'run' / 'environment.json').read_text(encoding='utf-8'))['kernels']
    assert ('x mixer: triton' in kernels) == ('--kernels' in flags)
    assert all(torch.isfinite(value).all() for value in read_tensors(tmp_path / 'run' / 'last.pth.tar').values())


@pytest.mark.parametrize('flags', [[], ['--kernels', '--ema']], ids=str)
def test_a_run_stopped_on_a_gpu_resumes(data, tmp_path, monkeypatch, flags):
    skip_without_kernels(flags)
    import caretrans.training.run
    from caretrans.config import parse_train_config

    config = parse_train_config([str(flag) for flag in (data, *FLAGS, *flags, '--output', tmp_path / 'run')])
    looks = iter(range(10 ** 6))
    monkeypatch.setattr(caretrans.training.run.StopRequest, '__call__', lambda self: next(looks) == 1)
    with pytest.raises(caretrans.training.run.Preempted):
        caretrans.training.run.train(config)
    assert caretrans.training.run.train(config).last.epoch == 2
