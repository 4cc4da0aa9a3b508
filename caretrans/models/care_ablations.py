"""Ablations of the paper: CARE blocks with a part removed, or with another decoupling.

    timm.create_model('care_s0', ablation='no_inter1')
"""
from typing import Any, Callable, Tuple, Type

import torch
import torch.nn as nn
from timm.layers import LayerScale2d

__all__ = ['ABLATIONS', 'ablate_block']

ABLATIONS = ('no_inter1', 'no_inter2', 'no_memory', 'symmetrical', 'stacked')


class StackedMixer(nn.Module):
    """Layers of a decoupled mixer in sequence, each on all channels (*stacked*)."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.long_range = mixer.long_range
        self.local_3x3 = mixer.local_3x3
        self.local_7x7 = mixer.local_7x7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.local_7x7(self.local_3x3(self.long_range(x)))


def ablate_block(block_class: Type[nn.Module], ablation: str) -> Callable[..., nn.Module]:
    """Return a constructor of blocks with a part removed, or with another decoupling.

    - no_inter1, no_inter2: without that half of the dual interaction; without Inter2 the last block has nothing to
      expand, so it equals the others and the heads get 4m channels.
    - no_memory: without the memory slice, so that every stage has 3m channels.
    - symmetrical: as many channels for the long range as for both local ranges together.
    - stacked: long range and convolutions in sequence, each on all 3m channels.
    The number of attention heads is unchanged; heads are wider in the last two ablations.

    Args:
        block_class: `caretrans.models.care.CareBlock`.
        ablation: One of `ABLATIONS`.
    Raises:
        ValueError: An unknown ablation.
    """
    if ablation not in ABLATIONS:
        raise ValueError(f'Unknown ablation {ablation!r}: choose from {", ".join(ABLATIONS)}.')

    def make_block(
            slice_chs: int, ratios: Tuple[int, int], num_heads: int, drop: float, drop_path: float,
            ls_init_value: float, last: bool, **dd: Any) -> nn.Module:
        last = last and ablation != 'no_inter2'
        block = block_class(slice_chs, ratios, num_heads, drop, drop_path, ls_init_value, last, **dd)
        if ablation == 'no_inter1':
            block.inter1 = nn.Identity()
        elif ablation == 'no_inter2':
            block.inter2 = nn.Identity()
        elif ablation == 'no_memory':
            block.memory_chs, block.in_chs = 0, 3 * slice_chs
            block.out_chs = ratios[1] * block.in_chs if last else block.in_chs
            block.inter2 = type(block.inter2)(block.in_chs, ratios[1], drop, **dd)
            block.layer_scale = nn.Identity() if last else LayerScale2d(block.in_chs, ls_init_value, **dd)
        elif ablation == 'symmetrical':
            block.mixer = type(block.mixer)(3 * slice_chs // 2, 3 * slice_chs // 4, num_heads, **dd)
        elif ablation == 'stacked':
            block.mixer = StackedMixer(type(block.mixer)(3 * slice_chs, 3 * slice_chs, num_heads, **dd))
        return block
    return make_block
