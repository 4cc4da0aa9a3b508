"""Modules of the networks with kernels inside: subclasses that change what `forward` calls and nothing else.

A module becomes one of these by a change of its class, so that its parameters, hooks and place in the network are kept.
"""
import os

import torch
import torch.nn as nn

from ..models.care import DecoupledMixer, LinearAttention
from ..models.inference.care_fused import FusedMixer
from ..models.mlla import RotaryLinearAttention

__all__ = ['KERNEL_MODULES', 'PARTS', 'KernelModule', 'is_interpreted']

PARTS = ('mixer', 'attention')
MAX_HEAD_CHS = 128  # wider heads do not fit into the registers


def is_interpreted() -> bool:
    """True if Triton's interpreter runs the kernels, on the CPU, for tests; read when Triton is first imported."""
    return os.environ.get('TRITON_INTERPRET') == '1'


def fits(x: torch.Tensor) -> bool:
    """True if the kernels support the device and dtype of `x`."""
    return is_interpreted() if x.device.type == 'cpu' else x.is_cuda and x.dtype != torch.float64


class KernelModule(nn.Module):
    """Base of the modules with kernels."""

    part: str
    torch_class: type[nn.Module]

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """The reason why `module` must run in PyTorch; '' if there is none."""
        return ''


# Long range, mixers ---------------------------------------------------------------------------------------------------

class KernelLinearAttention(KernelModule, LinearAttention):
    """Splits queries and keys as maps, before heads: their gradients are then joined as maps and keep the layout of the
    map, also NHWC, while joined heads would be copied.
    """

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


class KernelRotaryLinearAttention(KernelModule, RotaryLinearAttention):
    part, torch_class = 'attention', RotaryLinearAttention
    why_not = KernelLinearAttention.why_not

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotate: torch.Tensor) -> torch.Tensor:
        if not fits(v):
            return RotaryLinearAttention.attend(self, q, k, v, rotate)
        from .linear_attention import attend
        return attend(q, k, v, rotate=rotate)


def mix(
        x: torch.Tensor, attn_chs: int, long_range: nn.Module, weights: list[torch.Tensor],
        biases: list[torch.Tensor]) -> torch.Tensor:
    """[long range | 3x3 | 7x7] of x; weights and biases of the last two."""
    from .mixer import mix_with_attention, mix_with_strips
    if isinstance(long_range, LinearAttention):
        return mix_with_attention(x, long_range.qk(x[:, :attn_chs]), weights, biases, long_range.num_heads)
    strips = [long_range.conv_11x1, long_range.conv_1x11]
    return mix_with_strips(
        x, [strip.weight for strip in strips] + weights, [strip.bias for strip in strips] + biases)


class KernelMixer(KernelModule, DecoupledMixer):
    part, torch_class = 'mixer', DecoupledMixer

    @staticmethod
    def why_not(module: nn.Module) -> str:
        is_attention = isinstance(module.long_range, LinearAttention)
        return KernelLinearAttention.why_not(module.long_range) if is_attention else ''

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not fits(x):
            return DecoupledMixer.forward(self, x)
        local = [self.local_3x3, self.local_7x7]
        return mix(x, self.slices[0], self.long_range, [conv.weight for conv in local], [conv.bias for conv in local])


class KernelFusedMixer(KernelModule, FusedMixer):
    """Splits the joined local convolution again: the kernel needs no zeros around the 3x3 one."""

    part, torch_class = 'mixer', FusedMixer

    @staticmethod
    def why_not(module: nn.Module) -> str:
        border = module.local.weight[:module.slices[2] // 2].clone()
        border[:, :, 2:5, 2:5] = 0
        return 'its first convolution is larger than 3x3' if border.any() else KernelMixer.why_not(module)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not fits(x):
            return FusedMixer.forward(self, x)
        memory_chs, attn_chs, local_chs = self.slices
        memory, features = x.split([memory_chs, attn_chs + local_chs], dim=1)
        weight_3x3, weight_7x7 = self.local.weight.chunk(2)
        weights, biases = [weight_3x3[:, :, 2:5, 2:5], weight_7x7], list(self.local.bias.chunk(2))
        return memory, mix(features, attn_chs, self.long_range, weights, biases)


KERNEL_MODULES: dict[type[nn.Module], type[KernelModule]] = {module.torch_class: module for module in (
    KernelLinearAttention, KernelRotaryLinearAttention, KernelMixer, KernelFusedMixer)}
