"""CARE Transformer: a mobile vision backbone of decoupled linear attention and convolutions.

Paper: "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction",
CVPR 2025, arXiv:2411.16170.

A 4x4 convolution makes a feature map of 1/4 size; four stages of blocks follow, and
all but the first halve the map. A block treats its channels as four slices of equal width (*asymmetrical feature
decoupling*: one slice for the long range against two for the local range),

    [ memory | attention | 3x3 | 7x7 ]

Linear attention (strip convolutions in the two early stages) mixes the attention slice globally, two depth-wise
convolutions give the other two their *local inductive bias*, and the *dual interaction module* fuses everything:
Inter1 mixes global with local, Inter2 mixes the result with the memory slice, the *dynamic memory unit* that is
carried from block to block. There is no positional encoding, so any input from 32 x 32 works, square or not.

`PUBLISHED_KEYS` maps the names in published checkpoints to the names here.
"""
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.layers import DropPath, LayerScale2d, calculate_drop_path_rates
from timm.models import checkpoint_seq, generate_default_cfgs, register_model

from .attention import linear_attention
from .backbone import Backbone, build_backbone, check_image_size, make_cfg
from .care_ablations import ablate_block
from .folding import NormConv
from .inference.care_bmm import to_bmm_form
from .inference.care_fused import FusedBlock, FusedHead, FusedStem
from .inference.care_phone import to_phone_form

__all__ = ['CareTransformer']

torch.fx.wrap('check_image_size')  # leaves of FX graphs: both read shapes
torch.fx.wrap('linear_attention')


# Layers ---------------------------------------------------------------------------------------------------------------

def depthwise_conv(chs: int, height: int, width: int, **dd: Any) -> nn.Conv2d:
    """A height x width depth-wise convolution with bias that keeps the size of the map."""
    return nn.Conv2d(chs, chs, (height, width), padding=(height // 2, width // 2), groups=chs, **dd)


class LinearAttention(nn.Module):
    """Multi-head linear attention over all positions of a map: (B, C, H, W) to the same shape.

    Queries and keys are projections of the input, the values are the input itself, and nothing is projected
    afterwards. The channels of a head are contiguous.
    """

    def __init__(self, chs: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        if chs % num_heads:
            raise ValueError(f'num_heads={num_heads} does not divide the {chs} channels of the attention slice.')
        self.num_heads = num_heads
        self.head_chs = chs // num_heads
        self.qk = nn.Conv2d(chs, 2 * chs, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        q, k = self.qk(x).reshape(B, 2 * self.num_heads, self.head_chs, H * W).chunk(2, dim=1)
        out = linear_attention(q, k, x.reshape(B, self.num_heads, self.head_chs, H * W))
        return out.reshape(B, C, H, W)


class StripConv(nn.Module):
    """Long-range mixing of the early stages: the sum of an 11x1 and a 1x11 depth-wise convolution."""

    def __init__(self, chs: int, **dd: Any) -> None:
        super().__init__()
        self.conv_11x1 = depthwise_conv(chs, 11, 1, **dd)
        self.conv_1x11 = depthwise_conv(chs, 1, 11, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_11x1(x) + self.conv_1x11(x)


def long_range(chs: int, num_heads: int, **dd: Any) -> nn.Module:
    """Linear attention with `num_heads` heads, or strip convolutions if `num_heads` is 0."""
    return LinearAttention(chs, num_heads, **dd) if num_heads else StripConv(chs, **dd)


class DecoupledMixer(nn.Module):
    """Mix positions with a different operation for each slice of channels: [attention | 3x3 | 7x7].

    Args:
        attn_chs: Channels of the slice mixed over the long range.
        local_chs: Channels of each of the two slices mixed locally.
        num_heads: Heads of the linear attention; 0 for strip convolutions.
    """

    def __init__(self, attn_chs: int, local_chs: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.slices = [attn_chs, local_chs, local_chs]
        self.long_range = long_range(attn_chs, num_heads, **dd)
        self.local_3x3 = depthwise_conv(local_chs, 3, 3, **dd)
        self.local_7x7 = depthwise_conv(local_chs, 7, 7, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attn, local_3x3, local_7x7 = x.split(self.slices, dim=1)
        return torch.cat([self.long_range(attn), self.local_3x3(local_3x3), self.local_7x7(local_7x7)], dim=1)


class Expansion(nn.Module):
    """BatchNorm, expansion, GELU and a 3x3 depth-wise convolution: (B, C, H, W) to (B, ratio * C, H, W)."""

    def __init__(self, chs: int, ratio: int, drop: float = 0., **dd: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(chs, **dd)
        self.expand = nn.Conv2d(chs, ratio * chs, 1, **dd)
        self.act = nn.GELU()
        self.dwconv = depthwise_conv(ratio * chs, 3, 3, **dd)
        self.drop = nn.Dropout(drop)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.dwconv(self.act(self.expand(self.norm(x)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(x)


class Interaction(Expansion):
    """One half of the dual interaction module: a residual inverted bottleneck that mixes the channels."""

    def __init__(self, chs: int, ratio: int, drop: float = 0., **dd: Any) -> None:
        super().__init__(chs, ratio, drop, **dd)
        self.project = nn.Conv2d(ratio * chs, chs, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(self.hidden(x))


# Blocks, stages -------------------------------------------------------------------------------------------------------

class CareBlock(nn.Module):
    """Decoupled mixing, dual interaction and a residual: (B, 4m, H, W) to the same shape, m = `slice_chs`.

    The first m channels of the result are the memory that the next block reads.

    The last block of the network is different: it stops at the expanded channels of Inter2, (B, ratios[1] * 4m, H, W),
    and hands them to the heads. It has no projection back, no layer scale and no residual, so its drop path zeroes
    whole feature maps of the dropped samples. The published networks were trained this way, so it is kept.

    Args:
        slice_chs: Width m of each of the four slices.
        ratios: Expansion ratios of Inter1 and Inter2.
        num_heads: Heads of the linear attention; 0 for strip convolutions.
        drop: Dropout rate inside Inter1 and Inter2.
        drop_path: Rate at which a sample skips the block.
        ls_init_value: Initial layer scale.
        last: Whether this is the last block of the network.
    """

    def __init__(
            self,
            slice_chs: int,
            ratios: Tuple[int, int],
            num_heads: int,
            drop: float = 0.,
            drop_path: float = 0.,
            ls_init_value: float = 1e-6,
            last: bool = False,
            **dd: Any,
    ) -> None:
        super().__init__()
        self.memory_chs, self.mixed_chs = slice_chs, 3 * slice_chs
        self.in_chs = 4 * slice_chs
        self.out_chs = ratios[1] * self.in_chs if last else self.in_chs
        self.last = last
        self.mixer = DecoupledMixer(slice_chs, slice_chs, num_heads, **dd)
        self.inter1 = Interaction(self.mixed_chs, ratios[0], drop, **dd)
        self.inter2 = (Expansion if last else Interaction)(self.in_chs, ratios[1], drop, **dd)
        self.layer_scale = nn.Identity() if last else LayerScale2d(self.in_chs, ls_init_value, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory, features = x.split([self.memory_chs, self.mixed_chs], dim=1)
        features = self.inter1(self.mixer(features))
        y = self.inter2(torch.cat([memory, features], dim=1))
        y = self.drop_path(self.layer_scale(y))
        return y if self.last else x + y

    def fuse(self) -> nn.Module:
        """An equal block for inference only."""
        return FusedBlock(self)


class CareStage(nn.Module):
    """Downsampling from `in_chs` channels by BatchNorm and a 2x2 convolution (not in the first stage), then blocks."""

    def __init__(self, in_chs: Optional[int], blocks: List[CareBlock], **dd: Any) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if in_chs is None else NormConv(in_chs, blocks[0].in_chs, 2, stride=2, **dd)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Stem(nn.Module):
    """A 4x4 convolution of stride 4 and BatchNorm: (B, in_chs, H, W) to (B, out_chs, H // 4, W // 4)."""

    def __init__(self, in_chs: int, out_chs: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 4, stride=4, **dd)
        self.norm = nn.BatchNorm2d(out_chs, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(check_image_size(x)))

    def fuse(self) -> nn.Module:
        """An equal stem for inference only."""
        return FusedStem(self)


class ClassifierHead(nn.Module):
    """GELU, LayerNorm, Dropout and Linear on pooled features: (B, C) to (B, num_classes).

    Its output is averaged with the heads in `siblings`, which have `is_sibling` set.
    """

    siblings: Tuple[nn.Module, ...] = ()  # a tuple, so that they are not registered as submodules
    is_sibling = False
    __jit_ignored_attributes__ = ['siblings', 'is_sibling']

    def __init__(self, chs: int, num_classes: int, drop: float = 0., **dd: Any) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(chs, eps=1e-6, **dd)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(chs, num_classes, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.norm(self.act(x))))

    def fuse(self) -> nn.Module:
        """One head for inference only, equal to the mean of this head and its siblings, which become identities."""
        return nn.Identity() if self.is_sibling else FusedHead([self, *self.siblings])


# Network --------------------------------------------------------------------------------------------------------------

PUBLISHED_KEYS = (  # (part of a published key, part of a key of this package), both between dots
    ('stem.0', 'stem.conv'),
    ('stem.1', 'stem.norm'),
    ('downsample.0', 'downsample.norm'),
    ('downsample.1', 'downsample.conv'),
    ('gamma', 'layer_scale.gamma'),
    ('token_mixer.dwconvatt_1', 'mixer.long_range.conv_11x1'),
    ('token_mixer.dwconvatt_2', 'mixer.long_range.conv_1x11'),
    ('token_mixer.dwconv1', 'mixer.local_3x3'),
    ('token_mixer.dwconv2', 'mixer.local_7x7'),
    ('token_mixer.qk', 'mixer.long_range.qk'),
    ('inter_layer.inter1_norm', 'inter1.norm'),
    ('inter_layer.inter1_fc1', 'inter1.expand'),
    ('inter_layer.inter1_conv', 'inter1.dwconv'),
    ('inter_layer.inter1_fc2', 'inter1.project'),
    ('inter_layer.inter2_norm', 'inter2.norm'),
    ('inter_layer.inter2_fc1', 'inter2.expand'),
    ('inter_layer.inter2_conv', 'inter2.dwconv'),
    ('inter_layer.inter2_fc2', 'inter2.project'),
    ('dist_head', 'head_dist'),
)


class CareTransformer(Backbone):
    """CARE Transformer with two classification heads, `head` and `head_dist`.

    The output is the mean of the two heads, in training and in evaluation: trained on plain labels both heads learn
    from that mean. For distillation `set_distilled_training(True)` makes training return the pair
    (head, head_dist); evaluation still returns the mean.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of each head; 0 for no heads.
        global_pool: Pooling before the heads; '' disables it, which requires num_classes=0.
        depths: Blocks per stage.
        slice_chs: Width m of each of the four slices of the channels, per stage; a stage has 4m channels.
        ratios: Expansion ratios of Inter1 and Inter2, per stage.
        num_heads: Heads of the linear attention, per stage; 0 for strip convolutions.
        drop_rate: Dropout inside the interactions and before the classifiers.
        drop_path_rate: Stochastic depth, growing linearly from 0 at the first block to this at the last.
        ls_init_value: Initial layer scale.
        ablation: '' for the published network, or one of `care_ablations.ABLATIONS`.
        device, dtype: Device and dtype of the parameters.
    Raises:
        ValueError: An unknown ablation, disabled pooling with heads, or per-stage arguments of different lengths.
    """

    published_keys = PUBLISHED_KEYS
    inference_forms = {'phone': to_phone_form, 'bmm': to_bmm_form}

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            depths: Sequence[int] = (2, 4, 8, 4),
            slice_chs: Sequence[int] = (8, 16, 32, 64),
            ratios: Sequence[Tuple[int, int]] = ((2, 2), (2, 4), (4, 4), (4, 4)),
            num_heads: Sequence[int] = (0, 0, 2, 2),
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            ls_init_value: float = 1e-6,
            ablation: str = '',
            device=None,
            dtype=None,
    ) -> None:
        super().__init__(distilled=True)
        dd = dict(device=device, dtype=dtype)
        if not len(depths) == len(slice_chs) == len(ratios) == len(num_heads):
            raise ValueError(f'One entry per stage each: {depths=}, {slice_chs=}, {ratios=}, {num_heads=}.')
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        make_block = ablate_block(CareBlock, ablation) if ablation else CareBlock
        stages, self.feature_info, in_chs = [], [], None
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)):
            last_stage = i == len(depths) - 1
            blocks = [
                make_block(
                    slice_chs[i], ratios[i], num_heads[i], drop_rate, rate, ls_init_value,
                    last=last_stage and j == depths[i] - 1, **dd)
                for j, rate in enumerate(rates)]
            stages.append(CareStage(in_chs, blocks, **dd))
            in_chs = blocks[-1].out_chs
            self.feature_info.append(dict(num_chs=in_chs, reduction=4 * 2 ** i, module=f'stages.{i}'))
        self.stem = Stem(in_chans, stages[0].blocks[0].in_chs, **dd)
        self.stages = nn.Sequential(*stages)

        self.norm = nn.Identity()  # the heads normalise, after pooling
        self.num_features = self.head_hidden_size = in_chs
        self.set_heads(num_classes, global_pool, **dd)
        self.apply(self.init_module)

    @torch.jit.ignore
    def use_for_dense_tasks(self, last_map: Optional[str] = None) -> str:
        """Prepare for detection and segmentation.

        Args:
            last_map: The map after the last stage: 'residual', the narrower one before the last block, which goes (the
                default: see docs/dense.md); or 'expanded', as the heads see it, now without drop path, which would zero
                the whole map of a sample.
        Returns:
            Which last map it has now.
        """
        last_map = last_map or 'residual'
        blocks, info = self.stages[-1].blocks, self.feature_info[-1]
        if last_map == 'residual':
            info['num_chs'] = blocks[-1].in_chs
            self.stages[-1].blocks = blocks[:-1]
        else:
            blocks[-1].drop_path = nn.Identity()
        return last_map

    def make_head(self, num_classes: int, **dd: Any) -> nn.Module:
        return ClassifierHead(self.num_features, num_classes, self.drop_rate, **dd)


# Variants -------------------------------------------------------------------------------------------------------------

def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return make_cfg(
        first_conv='stem.conv', classifier=('head.fc', 'head_dist.fc'), hf_hub_id='YuanZ1995/CARE-Transformer',
        paper_ids='arXiv:2411.16170',
        paper_name='CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction',
        **kwargs)


default_cfgs = generate_default_cfgs({
    'care_s0.in1k': _cfg(hf_hub_filename='CARETrans_S0.pth.tar'),
    'care_s1.in1k': _cfg(hf_hub_filename='CARETrans_S1.pth.tar'),
    'care_s2.in1k': _cfg(hf_hub_filename='CARETrans_S2.pth.tar'),
})


VARIANTS = {
    'care_s0': dict(
        depths=(2, 4, 8, 4), slice_chs=(8, 16, 32, 64), num_heads=(0, 0, 2, 2),
        ratios=((2, 2), (2, 4), (4, 4), (4, 4))),
    'care_s1': dict(
        depths=(3, 6, 10, 6), slice_chs=(8, 16, 32, 64), num_heads=(0, 0, 2, 2),
        ratios=((2, 4), (2, 4), (4, 4), (4, 4))),
    'care_s2': dict(
        depths=(3, 6, 10, 6), slice_chs=(8, 16, 48, 96), num_heads=(0, 0, 3, 3),
        ratios=((4, 4), (4, 4), (4, 4), (4, 4))),
}


def _create_care(variant: str, pretrained: bool, **kwargs: Any) -> CareTransformer:
    return build_backbone(
        CareTransformer, variant, pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **dict(VARIANTS[variant], **kwargs))


@register_model
def care_s0(pretrained: bool = False, **kwargs: Any) -> CareTransformer:
    """CARE-S0: 7.34 M parameters, 0.72 GMACs at 224 x 224."""
    return _create_care('care_s0', pretrained, **kwargs)


@register_model
def care_s1(pretrained: bool = False, **kwargs: Any) -> CareTransformer:
    """CARE-S1: 9.60 M parameters, 1.03 GMACs at 224 x 224."""
    return _create_care('care_s1', pretrained, **kwargs)


@register_model
def care_s2(pretrained: bool = False, **kwargs: Any) -> CareTransformer:
    """CARE-S2: 19.48 M parameters, 1.92 GMACs at 224 x 224."""
    return _create_care('care_s2', pretrained, **kwargs)
