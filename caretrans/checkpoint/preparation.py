"""How images are made ready for a checkpoint: as flags say, else as its file does, else as is usual for its model."""
import logging
from typing import Any

import timm
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg

from ..models.backbone import resolve_alias
from .file import Checkpoint

__all__ = ['list_sources', 'read_settings', 'resolve_eval_config', 'resolve_settings']

NAMES = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'channel_order', 'mean', 'std')  # in an eval_config
FLAGS = {'img_size': 'input_size', **{name: name for name in NAMES[1:5]}}  # flag: what it goes over
CASVIT, SQUASHED_FROM, SQUASHED_TAG = 'casvit_', 384, 'r384_in1k'  # pixels from which CAS-ViT does not crop

_logger = logging.getLogger(__name__)


def resolve_eval_config(model: nn.Module, **overrides: Any) -> dict[str, Any]:
    """How images are made ready for evaluation: input_size, interpolation, crop_pct, crop_mode, mean, std.

    `overrides` (img_size, crop_pct, interpolation, ...; None is no override) go over the model's `pretrained_cfg`.
    With crop_mode 'squash' alone crop_pct is 1: the whole image. With channel_order 'bgr' that is in it too; where it
    is not, images are RGB.
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
        checkpoint: Checkpoint, model_name: str | None = None, img_size: int | None = None) -> dict[str, Any]:
    """What a file says, under the names of `resolve_eval_config`: its `eval_config`, or arguments of CAS-ViT's authors.

    Those state an image size (`args.input_size`), and from 384 pixels on the image is squashed, not cropped. They do
    not count where a tag says how to evaluate.

    Args:
        model_name: Asked for, with or without a tag.
        img_size: Asked for; below 384 pixels a file of CAS-ViT says nothing on cropping.
    """
    stored = checkpoint.meta.get('eval_config')
    if stored:
        return {name: stored[name] for name in NAMES if stored.get(name) is not None}
    args = checkpoint.meta.get('args')
    args = args if isinstance(args, dict) else {}
    side, name = args.get('input_size'), args.get('model')
    if '.' in (model_name or '') or not isinstance(side, int) or not (isinstance(name, str) and timm.is_model(name)):
        return {}
    name = resolve_alias(name).partition('.')[0]
    if not name.startswith(CASVIT):
        return {}
    settings: dict[str, Any] = dict(input_size=[3, side, side])
    if min(side, img_size or side) >= SQUASHED_FROM:
        cfg = get_pretrained_cfg(f'{name}.{SQUASHED_TAG}')
        settings.update(crop_pct=cfg.crop_pct, crop_mode=cfg.crop_mode)
    return settings


def _drop_crop(stored: dict[str, Any], flags: dict[str, Any]) -> bool:
    """Whether a flag squashes what the file would crop: then its share of the image is not meant."""
    return flags.get('crop_mode') == 'squash' != stored.get('crop_mode') and 'crop_pct' not in flags


def resolve_settings(
        model: nn.Module, checkpoint: Checkpoint, model_name: str | None = None, **overrides: Any) -> dict[str, Any]:
    """`resolve_eval_config` of `overrides` (None is none), over `read_settings`, over the model's `pretrained_cfg`."""
    flags = {name: value for name, value in overrides.items() if value is not None}
    stored = read_settings(checkpoint, model_name, flags.get('img_size'))
    kept = {name: value for name, value in stored.items() if name != 'input_size' or 'img_size' not in flags}
    if _drop_crop(stored, flags):
        kept.pop('crop_pct', None)
    config = resolve_eval_config(model, **{**kept, **flags})
    name = model.pretrained_cfg.get('architecture') or ''
    said = {'crop_mode', 'crop_pct'} & {*flags, *stored} or config['crop_mode'] == 'squash'
    if name.startswith(CASVIT) and flags.get('img_size', 0) >= SQUASHED_FROM and not said:
        _logger.info(
            'From %d pixels on CAS-ViT is published to be squashed, not cropped: --model %s.%s, or --crop-mode squash',
            SQUASHED_FROM, name, SQUASHED_TAG)
    return config


def list_sources(checkpoint: Checkpoint, model_name: str | None = None, **overrides: Any) -> dict[str, str]:
    """Where `resolve_settings` has each setting from: flag, checkpoint or model."""
    flags = {name: value for name, value in overrides.items() if value is not None}
    stored = read_settings(checkpoint, model_name, flags.get('img_size'))
    given = {*flags, 'crop_pct'} if _drop_crop(stored, flags) else flags
    return {flag: 'flag' if flag in given else 'checkpoint' if name in stored else 'model'
            for flag, name in FLAGS.items()}
