"""CAS-ViT for phones: the fused network, whose last BatchNorm goes through the global mean into the head.

The rest is convolutions, gates and sums already, channels first.
"""
import copy

import torch.nn as nn

from ..folding import fold_norm_into_head
from .care_phone import MeanPool

__all__ = ['rewrite_casvit_for_phone']


def rewrite_casvit_for_phone(model: nn.Module) -> nn.Module:
    """A copy of a fused CAS-ViT with the operations of phones; the network itself stays.

    Args:
        model: What `caretrans.fuse.fuse` returned.
    """
    model = copy.deepcopy(model)
    if getattr(model.global_pool, 'pool_type', '') == 'avg':
        model.global_pool = MeanPool()
        if isinstance(model.head, nn.Linear) and isinstance(model.norm, nn.BatchNorm2d):
            model.head = fold_norm_into_head(model.norm, model.head)
            model.norm = nn.Identity()
    return model
