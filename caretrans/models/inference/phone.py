"""Parts shared by the phone forms of all networks.

Phones compute in float16, whose largest number is 65504 and whose smallest normal one is 6.1e-5, and every
change of shape costs them time.
"""
import copy
from contextlib import contextmanager
from typing import Iterator, List

import torch
import torch.nn as nn

from ..attention import positive_feature
from ..folding import InferenceModule, fold_norm_into_head

__all__ = ['MeanPool', 'log_feature', 'to_phone_form', 'use_mean_pool', 'watch_least_mass']

HALF_MAX = torch.finfo(torch.float16).max


def log_feature(shifted: torch.Tensor) -> torch.Tensor:
    """1 + log phi(t) as a function of t + 1, with phi(t) = elu(t) + 1: no exponential, and exact where phi vanishes."""
    return shifted.clamp(-HALF_MAX, 1.) + shifted.clamp(1., HALF_MAX).log()


class MeanPool(InferenceModule):
    """Global average pooling without a reshape: (B, C, H, W) to (B, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


def use_mean_pool(model: nn.Module) -> bool:
    """Replace average pooling of a fused network by `MeanPool`, in place; returns whether there was any."""
    averages = getattr(model.global_pool, 'pool_type', '') == 'avg'
    if averages:
        model.global_pool = MeanPool()
    return averages


def to_phone_form(model: nn.Module) -> nn.Module:
    """Return a copy of a fused network with its last BatchNorm folded, through the global mean, into the head.

    The other layers must already be convolutions, gates and sums, channels first.

    Args:
        model: A network returned by `caretrans.fuse.fuse`.
    """
    model = copy.deepcopy(model)
    if use_mean_pool(model) and isinstance(model.head, nn.Linear) and isinstance(model.norm, nn.BatchNorm2d):
        model.head = fold_norm_into_head(model.norm, model.head)
        model.norm = nn.Identity()
    return model


@contextmanager
def watch_least_mass(model: nn.Module) -> Iterator[List[float]]:
    """Record the smallest denominator of each call of linear attention in an original or fused network.

        with watch_least_mass(model) as masses:
            model(images)
        least = min(masses, default=math.inf)
    """
    masses: List[float] = []

    def look(module: nn.Module, args: tuple) -> None:
        x = args[0]
        qk = module.qk(x) if isinstance(module.qk, nn.Conv2d) else \
            module.qk(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        q, k = positive_feature(qk).reshape(
            len(x), 2 * module.num_heads, module.head_chs, -1).chunk(2, dim=1)
        masses.append((k.mean(dim=-1).unsqueeze(-2) @ q).min().item())

    hooks = [module.register_forward_pre_hook(look) for module in model.modules() if hasattr(module, 'qk')]
    try:
        yield masses
    finally:
        for hook in hooks:
            hook.remove()
