"""Training with --kernels. Without a GPU no kernel runs; PyTorch stands in for those that tests pretend to run."""
import json

import caretrans.kernels
import pytest
import torch
import yaml
from launch import configure
from photos import FRUIT

import caretrans.training.run
import caretrans.training.classification
from caretrans.checkpoint import read_checkpoint
from caretrans.config import TrainConfig
from caretrans.errors import ConfigError
from caretrans.kernels import KernelModule
from caretrans.training.run import train
from caretrans.training.classification import ClassificationTrainer, build_model, check_kernels, put_kernels

CPU = torch.device('cpu')
FLAGS = ['--recipe', 'care_s0_fruit14', '--epochs', '2', '--warmup-epochs', '0', '--batch-size', '24', '--img-size',
         '32', '--val-img-size', '32', '--workers', '0', '--device', 'cpu', '--ema', '--model-args', 'depths=[1,1,1,1]']


@pytest.fixture
def pretend(monkeypatch):
    """Pretend that kernels run everywhere; on the CPU, modules with kernels call PyTorch."""
    for module in (caretrans.kernels, caretrans.training.classification):
        monkeypatch.setattr(module, 'why_unavailable', lambda device: '')


def prepare(data, output, *flags):
    return configure(data, *FLAGS, '--output', output, *flags)


def read_weights(folder):
    return {entry: read_checkpoint(folder / 'last.pth.tar', entry).state_dict
            for entry in ('state_dict', 'state_dict_ema')}


def assert_same(a, b):
    for entry in a:
        assert list(a[entry]) == list(b[entry])
        assert all(torch.equal(a[entry][key], b[entry][key]) for key in a[entry])


# Refused --------------------------------------------------------------------------------------------------------------

def test_a_device_without_kernels_is_refused_before_data_are_read(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ClassificationTrainer, '__init__', None)
    monkeypatch.setattr(caretrans.training.classification, '_download', None)
    with pytest.raises(ConfigError, match='kernels with device=cpu: the kernels run on CUDA GPUs, not on cpu: omit'):
        train(prepare(data, tmp_path / 'run', '--kernels', '--dataset-download'))
    monkeypatch.setattr(caretrans.kernels, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='kernels with device=cuda: Triton is not installed: omit --kernels'):
        check_kernels(TrainConfig(kernels=True), torch.device('cuda'))
    assert not (tmp_path / 'run').exists()


def test_a_model_without_parts_for_kernels_is_refused(pretend):
    config = TrainConfig(model='mobilenetv2_035', kernels=True)
    for refuse in (lambda: check_kernels(config, CPU), lambda: put_kernels(build_model(config, 2), config)):
        with pytest.raises(ConfigError, match='no part of mobilenetv2_035 uses|mobilenetv2_035 .no part uses'):
            refuse()
    for name in 'care_s0', 'mlla_t':
        check_kernels(TrainConfig(model=name, kernels=True), CPU)
    check_kernels(TrainConfig(model='mobilenetv2_035'), CPU)


def test_kernels_that_do_not_run_are_refused():
    config = TrainConfig(kernels=True)
    with pytest.raises(ConfigError, match='none runs in care_s0 .*mixer: torch, the kernels run on CUDA GPUs'):
        put_kernels(build_model(config, 2), config)


# Trained --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def plain(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('plain') / 'run'
    train(prepare(data, folder))
    return folder


def test_weights_and_average_equal_those_of_a_run_without_kernels(data, plain, tmp_path, pretend, capsys):
    folder = tmp_path / 'run'
    train(prepare(data, folder, '--kernels'))
    assert_same(read_weights(folder), read_weights(plain))
    kernels = json.loads((folder / 'environment.json').read_text(encoding='utf-8'))['kernels']
    assert kernels.startswith('triton ') and 'x mixer: triton' in kernels
    assert f'kernels: {kernels}' in capsys.readouterr().out
    assert json.loads((plain / 'environment.json').read_text(encoding='utf-8'))['kernels'] == 'torch'
    assert yaml.safe_load((folder / 'config.yaml').read_text(encoding='utf-8'))['kernels'] is True


def test_model_and_average_have_the_kernels(data, tmp_path, pretend):
    trainer = ClassificationTrainer(
        prepare(data, tmp_path / 'run', '--kernels'), caretrans.training.run.find_processes(), CPU)
    trainer.train_loader.close()
    for module in trainer.modules.values():
        assert any(isinstance(part, KernelModule) for part in module.modules())


@pytest.mark.parametrize('before, after', [(['--kernels'], ['--kernels']), (['--kernels'], []), ([], ['--kernels'])])
def test_a_run_resumes_with_kernels_and_without(data, plain, tmp_path, pretend, monkeypatch, before, after):
    folder, checks = tmp_path / 'run', iter(range(10 ** 6))
    with monkeypatch.context() as patch:
        patch.setattr(caretrans.training.run.StopRequest, '__call__', lambda self: next(checks) == 0)
        with pytest.raises(caretrans.training.run.Preempted):
            train(prepare(data, folder, *before))
    assert train(prepare(data, folder, *after)).last.epoch == 2
    assert_same(read_weights(folder), read_weights(plain))


def test_the_recipe_of_the_paper_takes_the_flag():
    assert configure(FRUIT, '--recipe', 'care_s0_imagenet', '--kernels').kernels
    assert not configure(FRUIT, '--recipe', 'care_s0_imagenet').kernels
