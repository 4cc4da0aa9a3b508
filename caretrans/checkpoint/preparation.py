"""Image settings for evaluation: from flags, else from the checkpoint file, else from the model."""
import logging
from typing import Any

import timm
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg

from ..models.backbone import resolve_alias
from .file import Checkpoint

__all__ = ['FLAGS', 'list_sources', 'read_settings', 'resolve_eval_config', 'resolve_settings']

NAMES = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'channel_order', 'mean', 'std')  # in an eval_config
FLAGS = {'img_size': 'input_size', **{name: name for name in NAMES[1:5]}}  # flag: the setting that it overrides

_logger = logging.getLogger(__name__)


def resolve_eval_config(model: nn.Module, **overrides: Any) -> dict[str, Any]:
    """The image settings for evaluation: input_size, interpolation, crop_pct, crop_mode, mean, std.

    `overrides` (img_size, crop_pct, interpolation, ...; None is no override) take precedence over the model's
    `pretrained_cfg`. crop_mode 'squash' sets crop_pct to 1, the whole image, unless it is given. channel_order is
    included only if it is 'bgr'; without it images are RGB.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    given.setdefault('in_chans', getattr(model, 'in_chans', 3))
    if 'img_size' not in given and 'input_size' not in given:
        given['img_size'] = model.pretrained_cfg['input_size'][-1]
    if given.get('crop_mode') == 'squash':
        given.setdefault('crop_pct', 1.)
    config = resolve_data_config(given, pretrained_cfg=model.pretrained_cfg)
    if given.get('channel_order', 'rgb') != 'rgb':
        config['channel_order'] = given['channel_order']
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def read_settings(
        model: nn.Module, checkpoint: Checkpoint, model_name: str | None = None,
        img_size: int | None = None) -> dict[str, Any]:
    """The settings stored in a file, under the names of `resolve_eval_config`.

    They are its `eval_config`; or for a model with `squash_from` what the authors' training arguments say: an image
    size (`args.input_size`), from which the images are squashed if it is large enough. A tag in `model_name` takes
    precedence over those arguments.

    Args:
        model: The model of the file.
        model_name: The requested name, with or without a tag.
        img_size: The requested size; below `squash_from` the arguments say nothing about cropping.
    """
    stored = checkpoint.meta.get('eval_config')
    if stored:
        return {name: stored[name] for name in NAMES if stored.get(name) is not None}
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
        model: nn.Module, checkpoint: Checkpoint, model_name: str | None = None, **overrides: Any) -> dict[str, Any]:
    """`resolve_eval_config` of `overrides` (None is none), then `read_settings`, then the model's `pretrained_cfg`."""
    flags = {name: value for name, value in overrides.items() if value is not None}
    stored = read_settings(model, checkpoint, model_name, flags.get('img_size'))
    kept = {name: value for name, value in stored.items() if name != 'input_size' or 'img_size' not in flags}
    if _drop_crop(stored, flags):
        kept.pop('crop_pct', None)
    config = resolve_eval_config(model, **{**kept, **flags})
    squash_from = getattr(model, 'squash_from', None)
    stated = {'crop_mode', 'crop_pct'} & {*flags, *stored} or config['crop_mode'] == 'squash'
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
