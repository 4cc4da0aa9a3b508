"""MESA: self-distillation from the averaged weights, its formula, its epochs, and resumed runs."""
import copy
import json
import re

import pytest
import timm
import torch
from launch import configure, list_differences, read_tensors, run
from torch import nn

from caretrans.config import TrainConfig
from caretrans.training.losses import SelfDistillationTask, build_task
from caretrans.training.run import train
from caretrans.training.classification import build_mixup

pytestmark = pytest.mark.slow

CPU = torch.device('cpu')
CLASSES = 5
FLAGS = [
    '--recipe', 'care_s0_fruit14', '--epochs', 4, '--warmup-epochs', 1, '--batch-size', 8, '--device-batch', 4,
    '--img-size', 32, '--val-img-size', 32, '--workers', 0, '--device', 'cpu', '--val-interval', 2, '--drop', 0.1,
    '--mixup', 0.8, '--cutmix', 1.0, '--ema', '--ema-decay', 0.9, '--no-channels-last',
    '--model-args', 'depths=[1,1,1,1]']
MESA = ['--mesa', 1.5, '--mesa-start', 0.5]


def make_config(**settings) -> TrainConfig:
    return TrainConfig(**{**dict(mesa=1.5, mesa_start=0.3, ema=True, epochs=10, smoothing=0.1), **settings})


def make_task(config: TrainConfig) -> SelfDistillationTask:
    """A task in its distilling epochs, with an average that differs from the model in weights and statistics."""
    torch.manual_seed(0)
    model = timm.create_model('care_s0', num_classes=CLASSES, depths=(1, 1, 1, 1), ls_init_value=0.1)
    task = build_task(config, model, CPU)
    average = task.setup_ema(0.9).module
    with torch.no_grad():
        for value in (*average.parameters(), *filter(torch.is_floating_point, average.buffers())):
            value.mul_(1 + 0.5 * torch.rand_like(value))
        average.head.fc.weight.normal_()
    task.set_epoch(config.mesa_epoch)
    return task.train()


def make_batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 3, 64, 64, generator=generator), torch.randint(CLASSES, (8,), generator=generator)


@pytest.mark.parametrize('mixed', [False, True])
def test_the_loss_equals_its_definition(mixed):
    """CE(out, smoothed and mixed labels) + w sum -p log q, p of the average in evaluation mode on the same images."""
    config = make_config(**(dict(mixup=0.8, cutmix=1.0) if mixed else {}))
    task = make_task(config)
    x, target = make_batch()
    soft = torch.full((8, CLASSES), 0.1 / CLASSES).scatter(1, target[:, None], 0.9 + 0.1 / CLASSES)
    if mixed:
        x, target = build_mixup(config, CLASSES)(x, target)
        soft = target
    teacher = copy.deepcopy(task.get_trainable_module(ema=True).module).eval()
    loss = task(x, target)['loss']

    out, total = task.get_trainable_module()(x).double(), 0.
    belief = teacher(x).double()
    for i in range(8):
        p, q = belief[i].exp() / belief[i].exp().sum(), out[i].exp() / out[i].exp().sum()
        total += -sum(soft[i, c] * q[c].log() for c in range(CLASSES)) / 8
        total += -1.5 * sum(p[c] * q[c].log() for c in range(CLASSES)) / 8
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_the_gradient_flows_through_the_weights_only():
    """The gradient of the second term is (softmax(out) - p) / batch, times the weight."""
    task = make_task(make_config())
    x, target = make_batch()
    result = task(x, target)
    gradient, = torch.autograd.grad(result['distill_loss'], result['output'], retain_graph=True)
    belief = task.get_trainable_module(ema=True)(x).softmax(dim=1)
    torch.testing.assert_close(gradient, (result['output'].softmax(dim=1) - belief).detach() / 8)
    assert result['loss'].item() == pytest.approx((result['task_loss'] + 1.5 * result['distill_loss']).item())


def test_the_average_stays_unchanged():
    """No gradient, no updated statistics, no random numbers drawn, however often the task enters training mode."""
    task = make_task(make_config())
    average = task.get_trainable_module(ema=True)
    before = {key: value.clone() for key, value in average.state_dict().items()}
    x, target = make_batch()
    torch.manual_seed(7)
    task.set_epoch(0)
    task(x, target)
    expected = torch.get_rng_state()
    torch.manual_seed(7)
    task.set_epoch(9)
    task.train().train(False).train()(x, target)['loss'].backward()
    assert torch.equal(torch.get_rng_state(), expected)
    assert not any(module.training for module in average.modules()) and task.get_trainable_module().training
    assert all(p.grad is None for p in average.parameters())
    assert all(torch.equal(value, before[key]) for key, value in average.state_dict().items())
    assert all(p.grad is not None for p in task.get_trainable_module().parameters())


@pytest.mark.parametrize('start, epochs, first', [
    (None, 300, 75), (0.1, 30, 3), (0., 10, 0), (0.25, 30, 8), (0.9, 10, 9)])
def test_it_starts_after_its_share_of_the_epochs(start, epochs, first):
    config = make_config(mesa_start=start, epochs=epochs, warmup_epochs=1)
    task = build_task(config, nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)), CPU)
    task.setup_ema()
    x, target = torch.randn(4, 3, 2, 2), torch.arange(4)
    begun = []
    for epoch in range(epochs):
        task.set_epoch(epoch)
        begun.append('distill_loss' in task(x, target))
    assert begun == [epoch >= first for epoch in range(epochs)] and config.mesa_epoch == first


def test_the_average_computes_in_the_precision_of_the_model():
    task = make_task(make_config())
    seen = []
    task.get_trainable_module(ema=True).module.head.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        assert task(*make_batch())['loss'].dtype == torch.float32
    task(*make_batch())
    assert seen == [torch.bfloat16, torch.float32]


def test_a_compiled_model_has_a_compiled_average():
    plain, compiled = make_task(make_config()), make_task(make_config())
    compiled.compile(backend='eager')  # as `Trainer` does for --compile, without the slow code generation
    average = compiled.compile_ema(backend='eager')
    seen = []
    average.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    x, target = make_batch()
    losses = [task.train()(x, target)['loss'].item() for task in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and seen == [False]


def test_a_recipe_with_mesa_can_run_without_it():
    config = configure('--recipe', 'mlla_t_imagenet', '--mesa', '0')
    assert (config.mesa, config.mesa_start) == (0., None)


# In a run -------------------------------------------------------------------------------------------------------------

def go(data, folder, *flags, mesa=MESA) -> None:
    train(configure(data, *FLAGS, *mesa, '--output', folder, *flags))


@pytest.fixture(scope='module')
def unbroken(data, tmp_path_factory):
    """The folder of a run of 4 epochs of 6 steps; the last two epochs distill."""
    folder = tmp_path_factory.mktemp('runs') / 'unbroken'
    go(data, folder)
    return folder


def test_a_run_distills_from_its_epoch_on(data, unbroken, tmp_path, monkeypatch):
    """Before that epoch the run equals one without MESA; from there the loss is larger."""
    seen, forward = [], SelfDistillationTask.forward
    monkeypatch.setattr(SelfDistillationTask, 'forward', lambda self, *args: [
        seen.append(self.is_distilling), forward(self, *args)][1])
    go(data, tmp_path / 'same')
    assert seen == 24 * [False] + 24 * [True]  # 6 steps of 2 passes per epoch
    assert not list_differences(read_tensors(tmp_path / 'same/last.pth.tar'), read_tensors(unbroken / 'last.pth.tar'))
    go(data, tmp_path / 'without', mesa=[])
    tables = ((folder / 'summary.csv').read_text(encoding='utf-8') for folder in (unbroken, tmp_path / 'without'))
    with_it, without = ([float(line.split(',')[1]) for line in table.splitlines()[1:]] for table in tables)
    assert with_it[:2] == without[:2] and all(a > b for a, b in zip(with_it[2:], without[2:], strict=True))


@pytest.mark.parametrize('passes, state', [(17, (1, 2)), (24, (1, 5)), (31, (2, 3))])
def test_a_killed_run_ends_with_the_same_weights(data, unbroken, tmp_path, monkeypatch, passes, state):
    """Killed before it starts, in the step before, and after; the loss depends on the epoch alone."""
    forward, counter = SelfDistillationTask.forward, iter(range(1, 10 ** 9))

    def fail(self, *args):
        if next(counter) == passes:
            raise KeyboardInterrupt
        return forward(self, *args)
    monkeypatch.setattr(SelfDistillationTask, 'forward', fail)
    with pytest.raises(KeyboardInterrupt):
        go(data, tmp_path / 'run', '--save-steps', 1)
    found = torch.load(tmp_path / 'run/last.pth.tar', weights_only=True)['standing']
    assert (found['epoch'], found['step']) == state
    monkeypatch.setattr(SelfDistillationTask, 'forward', forward)
    go(data, tmp_path / 'run', '--save-steps', 1)
    for entry in ('state_dict', 'state_dict_ema'):
        assert not list_differences(*(
            read_tensors(folder / 'last.pth.tar', entry) for folder in (tmp_path / 'run', unbroken)))


def test_two_processes_learn_the_same_as_one(data, tmp_path):
    """The average is the same on both except for the running statistics, which each process has for its own images."""
    flags = [data, *FLAGS, *MESA, '--mixup', 0, '--cutmix', 0, '--drop', 0, '--epochs', 2, '--opt', 'sgd']
    for name, processes in (('one', 1), ('two', 2)):
        out, _ = run('train.py', *flags, '--output', tmp_path / name, processes=processes)
        assert out.count('self-distillation from epoch 2 on, weight 1.5') == 1
    one, two = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=True) for name in ('one', 'two'))
    assert one['rows'][-1]['train_loss'] == pytest.approx(two['rows'][-1]['train_loss'], rel=1e-3)
    for entry in ('state_dict', 'state_dict_ema'):
        differences = list_differences(one[entry], two[entry])  # 7e-7 was measured
        assert max((v for k, v in differences.items() if not re.search('running|num_batches', k)), default=0.) < 1e-5
    assert json.loads((tmp_path / 'two/environment.json').read_text(encoding='utf-8'))['world_size'] == 2


def test_skipped_steps_do_not_change_the_average(data, tmp_path, monkeypatch):
    """With on_nan=skip a bad batch in a distilling epoch changes neither weights nor average."""
    forward, losses = SelfDistillationTask.forward, []

    def spoil(self, *args):
        result = forward(self, *args)
        losses.append(1)
        return dict(result, loss=result['loss'] * float('nan')) if len(losses) == 30 else result
    monkeypatch.setattr(SelfDistillationTask, 'forward', spoil)
    go(data, tmp_path / 'run', '--on-nan', 'skip')
    checkpoint = torch.load(tmp_path / 'run/last.pth.tar', weights_only=True)
    assert checkpoint['skipped'] == 1
    assert all(torch.isfinite(value).all() for value in checkpoint['state_dict_ema'].values())
