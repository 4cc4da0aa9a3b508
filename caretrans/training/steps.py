"""Optimizer steps over one epoch: no flags, no files, no globals."""
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

__all__ = ['NonFiniteError', 'Step', 'Stepper', 'mix_passes', 'train_steps']

LEAST_SCALE = 2. ** -14  # loss scale in float16; reached only after a long series of steps that all overflowed


class NonFiniteError(TrainingError):
    """A loss or a gradient is not finite.

    Attributes:
        step: Number of the optimizer step in the epoch.
        is_local: Whether the loss of this process is not finite.
    """

    def __init__(self, message: str, step: int, is_local: bool) -> None:
        super().__init__(message, is_shared=True)
        self.step, self.is_local = step, is_local


@dataclass
class Stepper:
    """Optimizer, schedule, loss scaler and clipping of a run, and the number of steps so far.

    Attributes:
        scheduler: Updated after every step, for schedules per step.
        scaler: Loss scaler, for float16.
        clip: Threshold of gradient clipping, None for no clipping.
        clip_mode: 'norm', 'value' or 'agc' (adaptive), as in timm.
        max_skips: Maximum number of steps skipped because a loss or gradient is not finite.
        skipped: Number of steps skipped so far; `steps` includes them.
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
        """Accumulate the gradient of one forward pass."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def measure_gradient(self) -> torch.Tensor:
        """The norm of the whole unscaled gradient, equal on all processes."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def update(self, norm: torch.Tensor) -> None:
        """Clip the gradient, whose norm is `norm`, and update the weights and the learning rate."""
        if self.clip is not None:
            parameters = [p for p in self.parameters if p.grad is not None]
            if self.clip_mode == 'norm':
                clip_grads_with_norm_(parameters, self.clip, norm)
            else:
                dispatch_clip_grad(parameters, self.clip, self.clip_mode)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)  # skips a step that overflowed
        self._finish()

    def skip(self) -> None:
        """Drop the gradient of this step and count it as skipped."""
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
    """Result of an optimizer step: its number in the epoch, this process's number of images, their mean loss and the
    terms of the task, the learning rate, the gradient norm, whether it was skipped, and whether any process was asked
    to stop."""
    number: int
    images: int
    loss: float
    terms: list[float]
    lr: float
    grad_norm: float
    skipped: bool
    stop: bool


def mix_passes(
        passes: Iterable[Pass], mixup: Mixup | None = None,
        memory_format: torch.memory_format = torch.contiguous_format) -> Iterator[Pass]:
    """Passes of a classifier with mixup or CutMix and in a memory format."""
    for batch in passes:
        x, target = (batch.images, batch.targets) if mixup is None else mixup(batch.images, batch.targets)
        yield batch._replace(images=x.contiguous(memory_format=memory_format), targets=target)


class _BufferGuard:
    """A copy of the running statistics after the last good step; the forward pass of a skipped step changes them."""

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
        processes: Processes = Processes(),  # noqa: B008 (immutable)
        wants_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Train on the passes of an epoch; yields after every optimizer step.

    At every step the processes agree on whether all losses and gradients are finite and whether to stop, so that none
    waits for another.

    Args:
        task: Forward pass and loss, of the form of `timm.task`; it may name, as its attribute `terms`, further scalars
            among its results.
        passes: With images and targets as the task takes them.
        wants_stop: Returns whether this process was asked to stop.
    Raises:
        NonFiniteError: A loss or gradient is not finite, and no more steps may be skipped.
        TrainingError: The loss scale fell so low that no step can succeed.
    """
    task.train()
    stepper.optimizer.zero_grad()
    guard = _BufferGuard(task.get_trainable_module()) if stepper.max_skips else None
    names = ('loss', *getattr(task, 'terms', ()))
    images, totals = 0, torch.zeros(())
    for x, target, number, index, count in passes:
        last = index + 1 == count
        with nullcontext() if last else task.no_sync():
            with autocast(task.device, amp):
                result = task(x, target)
            stepper.backward(result['loss'] / count)
        images += len(target)
        totals = totals + torch.stack([result[name].detach().float() for name in names]) * len(target)
        if not last:
            continue
        norm, lr = stepper.measure_gradient(), stepper.lr
        # Waits for the device, once per step.
        size, mean, *terms = torch.cat([norm.float()[None], totals / images]).tolist()
        # In float16 the scaler handles gradients that overflow.
        is_finite = math.isfinite(mean) and (math.isfinite(size) or stepper.scaler is not None)
        bad, stop = processes.largest([not is_finite, wants_stop()])
        if bad:
            if stepper.skipped >= stepper.max_skips:
                scale = f'loss scale {stepper.scaler.get_scale():g}' if stepper.scaler else 'no loss scaler'
                skipped = f', after {stepper.skipped} skipped steps' if stepper.skipped else ''
                raise NonFiniteError(
                    f'The loss is {mean}, the gradient norm {size:.4g}, at step {stepper.steps} (learning rate '
                    f'{stepper.lr:.3g}, {scale}){skipped}.', number, not math.isfinite(mean))
            guard.restore()
            stepper.skip()
        else:
            stepper.update(norm)
            if guard is not None:
                guard.keep()
        if stepper.scaler is not None and stepper.scaler.get_scale() < LEAST_SCALE:
            raise TrainingError(
                f'The loss scale fell to {stepper.scaler.get_scale():g} at step {stepper.steps} (learning rate '
                f'{stepper.lr:.3g}): every gradient overflows float16. Start a run with --amp bf16 or a lower rate, '
                f'with the last checkpoint of this one as --checkpoint.')
        yield Step(number, images, mean, terms, lr, size, bool(bad), bool(stop))
        images, totals = 0, torch.zeros(())
