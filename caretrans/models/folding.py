"""Folding of norms, scales and heads into weights, which is exact, and the layers that fuse themselves this way.

Everything is computed in float64. The `fuse` method of a layer, which timm's `reparameterize_model` calls, returns
its fused replacement.
"""
import copy
from typing import Any, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = [
    'ConvNorm', 'FusedConv2d', 'InferenceModule', 'LinearHead', 'NormConv', 'ResidualConv', 'fold_norm_into_head',
    'fold_norm_into_next', 'fold_norm_into_previous', 'fold_pixels', 'join_depthwise', 'make_pointwise',
    'scale_outputs']


class InferenceModule(nn.Module):
    """A module without training mode."""

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError(
                'This network is fused, for inference only: its norms and layer scales are gone. Train the original '
                'network, and fuse it again.')
        return super().train(False)


class FusedConv2d(InferenceModule, nn.Conv2d):
    """A convolution with other layers folded into its weights."""


def _scale_and_shift(norm: nn.BatchNorm2d) -> Tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm in evaluation mode as x * scale + shift, in float64."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _make_conv(like: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """A convolution with the stride and padding of `like`, from float64 weight and bias."""
    conv = FusedConv2d(
        weight.shape[1] * like.groups, len(weight), like.kernel_size, like.stride, like.padding, groups=like.groups,
        device=like.weight.device, dtype=like.weight.dtype)
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
    return conv.requires_grad_(False).eval()


def _get_bias(conv: nn.Conv2d) -> torch.Tensor:
    """Bias in float64; zeros if there is none."""
    return conv.weight.new_zeros(conv.out_channels).double() if conv.bias is None else conv.bias.double()


def fold_norm_into_previous(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """norm(conv(x)) as one convolution."""
    scale, shift = _scale_and_shift(norm)
    return _make_conv(conv, conv.weight.double() * scale[:, None, None, None], _get_bias(conv) * scale + shift)


def _fold_affine(scale: torch.Tensor, shift: torch.Tensor, conv: nn.Conv2d) -> nn.Conv2d:
    """conv(x * scale + shift) as one convolution."""
    weight = conv.weight.double()
    return _make_conv(
        conv, weight * scale[:, None, None], _get_bias(conv) + (weight * shift[:, None, None]).sum((1, 2, 3)))


def fold_norm_into_next(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """conv(norm(x)) as one convolution.

    Raises:
        ValueError: The convolution pads; its zeros would have to equal the shift of the norm.
    """
    if any(conv.padding):
        raise ValueError(f'A norm cannot be folded into a convolution that pads by {conv.padding}.')
    return _fold_affine(*_scale_and_shift(norm), conv)


def scale_outputs(conv: nn.Conv2d, scale: torch.Tensor) -> nn.Conv2d:
    """scale * conv(x) as one convolution."""
    scale = scale.double()
    return _make_conv(conv, conv.weight.double() * scale[:, None, None, None], _get_bias(conv) * scale)


def fold_pixels(
        conv: nn.Conv2d, mean: Sequence[float], std: Sequence[float], white: float = 255., half: bool = False,
) -> nn.Conv2d:
    """conv((x / white - mean) / std) as one convolution of pixels x from 0 to `white`, per channel.

    Args:
        half: Whether the weights will be rounded to float16. The mean of pixels is far from 0, so rounding errors of
            the weights add up: the weights are then rounded here, and the mean error is corrected in the bias.
    Raises:
        ValueError: The convolution pads, or its channels do not match the means.
    """
    if any(conv.padding) or conv.in_channels != len(mean):
        raise ValueError(
            f'A normalisation of {len(mean)} channels cannot be folded into a convolution of {conv.in_channels} '
            f'channels that pads by {conv.padding}.')
    grey = white * torch.tensor(mean, dtype=torch.float64, device=conv.weight.device)
    scale = 1 / (white * torch.tensor(std, dtype=torch.float64, device=conv.weight.device))
    folded = _fold_affine(scale, -grey * scale, conv)
    if not half:
        return folded
    weight = folded.weight.double()
    rounded = weight.half().double()
    return _make_conv(folded, rounded, folded.bias.double() + ((weight - rounded) * grey[:, None, None]).sum((1, 2, 3)))


def make_pointwise(weight: torch.Tensor, bias: torch.Tensor, like: torch.Tensor) -> nn.Conv2d:
    """A linear layer of weight (out, in) and bias (out,) as a 1x1 convolution, with the dtype and device of `like`."""
    conv = FusedConv2d(weight.shape[1], len(weight), 1, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        conv.weight.copy_(weight[:, :, None, None])
        conv.bias.copy_(bias)
    return conv.requires_grad_(False).eval()


def join_depthwise(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """Join depth-wise convolutions of consecutive slices into one with the largest kernel."""
    largest = max(convs, key=lambda conv: conv.kernel_size)
    height, width = largest.kernel_size
    weights = []
    for conv in convs:
        border_y, border_x = (height - conv.kernel_size[0]) // 2, (width - conv.kernel_size[1]) // 2
        weights.append(F.pad(conv.weight, (border_x, border_x, border_y, border_y)))
    weight = torch.cat(weights)
    joined = nn.Conv2d(
        len(weight), len(weight), (height, width), padding=largest.padding, groups=len(weight),
        device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        joined.weight.copy_(weight)
        joined.bias.copy_(torch.cat([conv.bias for conv in convs]))
    return joined.requires_grad_(False)


# Layers that fold themselves -----------------------------------------------------------------------------------------

class ConvNorm(nn.Module):
    """A convolution and the BatchNorm after it: (B, in_chs, H, W) to (B, out_chs, H', W')."""

    def __init__(
            self, in_chs: int, out_chs: int, kernel_size: int = 1, stride: int = 1, groups: int = 1, bias: bool = True,
            **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=bias, **dd)
        self.norm = nn.BatchNorm2d(out_chs, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))

    def fuse(self) -> nn.Module:
        """One convolution for inference only."""
        return fold_norm_into_previous(self.conv, self.norm)


class NormConv(nn.Module):
    """A BatchNorm and the convolution after it, without padding: (B, in_chs, H, W) to (B, out_chs, H', W')."""

    def __init__(
            self, in_chs: int, out_chs: int, kernel_size: int = 1, stride: int = 1, bias: bool = True,
            **dd: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_chs, **dd)
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, bias=bias, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x))

    def fuse(self) -> nn.Module:
        """One convolution for inference only."""
        return fold_norm_into_next(self.norm, self.conv)


class ResidualConv(nn.Conv2d):
    """A depth-wise convolution of odd size with bias, added to its input: (B, C, H, W) to the same shape."""

    def __init__(self, chs: int, kernel_size: int = 3, **dd: Any) -> None:
        super().__init__(chs, chs, kernel_size, padding=kernel_size // 2, groups=chs, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self._conv_forward(x, self.weight, self.bias)

    def fuse(self) -> nn.Module:
        """One convolution for inference only, with 1 added to the central weights."""
        weight = self.weight.double().clone()
        weight[:, :, self.kernel_size[0] // 2, self.kernel_size[1] // 2] += 1
        return _make_conv(self, weight, _get_bias(self))


class LinearHead(nn.Linear):
    """A linear classifier of pooled features: (B, C) to (B, num_classes).

    Its output is averaged with the heads in `siblings`, which have `is_sibling` set.
    """

    siblings: Tuple[nn.Module, ...] = ()  # a tuple, so that they are not registered as submodules
    is_sibling = False
    __jit_ignored_attributes__ = ['siblings', 'is_sibling']

    def fuse(self) -> nn.Module:
        """One classifier for inference only, the mean of this head and its siblings, which become identities."""
        return nn.Identity() if self.is_sibling else FusedLinearHead([self, *self.siblings])


class FusedLinearHead(InferenceModule, nn.Linear):
    """The mean of several linear heads as one."""

    def __init__(self, heads: Sequence[nn.Linear]) -> None:
        first = heads[0]
        super().__init__(
            first.in_features, first.out_features, device=first.weight.device, dtype=first.weight.dtype)
        self.num_merged = len(heads)
        with torch.no_grad():
            self.weight.copy_(torch.stack([head.weight.double() for head in heads]).mean(0))
            self.bias.copy_(torch.stack([head.bias.double() for head in heads]).mean(0))
        self.requires_grad_(False).eval()


def fold_norm_into_head(norm: nn.Module, head: nn.Linear) -> nn.Linear:
    """Fold scale and shift of a norm of maps into the linear head after global average pooling.

    The mean commutes with them. This replaces a BatchNorm entirely; a LayerNorm remains, without scale and shift.

    Args:
        norm: A BatchNorm2d in evaluation mode, or a LayerNorm over channels.
        head: Linear head on pooled features (B, C).
    """
    scale, shift = _scale_and_shift(norm) if isinstance(norm, nn.BatchNorm2d) else (norm.weight, norm.bias)
    folded, weight = copy.deepcopy(head), head.weight.double()
    with torch.no_grad():
        folded.weight.copy_(weight * scale.double())
        folded.bias.copy_(head.bias.double() + weight @ shift.double())
    return folded
