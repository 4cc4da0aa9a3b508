"""MLLA (MILA): a backbone of linear attention in a block shaped like that of Mamba.

Paper: "Demystify Mamba in Vision: A Linear Attention Perspective", NeurIPS 2024, arXiv:2405.16605. The
network was later renamed MILA: `mila_t` is an alias of `mlla_t`.

A convolutional stem makes a feature map of 1/4 size; four stages of blocks follow, and all
but the first halve the map by an inverted bottleneck. A block adds a depth-wise convolution of the map to it (a
*conditional position code*), then the mixer: linear attention over all positions of a projection of the map, with a
*rotary position code* (RoPE) in its numerator and a depth-wise convolution of the values beside it (*LePE*), gated by
another projection; then a second position code and an MLP. Nothing depends on a fixed size, so any input from
32 x 32 works, square or not; positions are grid indices, so larger images have positions not seen in training.

The rotary code rotates the channels before they are split into heads, so the first half of the heads sees only rows
and the second half only columns. The published networks were trained this way, so it is kept.

`PUBLISHED_KEYS` maps the names in published checkpoints to the names here.
"""
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs, register_model

from .attention import linear_attention
from .backbone import Backbone, build_backbone, check_image_size, init_linear, make_cfg, register_alias
from .folding import ConvNorm, ResidualConv
from .inference.mlla_phone import to_phone_form
from .rotary import make_rotations, rotary_code

__all__ = ['Mlla']

torch.fx.wrap('check_image_size')  # leaves of FX graphs: they read shapes
torch.fx.wrap('linear_attention')
torch.fx.wrap('rotary_code')

HEAD_CHS = 32


# Layers ---------------------------------------------------------------------------------------------------------------

def to_tokens(x: torch.Tensor) -> torch.Tensor:
    """A view of a map (B, C, H, W) with the channels last, for linear layers."""
    return x.permute(0, 2, 3, 1)


def to_map(x: torch.Tensor) -> torch.Tensor:
    """A view of tokens (B, H, W, C) with the channels first, for convolutions."""
    return x.permute(0, 3, 1, 2)


class RotaryLinearAttention(nn.Module):
    """Multi-head linear attention over all positions of a map (B, C, H, W), to the same shape.

    Queries and keys are projections of the input, rotated by a rotary code in the numerator; the values are the input
    itself, and a depth-wise convolution of them (LePE) is added. The channels of a head are contiguous.
    """

    def __init__(self, chs: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_chs = chs // num_heads
        self.qk = nn.Linear(chs, 2 * chs, **dd)
        self.lepe = nn.Conv2d(chs, chs, 3, padding=1, groups=chs, **dd)

    def forward(self, x: torch.Tensor, rotate: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        q, k = to_map(self.qk(to_tokens(x))).chunk(2, dim=1)
        heads = (B, self.num_heads, self.head_chs, H * W)
        pairs = (2, self.num_heads, self.head_chs // 2, H * W)
        out = self.attend(q.reshape(heads), k.reshape(heads), x.reshape(heads), rotate.reshape(pairs))
        return out.reshape(B, C, H, W) + self.lepe(x)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotate: torch.Tensor) -> torch.Tensor:
        return linear_attention(q, k, v, rotate=rotate)


class Downsample(nn.Module):
    """An inverted bottleneck of stride 2: (B, in_chs, H, W) to (B, out_chs, H / 2, W / 2)."""

    def __init__(self, in_chs: int, out_chs: int, ratio: int = 4, **dd: Any) -> None:
        super().__init__()
        hidden_chs = ratio * out_chs
        self.expand = nn.Conv2d(in_chs, hidden_chs, 1, **dd)
        self.reduce = nn.Conv2d(hidden_chs, hidden_chs, 3, stride=2, padding=1, groups=hidden_chs, **dd)
        self.project = ConvNorm(hidden_chs, out_chs, **dd)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.act(self.reduce(self.act(self.expand(x)))))


class Stem(nn.Module):
    """Five convolutions, two of stride 2, and Dropout: (B, in_chs, H, W) to (B, out_chs, H / 4, W / 4)."""

    def __init__(self, in_chs: int, out_chs: int, drop: float = 0., **dd: Any) -> None:
        super().__init__()
        dd = dict(bias=False, **dd)
        half = out_chs // 2
        self.conv1 = ConvNorm(in_chs, half, 3, stride=2, **dd)
        self.conv2 = nn.Sequential(ConvNorm(half, half, 3, **dd), ConvNorm(half, half, 3, **dd))
        self.conv3 = nn.Sequential(ConvNorm(half, 4 * out_chs, 3, stride=2, **dd), ConvNorm(4 * out_chs, out_chs, **dd))
        self.act = nn.ReLU()
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv1(check_image_size(x)))
        x = x + self.conv2[1](self.act(self.conv2[0](x)))
        return self.drop(self.conv3[1](self.act(self.conv3[0](x))))


# Blocks, stages -------------------------------------------------------------------------------------------------------

class MllaBlock(nn.Module):
    """Gated linear attention and MLP, each after a position code, with residuals: (B, C, H, W) to the same shape.

    Args:
        chs: Channels.
        num_heads: Heads of the linear attention.
        mlp_ratio: Expansion of the MLP.
        drop: Dropout rate of the MLP.
        drop_path: Rate at which a sample skips the attention, and separately the MLP.
    """

    def __init__(
            self, chs: int, num_heads: int, mlp_ratio: float, drop: float = 0., drop_path: float = 0.,
            **dd: Any) -> None:
        super().__init__()
        self.cpe1 = ResidualConv(chs, **dd)
        self.norm1 = nn.LayerNorm(chs, **dd)
        self.in_proj = nn.Linear(chs, chs, **dd)
        self.act_proj = nn.Linear(chs, chs, **dd)
        self.dwconv = nn.Conv2d(chs, chs, 3, padding=1, groups=chs, **dd)
        self.act = nn.SiLU()
        self.attn = RotaryLinearAttention(chs, num_heads, **dd)
        self.out_proj = nn.Linear(chs, chs, **dd)
        self.cpe2 = ResidualConv(chs, **dd)
        self.norm2 = nn.LayerNorm(chs, **dd)
        self.mlp = Mlp(chs, int(mlp_ratio * chs), drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def mix(self, x: torch.Tensor, rotate: torch.Tensor) -> torch.Tensor:
        """The mixer: linear attention of one projection of the map, gated by another one."""
        tokens = self.norm1(to_tokens(x))
        y = self.attn(self.act(self.dwconv(to_map(self.in_proj(tokens)))), rotate)
        return to_map(self.out_proj(to_tokens(y) * self.act(self.act_proj(tokens))))

    def forward(self, x: torch.Tensor, rotate: torch.Tensor) -> torch.Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path(self.mix(x, rotate))
        x = self.cpe2(x)
        return x + self.drop_path(to_map(self.mlp(self.norm2(to_tokens(x)))))


class MllaStage(nn.Module):
    """Downsampling from `in_chs` channels (None: no downsampling), then the blocks with one rotary code."""

    def __init__(self, in_chs: Optional[int], chs: int, blocks: List[MllaBlock], **dd: Any) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if in_chs is None else Downsample(in_chs, chs, **dd)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        rotate = rotary_code(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, rotate)
            else:
                x = block(x, rotate)
        return x


# Network --------------------------------------------------------------------------------------------------------------

PUBLISHED_KEYS = (  # (part of a published key, part of a key of this package), both between dots, ^ at the beginning
    ('^patch_embed', 'stem'),
    *((f'^layers.{i}.blocks', f'stages.{i}.blocks') for i in range(4)),
    *((f'^layers.{i}.downsample.conv.0.conv', f'stages.{i + 1}.downsample.expand') for i in range(3)),
    *((f'^layers.{i}.downsample.conv.1.conv', f'stages.{i + 1}.downsample.reduce') for i in range(3)),
    *((f'^layers.{i}.downsample.conv.2', f'stages.{i + 1}.downsample.project') for i in range(3)),
    ('dwc', 'dwconv'),
)


class Mlla(Backbone):
    """MLLA: LayerNorm of the last map, its mean, and one linear head, or two with `distilled`.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of each head; 0 for no heads.
        global_pool: Pooling before the heads; '' disables it, which requires num_classes=0.
        depths: Blocks per stage.
        width: Channels of the first stage, a multiple of 32; they double with each stage.
        mlp_ratio: Expansion of the MLPs.
        drop_rate: Dropout after the stem and in the MLPs.
        drop_path_rate: Stochastic depth, growing linearly from 0 at the first block to this at the last.
        distilled: Make two heads; the published networks have one.
        device, dtype: Device and dtype of the parameters.
    Raises:
        ValueError: Disabled pooling with heads, or a width that is not a multiple of 32.
    """

    published_keys = PUBLISHED_KEYS
    inference_forms = {'phone': to_phone_form}
    dense_norms = ('norm0', 'norm1', 'norm2', 'norm3')
    computed_keys = ('.attn.rope.rotations',)  # tie a checkpoint to the size of its images
    init_module = staticmethod(init_linear)

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            depths: Sequence[int] = (2, 4, 8, 4),
            width: int = 64,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            distilled: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__(distilled)
        dd = dict(device=device, dtype=dtype)
        if width % HEAD_CHS:
            raise ValueError(f'width={width} is not a multiple of {HEAD_CHS}, the channels of a head.')
        self.in_chans = in_chans

        self.stem = Stem(in_chans, width, drop_rate, **dd)
        stages, self.feature_info = [], []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)):
            chs = width * 2 ** i
            blocks = [MllaBlock(chs, chs // HEAD_CHS, mlp_ratio, drop_rate, rate, **dd) for rate in rates]
            stages.append(MllaStage(chs // 2 if i else None, chs, blocks, **dd))
            self.feature_info.append(dict(num_chs=chs, reduction=4 * 2 ** i, module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(chs, eps=1e-5, **dd)
        self.num_features = self.head_hidden_size = chs
        self.set_heads(num_classes, global_pool, **dd)
        self.apply(self.init_module)

    @torch.jit.ignore
    def compute_entries(self, height: int, width: int) -> Dict[str, torch.Tensor]:
        """Tables of the rotary code, see `make_rotations`."""
        chs, depths = [info['num_chs'] for info in self.feature_info], [len(stage.blocks) for stage in self.stages]
        return make_rotations(chs, depths, height, width)


# Variants -------------------------------------------------------------------------------------------------------------

def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return make_cfg(
        first_conv='stem.conv1.conv', classifier='head', origin_url='https://github.com/LeapLabTHU/MLLA',
        paper_ids='arXiv:2405.16605', paper_name='Demystify Mamba in Vision: A Linear Attention Perspective', **kwargs)


VARIANTS = {
    'mlla_t': dict(depths=(2, 4, 8, 4), width=64),
    'mlla_s': dict(depths=(3, 6, 21, 6), width=64),
    'mlla_b': dict(depths=(3, 6, 21, 6), width=96),
}

default_cfgs = generate_default_cfgs({f'{name}.in1k': _cfg() for name in VARIANTS})


def _create_mlla(variant: str, pretrained: bool, **kwargs: Any) -> Mlla:
    return build_backbone(
        Mlla, variant, pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **dict(VARIANTS[variant], **kwargs))


@register_model
def mlla_t(pretrained: bool = False, **kwargs: Any) -> Mlla:
    """MLLA-T: 24.39 M parameters, 4.13 GMACs at 224 x 224."""
    return _create_mlla('mlla_t', pretrained, **kwargs)


@register_model
def mlla_s(pretrained: bool = False, **kwargs: Any) -> Mlla:
    """MLLA-S: 43.02 M parameters, 7.25 GMACs at 224 x 224."""
    return _create_mlla('mlla_s', pretrained, **kwargs)


@register_model
def mlla_b(pretrained: bool = False, **kwargs: Any) -> Mlla:
    """MLLA-B: 95.98 M parameters, 16.11 GMACs at 224 x 224."""
    return _create_mlla('mlla_b', pretrained, **kwargs)


for _entrypoint in (mlla_t, mlla_s, mlla_b):
    register_alias(_entrypoint.__name__.replace('mlla', 'mila'), _entrypoint)
