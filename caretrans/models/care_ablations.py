"""The ablations of the paper: CARE blocks without one of their parts, or with another decoupling.

    timm.create_model('care_s0', ablation='no_inter1')
"""
from functools import partial
from typing import Any, Callable, Tuple

import torch
import torch.nn as nn
from timm.layers import LayerScale2d

from .care import CareBlock, DecoupledMixer, depthwise_conv, long_range

__all__ = ['ABLATIONS', 'AblatedCareBlock', 'ablated_block']

ABLATIONS = ('no_inter1', 'no_inter2', 'no_memory', 'symmetrical', 'stacked')


class StackedMixer(nn.Module):
    """The long range, then the 3x3, then the 7x7 convolution, each on all channels (*stacked*)."""

    def __init__(self, chs: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.long_range = long_range(chs, num_heads, **dd)
        self.local_3x3 = depthwise_conv(chs, 3, 3, **dd)
        self.local_7x7 = depthwise_conv(chs, 7, 7, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.local_7x7(self.local_3x3(self.long_range(x)))


class AblatedCareBlock(CareBlock):
    """A CARE block without one of its parts, or with another decoupling.

    - no_inter1, no_inter2: without that half of the dual interaction; without Inter2 there is nothing to expand in the
      last block, which then is a block like the others, and the heads see 4m channels.
    - no_memory: without the memory slice, everywhere, so that a stage has 3m channels.
    - symmetrical: as many channels for the long range as for both local ranges together.
    - stacked: long range and convolutions one after the other, each on all 3m channels.
    The number of heads stays; the heads of the last two are wider.
    """

    def __init__(
            self,
            slice_chs: int,
            ratios: Tuple[int, int],
            num_heads: int,
            drop: float = 0.,
            drop_path: float = 0.,
            ls_init_value: float = 1e-6,
            last: bool = False,
            ablation: str = '',
            **dd: Any,
    ) -> None:
        last = last and ablation != 'no_inter2'
        super().__init__(slice_chs, ratios, num_heads, drop, drop_path, ls_init_value, last, **dd)
        if ablation == 'no_inter1':
            self.inter1 = nn.Identity()
        elif ablation == 'no_inter2':
            self.inter2 = nn.Identity()
        elif ablation == 'no_memory':
            self.memory_chs, self.in_chs = 0, 3 * slice_chs
            self.out_chs = ratios[1] * self.in_chs if last else self.in_chs
            self.inter2 = type(self.inter2)(self.in_chs, ratios[1], drop, **dd)
            self.layer_scale = nn.Identity() if last else LayerScale2d(self.in_chs, ls_init_value, **dd)
        elif ablation == 'symmetrical':
            self.mixer = DecoupledMixer(3 * slice_chs // 2, 3 * slice_chs // 4, num_heads, **dd)
        elif ablation == 'stacked':
            self.mixer = StackedMixer(3 * slice_chs, num_heads, **dd)


def ablated_block(ablation: str) -> Callable[..., CareBlock]:
    """The class of block for one of `ABLATIONS`."""
    if ablation not in ABLATIONS:
        raise ValueError(f'Unknown ablation {ablation!r}: choose from {", ".join(ABLATIONS)}.')
    return partial(AblatedCareBlock, ablation=ablation)
