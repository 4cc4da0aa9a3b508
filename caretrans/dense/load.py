"""Detectors and segmenters: create them, read them from files, and write files."""
import inspect
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..checkpoint.file import Checkpoint, read_checkpoint, write_torch
from ..checkpoint.layout import find_models
from ..checkpoint.load import FORMAT_VERSION, load_strictly
from ..errors import CheckpointError, ConfigError, EvaluationError, list_names
from ..evaluation.metrics import list_non_finite
from .backbone import create_dense_backbone
from .keys import DENSE_NORM, load_published, publish, strip_backbone
from .rcnn import Rcnn
from .retinanet import RetinaNet
from .semantic_fpn import SemanticFpn

__all__ = [
    'TASKS', 'convert_checkpoint', 'create_dense_model', 'create_from_checkpoint', 'load_weights', 'open_model',
    'save_checkpoint']


class Task(NamedTuple):
    """A kind of model: its class, the levels of its backbone and its arguments."""
    make: type[nn.Module]
    out_indices: tuple[int, ...]
    fixed: Mapping[str, Any]


TASKS = {
    'retinanet': Task(RetinaNet, (1, 2, 3), {}),
    'faster_rcnn': Task(Rcnn, (0, 1, 2, 3), dict(masks=False)),
    'mask_rcnn': Task(Rcnn, (0, 1, 2, 3), dict(masks=True)),
    'semantic_fpn': Task(SemanticFpn, (0, 1, 2, 3), {}),
}
BACKBONE_ARGS = tuple(inspect.signature(create_dense_backbone).parameters)[2:-1]
CLASS_LAYERS = re.compile(r'classification_head\.cls_logits|box_predictor|mask_fcn_logits|^classifier\.')
# The last layer of each kind in published files, its rows per class, and further rows.
LAST_LAYERS = {
    'retinanet': ('bbox_head.retina_cls.bias', 9, 0),
    'mask_rcnn': ('roi_head.mask_head.conv_logits.bias', 1, 0),
    'faster_rcnn': ('roi_head.bbox_head.fc_cls.bias', 1, 1),
    'semantic_fpn': ('decode_head.conv_seg.bias', 1, 0),
}


def create_dense_model(
        task: str, backbone: str, num_classes: int, checkpoint: str | PathLike | None = None,
        model_args: Mapping[str, Any] | None = None, **options: Any) -> nn.Module:
    """Create a detector or segmenter.

    Args:
        task: One of `TASKS`: 'retinanet', 'faster_rcnn', 'mask_rcnn' or 'semantic_fpn'.
        backbone, checkpoint: See `create_dense_backbone`.
        num_classes: Classes of objects or pixels, without background.
        model_args: Of the backbone, for `timm.create_model`: drop_path_rate, depths ...
        options: Of `create_dense_backbone` (norm, frozen_bn, last_map ...) and of the class of the task (channels,
            min_size ...).
    Returns:
        The model; its attribute `dense_config` holds these arguments, for `save_checkpoint`.
    Raises:
        ConfigError: An unknown task or option.
        CheckpointError: See `create_dense_backbone`.
    """
    if task not in TASKS:
        raise ConfigError(f'There is no task {task!r}: choose from {", ".join(TASKS)}.')
    if num_classes < 1:
        raise ConfigError(f'num_classes is {num_classes}: at least one class is needed.')
    chosen = TASKS[task]
    body_options = {name: value for name, value in options.items() if name in BACKBONE_ARGS}
    head_options = {name: value for name, value in options.items() if name not in body_options}
    model_args = dict(model_args or {})
    try:
        body = create_dense_backbone(
            backbone, checkpoint, **dict(dict(out_indices=chosen.out_indices), **body_options), **model_args)
        model = chosen.make(body, num_classes, **chosen.fixed, **head_options)
    except TypeError as error:
        raise ConfigError(f'{task} with {backbone}: {error}: see the docstrings for the options.') from None
    body_options.pop('pretrained', None)
    model.dense_config = dict(
        task=task, backbone=backbone, num_classes=num_classes, model_args=model_args, **head_options,
        **dict(body_options, frozen_bn=body.frozen_bn, last_map=body.last_map))
    return model


def create_from_checkpoint(path: str | PathLike, entry: str | None = None) -> tuple[nn.Module, Checkpoint]:
    """Create the detector or segmenter of a file and load its weights.

    Args:
        path: A file of `save_checkpoint`, or a published one of mmdet or mmseg with a backbone of CAS-ViT or MLLA.
        entry: See `caretrans.checkpoint.read_checkpoint`.
    Returns:
        The model in evaluation mode, and what the file contains; `meta['class_names']` where it names the classes.
    Raises:
        CheckpointError: The file cannot be read, is none of these, or does not fit.
    """
    checkpoint = read_checkpoint(path, entry)
    checkpoint.log_remarks()
    config = checkpoint.meta.get('dense')
    if config is not None:
        model = create_dense_model(**_check_config(checkpoint, config))
        load_strictly(model, checkpoint.path, dict(checkpoint.state_dict), [])
        return model.eval(), checkpoint
    task = _find_task(checkpoint.state_dict)
    if task is None:
        raise CheckpointError(
            f'{path}: is no detector or segmenter: load classification files with caretrans.checkpoint.')
    model = create_dense_model(task, **_describe_published(checkpoint, task))
    load_published(model, checkpoint.state_dict, checkpoint.path)
    stored = checkpoint.meta.get('meta')
    names = stored.get('CLASSES') if isinstance(stored, Mapping) else None
    if names:
        checkpoint.meta['class_names'] = list(names)
    return model.eval(), checkpoint


def open_model(path: str | PathLike, entry: str | None = None) -> tuple[nn.Module, Checkpoint]:
    """`create_from_checkpoint`, for use: weights must be finite.

    Raises:
        EvaluationError: Some are not.
    """
    model, checkpoint = create_from_checkpoint(path, entry)
    broken = list_non_finite(model)
    if broken:
        raise EvaluationError(f'{checkpoint.path}: {len(broken)} tensors are not finite ({list_names(broken, 3)}): use '
                              f'another checkpoint.')
    return model, checkpoint


def _check_config(checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    if not isinstance(config, Mapping) or not {'task', 'backbone', 'num_classes'} <= set(config):
        raise CheckpointError(f'{checkpoint.path}: its entry `dense` is {config!r}, not a task and a backbone.')
    return dict(dict(last_map='expanded'), **config)  # the only one of older files that do not name it


def _find_task(weights: Mapping[str, torch.Tensor]) -> str | None:
    """The kind of a published model, by its last layer."""
    return next((task for task, (key, *_) in LAST_LAYERS.items() if key in weights), None)


def _describe_published(checkpoint: Checkpoint, task: str) -> dict[str, Any]:
    """The arguments of `create_dense_model`, from the shapes of published weights."""
    weights = checkpoint.state_dict
    key, per_class, beside = LAST_LAYERS[task]
    body = {name: value for name, value in strip_backbone(weights).items() if not DENSE_NORM.match(name)}
    names, fit = find_models(body)
    if fit < .8 or len(names) > 1:
        raise CheckpointError(
            f'{checkpoint.path}: its backbone is none of ours: published detectors of CAS-ViT and MLLA are read.')
    options: dict[str, Any] = dict(
        backbone=names[0], num_classes=len(weights[key]) // per_class - beside,
        norm='batch' if any(re.fullmatch(r'backbone\.norm\d\.running_var', name) for name in weights) else 'layer',
        frozen_bn=True, channels=len(weights['neck.lateral_convs.0.conv.bias']))
    if task.endswith('rcnn'):
        options['hidden'] = len(weights['roi_head.bbox_head.shared_fcs.0.bias'])
    if task == 'mask_rcnn':
        options['mask_convs'] = sum('mask_head.convs.' in name and name.endswith('.bias') for name in weights)
    if task == 'semantic_fpn':
        options['head_channels'] = weights['decode_head.conv_seg.weight'].shape[1]
    return options


def load_weights(
        model: nn.Module, path: str | PathLike, class_names: Sequence[str] | None = None, new_heads: bool = False,
) -> None:
    """Load a detector or segmenter into another of the same kind, which may have other classes.

    Args:
        class_names: Of `model`, if they are known.
        new_heads: Keep the layers of the classes of `model`, to be trained, if the file has other classes.
    Raises:
        CheckpointError: The file is of another kind, another size, or other classes without `new_heads`.
    """
    source, checkpoint = create_from_checkpoint(path)
    ours, theirs = model.dense_config, source.dense_config
    for what in ('task', 'backbone', 'norm', 'last_map'):
        if ours.get(what) != theirs.get(what):
            raise CheckpointError(f'{checkpoint.path}: its {what} is {theirs.get(what)}, not {ours.get(what)}: take '
                                  f'another file, or change the setting.')
    weights, own = source.state_dict(), model.state_dict()
    other = {key for key in {*weights, *own} if key not in weights or key not in own
             or weights[key].shape != own[key].shape}
    wrong = sorted(key for key in other if not CLASS_LAYERS.search(key))
    if wrong:
        raise CheckpointError(
            f'{checkpoint.path}: {list_names(wrong, 3)} are missing here or there, or have other sizes: use the '
            f'settings that it was made with, such as --channels {theirs.get("channels", 256)}, and its --model-args '
            f'{theirs["model_args"] or "(none)"}.')
    known = checkpoint.meta.get('class_names')
    if other or known and class_names and list(known) != list(class_names):
        if not new_heads:
            raise CheckpointError(
                f'{checkpoint.path}: has {theirs["num_classes"]} classes ({list_names(known or (), 3)}), the data '
                f'{ours["num_classes"]} ({list_names(class_names or (), 3)}): add --new-heads.')
        weights = {key: own[key] if CLASS_LAYERS.search(key) else value for key, value in weights.items()}
    model.load_state_dict(weights)


def save_checkpoint(
        path: str | PathLike, model: nn.Module, class_names: Sequence[str] = (), ema: nn.Module | None = None,
        **rest: Any) -> None:
    """Write a detector or segmenter, atomically.

    Args:
        model: Of `create_dense_model` or `create_from_checkpoint`.
        class_names: One per class.
        ema: Averaged weights (EMA) of the same model, which readers prefer.
        rest: See `caretrans.checkpoint.save_checkpoint`.
    Raises:
        CheckpointError: The file cannot be written.
        ValueError: Too few or many names.
    """
    config = model.dense_config
    if class_names and len(class_names) != config['num_classes']:
        raise ValueError(f'{len(class_names)} class names for a model of {config["num_classes"]} classes.')
    named = dict(class_names=list(class_names)) if class_names else {}
    averaged = dict(state_dict_ema=ema.state_dict()) if ema is not None else {}
    write_torch(Path(path), dict(
        dense=config, num_classes=config['num_classes'], version=FORMAT_VERSION, state_dict=model.state_dict(),
        **averaged, **named, **rest))


def convert_checkpoint(
        source: str | PathLike, target: str | PathLike, layout: str, overwrite: bool = False, entry: str | None = None,
) -> str:
    """Write a detector or segmenter in the layout of mmdet and mmseg ('published'), or in ours ('caretrans').

    Returns:
        One line that summarises the conversion.
    Raises:
        CheckpointError: `source` is none, has no such layout, or `target` exists or cannot be written.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise CheckpointError(f'{target}: already exists: choose another name, or overwrite it (--overwrite).')
    if layout not in ('published', 'caretrans'):
        raise CheckpointError(f'{source}: detectors and segmenters have no {layout} layout: take --to published.')
    model, checkpoint = create_from_checkpoint(source, entry)
    names = checkpoint.meta.get('class_names') or ()
    if layout == 'caretrans':
        save_checkpoint(target, model, names)
    else:
        meta = dict(CLASSES=list(names)) if names else {}
        write_torch(target, dict(meta=meta, state_dict=publish(model)))
    config = model.dense_config
    return (f'{config["task"]} with {config["backbone"]}, {config["num_classes"]} classes: from {source} to {target} '
            f'in the {layout} layout')
