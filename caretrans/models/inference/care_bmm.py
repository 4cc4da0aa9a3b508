"""The CARE Transformer for XNNPACK: the fused network with operations that run in XNNPACK without fallbacks.

XNNPACK, which runs programs of ExecuTorch and LiteRT on CPUs, leaves unsupported operations to slow general code, with
a copy at each border. It supports no split, comparison, mean over one axis or matmul of four-dimensional tensors.
Therefore channels are cut by slices, batch and heads are one axis, the feature of attention is

    phi(t) = elu(t) + 1 = exp(-relu(-t)) + relu(t),

and its denominator is an extra row of the values, all ones, that the convolution makes. This is exact algebra.
"""
import copy
from typing import Tuple

import torch
import torch.nn as nn

from ..attention import EPS
from ..folding import InferenceModule

__all__ = ['BmmAttention', 'SlicedMixer', 'to_bmm_form']


class BmmAttention(InferenceModule):
    """Linear attention by matmuls of three-dimensional tensors: (B, C, H, W) to the same shape.

    One convolution computes queries, keys, values and a row of ones for each head, with few reshapes. Values and ones
    are multiplied by 1 / N, so that the sums over the N positions are means; see `caretrans.models.attention`.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        qk = attention.qk
        chs, heads, size = qk.in_channels, attention.num_heads, attention.head_chs
        self.num_heads, self.head_chs = heads, size
        by_head = [part.reshape(heads, size, chs) for part in qk.weight.detach().chunk(2)]
        identity = torch.eye(chs).to(qk.weight).view(heads, size, chs)
        weight = torch.cat([*by_head, identity, torch.zeros_like(identity[:, :1])], dim=1)
        shifts = [part.reshape(heads, size) for part in qk.bias.detach().chunk(2)]
        bias = torch.cat([*shifts, torch.zeros_like(shifts[0]), torch.ones_like(shifts[0][:, :1])], dim=1)
        self.qkv = nn.Conv2d(chs, bias.numel(), 1, device=qk.weight.device, dtype=qk.weight.dtype)
        with torch.no_grad():
            self.qkv.weight.copy_(weight.reshape(-1, chs, 1, 1))
            self.qkv.bias.copy_(bias.flatten())
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        size = self.head_chs
        qkv = self.qkv(x).reshape(B * self.num_heads, 3 * size + 1, H * W)
        qk, values = qkv[:, :2 * size], qkv[:, 2 * size:]  # (B*h, d + 1, N), the last row all ones
        features = (-(-qk).relu()).exp() + qk.relu()
        q, k = features[:, :size], features[:, size:]
        context = torch.bmm(values * (1 / (H * W)), k.transpose(1, 2))
        out = torch.bmm(context, q)
        return (out[:, :size] / (out[:, size:] + EPS)).reshape(B, C, H, W)


class SlicedMixer(InferenceModule):
    """A `FusedMixer` that slices instead of splitting: (B, C, H, W) to (B, m, H, W) and (B, C - m, H, W)."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.memory_chs, attn_chs, _ = mixer.slices
        self.end = self.memory_chs + attn_chs
        self.long_range, self.local = mixer.long_range, mixer.local
        if hasattr(self.long_range, 'qk'):
            self.long_range = BmmAttention(self.long_range)
        self.eval()

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        attn, local = x[:, self.memory_chs:self.end], x[:, self.end:]
        return x[:, :self.memory_chs], torch.cat([self.long_range(attn), self.local(local)], dim=1)


def to_bmm_form(model: nn.Module) -> nn.Module:
    """Return a copy of a fused network with operations that XNNPACK supports; the network itself is unchanged.

    Args:
        model: A network returned by `caretrans.fuse.fuse`.
    """
    model = copy.deepcopy(model)
    for block in [module for module in model.modules() if hasattr(module, 'mixer')]:
        if hasattr(block.mixer, 'local'):
            block.mixer = SlicedMixer(block.mixer)
    return model
