"""Optimizer steps, compared with the same computation written out."""
import copy
import io
import math

import pytest
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from caretrans.data.loaders import Pass
from caretrans.errors import TrainingError
from caretrans.progress import Progress
from caretrans.training.steps import NonFiniteError, Stepper, train_steps

CPU = torch.device('cpu')


def make_batches(count: int, size: int, classes: int = 5):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 8, 8, generator=generator), torch.randint(classes, (size,), generator=generator))
            for _ in range(count)]


def make_model(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Linear(16, classes)).double()


def make_passes(batches, passes: int = 1):
    dtype = next(iter(batches))[0].dtype
    return [Pass(x.to(dtype), y, i // passes, i % passes, passes) for i, (x, y) in enumerate(batches)]


def run_epoch(model: nn.Module, batches, passes: int = 1, amp: str = 'off', **options):
    stepper = Stepper(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    return stepper, list(train_steps(task, make_passes(batches, passes), stepper, amp))


def doubled(batches):
    return [(x.double(), y) for x, y in batches]


def test_accumulated_steps_equal_the_large_batch():
    """Exact for networks without BatchNorm, which sees the small batches."""
    small = doubled(make_batches(4, 6))
    large = [tuple(torch.cat(part) for part in zip(*small[i:i + 2], strict=True)) for i in (0, 2)]
    accumulated, at_once = make_model(), make_model()
    stepper, steps = run_epoch(accumulated, small, passes=2)
    _, expected = run_epoch(at_once, large)
    assert stepper.steps == 2 and [step.images for step in steps] == [12, 12]
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected])
    for a, b in zip(accumulated.parameters(), at_once.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_accumulated_steps_of_care_s0_equal_the_large_batch_but_for_batch_norm():
    """The whole network and AdamW, with BatchNorm in evaluation mode: 1e-9 in float64; in training mode they differ."""
    images = [(torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(5, (4,))) for _ in range(2)]
    joined = [tuple(torch.cat(part) for part in zip(*images, strict=True))]

    def train(batches, passes, frozen):
        torch.manual_seed(0)
        model = timm.create_model('care_s0', num_classes=5, depths=(1, 1, 1, 1)).double()
        task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        if frozen:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train = lambda mode=True, module=module: module
                    module.training = False
        list(train_steps(task, make_passes(batches, passes), Stepper(create_optimizer_v2(model, opt='adamw', lr=1e-3))))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.allclose(train(images, 2, True), train(joined, 1, True), rtol=0, atol=1e-9)
    assert not torch.allclose(train(images, 2, False), train(joined, 1, False), rtol=0, atol=1e-9)


def spoil(batches, *numbers):
    for number in numbers:
        batches[number][0][0, 0, 0, 0] = float('nan')
    return batches


def test_a_loss_that_is_not_finite_stops_training_and_names_the_step():
    model = make_model()
    with pytest.raises(NonFiniteError, match=r'loss is nan.* at step 2 \(learning rate 0.1, no loss scaler\)') as error:
        run_epoch(model, spoil(doubled(make_batches(3, 6)), 2))
    assert error.value.step == 2 and error.value.is_local
    assert all(torch.isfinite(p).all() for p in model.parameters()), 'the step did not change them'


def test_a_gradient_that_is_not_finite_stops_training_too():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5))

        def forward(self, x):
            return self.weight.abs().sqrt() + x.flatten(1)[:, :5]  # the slope of the root is infinite at 0

    with pytest.raises(NonFiniteError, match='gradient norm (inf|nan)'):
        run_epoch(Root(), make_batches(1, 6))


def test_bad_steps_are_skipped_up_to_the_limit():
    """As if these batches did not exist, including the running statistics."""
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 5)).double()

    batches, model, expected = doubled(make_batches(5, 6)), make(), make()
    run_epoch(expected, [batches[i] for i in (0, 2, 4)])
    stepper, steps = run_epoch(model, spoil(doubled(make_batches(5, 6)), 1, 3), max_skips=2)
    assert [step.skipped for step in steps] == [False, True, False, True, False] and stepper.skipped == 2
    for key, value in expected.state_dict().items():
        if 'num_batches' not in key:
            assert torch.equal(model.state_dict()[key], value), key
    with pytest.raises(NonFiniteError, match='after 2 skipped steps'):
        run_epoch(make(), spoil(doubled(make_batches(5, 6)), 1, 2, 3), max_skips=2)


def test_gradients_are_clipped_as_timm_does():
    batches = doubled(make_batches(1, 6))
    plain, clipped = make_model(), make_model()
    start = copy.deepcopy(list(plain.parameters()))
    _, (step,) = run_epoch(plain, batches)
    run_epoch(clipped, batches, clip=step.grad_norm / 2)
    assert step.grad_norm == pytest.approx(
        math.sqrt(sum(((a - b) / 0.1).square().sum().item() for a, b in zip(plain.parameters(), start, strict=True))))
    for before, full, half in zip(start, plain.parameters(), clipped.parameters(), strict=True):
        assert torch.allclose(before - half, (before - full) / 2, rtol=1e-5)
    for mode in ('value', 'agc'):
        model = make_model()
        run_epoch(model, batches, clip=1e-4, clip_mode=mode)
        moved = max((a - b).abs().max().item() for a, b in zip(model.parameters(), start, strict=True))
        assert 0 < moved < (1.001e-5 if mode == 'value' else 1e-3)


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_training_runs_in_half_precision(amp):
    model = make_model().float()
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler('cpu') if amp == 'fp16' else None
    _, steps = run_epoch(model, make_batches(2, 6), amp=amp, scaler=scaler)
    _, expected = run_epoch(make_model().float(), make_batches(2, 6))
    assert steps[-1].loss == pytest.approx(expected[-1].loss, rel=0.02)
    assert steps[-1].grad_norm == pytest.approx(expected[-1].grad_norm, rel=0.05), 'unscaled'
    assert not torch.equal(before['1.weight'], model.state_dict()['1.weight'])


def test_a_loss_scale_that_keeps_falling_stops_training():
    model, batches = make_model().float(), make_batches(60, 6)
    scaler = torch.amp.GradScaler('cpu', init_scale=1.)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    for p in model.parameters():
        p.register_hook(lambda grad: grad * float('inf'))
    with pytest.raises(TrainingError, match='loss scale fell to .* --amp bf16'):
        list(train_steps(task, make_passes(batches), Stepper(torch.optim.SGD(model.parameters()), scaler=scaler)))


def test_weight_decay_is_on_weights_of_two_or_more_dimensions_only():
    model = timm.create_model('care_s0')
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05)
    decayed = {p for group in optimizer.param_groups if group['weight_decay'] for p in group['params']}
    assert decayed == {p for p in model.parameters() if p.ndim >= 2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_in_a_terminal_and_plain_lines_elsewhere():
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        with Progress(100, interval=0., stream=stream) as progress:
            progress.describe('epoch 1/2')
            progress.update(25, loss=2.5, lr=0.001)
            progress.write('a line that stays')
    assert '\r' in terminal.getvalue() and 'epoch 1/2' in terminal.getvalue()
    assert '\r' not in plain.getvalue() and plain.getvalue().count('\n') == 2
    for part in ('epoch 1/2', '25/100 images', 'loss 2.5', 'lr 0.001', 'images/s', 'left', 'a line that stays'):
        assert part in plain.getvalue()
