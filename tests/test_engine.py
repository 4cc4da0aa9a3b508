"""One epoch of training, against the same written out."""
import copy
import io

import pytest
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from caretrans.engine import Stepper, TrainingError, train_epoch
from caretrans.progress import Progress

CPU = torch.device('cpu')


def make_batches(count: int, size: int, classes: int = 5):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 8, 8, generator=generator), torch.randint(classes, (size,), generator=generator))
            for _ in range(count)]


def make_model(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Linear(16, classes)).double()


def run_epoch(model: nn.Module, batches, accumulation: int = 1, amp: str = 'off'):
    stepper = Stepper(torch.optim.SGD(model.parameters(), lr=0.1), accumulation=accumulation)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    return stepper, train_epoch(task, batches, stepper, CPU, amp)


def test_accumulated_steps_equal_the_large_batch():
    """Exactly, for networks that see each image by itself; BatchNorm sees the small batches."""
    small = [(x.double(), y) for x, y in make_batches(4, 6)]
    large = [tuple(torch.cat(part) for part in zip(*small[i:i + 2], strict=True)) for i in (0, 2)]
    accumulated, at_once = make_model(), make_model()
    stepper, result = run_epoch(accumulated, small, accumulation=2)
    _, expected = run_epoch(at_once, large)
    assert stepper.steps == 2 and result['images'] == 24 and result['loss'] == pytest.approx(expected['loss'])
    for a, b in zip(accumulated.parameters(), at_once.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_batches_that_do_not_fill_a_step_are_left_out():
    stepper, result = run_epoch(make_model(), [(x.double(), y) for x, y in make_batches(5, 6)], accumulation=2)
    assert stepper.steps == 2 and result['images'] == 24
    with pytest.raises(TrainingError, match='1 batches do not make one step of 2'):
        run_epoch(make_model(), make_batches(1, 6), accumulation=2)


def test_a_loss_that_is_not_finite_stops_training_and_says_where():
    batches = [(x.double(), y) for x, y in make_batches(3, 6)]
    batches[2][0][0, 0, 0, 0] = float('nan')
    with pytest.raises(TrainingError, match=r'loss is nan at step 2 \(learning rate 0.1\)'):
        run_epoch(make_model(), batches)


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_training_runs_in_half_precision(amp):
    model = make_model().float()
    before = copy.deepcopy(model.state_dict())
    _, result = run_epoch(model, make_batches(2, 6), amp=amp)
    assert result['loss'] == pytest.approx(run_epoch(make_model().float(), make_batches(2, 6))[1]['loss'], rel=0.02)
    assert not torch.equal(before['1.weight'], model.state_dict()['1.weight'])


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
