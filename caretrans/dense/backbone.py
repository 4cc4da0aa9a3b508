"""Dense backbone: the maps of a network at strides 4, 8, 16 and 32, each with a norm of its own.

A classification network becomes the backbone of a detector or segmenter: heads go, a norm per level comes, images are
padded to multiples of 32 and the maps cropped back, and BatchNorm keeps its statistics if they come from pre-training.
"""
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import create_from_checkpoint, create_pretrained
from ..checkpoint.file import Checkpoint, PathLike, read_checkpoint
from ..checkpoint.layout import list_models
from ..checkpoint.load import load_strictly
from ..errors import CheckpointError, ConfigError, list_names
from ..models.backbone import Backbone, resolve_alias
from .keys import is_dense, strip_backbone, translate_backbone

__all__ = ['LAST_MAPS', 'NORMS', 'STRIDES', 'DenseBackbone', 'create_dense_backbone']

STRIDES = (4, 8, 16, 32)
NORMS = {'layer': partial(LayerNorm2d, eps=1e-5), 'batch': nn.BatchNorm2d, 'none': lambda chs: nn.Identity()}
LAST_MAPS = ('expanded', 'residual')

_logger = logging.getLogger(__name__)


class DenseBackbone(nn.Module):
    """Maps of a network, normalised: (B, 3, H, W) to a list of (B, channels[i], ceil(H / s), ceil(W / s)).

    Args:
        network: A network of this package without heads, or one of timm with `features_only`.
        indices: Which of its maps are taken, counted as the network counts them.
        levels: The same, counted from 0 for stride 4.
        channels: Of each map.
        norm: Name of a norm in `NORMS`, for each level.
        frozen_bn: Keep every BatchNorm in evaluation mode during training; its scale and shift still learn.
        pad_to: Images are padded with zeros, right and at the bottom, to multiples of it.
    Attributes:
        last_map: Which map of the last stage the network gives, see `create_dense_backbone`.
    """

    def __init__(
            self, network: nn.Module, indices: Sequence[int], levels: Sequence[int], channels: Sequence[int],
            norm: str, frozen_bn: bool, pad_to: int,
    ) -> None:
        super().__init__()
        self.network, self.make_norm = network, NORMS[norm]
        self.norms = nn.ModuleList(map(self.make_norm, channels))
        self.indices, self.levels, self.channels = list(indices), tuple(levels), tuple(channels)
        self.norm, self.frozen_bn, self.pad_to, self.last_map = norm, frozen_bn, pad_to, 'expanded'

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride of each map, in pixels."""
        return tuple(STRIDES[level] for level in self.levels)

    def train(self, mode: bool = True) -> 'DenseBackbone':
        super().train(mode)
        if mode and self.frozen_bn:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.pad_to, 0, -height % self.pad_to))
        if isinstance(self.network, Backbone):
            maps = self.network.forward_intermediates(x, self.indices, stop_early=True, intermediates_only=True)
        else:
            maps = self.network(x)
        outputs = []
        for i, norm in enumerate(self.norms):
            y = maps[i]
            if y.shape[1] != self.channels[i]:  # of timm's networks with channels last
                y = y.permute(0, 3, 1, 2)
            stride = self.strides[i]
            outputs.append(norm(y[..., :-(-height // stride), :-(-width // stride)]))
        return outputs


def create_dense_backbone(
        name: str,
        checkpoint: PathLike | None = None,
        *,
        pretrained: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norm: str = 'layer',
        frozen_bn: bool | None = None,
        last_map: str | None = None,
        pad_to: int = 32,
        **model_args: Any,
) -> DenseBackbone:
    """Create the dense backbone of a model.

    Args:
        name: A model of this package, or one of timm that has maps at strides 4 to 32.
        checkpoint: A classification file, published or ours, of which all but the heads must fit; or a published file
            for dense tasks, with a norm per level (`norm0` ...), for the same kind of `norm`.
        pretrained: Take timm's pretrained weights instead.
        out_indices: Levels: 0 for stride 4, to 3 for stride 32.
        norm: 'layer' (LayerNorm over the channels), 'batch' or 'none', of each level.
        frozen_bn: See `DenseBackbone`. By default only with pretrained weights, whose statistics batches of a few
            large images would spoil; give False for 16 or more images per device.
        last_map: The last map of CARE: 'residual', that of the block before the last one (default), or 'expanded', the
            4 times wider one that its heads see.
        pad_to: See `DenseBackbone`.
        model_args: For `timm.create_model`, e.g. drop_path_rate.
    Raises:
        CheckpointError: The file does not fit; names the keys.
        ConfigError: An unknown model, level, norm or map.
    """
    levels = _check_levels(name, out_indices)
    for what, value, known in (('norm', norm, NORMS), ('last_map', last_map, (None, *LAST_MAPS))):
        if value not in known:
            raise ConfigError(f'{what} is {value!r}: choose from {list_names(filter(None, known))}.')
    frozen = (checkpoint is not None or pretrained) if frozen_bn is None else frozen_bn
    if resolve_alias(name).partition('.')[0] not in list_models():
        network, indices, channels = _create_timm(name, checkpoint, pretrained, levels, last_map, model_args)
        return DenseBackbone(network, indices, levels, channels, norm, frozen, pad_to)

    dense = checkpoint and read_checkpoint(checkpoint)
    dense = dense if dense and is_dense(strip_backbone(dense.state_dict)) else None
    if checkpoint is None or dense:
        network = create_pretrained(name, **model_args)[0] if pretrained else timm.create_model(name, **model_args)
    else:
        network, loaded = create_from_checkpoint(checkpoint, name, **model_args)
    try:
        last_map = network.use_for_dense_tasks(last_map)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if checkpoint is not None and not dense:
        unused = ['its heads', *['the norm before them'] * bool(network.dense_norms),
                  *['its last block'] * (last_map == 'residual')]
        _logger.info('Of %s the backbone does not use %s', loaded.path, ', '.join(unused))
    network.prune_intermediate_layers(list(levels), prune_norm=True)
    channels = [network.feature_info[i]['num_chs'] for i in levels]
    backbone = DenseBackbone(network, levels, levels, channels, norm, frozen, pad_to)
    backbone.last_map = last_map
    if dense:
        load_strictly(backbone, dense.path, *translate_backbone(backbone, strip_backbone(dense.state_dict)))
    return backbone


def _check_levels(name: str, out_indices: Sequence[int]) -> tuple[int, ...]:
    levels = tuple(out_indices)
    if not levels or sorted(set(levels)) != list(levels) or not set(levels) <= set(range(len(STRIDES))):
        raise ConfigError(f'out_indices of {name} is {levels}: take some of 0, 1, 2, 3 (strides 4 to 32), in order.')
    if not timm.is_model(name.partition('.')[0]):
        raise ConfigError(f'There is no model {name!r} in caretrans or timm: see timm.list_models().')
    return levels


# Networks of timm -----------------------------------------------------------------------------------------------------

def _create_timm(
        name: str, checkpoint: PathLike | None, pretrained: bool, levels: tuple[int, ...], last_map: str | None,
        model_args: dict[str, Any]) -> tuple[nn.Module, list[int], list[int]]:
    """A network of timm with `features_only`, the indices of its maps, and their channels."""
    if last_map not in (None, 'expanded'):
        raise ConfigError(f'last_map is {last_map!r}, which only CARE has, not {name}: omit it.')
    try:
        info = timm.create_model(name, features_only=True).feature_info.info
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f'{name} has no features_only in timm ({error}): take another backbone.') from None
    last = {level['reduction']: i for i, level in enumerate(info)}  # the last map of each stride
    wanted = [STRIDES[level] for level in levels]
    if any(stride not in last for stride in wanted) or len(last) != len(info):
        raise ConfigError(
            f'{name} has maps at strides {list_names(level["reduction"] for level in info)}, not one each at '
            f'{list_names(wanted)}: take a network of stages, or other out_indices.')
    indices = [last[stride] for stride in wanted]
    network = timm.create_model(
        name, pretrained=pretrained, features_only=True, out_indices=indices, **model_args)
    if checkpoint is not None:
        _copy_weights(network, create_from_checkpoint(checkpoint, name, **model_args))
    return network, indices, network.feature_info.channels()


def _copy_weights(network: nn.Module, source: tuple[nn.Module, Checkpoint]) -> None:
    """Fill a network of `features_only` with those weights of a whole model that it has."""
    model, checkpoint = source
    weights = model.state_dict()
    weights.update({key.replace('.', '_', 1): value for key, value in model.state_dict().items()})  # flattened stages
    keys = {key: key.removeprefix('model.') for key in network.state_dict()}
    missing = [key for key in keys.values() if key not in weights]
    if missing:
        raise CheckpointError(f'{checkpoint.path}: lacks {list_names(missing)} of the backbone: take another file.')
    network.load_state_dict({key: weights[name] for key, name in keys.items()})
    unused = set(model.state_dict()) - {name.replace('_', '.', 1) for name in keys.values()} - set(keys.values())
    _logger.info('Of %s the backbone does not use %s', checkpoint.path, list_names(sorted(unused)))
