"""The CARE Transformer for phones: the fused network with fewer and safer operations still.

Phones compute in float16, whose largest number is 65504 and whose least normal one is 6.1e-5, and their compilers pay
for every change of shape. So

- attention is written with softmax and logarithms: no sum over positions that overflows, no small denominator, no
  feature that cancels to 0; queries, keys and values leave one convolution, head by head, so that two reshapes remain;
- the 11x1 and the 1x11 convolution of the early stages are one 11x11 cross, and that is one convolution with the local
  range beside it, whose 7x7 gets a border of zeros: 2 % more multiply-adds of care_s0 for 12 operations less.

Both are exact algebra but for one number: attention goes without its eps of 1e-6. That moves an output by the part
eps / denominator of itself; `watch_least_mass` says what the denominators are.
"""
import copy
from contextlib import contextmanager
from typing import Iterator, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..attention import positive_feature
from ..care import LinearAttention
from ..folding import InferenceModule, join_depthwise
from ..mlla import RotaryLinearAttention, to_map, to_tokens
from .care_fused import FusedBlock, FusedMixer

__all__ = [
    'ConvMixer', 'CrossConv', 'MeanPool', 'PhoneAttention', 'log_feature', 'rewrite_for_phone', 'watch_least_mass']

HALF_MAX = torch.finfo(torch.float16).max


def log_feature(shifted: torch.Tensor) -> torch.Tensor:
    """1 + log phi(t) of t + 1, for phi(t) = elu(t) + 1: without an exponential, and exact where phi vanishes."""
    return shifted.clamp(-HALF_MAX, 1.) + shifted.clamp(1., HALF_MAX).log()


class PhoneAttention(InferenceModule):
    """Linear attention by softmax: (B, C, H, W) to the same shape, every intermediate a mean or a logarithm.

    With phi(t) = elu(t) + 1 and K_a = sum_j phi(k_ja), output i is

        sum_a g_ia c_a,   c_a = sum_j phi(k_ja) / K_a v_j,   g_ia = phi(q_ia) K_a / sum_b phi(q_ib) K_b

    The first is a softmax over positions j of log phi(k), the second one over channels a of log phi(q) + log K. Both
    are the same for log phi + 1 = min(t + 1, 1) + log(max(t + 1, 1)), which needs no exponential and is nearly t
    itself for negative t, where phi vanishes. t + 1 comes from the bias, v from an identity in the convolution.

    Departure: no eps in the denominator; see above.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        qk = attention.qk
        chs, heads, size = qk.in_channels, attention.num_heads, attention.head_chs
        self.num_heads, self.head_chs = heads, size
        by_head = [part.view(heads, size, -1) for part in qk.weight.detach().chunk(2)]
        weight = torch.cat([*by_head, torch.eye(chs).to(qk.weight).view(heads, size, chs)], dim=1)
        shifts = [part.view(heads, size) + 1 for part in qk.bias.detach().double().chunk(2)]
        bias = torch.cat([*shifts, torch.zeros_like(shifts[0])], dim=1)
        self.qkv = nn.Conv2d(chs, 3 * chs, 1, device=qk.weight.device, dtype=qk.weight.dtype)
        with torch.no_grad():
            self.qkv.weight.copy_(weight.view(3 * chs, chs, 1, 1))
            self.qkv.bias.copy_(bias.flatten())
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        shifted, v = self.qkv(x).reshape(B, self.num_heads, 3 * self.head_chs, H * W).split(
            [2 * self.head_chs, self.head_chs], dim=2)
        q, k = log_feature(shifted).split(self.head_chs, dim=2)
        context = v @ k.softmax(dim=-1).transpose(-2, -1)  # (B, h, d, d)
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


class MeanPool(InferenceModule):
    """Global average pooling without a reshape: (B, C, H, W) to (B, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


def rewrite_for_phone(model: nn.Module) -> nn.Module:
    """A copy of a fused network with the operations of phones; the network itself stays.

    Args:
        model: What `caretrans.fuse.fuse` returned.
    """
    model = copy.deepcopy(model)
    for block in [module for module in model.modules() if isinstance(module, FusedBlock)]:
        if isinstance(block.mixer, FusedMixer) and not hasattr(block.mixer.long_range, 'qk'):
            block.mixer = ConvMixer(block.mixer)
    for mixer in [module for module in model.modules() if hasattr(module, 'long_range')]:
        mixer.long_range = PhoneAttention(mixer.long_range) if hasattr(mixer.long_range, 'qk') \
            else CrossConv(mixer.long_range)
    if getattr(model.global_pool, 'pool_type', '') == 'avg':
        model.global_pool = MeanPool()
    return model


@contextmanager
def watch_least_mass(model: nn.Module) -> Iterator[List[float]]:
    """The denominators of the attention of a network as trained or fused, the least of each call, while it runs.

        with watch_least_mass(model) as masses:
            model(images)
        least = min(masses, default=math.inf)
    """
    masses: List[float] = []

    def look(module: nn.Module, args: tuple) -> None:
        x = args[0]
        qk = module.qk(x) if isinstance(module, LinearAttention) else to_map(module.qk(to_tokens(x)))
        q, k = positive_feature(qk).reshape(
            len(x), 2 * module.num_heads, module.head_chs, -1).chunk(2, dim=1)
        masses.append((k.mean(dim=-1).unsqueeze(-2) @ q).min().item())

    hooks = [module.register_forward_pre_hook(look) for module in model.modules()
             if isinstance(module, (LinearAttention, RotaryLinearAttention))]
    try:
        yield masses
    finally:
        for hook in hooks:
            hook.remove()
