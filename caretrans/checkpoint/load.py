"""Load any checkpoint of our networks, strictly; write one format, which plain timm also reads.

    model, checkpoint = create_from_checkpoint('CARETrans_S0.pth.tar')  # the model is read from the file, or inferred
    load_checkpoint(model, 'runs/1/best.pth.tar')
    save_checkpoint('last.pth.tar', model, arch='care_s0', class_names=names, epoch=9)

Files are PyTorch's (zip or the older pickle, under any name) or safetensors, with bare or wrapped weights under
published keys, ours or those of mmpretrain, and one head or two. No code in a file is run, and no file is loaded in
part: every misfit raises a `CheckpointError` of one line that names the file, the problem and the remedy.
"""
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg
from timm.utils import get_state_dict, unwrap_model

from ..errors import CheckpointError, list_names
from ..fuse import is_fused
from ..models.backbone import resolve_alias
from .file import Checkpoint, read_checkpoint, write_torch
from .layout import Layout, Shapes, find_models, get_shapes, match_layout

__all__ = [
    'Checkpoint', 'CheckpointError', 'create_from_checkpoint', 'create_pretrained', 'is_dense', 'is_pretraining',
    'load_checkpoint', 'load_strictly', 'read_checkpoint', 'save_checkpoint']

TORCH_ENDINGS = ('.pth', '.pth.tar', '.pt')
FORMAT_VERSION = 1  # timm's convention: `epoch`, if present, is the number of finished epochs
NOT_ARCHITECTURE = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir')
LAYOUTS = ('published', 'caretrans', 'mmpretrain')
COUNTS = ('no head', 'one head', 'two heads')
DENSE_HEADS = ('bbox_head.', 'decode_head.', 'roi_head.')  # keys of detectors and segmenters of mmdet and mmseg
STUDENT = 'student_encoder.'  # begins the keys of a published self-supervised pre-training
MIN_FIT = 0.9  # minimum share of equal keys and shapes to infer the model of the weights

PathLike = str | os.PathLike

_logger = logging.getLogger(__name__)


# Model inference ------------------------------------------------------------------------------------------------------

def is_dense(checkpoint: Checkpoint) -> bool:
    """Whether a file holds a detector or segmenter, of `caretrans.dense` or published."""
    return 'dense' in checkpoint.meta or any(key.startswith(DENSE_HEADS) for key in checkpoint.state_dict)


def is_pretraining(checkpoint: Checkpoint) -> bool:
    """Whether a file holds a self-supervised pre-training, of `caretrans.selfsup` or published."""
    return 'selfsup' in checkpoint.meta or any(key.startswith(STUDENT) for key in checkpoint.state_dict)


def _refuse_students(checkpoint: Checkpoint) -> None:
    """CheckpointError for a published pre-training, in which a trunk is among other parts."""
    if any(key.startswith(STUDENT) for key in checkpoint.state_dict):
        path = checkpoint.path
        raise CheckpointError(
            f'{path}: is a published self-supervised pre-training: `python -m caretrans convert {path} NEW.pth.tar '
            f'--to caretrans` writes a file whose trunk can be loaded.')


def choose_model(checkpoint: Checkpoint, model_name: str | None = None) -> str:
    """The requested model name, or that of the file, or the one inferred from the shapes; aliases are resolved."""
    path, args = checkpoint.path, checkpoint.meta.get('args')
    if is_dense(checkpoint):
        raise CheckpointError(
            f'{path}: is a detector or segmenter, not a classifier: use caretrans.dense.create_from_checkpoint.')
    _refuse_students(checkpoint)
    stated = checkpoint.meta.get('arch') or (args.get('model') if isinstance(args, dict) else None)
    stated = resolve_alias(stated).partition('.')[0] if isinstance(stated, str) and timm.is_model(stated) else None
    if model_name:
        if not timm.is_model(model_name):
            raise CheckpointError(f'{path}: no model {model_name!r} to load it into: omit or correct the name.')
        name = resolve_alias(model_name)
        try:
            get_pretrained_cfg(name)
        except RuntimeError as error:  # no such tag
            reason = str(error).rstrip('.')
            raise CheckpointError(f'{path}: {model_name}: {reason}: omit or correct the tag.') from None
        if stated not in (None, name.partition('.')[0]):
            raise CheckpointError(f'{path}: is a checkpoint of {stated}, not {model_name}: take {stated}.')
        return name
    if stated:
        return stated
    names, fit = find_models(checkpoint.state_dict)
    if fit < MIN_FIT or len(names) > 1:
        problem = 'its weights fit none of ours' if fit < MIN_FIT else f'its weights fit {list_names(names)}'
        raise CheckpointError(f'{path}: does not say of which model it is, and {problem}: name the model.')
    _logger.info('%s does not say of which model it is; its weights have the shapes of %s', path, names[0])
    return names[0]


def build_model(checkpoint: Checkpoint, model_name: str, **model_args: Any) -> nn.Module:
    """Create the model with heads, classes and channels of the weights and other arguments of the file."""
    layout = match_layout(model_name.partition('.')[0], checkpoint.state_dict)
    files = layout.match_keys(checkpoint.state_dict)
    shapes = {ours: tuple(checkpoint.state_dict[theirs].shape) for ours, theirs in files.items()}
    sizes = dict(num_classes=layout.count_classes(shapes)[0]) if layout.classifiers else {}
    if layout.optional_heads:
        sizes['distilled'] = layout.count_heads(layout.shapes) > 1
    if f'{layout.first_conv}.weight' in shapes:
        sizes['in_chans'] = shapes[f'{layout.first_conv}.weight'][1]
    stored = checkpoint.meta.get('model_args') or {}
    if not isinstance(stored, dict):
        raise CheckpointError(f'{checkpoint.path}: its model_args are {stored!r}, not names and values: remove them.')
    stored = {name: value for name, value in stored.items() if name not in NOT_ARCHITECTURE}
    try:
        return timm.create_model(model_name, **{**sizes, **stored, **model_args})
    except TypeError as error:
        if not stored:
            raise
        raise CheckpointError(
            f'{checkpoint.path}: its model_args {stored} do not fit {model_name} ({error}): remove them.') from None


# Loading --------------------------------------------------------------------------------------------------------------

def load_checkpoint(
        model: nn.Module, path: PathLike, entry: str | None = None, new_heads: bool = False) -> Checkpoint:
    """Load the weights of a file into `model`: all of them, or none with an error.

    Args:
        model: Keeps its dtype and device.
        path, entry: See `read_checkpoint`.
        new_heads: Keep the heads of the model (classifiers and the norms before them), to be trained.
    Raises:
        CheckpointError: As for `read_checkpoint`; or the weights are of another model, other classes or another number
            of heads, or have keys that are missing, unexpected or of wrong shape, all of which it names.
    """
    checkpoint = read_checkpoint(path, entry)
    _load(model, checkpoint, new_heads)
    return checkpoint


def create_from_checkpoint(
        path: PathLike,
        model_name: str | None = None,
        entry: str | None = None,
        new_heads: bool = False,
        **model_args: Any,
) -> tuple[nn.Module, Checkpoint]:
    """Create the model of a file and load its weights.

    Args:
        path, entry: See `read_checkpoint`.
        model_name: Needed only where the file does not state it (`arch`) and its shapes are not those of exactly one
            model of this package; or with a tag, 'casvit_xs.r384_in1k' for instance, which decides how images are
            prepared for evaluation.
        new_heads: See `load_checkpoint`.
        model_args: For `timm.create_model`. By default heads, classes and image channels are those of the weights, and
            other arguments those that the file states (`model_args`).
    Raises:
        CheckpointError: As for `load_checkpoint`; or the model is not known, or not the one that the file states.
    """
    checkpoint = read_checkpoint(path, entry)
    model = build_model(checkpoint, choose_model(checkpoint, model_name), **model_args)
    _load(model, checkpoint, new_heads)
    return model, checkpoint


def create_pretrained(
        model_name: str, remedy: str = 'use a downloaded file with --checkpoint instead of --pretrained',
        **model_args: Any) -> tuple[nn.Module, Checkpoint]:
    """Create a model with its published weights, which timm takes from their hub, or from its cache when offline.

    Args:
        model_name: Of a model of this package or of timm, with or without a tag.
        remedy: What to do without a network.
        model_args: For `timm.create_model`; with another `num_classes` the heads are fresh.
    Returns:
        The model, and a `Checkpoint` whose `path` says in words where the weights are from.
    Raises:
        CheckpointError: There is no such model, or its weights cannot be fetched.
        TypeError: An argument that the model does not accept.
    """
    if ':' not in model_name and not timm.is_model(model_name):  # with a colon, timm takes it from a hub or a folder
        raise CheckpointError(f'No model {model_name!r} with published weights: correct the name.')
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it prints two lines for each of its tries
    try:
        model = timm.create_model(model_name, pretrained=True, **model_args)
    except (CheckpointError, TypeError):
        raise
    except Exception as error:  # without a network the clients of the hubs raise nearly anything
        reason = ' '.join(str(error).split())[:800].rstrip('.')
        raise CheckpointError(
            f'The weights of {model_name} could not be downloaded ({type(error).__name__}: {reason}): {remedy}.'
        ) from error
    cfg = model.pretrained_cfg
    name = '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))
    origin = cfg.get('file') or '/'.join(filter(None, (cfg.get('hf_hub_id'), cfg.get('hf_hub_filename')))) \
        or cfg.get('url') or model_name
    path = f'published weights {name} ({origin})'
    _logger.info('Loaded %s with %s', cfg['architecture'], path)
    if model.num_classes != cfg.get('num_classes'):
        _logger.info('The heads of %s are fresh: train them', cfg['architecture'])
    names = cfg.get('label_names')
    return model, Checkpoint(path, '', (), model.state_dict(), {'class_names': list(names)} if names else {})


def _load(model: nn.Module, checkpoint: Checkpoint, new_heads: bool) -> None:
    _refuse_students(checkpoint)
    checkpoint.log_remarks()
    model = unwrap_model(model)
    layout = Layout.of(model)
    tensors = match_strictly(layout, checkpoint, new_heads)
    heads = {key: value for key, value in model.state_dict().items() if new_heads and layout.is_head(key)}
    model.load_state_dict({**tensors, **heads})
    _logger.info(
        'Loaded %s from %s%s%s', layout.model_name, checkpoint.path,
        f', entry {checkpoint.entry}' if checkpoint.entry else '',
        f' (not {list_names(checkpoint.entries)})' if checkpoint.entries else '')
    if new_heads:
        _logger.info('The heads of %s are fresh: train them', layout.model_name)


def match_strictly(layout: Layout, checkpoint: Checkpoint, skip_heads: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint under the keys of `layout`, which they fit exactly."""
    path, name = checkpoint.path, layout.model_name
    files = layout.match_keys(checkpoint.state_dict)
    if len(files) < sum(not layout.is_computed(key) for key in checkpoint.state_dict):
        raise CheckpointError(f'{path}: has weights under published keys and ours: save each weight once.')
    tensors = {ours: checkpoint.state_dict[theirs] for ours, theirs in files.items()}
    found, wanted = (
        {key: shape for key, shape in shapes.items() if not (skip_heads and layout.is_head(key))}
        for shapes in (get_shapes(tensors), layout.shapes))
    if found == wanted:
        return {key: tensors[key] for key in wanted}

    found_body, wanted_body = (
        {key: shape for key, shape in shapes.items() if not layout.is_head(key)} for shapes in (found, wanted))
    if found_body != wanted_body:
        _check_variant(layout, checkpoint)
    else:
        _check_heads(layout, path, found, wanted)
    raise CheckpointError(
        f'{path}: does not fit {name}: {_describe_misfit(layout, files, found, wanted)}: take another file or model.')


def _check_heads(layout: Layout, path: Path, found: Shapes, wanted: Shapes) -> None:
    """CheckpointError when the heads of a file are of other classes than those of `layout`, or more or fewer."""
    classes, wanted_classes = layout.count_classes(found), layout.count_classes(wanted)
    heads, wanted_heads = layout.count_heads(found), layout.count_heads(wanted)
    remedy = 'to keep all but the heads and train these afresh, ask for it (new_heads=True, --new-heads).'
    if classes != wanted_classes:
        raise CheckpointError(
            f'{path}: has heads of {list_names(classes)} classes, {layout.model_name} of {list_names(wanted_classes)}: '
            f'{remedy}')
    if layout.optional_heads and heads != wanted_heads:
        raise CheckpointError(
            f'{path}: has {COUNTS[heads]}, {layout.model_name} as it was made {COUNTS[wanted_heads]}: make the model '
            f'with distilled={heads > 1}, or {remedy}')


def _check_variant(layout: Layout, checkpoint: Checkpoint) -> None:
    """CheckpointError when another model of this package fits better than `layout`."""
    names, fit = find_models(checkpoint.state_dict)
    if fit < MIN_FIT or fit <= layout.measure_fit(checkpoint.state_dict):
        return
    if layout.model_name in names:
        raise CheckpointError(
            f'{checkpoint.path}: is a checkpoint of {layout.model_name} as it is by default, not of one changed by '
            f'arguments (ablation, features_only ...): make the model without them.')
    right = ' or '.join(names)
    raise CheckpointError(
        f'{checkpoint.path}: is a checkpoint of {right}, not {layout.model_name}: take {right}.')


def _describe_misfit(layout: Layout, files: dict[str, str], found: Shapes, wanted: Shapes) -> str:
    """List every key that is missing, unexpected or of wrong shape, named as in the file."""
    kinds = {
        'missing': layout.name_as_in_file([key for key in wanted if key not in found], files),
        'unexpected': [files[key] for key in found if key not in wanted],
        'of wrong shape': [
            f'{files[key]} (is {found[key]}, should be {wanted[key]})' for key in found
            if found[key] != wanted.get(key, found[key])]}
    return '; '.join(f'{len(keys)} {kind}: {", ".join(keys)}' for kind, keys in kinds.items() if keys)


def load_strictly(
        model: nn.Module, path: PathLike, found: dict[str, torch.Tensor], unused: Sequence[str] = ()) -> None:
    """Load `found` into `model` if it is exactly what the model has; log the keys that are not used.

    Raises:
        CheckpointError: Keys are missing, unexpected or of wrong shape.
    """
    wanted = model.state_dict()
    problems = {
        'missing': [key for key in wanted if key not in found],
        'unexpected': [key for key in found if key not in wanted],
        'of wrong shape': [f'{key} (is {tuple(found[key].shape)}, should be {tuple(wanted[key].shape)})'
                           for key in found if key in wanted and found[key].shape != wanted[key].shape]}
    text = '; '.join(f'{len(keys)} {kind}: {list_names(keys)}' for kind, keys in problems.items() if keys)
    if text:
        raise CheckpointError(f'{path}: does not fit: {text}: take another file or model.')
    model.load_state_dict(found)
    _logger.info('Loaded %s%s', path, f'; not used: {list_names(unused)}' if unused else '')


# Writing --------------------------------------------------------------------------------------------------------------

def save_checkpoint(
        path: PathLike,
        model: nn.Module,
        *,
        arch: str,
        ema: nn.Module | None = None,
        class_names: Sequence[str] | None = None,
        **rest: Any,
) -> None:
    """Write a checkpoint for this module and plain timm, atomically: an older file stays until the new one is safe.

    Args:
        path: `.pth.tar`, `.pth` or `.pt`, in an existing folder.
        model: Its weights, without the wrappers of parallel or compiled models.
        arch: Its name in timm.
        ema: Averaged weights (EMA) of the same model, which readers prefer.
        class_names: One name per class, in the order of the labels.
        rest: `epoch` (finished ones), `model_args` (for `timm.create_model`), `optimizer` ...: tensors, numbers,
            texts, and lists, tuples and dicts of them.
    Raises:
        CheckpointError: The file cannot be written, because the disk is full for instance.
        TypeError, ValueError: `rest` holds other types, which could not be read back; too few or many `class_names`; a
            fused network, which no reader could load.
    """
    path = Path(path)
    if not path.name.endswith(TORCH_ENDINGS):
        raise CheckpointError(f'{path}: timm reads files by ending: end the name in {" or ".join(TORCH_ENDINGS)}.')
    if is_fused(model):
        raise ValueError(f'{path}: fused networks are not saved. Save the original network and fuse it after loading.')
    num_classes = unwrap_model(model).num_classes
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f'{len(class_names)} class names for a model of {num_classes} classes.')
    contents = dict(arch=arch, num_classes=num_classes, version=FORMAT_VERSION, state_dict=get_state_dict(model))
    if ema is not None:
        contents['state_dict_ema'] = get_state_dict(ema)
    if class_names is not None:
        contents['class_names'] = list(class_names)
    write_torch(path, dict(contents, **rest))
