"""One epoch of training: no flags, no files, no globals."""
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Dict, Optional

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import NativeScaler

from .config import ConfigError

__all__ = ['Stepper', 'TrainingError', 'autocast', 'resolve_device', 'train_epoch']

AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stood."""


def resolve_device(name: str) -> torch.device:
    """The device of that name; 'auto' is cuda, else mps, else cpu.

    Raises:
        ConfigError: There is no such device here.
    """
    available = [kind for kind, module in (('cuda', torch.cuda), ('mps', torch.backends.mps)) if module.is_available()]
    if name == 'auto':
        return torch.device((available + ['cpu'])[0])
    if name.split(':')[0] not in available + ['cpu']:
        raise ConfigError(f'device={name}, but there is only {", ".join(available + ["cpu"])} here.')
    return torch.device(name)


def autocast(device: torch.device, amp: str) -> ContextManager:
    """Autocast in 'bf16' or 'fp16'; nothing for 'off'."""
    return nullcontext() if amp == 'off' else torch.autocast(device.type, AMP_DTYPES[amp])


@dataclass
class Stepper:
    """What an optimizer step needs, and how many were made.

    Attributes:
        accumulation: Forward passes per optimizer step.
        scaler: Of the loss, in float16.
        scheduler: Told after every step how many were made, for schedules per step.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Optional[Scheduler] = None
    accumulation: int = 1
    scaler: Optional[NativeScaler] = None
    steps: int = 0

    @property
    def lr(self) -> float:
        return max(group['lr'] for group in self.optimizer.param_groups)

    def backward(self, loss: torch.Tensor, last_of_step: bool) -> None:
        """Add the gradient of one forward pass; after the last one of a step, update the weights."""
        loss = loss / self.accumulation
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, need_update=last_of_step)
        else:
            loss.backward()
            if last_of_step:
                self.optimizer.step()
        if last_of_step:
            self.optimizer.zero_grad()
            self.steps += 1
            if self.scheduler is not None:
                self.scheduler.step_update(self.steps)


def train_epoch(
        task: TrainingTask,
        loader: Any,
        stepper: Stepper,
        device: torch.device,
        amp: str = 'off',
        mixup: Optional[Mixup] = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        report: Callable[..., None] = lambda images, **figures: None,
) -> Dict[str, float]:
    """Train on every whole optimizer step that the loader gives.

    Args:
        task: Forward pass and loss, from `timm.task`.
        loader: Batches of (images, labels); an iterable with a length.
        report: Called after every forward pass with the images so far seen and loss, lr.
    Returns:
        Mean loss, last lr, images, seconds and images_per_s.
    Raises:
        TrainingError: The loss is not finite.
    """
    task.train()
    stepper.optimizer.zero_grad()
    start, images, total = time.perf_counter(), 0, 0.
    passes = len(loader) // stepper.accumulation * stepper.accumulation
    if not passes:
        raise TrainingError(f'{len(loader)} batches do not make one step of {stepper.accumulation} forward passes.')
    for i, (x, target) in zip(range(passes), loader):  # noqa: B905 (the loader may have a few batches more)
        x, target = x.to(device, non_blocking=True), target.to(device, non_blocking=True)
        if mixup is not None:
            x, target = mixup(x, target)
        with autocast(device, amp):
            loss = task(x.contiguous(memory_format=memory_format), target)['loss']
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f'The loss is {value} at step {stepper.steps} (learning rate {stepper.lr:.3g}).')
        lr = stepper.lr
        stepper.backward(loss, last_of_step=(i + 1) % stepper.accumulation == 0)
        images, total = images + len(x), total + value * len(x)
        report(images, loss=total / images, lr=lr)
    if not images:
        raise TrainingError('The loader gave no images.')
    seconds = time.perf_counter() - start
    return dict(loss=total / images, lr=lr, images=images, seconds=seconds, images_per_s=images / seconds)
