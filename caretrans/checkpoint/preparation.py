"""Preparation of images for evaluation: from flags, else from the checkpoint file, else from the model."""
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import timm
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from timm.models import get_pretrained_cfg

from ..errors import DataError
from ..flags import CHANNEL_ORDERS, ORIENTATIONS
from ..models.backbone import resolve_alias
from .file import Checkpoint

__all__ = ['FLAGS', 'Preparation', 'list_sources', 'read_settings', 'resolve_eval_config', 'resolve_settings']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """Preparation of an image for a network.

    Attributes:
        input_size: Channels, height and width of what the network takes.
        interpolation, crop_pct, crop_mode: Resizing and centre crop for evaluation, as in `timm.data.create_transform`.
        mean, std: One for each channel, of values from 0 to 1, in the channel order of the network.
        channel_order: 'rgb' or 'bgr'.
        orientation: 'exif' rotates images upright as their EXIF data say; 'ignore' takes the pixels as they are stored,
            as the authors of published ImageNet weights did.
    """
    input_size: Sequence[int]
    interpolation: str = 'bicubic'
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875
    crop_mode: str = 'center'
    channel_order: str = 'rgb'
    orientation: str = 'ignore'

    def __post_init__(self) -> None:
        for name in ('input_size', 'mean', 'std'):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in (('channel_order', CHANNEL_ORDERS), ('orientation', ORIENTATIONS)):
            if getattr(self, name) not in choices:
                raise DataError(f'{name} is {getattr(self, name)!r}, choose from {", ".join(choices)}.')

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.input_size[1], self.input_size[2]

    def at_size(self, size: tuple[int, int]) -> 'Preparation':
        """The same for images of another height and width."""
        return replace(self, input_size=(self.input_size[0], *size))

    def to_dict(self) -> dict[str, Any]:
        """The `eval_config` of checkpoints and reports; channel_order only where it is not 'rgb'."""
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        if self.channel_order == 'rgb':
            del settings['channel_order']
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


NAMES = tuple(item.name for item in fields(Preparation))
# Flag: the setting that it overrides
FLAGS = {'img_size': 'input_size',
         **{name: name for name in ('interpolation', 'crop_pct', 'crop_mode', 'channel_order', 'orientation')}}


def resolve_eval_config(model: nn.Module, **overrides: Any) -> Preparation:
    """The preparation of images for the evaluation of a model.

    `overrides` (img_size, crop_pct, interpolation, ...; None is no override) take precedence over the model's
    `pretrained_cfg`. crop_mode 'squash' sets crop_pct to 1, the whole image, unless it is given.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    given.setdefault('in_chans', getattr(model, 'in_chans', 3))
    if 'img_size' not in given and 'input_size' not in given:
        given['img_size'] = model.pretrained_cfg['input_size'][-1]
    if given.get('crop_mode') == 'squash':
        given.setdefault('crop_pct', 1.)
    others = {name: given.pop(name) for name in ('channel_order', 'orientation') if name in given}
    return Preparation(**resolve_data_config(given, pretrained_cfg=model.pretrained_cfg), **others)


def _get_stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `eval_config` of a file; empty for files of others that mean something else by the name."""
    stored = checkpoint.meta.get('eval_config')
    return stored if isinstance(stored, dict) else {}


def read_settings(
        model: nn.Module, checkpoint: Checkpoint, model_name: str | None = None,
        img_size: int | None = None) -> dict[str, Any]:
    """The settings stored in a file, under the names of `Preparation`.

    They are its `eval_config`, where an older file lacks the orientation, which its training ignored. For a model with
    `squash_from` they may be what the authors' training arguments say: an image size (`args.input_size`), from which
    the images are squashed if it is large enough. A tag in `model_name` takes precedence over those arguments.

    Args:
        model: The model of the file.
        model_name: The requested name, with or without a tag.
        img_size: The requested size; below `squash_from` the arguments say nothing about cropping.
    """
    stored = _get_stored(checkpoint)
    if stored:
        return {'orientation': 'ignore', **{name: stored[name] for name in NAMES if stored.get(name) is not None}}
    args, squash_from = checkpoint.meta.get('args'), getattr(model, 'squash_from', None)
    if not squash_from or not isinstance(args, dict) or '.' in (model_name or ''):
        return {}
    side, name = args.get('input_size'), args.get('model')
    if not isinstance(side, int) or not (isinstance(name, str) and timm.is_model(name)):
        return {}
    settings: dict[str, Any] = dict(input_size=[3, side, side])
    if min(side, img_size or side) >= squash_from[0]:
        cfg = get_pretrained_cfg(f'{resolve_alias(name).partition(".")[0]}.{squash_from[1]}')
        settings.update(crop_pct=cfg.crop_pct, crop_mode=cfg.crop_mode)
    return settings


def _drop_crop(stored: dict[str, Any], flags: dict[str, Any]) -> bool:
    """Whether a flag squashes what the file would crop, so that the crop_pct of the file does not apply."""
    return flags.get('crop_mode') == 'squash' != stored.get('crop_mode') and 'crop_pct' not in flags


def resolve_settings(
        model: nn.Module, checkpoint: Checkpoint, model_name: str | None = None, **overrides: Any) -> Preparation:
    """`resolve_eval_config` of `overrides` (None is none), then `read_settings`, then the model's `pretrained_cfg`."""
    flags = {name: value for name, value in overrides.items() if value is not None}
    stored = read_settings(model, checkpoint, model_name, flags.get('img_size'))
    kept = {name: value for name, value in stored.items() if name != 'input_size' or 'img_size' not in flags}
    if _drop_crop(stored, flags):
        kept.pop('crop_pct', None)
    config = resolve_eval_config(model, **{**kept, **flags})
    if 'orientation' not in {**(_get_stored(checkpoint) or {'orientation': None}), **flags}:
        _logger.info(f'{checkpoint.path}: was trained by an older version, which did not rotate images as their EXIF '
                     f'data say, and is used so: --orientation exif rotates them.')
    squash_from = getattr(model, 'squash_from', None)
    stated = {'crop_mode', 'crop_pct'} & {*flags, *stored} or config.crop_mode == 'squash'
    if squash_from and flags.get('img_size', 0) >= squash_from[0] and not stated:
        name = model.pretrained_cfg['architecture']
        _logger.info('From %d pixels on %s is published with squashed, not cropped images: --model %s.%s, or '
                     '--crop-mode squash', squash_from[0], name, name, squash_from[1])
    return config


def list_sources(
        model: nn.Module, checkpoint: Checkpoint, model_name: str | None = None, **overrides: Any) -> dict[str, str]:
    """The source of each setting of `resolve_settings`: flag, checkpoint or model."""
    flags = {name: value for name, value in overrides.items() if value is not None}
    stored = read_settings(model, checkpoint, model_name, flags.get('img_size'))
    given = {*flags, 'crop_pct'} if _drop_crop(stored, flags) else flags
    return {flag: 'flag' if flag in given else 'checkpoint' if name in stored else 'model'
            for flag, name in FLAGS.items()}
