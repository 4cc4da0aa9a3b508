"""Files of pre-training: published ones and ours, read and written, and the trunk for detectron2.

A published file has the keys `module.student_encoder.*` and `module.teacher_encoder.*`, trunk, T-stream and heads side
by side. A file of ours is a checkpoint of the student's trunk, which `caretrans.checkpoint` and timm load as any other,
with the whole module in a second entry.
"""
import pickle
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from ..checkpoint.file import Checkpoint, is_plain, read_checkpoint, write_bytes, write_torch
from ..checkpoint.layout import get_shapes
from ..checkpoint.load import TORCH_ENDINGS, is_pretraining, load_strictly, save_checkpoint
from ..errors import CheckpointError, ConfigError
from .pretraining import Design, Pretraining

__all__ = [
    'ENTRY', 'LAYOUTS', 'convert_pretraining', 'is_pretraining', 'load_pretraining', 'name_for_detectron2', 'publish',
    'read_published', 'save_pretraining']

LAYOUTS = ('published', 'caretrans', 'detectron2')
ENTRY = 'pretraining'  # of a file of ours, the whole module
TRUNKS = ('resnet50', 'resnet101', 'resnet152', 'wide_resnet50_2', 'wide_resnet101_2', 'resnet18', 'resnet34')
STRIDE = 16  # of the map that the T-stream takes
BESIDE_TRUNK = ('trans.', 'fc1.', 'fc2.')
OLD_NAME = re.compile(r'^(student_encoder|teacher_encoder)\.bot\.')  # of the T-stream

DETECTRON2 = (  # (part of a key of a ResNet, part of a key of detectron2), in the order in which they are replaced
    (r'^(?!layer)', 'stem.'), (r'^layer(\d)', lambda found: f'res{int(found[1]) + 1}'), (r'\bbn(\d)', r'conv\1.norm'),
    (r'downsample\.0', 'shortcut'), (r'downsample\.1', 'shortcut.norm'))


# Published layout -----------------------------------------------------------------------------------------------------

def publish(module: Pretraining) -> dict[str, torch.Tensor]:
    """The weights under published keys, in the published order.

    Raises:
        CheckpointError: The trunk is no ResNet that a published file can hold.
    """
    if module.design.model.partition('.')[0] not in TRUNKS or module.design.model_args:
        raise CheckpointError(
            f'{module.design.model} has no published layout, which is for {", ".join(TRUNKS)} without arguments: use '
            f'--to caretrans.')
    names = ((key, re.sub(r'^(student|teacher)\.(trunk\.)?', r'\1_encoder.', key)) for key in module.state_dict())
    weights = module.state_dict()
    return {published: weights[key] for key, published in names}


def read_published(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under published keys, also older ones, under ours."""
    found = {}
    for key, value in weights.items():
        owner, _, rest = OLD_NAME.sub(r'\1.trans.', key).partition('.')
        part = '' if rest.startswith(BESIDE_TRUNK) else 'trunk.'
        found[f'{owner.removesuffix("_encoder")}.{part}{rest}'] = value
    return found


def _find_trunk(path: Path | str, weights: Mapping[str, torch.Tensor]) -> str:
    """The name of the ResNet whose keys and shapes are those of the student."""
    shapes = get_shapes({key.removeprefix('student.trunk.'): value for key, value in weights.items()
                         if key.startswith('student.trunk.')})
    for name in TRUNKS:
        if get_shapes(timm.create_model(name, num_classes=0, device='meta').state_dict()) == shapes:
            return name
    raise CheckpointError(f'{path}: its trunk is none of {", ".join(TRUNKS)}: take another file.')


def _describe_published(path: Path | str, weights: Mapping[str, torch.Tensor]) -> Design:
    """The design of a published file, from the shapes of its weights under our keys."""
    student = {key.removeprefix('student.'): tuple(value.shape) for key, value in weights.items()}
    try:
        hidden, out = student['fc1.0.weight'][0], student['fc1.3.weight'][0]
        sizes: dict[str, Any] = dict(method='byol')
        blocks = {key.split('.')[2] for key in student if key.startswith('trans.net.')}
        if blocks:
            attention = 'trans.net.0.net.3.'
            relative = f'{attention}pos_emb.rel_height' in student
            rows, head_dim = student[f'{attention}pos_emb.{"rel_" if relative else ""}height']
            sizes = dict(
                blocks=len(blocks), heads=student[f'{attention}to_qkv.weight'][0] // (3 * head_dim), head_dim=head_dim,
                factor=student['trans.net.0.net.7.weight'][0] // student['trans.net.0.net.0.weight'][0],
                relative=relative, img_size=STRIDE * ((rows + 1) // 2 if relative else rows))
    except KeyError as error:
        raise CheckpointError(
            f'{path}: lacks student_encoder.{error.args[0]} of a pre-training: take a whole file.') from None
    return Design(model=_find_trunk(path, weights), hidden=hidden, out=out, **sizes)


# Reading and writing --------------------------------------------------------------------------------------------------

def _read(path: str | PathLike, entry: str | None) -> tuple[Design, dict[str, torch.Tensor], Checkpoint]:
    """The design and the weights of a file under our keys."""
    checkpoint = read_checkpoint(path, entry)
    stored = checkpoint.meta.get('selfsup')
    if isinstance(stored, dict):
        whole = read_checkpoint(path, ENTRY)
        try:
            return Design(**stored), dict(whole.state_dict), checkpoint
        except TypeError as error:
            raise CheckpointError(f'{path}: its entry selfsup is not a design ({error}): take another file.') from None
    if not is_pretraining(checkpoint):
        raise CheckpointError(
            f'{path}: is no file of self-supervised pre-training, which has a student and a teacher: take another.')
    checkpoint.log_remarks()
    weights = read_published(checkpoint.state_dict)
    return _describe_published(checkpoint.path, weights), weights, checkpoint


def load_pretraining(path: str | PathLike, entry: str | None = None) -> Pretraining:
    """The student and the teacher of a file, in training mode.

    Args:
        path: A published file, with a ResNet as trunk, whose sizes are read from its shapes; or one of ours.
        entry: See `caretrans.checkpoint.read_checkpoint`.
    Raises:
        CheckpointError: The file cannot be read, is none of these, or does not fit; names the keys.
    """
    design, weights, checkpoint = _read(path, entry)
    try:
        module = Pretraining(design)
    except ConfigError as error:
        raise CheckpointError(f'{path}: {error}') from error
    load_strictly(module, checkpoint.path, weights)
    return module


def save_pretraining(path: str | PathLike, module: Pretraining, **rest: Any) -> None:
    """Write the trunk of the student as a checkpoint of its model, and the whole module in a second entry.

    Args:
        rest: See `caretrans.checkpoint.save_checkpoint`.
    """
    design = module.design
    save_checkpoint(path, module.student.trunk, arch=design.model, model_args=design.model_args,
                    selfsup=design.to_dict(), **{ENTRY: module.state_dict()}, **rest)


def name_for_detectron2(key: str) -> str:
    """The name that detectron2 has for a key of a ResNet."""
    for pattern, name in DETECTRON2:
        key = re.sub(pattern, name, key)
    return key


def _write_detectron2(path: Path, trunk: nn.Module) -> None:
    weights = {name_for_detectron2(key): value.cpu().numpy() for key, value in trunk.state_dict().items()}
    contents = dict(model=weights, __author__='CARE', matching_heuristics=True)
    write_bytes(path, pickle.dumps(contents))


def convert_pretraining(
        source: str | PathLike, target: str | PathLike, layout: str, overwrite: bool = False, entry: str | None = None,
) -> str:
    """Write a file of pre-training in another layout.

    Args:
        source, entry: See `load_pretraining`.
        target: .pth, .pth.tar or .pt; .pkl for detectron2.
        layout: 'published'; 'caretrans', ours, whose trunk every other command takes; or 'detectron2', the student's
            trunk under the names of detectron2, to be used with RGB images of mean 123.675 116.28 103.53 and deviation
            58.395 57.12 57.375, STRIDE_IN_1X1 off, and BatchNorm that is synchronised and trained.
    Returns:
        One line that summarises the conversion.
    Raises:
        CheckpointError: `source` is none, has no such layout, or `target` exists or has another ending.
    """
    target = Path(target)
    if layout not in LAYOUTS:
        raise CheckpointError(f'{source}: a pre-training has no {layout} layout: use {" or ".join(LAYOUTS)}.')
    endings = ('.pkl',) if layout == 'detectron2' else TORCH_ENDINGS
    if not target.name.endswith(endings):
        raise CheckpointError(f'{target}: let the name end in {", ".join(endings)} for --to {layout}.')
    if target.exists() and not overwrite:
        raise CheckpointError(f'{target}: already exists: choose another name, or overwrite it (--overwrite).')
    module, meta = load_pretraining(source, entry), read_checkpoint(source, entry).meta
    epoch = next((meta[name] for name in ('epoch', 'start_epoch') if isinstance(meta.get(name), int)), 0)
    design = module.design
    if layout == 'published':
        write_torch(target, dict(
            start_epoch=epoch, model={f'module.{key}': value for key, value in publish(module).items()}))
    elif layout == 'caretrans':
        kept = {name: meta[name] for name in ('eval_config', 'config') if is_plain(meta.get(name, object()))}
        save_pretraining(target, module, epoch=epoch, **kept)
    elif design.model.partition('.')[0] not in TRUNKS:
        raise CheckpointError(f'{source}: detectron2 has names for ResNets, not for {design.model}: use it in timm.')
    else:
        _write_detectron2(target, module.student.trunk)
    return (f'{design.method} with {design.model} at {design.img_size} pixels: from {source} to {target} in the '
            f'{layout} layout')
