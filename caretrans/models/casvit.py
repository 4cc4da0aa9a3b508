"""CAS-ViT: a mobile backbone of convolutional additive token mixers, without matmuls over positions.

Paper: "CAS-ViT: Convolutional Additive Self-attention Vision Transformers for Efficient Mobile Applications",
arXiv:2408.03703. The published code calls the network RCViT: `rcvit_xs` is an alias of `casvit_xs`.

Two 3x3 convolutions of stride 2 make a feature map of 1/4 size; four stages of blocks
follow, and all but the first halve the map with a 3x3 convolution. A block has three residual steps: a *local
perception* by a depth-wise convolution, the *convolutional additive token mixer*, and an MLP. The mixer passes q and k
through separate gates, over positions and then over channels, adds them, and multiplies the context of the sum
with v. Only the channel gates see the whole map, through its mean, so any input from 32 x 32 works, square or not.

Three details differ from the figures of the paper and are kept as published: a depth-wise convolution follows q + k,
another one ends the mixer, and the local perception has no stochastic depth.

`PUBLISHED_KEYS` maps the names in published checkpoints to the names here.
"""
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import checkpoint_seq, generate_default_cfgs, register_model

from .backbone import Backbone, build_backbone, check_image_size, init_linear, make_cfg, register_alias
from .folding import ConvNorm, NormConv
from .inference.phone import to_phone_form

__all__ = ['CasVit']

torch.fx.wrap('check_image_size')  # a leaf of FX graphs: it reads the shape


# Layers ---------------------------------------------------------------------------------------------------------------

class LocalPerception(nn.Module):
    """1x1 convolution and BatchNorm, 3x3 depth-wise convolution, GELU, 1x1 convolution: (B, C, H, W) to the same."""

    def __init__(self, chs: int, **dd: Any) -> None:
        super().__init__()
        self.mix = ConvNorm(chs, chs, **dd)
        self.dwconv = nn.Conv2d(chs, chs, 3, padding=1, groups=chs, **dd)
        self.act = nn.GELU()
        self.project = nn.Conv2d(chs, chs, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.act(self.dwconv(self.mix(x))))


class SpatialGate(nn.Module):
    """Multiply all channels by one map of weights from 0 to 1: (B, C, H, W) to the same shape."""

    def __init__(self, chs: int, **dd: Any) -> None:
        super().__init__()
        self.dwconv = ConvNorm(chs, chs, 3, groups=chs, **dd)
        self.act = nn.ReLU()
        self.project = nn.Conv2d(chs, 1, 1, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.project(self.act(self.dwconv(x))).sigmoid()


class ChannelGate(nn.Module):
    """Multiply each channel by a weight from 0 to 1 computed from the whole map: (B, C, H, W) to the same shape."""

    def __init__(self, chs: int, **dd: Any) -> None:
        super().__init__()
        self.project = nn.Conv2d(chs, chs, 1, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.project(x.mean(dim=(2, 3), keepdim=True)).sigmoid()


class AdditiveMixer(nn.Module):
    """The convolutional additive token mixer, with the BatchNorm in front of it: (B, C, H, W) to the same shape.

        out = project(context(gate_q(q) + gate_k(k)) * v)

    Source: arXiv:2408.03703, section 3.2 (called "self-attention" there, although no positions are compared).
    """

    def __init__(self, chs: int, drop: float = 0., **dd: Any) -> None:
        super().__init__()
        self.qkv = NormConv(chs, 3 * chs, bias=False, **dd)
        self.gate_q = nn.Sequential(SpatialGate(chs, **dd), ChannelGate(chs, **dd))
        self.gate_k = nn.Sequential(SpatialGate(chs, **dd), ChannelGate(chs, **dd))
        self.context = nn.Conv2d(chs, chs, 3, padding=1, groups=chs, **dd)
        self.project = nn.Conv2d(chs, chs, 3, padding=1, groups=chs, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=1)
        return self.drop(self.project(self.context(self.gate_q(q) + self.gate_k(k)) * v))


class ConvMlp(nn.Module):
    """BatchNorm, 1x1 expansion, GELU and 1x1 projection: (B, C, H, W) to the same shape."""

    def __init__(self, chs: int, ratio: float, drop: float = 0., **dd: Any) -> None:
        super().__init__()
        self.expand = NormConv(chs, int(ratio * chs), **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.project = nn.Conv2d(int(ratio * chs), chs, 1, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop2(self.project(self.drop1(self.act(self.expand(x)))))


# Blocks, stages -------------------------------------------------------------------------------------------------------

class CasVitBlock(nn.Module):
    """Local perception, additive token mixer and MLP, each with a residual: (B, C, H, W) to the same shape.

    Args:
        chs: Channels.
        mlp_ratio: Expansion of the MLP.
        drop: Dropout rate of mixer and MLP.
        drop_path: Rate at which a sample skips the mixer, and separately the MLP.
    """

    def __init__(self, chs: int, mlp_ratio: float, drop: float = 0., drop_path: float = 0., **dd: Any) -> None:
        super().__init__()
        self.local = LocalPerception(chs, **dd)
        self.mixer = AdditiveMixer(chs, drop, **dd)
        self.mlp = ConvMlp(chs, mlp_ratio, drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.local(x)
        x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.mlp(x))


class CasVitStage(nn.Module):
    """Downsampling from `in_chs` channels (None in the first stage: no downsampling), then the blocks."""

    def __init__(self, in_chs: Optional[int], chs: int, blocks: List[CasVitBlock], **dd: Any) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if in_chs is None else ConvNorm(in_chs, chs, 3, stride=2, **dd)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2 with BatchNorm and ReLU: (B, in_chs, H, W) to (B, out_chs, H / 4, W / 4)."""

    def __init__(self, in_chs: int, out_chs: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chs, out_chs // 2, 3, stride=2, **dd)
        self.conv2 = ConvNorm(out_chs // 2, out_chs, 3, stride=2, **dd)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv2(self.act(self.conv1(check_image_size(x)))))


# Network --------------------------------------------------------------------------------------------------------------

PUBLISHED_KEYS = (  # (part of a published key, part of a key of this package), both between dots, ^ at the beginning
    ('^patch_embed.0', 'stem.conv1.conv'),
    ('^patch_embed.1', 'stem.conv1.norm'),
    ('^patch_embed.3', 'stem.conv2.conv'),
    ('^patch_embed.4', 'stem.conv2.norm'),
    *((f'^network.{2 * i}', f'stages.{i}.blocks') for i in range(4)),
    *((f'^network.{2 * i + 1}.proj', f'stages.{i + 1}.downsample.conv') for i in range(3)),
    *((f'^network.{2 * i + 1}.norm', f'stages.{i + 1}.downsample.norm') for i in range(3)),
    ('local_perception.network.0', 'local.mix.conv'),
    ('local_perception.network.1', 'local.mix.norm'),
    ('local_perception.network.2', 'local.dwconv'),
    ('local_perception.network.4', 'local.project'),
    ('norm1', 'mixer.qkv.norm'),
    ('attn.qkv', 'mixer.qkv.conv'),
    *((f'attn.oper_{x}.0.block.0', f'mixer.gate_{x}.0.dwconv.conv') for x in 'qk'),
    *((f'attn.oper_{x}.0.block.1', f'mixer.gate_{x}.0.dwconv.norm') for x in 'qk'),
    *((f'attn.oper_{x}.0.block.3', f'mixer.gate_{x}.0.project') for x in 'qk'),
    *((f'attn.oper_{x}.1.block.1', f'mixer.gate_{x}.1.project') for x in 'qk'),
    ('attn.dwc', 'mixer.context'),
    ('attn.proj', 'mixer.project'),
    ('norm2', 'mlp.expand.norm'),
    ('mlp.fc1', 'mlp.expand.conv'),
    ('mlp.fc2', 'mlp.project'),
    ('^dist_head', 'head_dist'),
)


MMPRETRAIN_KEYS = (  # (part of a published key, part of a key in BackboneHub's `casvit_to_mmpretrain.py`)
    ('^patch_embed.0', '^backbone.downsample_layers.0.conv1.conv'),
    ('^patch_embed.1', '^backbone.downsample_layers.0.conv1.bn'),
    ('^patch_embed.3', '^backbone.downsample_layers.0.conv2.conv'),
    ('^patch_embed.4', '^backbone.downsample_layers.0.conv2.bn'),
    *((f'^network.{2 * i}', f'^backbone.stages.{i}') for i in range(4)),
    *((f'^network.{2 * i + 1}', f'^backbone.downsample_layers.{i + 1}') for i in range(3)),
    *((f'attn.oper_{x}.0.block.0', f'attn.oper_{x}.0.block.0.conv') for x in 'qk'),  # before what becomes block.1
    *((f'attn.oper_{x}.0.block.1', f'attn.oper_{x}.0.block.0.bn') for x in 'qk'),
    *((f'attn.oper_{x}.0.block.3', f'attn.oper_{x}.0.block.1.conv') for x in 'qk'),
    *((f'attn.oper_{x}.1.block.1', f'attn.oper_{x}.1.block.1.conv') for x in 'qk'),
    ('local_perception.network.0', 'local_perception.network.0.conv'),
    ('local_perception.network.1', 'local_perception.network.0.bn'),
    ('local_perception.network.2', 'local_perception.network.1.conv'),
    ('local_perception.network.4', 'local_perception.network.2'),
    ('^norm', '^backbone.norm3'),
    ('^head', '^head.fc'),
)


class CasVit(Backbone):
    """CAS-ViT: BatchNorm of the last map, its mean, and one linear head, or two with `distilled`.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of each head; 0 for no heads.
        global_pool: Pooling before the heads; '' disables it, which requires num_classes=0.
        depths: Blocks per stage.
        widths: Channels per stage.
        mlp_ratio: Expansion of the MLPs.
        drop_rate: Dropout in mixers and MLPs.
        drop_path_rate: Stochastic depth, growing linearly from 0 at the first block to this at the last.
        distilled: Make two heads, the default of the published constructor; the published files contain one.
        device, dtype: Device and dtype of the parameters.
    Raises:
        ValueError: Disabled pooling with heads, or per-stage arguments of different lengths.
    """

    published_keys, mmpretrain_keys = PUBLISHED_KEYS, MMPRETRAIN_KEYS
    inference_forms = {'phone': to_phone_form}
    squash_from = (384, 'r384_in1k')
    dense_norms = ('norm0', 'norm2', 'norm4', 'norm6')
    init_module = staticmethod(init_linear)

    def __init__(
            self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = 'avg',
            depths: Sequence[int] = (2, 2, 4, 2),
            widths: Sequence[int] = (48, 56, 112, 220),
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            distilled: bool = False, device=None, dtype=None,
    ) -> None:
        super().__init__(distilled)
        dd = dict(device=device, dtype=dtype)
        if len(depths) != len(widths):
            raise ValueError(f'One entry per stage each: {depths=}, {widths=}.')
        self.in_chans = in_chans

        self.stem = Stem(in_chans, widths[0], **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages, self.feature_info = [], []
        for i, chs in enumerate(widths):
            blocks = [CasVitBlock(chs, mlp_ratio, drop_rate, rate, **dd) for rate in rates[i]]
            stages.append(CasVitStage(widths[i - 1] if i else None, chs, blocks, **dd))
            self.feature_info.append(dict(num_chs=chs, reduction=4 * 2 ** i, module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(widths[-1], **dd)
        self.num_features = self.head_hidden_size = widths[-1]
        self.set_heads(num_classes, global_pool, **dd)
        self.apply(self.init_module)


# Variants -------------------------------------------------------------------------------------------------------------

def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return make_cfg(
        first_conv='stem.conv1.conv', classifier='head', origin_url='https://github.com/Tianfang-Zhang/CAS-ViT',
        paper_ids='arXiv:2408.03703',
        paper_name='CAS-ViT: Convolutional Additive Self-attention Vision Transformers for Efficient Mobile '
                   'Applications',
        **kwargs)


VARIANTS = {
    'casvit_xs': dict(depths=(2, 2, 4, 2), widths=(48, 56, 112, 220)),
    'casvit_s': dict(depths=(3, 3, 6, 3), widths=(48, 64, 128, 256)),
    'casvit_m': dict(depths=(3, 3, 6, 3), widths=(64, 96, 192, 384)),
    'casvit_t': dict(depths=(3, 3, 6, 3), widths=(96, 128, 256, 512)),
}
# At 384 pixels the whole image is squashed to a square instead of cropped.
AT_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, crop_mode='squash')

default_cfgs = generate_default_cfgs({
    f'{name}.{tag}': _cfg(**cfg) for name in VARIANTS for tag, cfg in (('in1k', {}), ('r384_in1k', AT_384))})


def _create_casvit(variant: str, pretrained: bool, **kwargs: Any) -> CasVit:
    return build_backbone(
        CasVit, variant, pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **dict(VARIANTS[variant], **kwargs))


@register_model
def casvit_xs(pretrained: bool = False, **kwargs: Any) -> CasVit:
    """CAS-ViT-XS: 2.98 M parameters, 0.55 GMACs at 224 x 224."""
    return _create_casvit('casvit_xs', pretrained, **kwargs)


@register_model
def casvit_s(pretrained: bool = False, **kwargs: Any) -> CasVit:
    """CAS-ViT-S: 5.51 M parameters, 0.91 GMACs at 224 x 224."""
    return _create_casvit('casvit_s', pretrained, **kwargs)


@register_model
def casvit_m(pretrained: bool = False, **kwargs: Any) -> CasVit:
    """CAS-ViT-M: 12.04 M parameters, 1.86 GMACs at 224 x 224."""
    return _create_casvit('casvit_m', pretrained, **kwargs)


@register_model
def casvit_t(pretrained: bool = False, **kwargs: Any) -> CasVit:
    """CAS-ViT-T: 21.25 M parameters, 3.56 GMACs at 224 x 224."""
    return _create_casvit('casvit_t', pretrained, **kwargs)


for _entrypoint in (casvit_xs, casvit_s, casvit_m, casvit_t):
    register_alias(_entrypoint.__name__.replace('casvit', 'rcvit'), _entrypoint)
