"""MLLA for phones: the fused network with fewer operations that are also safer in float16.

All maps are channels first, so that nothing is transposed: linear layers are 1x1 convolutions, and LayerNorms run along
the channels in the form that Core ML's converter recognises as one operation. Their scales and shifts are folded into
the convolutions after them. Both projections of a block are one convolution.

The linear attention is written for float16 like that of `care_phone.py`: features by their logarithms, queries by a
softmax over channels, keys as fractions of their mean, so that no sum overflows and no denominator is small. Its rotary
code is two elementwise products with constant tables and one matmul with a small matrix; nothing is split into pairs.

The residual stream has its values in the original network times a power of two, 1/8 if no images say otherwise.
LayerNorm is invariant to that, ReLU preserves it, and squares, which some programs compute separately, are finite in
float16 up to values of 2,000 instead of 255.

Everything is exact algebra, with the eps in the denominator of attention.
"""
import copy
import math
from typing import List, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..folding import InferenceModule, fold_norm_into_head, make_pointwise, scale_outputs
from ..rotary import rotary_code
from .phone import choose_scale, log_feature, split_log_eps, use_mean_pool

__all__ = ['ChannelNorm', 'PhoneMllaBlock', 'PhoneRotaryAttention', 'make_rotary_tables', 'to_phone_form']

STREAM = 1 / 8  # least factor of the residual stream
MOST_STREAM = 4.


def make_rotary_tables(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Cosines over sines of the rotary code of a map (B, C, H, W), by head: (1, h, 2d + 2, H * W) in its dtype.

    In a head, the first channels of all pairs come first, then the second ones; both have the angle of their pair. The
    channel of eps comes before them, and has 0.
    """
    chs, height, width = x.shape[1], x.shape[2], x.shape[3]
    cos, sin = rotary_code(x).reshape(2, num_heads, chs // num_heads // 2, height * width).to(x.dtype).unbind(0)
    none = torch.zeros_like(cos[:, :1])
    return torch.cat([none, cos, cos, none, sin, sin], dim=1).unsqueeze(0)


def _turn_halves(size: int) -> torch.Tensor:
    """The matrix J of (second, first) -> (-first, second) for channels ordered as above: (size, size)."""
    eye = torch.eye(size // 2)
    zero = torch.zeros_like(eye)
    return torch.cat([torch.cat([zero, -eye], dim=1), torch.cat([eye, zero], dim=1)])


class PhoneRotaryAttention(InferenceModule):
    """RotaryLinearAttention for float16: a map (B, C, H, W) and its tables to the same shape as the map.

    With m, sqrt(N) times the mean of phi(k) over channels and positions, k' = phi(k) / m, and one channel more of
    constants with phi(q) k' = eps, which takes part in the denominator alone,

        out_i = R_i u_i . (sum_j R_j k'_j v_j) / (u_i . sum_j k'_j)

    where u is a softmax over the d + 1 channels of log phi(q), and of log phi(q) - log m in that channel. k' is about
    N^-1/2 and the sums about N^1/2, whatever the keys are. R x = cos x + J (sin x) with a matrix J of 1 and -1, so that
    the matmuls use (cos u, sin u) and (cos k', sin k'), and J is applied to the sums.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        linear = attention.qk
        chs, heads, size = linear.in_features, attention.num_heads, attention.head_chs
        self.num_heads, self.head_chs = heads, size
        order = torch.arange(size).reshape(-1, 2).t().flatten()  # the first of all pairs, then the second
        q, k = (part.reshape(heads, size, chs)[:, order] for part in linear.weight.detach().double().chunk(2))
        q_shift, k_shift = (
            part.reshape(heads, size)[:, order] + 1 for part in linear.bias.detach().double().chunk(2))
        none, identity = torch.zeros_like(q[:, :1]), torch.eye(chs).to(q).view(heads, size, chs)
        q_eps, k_eps = (torch.full_like(q_shift[:, :1], value) for value in split_log_eps(-2.75))
        self.qkv = make_pointwise(
            torch.cat([none, q, none, k, identity], dim=1).flatten(0, 1),
            torch.cat([q_eps, q_shift, k_eps, k_shift, torch.zeros_like(q_shift)], dim=1).flatten(), like=linear.weight)
        signs = torch.cat([-torch.ones(1), torch.zeros(size + 1), -torch.ones(size)])  # queries keep their precision
        self.register_buffer('signs', signs[:, None].to(linear.weight))
        eye, turn = F.pad(torch.eye(size), (1, 0, 1, 0)), F.pad(_turn_halves(size), (1, 0, 1, 0))
        mix = torch.cat([torch.cat([eye, turn], dim=1), torch.cat([turn.t(), eye], dim=1)])
        self.register_buffer('mix', mix.t().contiguous().to(linear.weight))
        self.lepe = attention.lepe
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        size = self.head_chs
        shifted, v = self.qkv(x).reshape(B, self.num_heads, 3 * size + 2, H * W).split([2 * size + 2, size], dim=2)
        features = log_feature(shifted)
        _, keys = features.split([size + 2, size], dim=2)
        mass = keys.logsumexp(dim=(2, 3), keepdim=True) - math.log(size * math.sqrt(H * W))
        q, k = (features + mass * self.signs).split(size + 1, dim=2)
        q, k = q.softmax(dim=2), k.exp()
        weight = k.sum(dim=3).unsqueeze(2) @ q  # (B, h, 1, N)
        context = v @ (torch.cat([k, k], dim=2) * tables).transpose(-2, -1)  # (B, h, d, 2d + 2)
        out = (context @ self.mix) @ (torch.cat([q, q], dim=2) * tables)
        return (out / weight).reshape(B, C, H, W) + self.lepe(x)


class ChannelNorm(InferenceModule):
    """A LayerNorm along the channels of the stream (B, C, H, W) times `scale`, without scale and shift of its own.

    Core ML's converter turns it into one operation.
    """

    def __init__(self, norm: nn.LayerNorm, scale: float) -> None:
        super().__init__()
        self.eps = norm.eps * scale ** 2
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        return centred * ((centred * centred).mean(dim=1, keepdim=True) + self.eps).rsqrt()


class ScaledNorm(ChannelNorm):
    """A `ChannelNorm` with scale and shift."""

    def __init__(self, norm: nn.LayerNorm, scale: float) -> None:
        super().__init__(norm, scale)
        self.register_buffer('scale', norm.weight.detach()[:, None, None].clone())
        self.register_buffer('shift', norm.bias.detach()[:, None, None].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale + self.shift


def _fold(norm: nn.LayerNorm, linears: List[nn.Linear]) -> nn.Conv2d:
    """Linear layers side by side behind a LayerNorm as one 1x1 convolution behind a `ChannelNorm`."""
    weight = torch.cat([linear.weight.double() for linear in linears])
    bias = torch.cat([linear.bias.double() for linear in linears])
    return make_pointwise(weight * norm.weight.double(), bias + weight @ norm.bias.double(), like=linears[0].weight)


def _write(linear: nn.Linear, scale: float) -> nn.Conv2d:
    """A linear layer as a 1x1 convolution whose output is added to the scaled stream."""
    return make_pointwise(linear.weight.double() * scale, linear.bias.double() * scale, like=linear.weight)


def _keep(conv: nn.Conv2d, scale: float) -> nn.Conv2d:
    """A convolution of the scaled stream, whose output has the same scale."""
    conv = copy.deepcopy(conv).requires_grad_(False)
    conv.bias.mul_(scale)
    return conv


class PhoneMllaBlock(InferenceModule):
    """MllaBlock, channels first: a map (B, C, H, W) and the tables of its rotary code to the same shape as the map."""

    def __init__(self, block: nn.Module, scale: float) -> None:
        super().__init__()
        self.cpe1, self.cpe2 = _keep(block.cpe1, scale), _keep(block.cpe2, scale)
        self.norm1, self.norm2 = ChannelNorm(block.norm1, scale), ChannelNorm(block.norm2, scale)
        self.in_and_gate = _fold(block.norm1, [block.in_proj, block.act_proj])
        self.dwconv, self.act = block.dwconv, block.act
        self.attn = PhoneRotaryAttention(block.attn)
        self.project = _write(block.out_proj, scale)
        self.expand = _fold(block.norm2, [block.mlp.fc1])
        self.mlp_act = block.mlp.act
        self.reduce = _write(block.mlp.fc2, scale)
        self.eval()

    def forward(self, x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        x = self.cpe1(x)
        y, gate = self.in_and_gate(self.norm1(x)).chunk(2, dim=1)
        x = x + self.project(self.attn(self.act(self.dwconv(y)), tables) * self.act(gate))
        x = self.cpe2(x)
        return x + self.reduce(self.mlp_act(self.expand(self.norm2(x))))


class PhoneMllaStage(InferenceModule):
    """MllaStage of such blocks, with one pair of tables: maps (B, in_chs, H, W) to (B, C, H', W')."""

    def __init__(self, stage: nn.Module, scale: float) -> None:
        super().__init__()
        self.downsample = copy.deepcopy(stage.downsample)
        for name, conv in list(self.downsample.named_children()):
            if isinstance(conv, nn.Conv2d):
                setattr(self.downsample, name, _keep(conv, scale))
        self.num_heads = stage.blocks[0].attn.num_heads
        self.blocks = nn.ModuleList(PhoneMllaBlock(block, scale) for block in stage.blocks)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        tables = make_rotary_tables(x, self.num_heads)
        for block in self.blocks:
            x = block(x, tables)
        return x


def to_phone_form(model: nn.Module, images: Optional[torch.Tensor] = None) -> nn.Module:
    """Return a copy of a fused MLLA with the operations that phones prefer; the network itself is unchanged.

    Args:
        model: A network returned by `caretrans.fuse.fuse`.
        images: (B, C, H, W), normalised, to choose the scale of the residual stream.
    """
    model = copy.deepcopy(model)
    scale = STREAM if images is None else choose_scale(model, images, STREAM, MOST_STREAM)
    last = model.stem.conv3[1]
    model.stem.conv3[1] = scale_outputs(last, torch.full_like(last.bias, scale))
    model.stages = nn.Sequential(*[PhoneMllaStage(stage, scale) for stage in model.stages])
    norm = model.norm
    model.norm = ScaledNorm(norm, scale)
    if use_mean_pool(model) and isinstance(model.head, nn.Linear):
        model.head = fold_norm_into_head(norm, model.head)
        model.norm = ChannelNorm(norm, scale)
    return model
