"""Optimizer and learning rate of the published runs, by timm."""
from typing import Any

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

__all__ = ['build_optimizer', 'build_schedule', 'optimizer_options', 'schedule_options']


def optimizer_options(lr: float, opt: str = 'momentum', weight_decay: float = 1e-4) -> dict[str, Any]:
    """Arguments of timm's `create_optimizer_v2`.

    By default that is SGD without Nesterov's momentum, which timm calls 'momentum'. Weight decay is for all parameters,
    also for biases and those of BatchNorm.
    """
    return dict(opt=opt, lr=lr, weight_decay=weight_decay, momentum=.9, filter_bias_and_bn=False)


def schedule_options(epochs: int, warmup_epochs: int, steps_per_epoch: int) -> dict[str, Any]:
    """Arguments of timm's `create_scheduler_v2`: a rate per step, whose cosine starts at the end of the warm-up."""
    return dict(
        sched='cosine', num_epochs=epochs - warmup_epochs, warmup_epochs=warmup_epochs, warmup_prefix=True,
        step_on_epochs=False, updates_per_epoch=steps_per_epoch)


def build_optimizer(module: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """An optimizer of the parameters of a module, see `optimizer_options`."""
    return create_optimizer_v2(module, **optimizer_options(lr, **options))


def build_schedule(
        optimizer: torch.optim.Optimizer, epochs: int, warmup_epochs: int, steps_per_epoch: int,
        warmup_lr: float = 1e-6) -> Scheduler:
    """A rate per step: linear from `warmup_lr` to the peak, then a half cosine over the other epochs, to 0.

    Call `step_update(n)` after step n, counted from 1; the first step uses
    `warmup_lr`, or the peak if there is no warm-up.
    """
    return create_scheduler_v2(
        optimizer, min_lr=0., warmup_lr=warmup_lr, **schedule_options(epochs, warmup_epochs, steps_per_epoch))[0]
