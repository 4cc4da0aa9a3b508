"""The modules of the network with kernels inside: subclasses that change what `forward` calls and nothing else.

A module becomes one of these by a change of its class, so that its parameters, hooks and place in the network stay.
"""
import os
from typing import Dict, Type

import torch
import torch.nn as nn

from ..models.care import DecoupledMixer, Expansion, Interaction, LinearAttention

__all__ = ['KERNEL_MODULES', 'PARTS', 'KernelModule', 'is_interpreted']

PARTS = ('mixer', 'attention', 'expansion')
MAX_HEAD_CHS = 128  # wider heads do not fit into the registers


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU, for tests; read when Triton is first imported."""
    return os.environ.get('TRITON_INTERPRET') == '1'


def fits(x: torch.Tensor) -> bool:
    """Whether the kernels take `x`: where it lies, and as what."""
    return is_interpreted() if x.device.type == 'cpu' else x.is_cuda and x.dtype != torch.float64


class KernelModule(nn.Module):
    """What the modules with kernels have in common."""

    part: str
    torch_class: Type[nn.Module]

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """Why `module` must stay with PyTorch; '' if it need not."""
        return ''


class KernelLinearAttention(KernelModule, LinearAttention):
    part, torch_class = 'attention', LinearAttention

    @staticmethod
    def why_not(module: nn.Module) -> str:
        return f'heads are wider than {MAX_HEAD_CHS} channels' if module.head_chs > MAX_HEAD_CHS else ''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not fits(x):
            return LinearAttention.forward(self, x)
        from .linear_attention import attend
        B, C, H, W = x.shape
        q, k = self.qk(x).chunk(2, dim=1)
        heads = (B, self.num_heads, self.head_chs, H * W)
        return attend(q.reshape(heads), k.reshape(heads), x.reshape(heads)).reshape(B, C, H, W)


class KernelMixer(KernelModule, DecoupledMixer):
    part, torch_class = 'mixer', DecoupledMixer

    @staticmethod
    def why_not(module: nn.Module) -> str:
        return KernelLinearAttention.why_not(module.long_range) if hasattr(module.long_range, 'head_chs') else ''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not fits(x):
            return DecoupledMixer.forward(self, x)
        from .mixer import mix_with_attention, mix_with_strips
        long_range, convs = self.long_range, [self.local_3x3, self.local_7x7]
        attention = isinstance(long_range, LinearAttention)
        if not attention:
            convs = [long_range.conv_11x1, long_range.conv_1x11] + convs
        weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs]
        if not attention:
            return mix_with_strips(x, weights, biases)
        return mix_with_attention(x, long_range.qk(x[:, :self.slices[0]]), weights, biases, long_range.num_heads)


class KernelExpansion(KernelModule, Expansion):
    part, torch_class = 'expansion', Expansion

    @staticmethod
    def why_not(module: nn.Module) -> str:
        return '' if isinstance(module.norm, nn.Identity) else 'its normalisation is not folded into the expansion'

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        if not fits(x) or self.training or torch.is_grad_enabled():
            return Expansion.hidden(self, x)
        from .expansion import expand
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return expand(x, self.expand.weight, self.expand.bias, self.dwconv.weight, self.dwconv.bias, dtype)


class KernelInteraction(KernelExpansion, Interaction):
    torch_class = Interaction


KERNEL_MODULES: Dict[Type[nn.Module], Type[KernelModule]] = {
    module.torch_class: module for module in (KernelLinearAttention, KernelMixer, KernelExpansion, KernelInteraction)}
