"""Optimizer and learning rate of the published runs, by timm."""
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

__all__ = ['build_optimizer', 'build_schedule']


def build_optimizer(
        module: nn.Module, lr: float, opt: str = 'momentum', weight_decay: float = 1e-4) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters of a module, with momentum 0.9.

    By default that is SGD without Nesterov's momentum, which timm calls 'momentum'. Weight decay is for all parameters,
    also for biases and those of BatchNorm.
    """
    return create_optimizer_v2(
        module, opt=opt, lr=lr, weight_decay=weight_decay, momentum=.9, filter_bias_and_bn=False)


def build_schedule(
        optimizer: torch.optim.Optimizer, epochs: int, warmup_epochs: int, steps_per_epoch: int,
        warmup_lr: float = 1e-6) -> Scheduler:
    """A rate per step: linear from `warmup_lr` to the peak, then a half cosine over the other epochs, to 0.

    The cosine starts at the end of the warm-up. Call `step_update(n)` after step n, counted from 1; the first step uses
    `warmup_lr`, or the peak if there is no warm-up.
    """
    return create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs - warmup_epochs, warmup_epochs=warmup_epochs, warmup_prefix=True,
        min_lr=0., warmup_lr=warmup_lr, step_on_epochs=False, updates_per_epoch=steps_per_epoch)[0]
