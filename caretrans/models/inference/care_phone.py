"""The CARE Transformer for phones: the fused network with fewer operations that are also safer in float16.

- Attention is written with softmax and logarithms: no sum over positions that overflows, no small denominator, no
  feature that cancels to 0. Queries, keys and values leave one convolution, head by head, so that two reshapes remain.
- The features for the head can be multiplied by a power of two, so that neither they nor the eps of its LayerNorm are
  too small for float16.
- The 11x1 and the 1x11 convolution of the early stages become one 11x11 cross, joined with the local 7x7 convolution,
  which gets a border of zeros: 2 % more multiply-adds for care_s0, but 12 operations fewer.

All is exact algebra, with the eps in the denominator of attention.
"""
import copy
import math
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..folding import InferenceModule, join_depthwise, make_pointwise, scale_outputs
from .care_fused import FusedBlock, FusedHead, FusedMixer
from .phone import choose_scale, log_feature, split_log_eps, use_mean_pool

__all__ = ['ConvMixer', 'CrossConv', 'PhoneAttention', 'PhoneHead', 'to_phone_form']

MOST_SCALE = 512.


class PhoneAttention(InferenceModule):
    """Linear attention by softmax: (B, C, H, W) to the same shape, every intermediate a mean or a logarithm.

    With phi(t) = elu(t) + 1 and K_a = sum_j phi(k_ja), output i is

        sum_a g_ia c_a,   c_a = sum_j phi(k_ja) / K_a v_j,   g_ia = phi(q_ia) K_a / (sum_b phi(q_ib) K_b + N eps)

    The first is a softmax over positions j of log phi(k), the second one over channels a of log phi(q) + log K. Both
    are the same for log phi + 1 = min(t + 1, 1) + log(max(t + 1, 1)), which needs no exponential and is nearly t
    itself for negative t, where phi vanishes. t + 1 comes from the bias, v from an identity in the convolution.

    The eps is one channel more in each head, whose query and key are constants with phi(q) phi(k) = eps, so that its
    phi(q) K is N eps; `mask` sets its c to 0.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        qk = attention.qk
        chs, heads, size = qk.in_channels, attention.num_heads, attention.head_chs
        self.num_heads, self.head_chs = heads, size
        q, k = (part.reshape(heads, size, chs) for part in qk.weight.detach().chunk(2))
        q_shift, k_shift = (part.reshape(heads, size) + 1 for part in qk.bias.detach().double().chunk(2))
        none, identity = torch.zeros_like(q[:, :1]), torch.eye(chs).to(q).view(heads, size, chs)
        q_eps, k_eps = (torch.full_like(q_shift[:, :1], value) for value in split_log_eps())
        self.qkv = make_pointwise(
            torch.cat([q, none, k, none, identity], dim=1).flatten(0, 1),
            torch.cat([q_shift, q_eps, k_shift, k_eps, torch.zeros_like(q_shift)], dim=1).flatten(), like=qk.weight)
        self.register_buffer('mask', (torch.arange(size + 1) < size).to(qk.weight))
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        size = self.head_chs
        shifted, v = self.qkv(x).reshape(B, self.num_heads, 3 * size + 2, H * W).split([2 * size + 2, size], dim=2)
        q, k = log_feature(shifted).split(size + 1, dim=2)
        context = v @ k.softmax(dim=-1).transpose(-2, -1) * self.mask  # (B, h, d, d + 1)
        shares = (q + k.logsumexp(dim=-1, keepdim=True)).softmax(dim=2)
        return (context @ shares).reshape(B, C, H, W)


class CrossConv(InferenceModule):
    """The sum of an 11x1 and a 1x11 depth-wise convolution as one 11x11 one: (B, C, H, W) to the same shape."""

    def __init__(self, strips: nn.Module) -> None:
        super().__init__()
        tall, wide = strips.conv_11x1, strips.conv_1x11
        size = tall.kernel_size[0]
        self.conv = nn.Conv2d(
            tall.in_channels, tall.in_channels, size, padding=size // 2, groups=tall.in_channels,
            device=tall.weight.device, dtype=tall.weight.dtype)
        border = size // 2
        weight = F.pad(tall.weight.double(), (border, border)) + F.pad(wide.weight.double(), (0, 0, border, border))
        with torch.no_grad():
            self.conv.weight.copy_(weight)
            self.conv.bias.copy_(tall.bias.double() + wide.bias.double())
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class ConvMixer(InferenceModule):
    """A mixer without attention as one convolution: (B, C, H, W) to (B, m, H, W) and (B, C - m, H, W)."""

    def __init__(self, mixer: FusedMixer) -> None:
        super().__init__()
        memory_chs, *mixed_chs = mixer.slices
        self.slices = [memory_chs, sum(mixed_chs)]
        self.conv = join_depthwise([CrossConv(mixer.long_range).conv, mixer.local])
        self.eval()

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        memory, features = x.split(self.slices, dim=1)
        return memory, self.conv(features)


class PhoneHead(InferenceModule):
    """A `FusedHead` of pooled features times a power of two: (B, C) to logits (B, num_classes).

    With z = s x, the LayerNorm gets 2 s gelu(x) = z (1 + erf(z / (s sqrt(2)))), and its eps the square of 2 s. Unlike
    gelu(z / s), that is exact where z / s is subnormal.
    """

    def __init__(self, head: FusedHead, scale: float) -> None:
        super().__init__()
        self.num_merged = head.num_merged
        self.register_buffer('to_erf', head.fc.weight.new_full((1,), 1 / (scale * math.sqrt(2))))
        self.norm = nn.LayerNorm(
            head.norm.normalized_shape, eps=head.norm.eps * (2 * scale) ** 2, elementwise_affine=False)
        self.fc = head.fc
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(x * (1 + (x * self.to_erf).erf())))


def to_phone_form(model: nn.Module, images: Optional[torch.Tensor] = None) -> nn.Module:
    """Return a copy of a fused network with the operations that phones prefer; the network itself is unchanged.

    Args:
        model: A network returned by `caretrans.fuse.fuse`.
        images: (B, C, H, W), normalised, to choose the scale of the features; without them these are not scaled.
    """
    model = copy.deepcopy(model)
    if images is not None and isinstance(model.head, FusedHead):
        scale = choose_scale(model, images, 1 / MOST_SCALE, MOST_SCALE) / 2  # the LayerNorm gets twice the features
        last = model.stages[-1].blocks[-1].inter2
        last.dwconv = scale_outputs(last.dwconv, torch.full_like(last.dwconv.bias, scale))
        model.head = PhoneHead(model.head, scale)
    for block in [module for module in model.modules() if isinstance(module, FusedBlock)]:
        if isinstance(block.mixer, FusedMixer) and not hasattr(block.mixer.long_range, 'qk'):
            block.mixer = ConvMixer(block.mixer)
    for mixer in [module for module in model.modules() if hasattr(module, 'long_range')]:
        mixer.long_range = PhoneAttention(mixer.long_range) if hasattr(mixer.long_range, 'qk') \
            else CrossConv(mixer.long_range)
    use_mean_pool(model)
    return model
