"""The CARE Transformer for inference only: the same function with fewer operations.

Every step is exact algebra, computed in float64; only the rounding differs.

- A BatchNorm in evaluation mode is a scale and a shift per channel. The BatchNorm of the stem is folded into the
  convolution before it, the others (downsampling, Inter1, Inter2) into the one after them, none of which pads.
- The 3x3 convolution is a 7x7 one with a border of zeros: both local convolutions become one.
- The residual x + gamma * (c + P(h)) becomes x + gamma * c + (gamma P)(h): gamma is folded into the projection P.
- The heads share pooling, GELU and the statistics of their LayerNorms, so that their mean is one head.
- Dropout and stochastic depth do nothing, and are removed.

The `fuse` methods in `care.py`, which timm's `reparameterize_model` calls, return these modules.
"""
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..backbone import check_image_size
from ..folding import InferenceModule, fold_norm_into_next, fold_norm_into_previous, join_depthwise, scale_outputs

__all__ = ['FusedBlock', 'FusedHead', 'FusedMixer', 'FusedStem']

torch.fx.wrap('check_image_size')


# Parts of the network -------------------------------------------------------------------------------------------------

class FusedStem(InferenceModule):
    """Stem: images (B, in_chans, H, W) to (B, C, H // 4, W // 4)."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.conv = fold_norm_into_previous(stem.conv, stem.norm)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(check_image_size(x))


class FusedExpansion(InferenceModule):
    """Expansion, GELU and depth-wise convolution of an interaction: (B, C, H, W) to (B, ratio * C, H, W)."""

    def __init__(self, expansion: nn.Module) -> None:
        super().__init__()
        self.expand = fold_norm_into_next(expansion.norm, expansion.expand)
        self.act = nn.GELU()
        self.dwconv = expansion.dwconv
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dwconv(self.act(self.expand(x)))


class FusedInteraction(FusedExpansion):
    """Residual branch of an interaction, times `scale` per channel: (B, C, H, W) to the same shape."""

    def __init__(self, interaction: nn.Module, scale: Optional[torch.Tensor] = None) -> None:
        super().__init__(interaction)
        self.project = interaction.project if scale is None else scale_outputs(interaction.project, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.dwconv(self.act(self.expand(x))))


class FusedMixer(InferenceModule):
    """Split off the memory and mix the other slices: (B, C, H, W) to (B, m, H, W) and (B, C - m, H, W)."""

    def __init__(self, mixer: nn.Module, memory_chs: int) -> None:
        super().__init__()
        attn_chs, *local_chs = mixer.slices
        self.slices = [memory_chs, attn_chs, sum(local_chs)]
        self.long_range = mixer.long_range
        self.local = join_depthwise([mixer.local_3x3, mixer.local_7x7])
        self.eval()

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        memory, attn, local = x.split(self.slices, dim=1)
        return memory, torch.cat([self.long_range(attn), self.local(local)], dim=1)


class FusedStackedMixer(InferenceModule):
    """A `FusedMixer` for the ablation whose mixing layers run in sequence, each on all channels."""

    def __init__(self, mixer: nn.Module, memory_chs: int, mixed_chs: int) -> None:
        super().__init__()
        self.slices = [memory_chs, mixed_chs]
        self.mixer = mixer
        self.eval()

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        memory, features = x.split(self.slices, dim=1)
        return memory, self.mixer(features)


class FusedBlock(InferenceModule):
    """CareBlock: (B, 4m, H, W) to the same shape, or to the expanded channels of Inter2 in the last block.

    `inter1` and `inter2` are None if an ablation removes them; the layer scale `gamma` is None in the last block.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if hasattr(block.mixer, 'slices'):
            self.mixer = FusedMixer(block.mixer, block.memory_chs)
        else:
            self.mixer = FusedStackedMixer(block.mixer, block.memory_chs, block.mixed_chs)
        gamma = None if block.last else block.layer_scale.gamma.detach()
        self.inter1 = None if isinstance(block.inter1, nn.Identity) else FusedInteraction(block.inter1)
        if isinstance(block.inter2, nn.Identity):
            self.inter2 = None
        else:
            self.inter2 = FusedExpansion(block.inter2) if block.last else FusedInteraction(block.inter2, gamma)
        self.register_buffer('gamma', None if gamma is None else gamma[:, None, None].clone())
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory, features = self.mixer(x)
        if self.inter1 is not None:
            features = features + self.inter1(features)
        y = torch.cat([memory, features], dim=1)
        if self.gamma is None:
            return self.inter2(y)
        out = x + self.gamma * y
        if self.inter2 is not None:
            out = out + self.inter2(y)
        return out


class FusedHead(InferenceModule):
    """The mean of several heads as one: pooled features (B, C) to logits (B, num_classes).

    The LayerNorm only normalises; the scales and shifts of the original LayerNorms are folded into the linear layer.
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        first = heads[0]
        self.num_merged = len(heads)
        self.act = first.act
        self.norm = nn.LayerNorm(first.norm.normalized_shape, eps=first.norm.eps, elementwise_affine=False)
        weights = [head.fc.weight.double() * head.norm.weight.double() for head in heads]
        biases = [head.fc.bias.double() + head.fc.weight.double() @ head.norm.bias.double() for head in heads]
        self.fc = nn.Linear(
            first.fc.in_features, first.fc.out_features, device=first.fc.weight.device, dtype=first.fc.weight.dtype)
        with torch.no_grad():
            self.fc.weight.copy_(torch.stack(weights).mean(0))
            self.fc.bias.copy_(torch.stack(biases).mean(0))
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.act(x)))
