"""One epoch of training: no flags, no files, no globals."""
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..data.loaders import Pass
from ..devices import autocast
from ..distributed import Processes
from ..errors import TrainingError

__all__ = ['NonFiniteError', 'Step', 'Stepper', 'train_steps']

LEAST_SCALE = 2. ** -14  # of the loss in float16; below, every step overflowed for a long time


class NonFiniteError(TrainingError):
    """A loss or a gradient is not finite.

    Attributes:
        step: Optimizer step of the epoch.
        is_local: Whether the loss of this process is one of them.
    """

    def __init__(self, message: str, step: int, is_local: bool) -> None:
        super().__init__(message, is_shared=True)
        self.step, self.is_local = step, is_local


@dataclass
class Stepper:
    """What an optimizer step needs, and how many were made.

    Attributes:
        scheduler: Told after every step how many were made, for schedules per step.
        scaler: Of the loss, in float16.
        clip: Gradients are clipped at this value, None for not at all.
        clip_mode: 'norm', 'value' or 'agc' (adaptive), as in timm.
        max_skips: Steps that may be left out because something is not finite.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None = None
    scaler: torch.amp.GradScaler | None = None
    clip: float | None = None
    clip_mode: str = 'norm'
    max_skips: int = 0
    steps: int = 0
    skipped: int = 0
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.optimizer.param_groups for p in group['params']]

    @property
    def lr(self) -> float:
        return max(group['lr'] for group in self.optimizer.param_groups)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one forward pass."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def measure_gradient(self) -> torch.Tensor:
        """The norm of the whole gradient, unscaled, the same on every process."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def update(self, norm: torch.Tensor) -> None:
        """Clip the gradient, whose norm is `norm`, update the weights and the rate."""
        if self.clip is not None:
            parameters = [p for p in self.parameters if p.grad is not None]
            if self.clip_mode == 'norm':
                clip_grads_with_norm_(parameters, self.clip, norm)
            else:
                dispatch_clip_grad(parameters, self.clip, self.clip_mode)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)  # which leaves out a step that overflowed
        self._finish()

    def skip(self) -> None:
        """Leave out this step, as one of those that may be."""
        self.skipped += 1
        self._finish()

    def _finish(self) -> None:
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.scheduler is not None:
            self.scheduler.step_update(self.steps)


class Step(NamedTuple):
    """What an optimizer step did: its number in the epoch, this process's images and loss (their mean), the rate it
    used, the norm of its gradient, whether it was left out, and whether some process wants to stop."""
    number: int
    images: int
    loss: float
    lr: float
    grad_norm: float
    skipped: bool
    stop: bool


class _BufferGuard:
    """Keeps the running statistics of the last good step, for one that is left out has spoiled them already."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self.copies = [buffer.clone() for buffer in self.buffers]

    def keep(self) -> None:
        for buffer, copy in zip(self.buffers, self.copies, strict=True):
            copy.copy_(buffer)

    def restore(self) -> None:
        for buffer, copy in zip(self.buffers, self.copies, strict=True):
            buffer.copy_(copy)


def train_steps(
        task: TrainingTask,
        passes: Iterable[Pass],
        stepper: Stepper,
        amp: str = 'off',
        mixup: Mixup | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        processes: Processes = Processes(),  # noqa: B008 (immutable)
        wants_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Train on the passes of an epoch; yields after every optimizer step.

    The processes agree at every step on whether all is finite and whether to stop, so that none is left waiting.

    Args:
        task: Forward pass and loss, from `timm.task`.
        wants_stop: Whether this process was asked to stop.
    Raises:
        NonFiniteError: A loss or gradient is not finite, and no more steps may be left out.
    """
    task.train()
    stepper.optimizer.zero_grad()
    guard = _BufferGuard(task.get_trainable_module()) if stepper.max_skips else None
    images, total = 0, 0.
    for x, target, number, index, count in passes:
        if mixup is not None:
            x, target = mixup(x, target)
        last = index + 1 == count
        with nullcontext() if last else task.no_sync():
            with autocast(x.device, amp):
                loss = task(x.contiguous(memory_format=memory_format), target)['loss']
            stepper.backward(loss / count)
        images, total = images + len(x), total + loss.detach().float() * len(x)
        if not last:
            continue
        norm, lr = stepper.measure_gradient(), stepper.lr
        mean, size = torch.stack([total / images, norm.float()]).tolist()  # waits for the device, once in a step
        # In float16 the scaler sees to gradients that overflow.
        is_finite = math.isfinite(mean) and (math.isfinite(size) or stepper.scaler is not None)
        bad, stop = processes.largest([not is_finite, wants_stop()])
        if bad:
            if stepper.skipped >= stepper.max_skips:
                raise NonFiniteError(_describe_failure(mean, size, stepper), number, not math.isfinite(mean))
            guard.restore()
            stepper.skip()
        else:
            stepper.update(norm)
            if guard is not None:
                guard.keep()
        _check_scale(stepper)
        yield Step(number, images, mean, lr, size, bool(bad), bool(stop))
        images, total = 0, 0.


def _describe_failure(loss: float, norm: float, stepper: Stepper) -> str:
    scale = 'no loss scaler' if stepper.scaler is None else f'loss scale {stepper.scaler.get_scale():g}'
    skipped = f', after {stepper.skipped} steps were left out' if stepper.skipped else ''
    return (f'The loss is {loss}, the norm of its gradient {norm:.4g}, at step {stepper.steps} '
            f'(learning rate {stepper.lr:.3g}, {scale}){skipped}.')


def _check_scale(stepper: Stepper) -> None:
    if stepper.scaler is not None and stepper.scaler.get_scale() < LEAST_SCALE:
        raise TrainingError(
            f'The loss scale fell to {stepper.scaler.get_scale():g} at step {stepper.steps} (learning rate '
            f'{stepper.lr:.3g}): every gradient overflows float16. Begin a run with --amp bf16 or a lower rate, '
            f'from the last checkpoint of this one by --checkpoint.')
