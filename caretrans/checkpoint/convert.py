"""Conversion of checkpoints to other layouts and formats."""
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..errors import CheckpointError, list_names
from ..models.published_keys import rename_keys
from .file import Checkpoint, PathLike, is_plain, read_checkpoint, write_safetensors, write_torch
from .layout import Layout, list_models, sort_as_published
from .load import FORMAT_VERSION, LAYOUTS, TORCH_ENDINGS, build_model, choose_model, match_strictly
from .preparation import Preparation, read_settings, resolve_settings

__all__ = ['convert_checkpoint']


def convert_checkpoint(
        source: PathLike, target: PathLike, layout: str, entry: str | None = None, overwrite: bool = False,
        model_name: str | None = None, **settings: Any) -> str:
    """Write the weights of `source` to `target` in another layout or another format.

    Args:
        source, entry: See `read_checkpoint`.
        target: `.pth`, `.pth.tar`, `.pt` or `.safetensors`, which decides the format.
        layout: 'published', the weights alone under the official keys in the official order (safetensors has an
            order of its own; the tables of MLLA follow `lepe`, their official position is not known); 'mmpretrain',
            CAS-ViT only, that of the converter for mmpretrain, in an entry `state_dict`; or 'caretrans', ours,
            with the other numbers and texts of the file.
        overwrite: Replace `target` if it exists.
        model_name: See `create_from_checkpoint`; for 'caretrans' the image settings of its tag are stored.
        settings: img_size, crop_pct, crop_mode, interpolation, channel_order, None for none. For 'caretrans', the
            settings of later evaluations; a network for BGR images is converted to RGB exactly, by reversing the inputs
            of its first convolution, mean and std. For 'published', img_size only: the side in pixels of the tables in
            checkpoints of MLLA; by default that of the tables of the source, if any, else that of its evaluation in
            training, else 224.
    Returns:
        One line that summarises the conversion.
    Raises:
        CheckpointError: `source` is not exactly a model of ours, has no such layout or no use for one of `settings`, or
            `target` exists or cannot be written.
        ValueError: Another `layout`.
    """
    target = Path(target)
    _check_target(target, layout, overwrite)
    checkpoint = read_checkpoint(source, entry)
    checkpoint.log_remarks()
    model_name, tagged = choose_model(checkpoint, model_name), model_name and '.' in model_name
    name = model_name.partition('.')[0]
    if name not in list_models():
        raise CheckpointError(f'{source}: is a checkpoint of {name}, which is none of ours: it has one layout.')
    model = build_model(checkpoint, model_name, device='meta')
    tensors, meta = match_strictly(Layout.of(model), checkpoint), {}
    settings = {key: value for key, value in settings.items() if value is not None}
    eval_config = resolve_settings(model, checkpoint, model_name if tagged else None, **settings)
    if layout == 'caretrans':
        meta = {key: value for key, value in checkpoint.meta.items() if is_plain(value)}
        meta.update(arch=name, num_classes=model.num_classes, version=FORMAT_VERSION)
        if settings or tagged or eval_config.channel_order != 'rgb':
            meta['eval_config'] = _turn_to_rgb(checkpoint, model, tensors, eval_config).to_dict()
    else:
        _check_settings(checkpoint, model, layout, settings)
        tensors = _publish(model, tensors, checkpoint, eval_config, keep_tables='img_size' not in settings)
    if layout == 'mmpretrain':
        tensors = _rename_for_mmpretrain(model, name, tensors, checkpoint)
    summary = (f'{name}, {model.num_classes} classes: {len(tensors)} tensors from {source}'
               f'{f", entry {checkpoint.entry}," if checkpoint.entry else ""} to {target} in the {layout} layout')
    if layout != 'caretrans' and (tagged or read_settings(model, checkpoint)):
        summary += _describe_settings(model, eval_config)
    if target.suffix == '.safetensors':
        write_safetensors(target, tensors, meta)
    else:
        write_torch(target, tensors if layout == 'published' else dict(meta, state_dict=tensors))
    return summary


def _check_target(target: Path, layout: str, overwrite: bool) -> None:
    if layout not in LAYOUTS:
        raise CheckpointError(
            f'{target}: a classifier has no {layout} layout: use {", ".join(LAYOUTS[:-1])} or {LAYOUTS[-1]}.')
    if not target.name.endswith((*TORCH_ENDINGS, '.safetensors')):
        raise CheckpointError(f'{target}: let the name end in {", ".join(TORCH_ENDINGS)} or .safetensors.')
    if target.exists() and not overwrite:
        raise CheckpointError(f'{target}: already exists: choose another name, or overwrite it (--overwrite).')


def _check_settings(checkpoint: Checkpoint, model: nn.Module, layout: str, settings: dict[str, Any]) -> None:
    """Raise a CheckpointError if the layout cannot store one of `settings`."""
    useless = [name for name in settings if name != 'img_size' or not model.computed_keys]
    if useless:
        raise CheckpointError(
            f'{checkpoint.path}: {list_names(useless)} cannot be kept: the {layout} layout of '
            f'{model.pretrained_cfg["architecture"]} has no place for it: omit it, or take --to caretrans.')


def _turn_to_rgb(
        checkpoint: Checkpoint, model: nn.Module, tensors: dict[str, torch.Tensor],
        eval_config: Preparation) -> Preparation:
    """`eval_config` for RGB images; for a BGR network, reverses the first weights in `tensors`."""
    if eval_config.channel_order == 'rgb':
        return eval_config
    if model.in_chans != 3:
        raise CheckpointError(
            f'{checkpoint.path}: channel_order bgr is of 3 channels, it has {model.in_chans}: omit it.')
    key = f'{model.pretrained_cfg["first_conv"]}.weight'
    tensors[key] = tensors[key].flip(1)
    return replace(eval_config, mean=eval_config.mean[::-1], std=eval_config.std[::-1], channel_order='rgb')


def _publish(
        model: nn.Module, tensors: dict[str, torch.Tensor], checkpoint: Checkpoint, eval_config: Preparation,
        keep_tables: bool) -> dict[str, torch.Tensor]:
    """The weights under published keys in the published order, with the computed entries of a published checkpoint."""
    try:
        computed = model.compute_entries(*eval_config.size)
    except ValueError as error:
        raise CheckpointError(f'{checkpoint.path}: {error}: name a size (img_size, --img-size).') from None
    if keep_tables:
        computed.update({key: checkpoint.state_dict[key] for key in computed if key in checkpoint.state_dict})
    tensors = {**rename_keys(tensors, model.published_keys, to_published=True), **computed}
    return {key: tensors[key] for key in sort_as_published(tensors, model.published_keys)}


def _rename_for_mmpretrain(
        model: nn.Module, model_name: str, tensors: dict[str, torch.Tensor],
        checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Published weights under the keys of the converter for mmpretrain."""
    if not model.mmpretrain_keys:
        raise CheckpointError(
            f'{checkpoint.path}: is a checkpoint of {model_name}, and only CAS-ViT has a layout of mmpretrain: take '
            f'--to published.')
    if model.distilled:
        raise CheckpointError(
            f'{checkpoint.path}: has two heads, and the layout of mmpretrain has a place for one: take --to published.')
    return rename_keys(tensors, model.mmpretrain_keys)


def _describe_settings(model: nn.Module, settings: Preparation) -> str:
    """The flags for the settings that the layout cannot store."""
    flags = (f'; it has no place for class names and settings, so evaluate it with --img-size '
             f'{settings.size[-1]} --crop-pct {settings.crop_pct} --interpolation {settings.interpolation}')
    for name, usual in (('crop_mode', 'center'), ('channel_order', 'rgb'), ('orientation', 'ignore')):
        if getattr(settings, name) != usual:
            flags += f' --{name.replace("_", "-")} {getattr(settings, name)}'
    for name in ('mean', 'std'):
        if getattr(settings, name) != tuple(model.pretrained_cfg[name]):
            flags += f', and {name} {list(getattr(settings, name))}, for which there is no flag'
    return flags
