"""Parts shared by the phone forms of all networks.

Phones compute in float16, whose largest number is 65504 and whose smallest normal one is 6.1e-5, and every
change of shape costs them time.
"""
import copy
import math
from typing import Optional, Tuple

import torch
import torch.nn as nn

from ..attention import EPS
from ..folding import InferenceModule, fold_norm_into_head

__all__ = ['MeanPool', 'choose_scale', 'log_feature', 'split_log_eps', 'to_phone_form', 'use_mean_pool']

HALF_MAX = torch.finfo(torch.float16).max
NORM_INPUT = 64.  # largest input of a norm, of the images for the scale: squares up to 16 times as large are finite


def log_feature(shifted: torch.Tensor) -> torch.Tensor:
    """1 + log phi(t) as a function of t + 1, with phi(t) = elu(t) + 1: no exponential, and exact where phi vanishes."""
    return shifted.clamp(-HALF_MAX, 1.) + shifted.clamp(1., HALF_MAX).log()


def split_log_eps(key: float = 0.) -> Tuple[float, float]:
    """Values of `log_feature` of a query and a key with phi(q) phi(k) = EPS.

    Args:
        key: About the second value. The first is a number of float16; near 0, float16 is fine enough for an error of
            1e-6 of eps.
    """
    total = math.log(EPS) + 2
    query = round(128 * (total - key)) / 128
    return query, total - query


@torch.no_grad()
def choose_scale(model: nn.Module, images: torch.Tensor, least: float, most: float) -> float:
    """The power of two that makes the largest input of a LayerNorm between half of `NORM_INPUT` and `NORM_INPUT`.

    A LayerNorm undoes a scale of its input if its eps has the square of it. With the right one, neither the inputs
    and their squares nor the eps leave the numbers of float16: networks of one epoch have inputs of 1e-5.

    Args:
        model: A fused network.
        images: (B, C, H, W), normalised.
        least, most: Limits of the scale.
    """
    largest = [torch.finfo(torch.float32).tiny]
    hooks = [
        module.register_forward_pre_hook(lambda module, args: largest.append(args[0].abs().max().item()))
        for module in model.modules() if isinstance(module, nn.LayerNorm)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    ratio = NORM_INPUT / max(largest)
    return min(max(2. ** math.floor(math.log2(ratio)), least), most) if ratio > 0 else least  # 0 for infinity


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


def to_phone_form(model: nn.Module, images: Optional[torch.Tensor] = None) -> nn.Module:
    """Return a copy of a fused network with its last BatchNorm folded, through the global mean, into the head.

    The other layers must already be convolutions, gates and sums, channels first.

    Args:
        model: A network returned by `caretrans.fuse.fuse`.
        images: Not needed: there is no LayerNorm.
    """
    model = copy.deepcopy(model)
    if use_mean_pool(model) and isinstance(model.head, nn.Linear) and isinstance(model.norm, nn.BatchNorm2d):
        model.head = fold_norm_into_head(model.norm, model.head)
        model.norm = nn.Identity()
    return model
