"""Load any checkpoint of our networks, strictly; write one format, which plain timm opens too.

    model, checkpoint = create_from_checkpoint('CARETrans_S0.pth.tar')  # which model, the file says or its shapes do
    load_checkpoint(model, 'runs/1/best.pth.tar')
    save_checkpoint('last.pth.tar', model, arch='care_s0', class_names=names, epoch=9)

Files are PyTorch's (zip or the older pickle, whatever they are called) or safetensors; the weights bare or wrapped,
under published keys or ours. Nothing in a file is run, and nothing is loaded in part: whatever does not fit is a
`CheckpointError` of one line that names the file, what is wrong and what to do.
"""
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.utils import get_state_dict, unwrap_model

from . import models  # noqa: F401 (registers the models)
from .checkpoint_file import (
    Checkpoint,
    CheckpointError,
    is_plain,
    list_names,
    read_checkpoint,
    write_safetensors,
    write_torch,
)
from .fuse import is_fused
from .models.published_keys import Table, rename_keys

__all__ = [
    'Checkpoint', 'CheckpointError', 'convert_checkpoint', 'create_from_checkpoint', 'load_checkpoint',
    'read_checkpoint', 'save_checkpoint']

TORCH_ENDINGS = ('.pth', '.pth.tar', '.pt')
FORMAT_VERSION = 1  # as timm counts: `epoch`, when given, is the number of finished epochs
NOT_ARCHITECTURE = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir')
MIN_FIT = 0.9  # share of equal keys and shapes from which weights are taken for those of a model

PathLike = Union[str, os.PathLike]
Shapes = Dict[str, Tuple[int, ...]]

_logger = logging.getLogger(__name__)


# Which model it is ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Layout:
    """Keys and shapes of the weights of a model, and which of them depend on the data."""
    model_name: str
    shapes: Shapes
    published_keys: Table
    computed_keys: Tuple[str, ...]
    classifiers: Tuple[str, ...]
    first_conv: str

    @classmethod
    def of(cls, model: nn.Module) -> '_Layout':
        cfg = getattr(model, 'pretrained_cfg', {})
        classifiers = cfg.get('classifier') or ()
        return cls(
            model_name=cfg.get('architecture') or type(model).__name__,
            shapes=_get_shapes(model.state_dict()),
            published_keys=getattr(model, 'published_keys', ()),
            computed_keys=getattr(model, 'computed_keys', ()),
            classifiers=(classifiers,) if isinstance(classifiers, str) else tuple(classifiers),
            first_conv=cfg.get('first_conv') or '')

    def match_keys(self, state_dict: Mapping[str, Any]) -> Dict[str, str]:
        """{our key: key in the file}, for published keys and ours."""
        return rename_keys({key: key for key in state_dict}, self.published_keys, drop=self.computed_keys)

    def is_head(self, key: str) -> bool:
        """Whether `key` is of a classifier, or of what is with it in one module, such as its norm."""
        return any(key.startswith((name.rpartition('.')[0] or name) + '.') for name in self.classifiers)

    def count_classes(self, shapes: Shapes) -> List[int]:
        """The different numbers of classes of the heads; 0 without heads."""
        return sorted({shapes[f'{name}.weight'][0] for name in self.classifiers if f'{name}.weight' in shapes}) or [0]

    def measure_fit(self, state_dict: Dict[str, torch.Tensor]) -> float:
        """The share of keys that agree in shape, 0 to 1, whatever the numbers of classes and of image channels."""
        shapes = {ours: tuple(state_dict[theirs].shape) for ours, theirs in self.match_keys(state_dict).items()}
        free = {f'{name}.{kind}' for name in (*self.classifiers, self.first_conv) for kind in ('weight', 'bias')}
        agree = sum(key in self.shapes and (key in free or self.shapes[key] == shapes[key]) for key in shapes)
        return agree / len(self.shapes.keys() | shapes.keys())


def _get_shapes(state_dict: Dict[str, torch.Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state_dict.items()}


@lru_cache(maxsize=None)
def _get_layout(model_name: str) -> _Layout:
    return _Layout.of(timm.create_model(model_name, device='meta'))


def _list_models() -> List[str]:
    """The models of this package, without aliases."""
    package = __name__.partition('.')[0]
    names = timm.list_models(name_matches_cfg=True)
    return [name for name in names if timm.model_entrypoint(name).__module__.startswith(f'{package}.')]


def _find_models(state_dict: Dict[str, torch.Tensor]) -> Tuple[List[str], float]:
    """The models of this package whose keys and shapes fit best, and how well (0 to 1)."""
    fits = {name: _get_layout(name).measure_fit(state_dict) for name in _list_models()}
    best = max(fits.values())
    return [name for name, fit in fits.items() if fit == best], best


def _choose_model(checkpoint: Checkpoint, model_name: Optional[str] = None) -> str:
    """The name asked for, or the one that the file states, or the one whose shapes its weights have."""
    path, args = checkpoint.path, checkpoint.meta.get('args')
    stated = checkpoint.meta.get('arch') or (args.get('model') if isinstance(args, dict) else None)
    stated = stated.partition('.')[0] if isinstance(stated, str) and timm.is_model(stated) else None
    if model_name and not timm.is_model(model_name):
        raise CheckpointError(f'{path}: no model {model_name!r} to load it into: leave the name out or correct it.')
    if model_name and stated not in (None, model_name.partition('.')[0]):
        raise CheckpointError(f'{path}: is a checkpoint of {stated}, not {model_name}: take {stated}.')
    if model_name or stated:
        return model_name or stated
    names, fit = _find_models(checkpoint.state_dict)
    if fit < MIN_FIT or len(names) > 1:
        problem = 'its weights fit none of ours' if fit < MIN_FIT else f'its weights fit {list_names(names)}'
        raise CheckpointError(f'{path}: does not say of which model it is, and {problem}: name the model.')
    _logger.info('%s does not say of which model it is; its weights have the shapes of %s', path, names[0])
    return names[0]


def _build_model(checkpoint: Checkpoint, model_name: str, **model_args: Any) -> nn.Module:
    """The model for as many classes and image channels as the weights have, with other arguments of the file."""
    layout = _get_layout(model_name)
    files = layout.match_keys(checkpoint.state_dict)
    shapes = {ours: tuple(checkpoint.state_dict[theirs].shape) for ours, theirs in files.items()}
    sizes = dict(num_classes=layout.count_classes(shapes)[0]) if layout.classifiers else {}
    if f'{layout.first_conv}.weight' in shapes:
        sizes['in_chans'] = shapes[f'{layout.first_conv}.weight'][1]
    stored = checkpoint.meta.get('model_args') or {}
    if not isinstance(stored, dict):
        raise CheckpointError(f'{checkpoint.path}: its model_args are {stored!r}, not names and values: remove them.')
    stored = {name: value for name, value in stored.items() if name not in NOT_ARCHITECTURE}
    return timm.create_model(model_name, **{**sizes, **stored, **model_args})


# Loading --------------------------------------------------------------------------------------------------------------

def load_checkpoint(
        model: nn.Module, path: PathLike, entry: Optional[str] = None, new_heads: bool = False) -> Checkpoint:
    """Load the weights of a file into `model`: all of them, or none and an error.

    Args:
        model: Takes them in its own dtype and on its own device.
        path, entry: See `read_checkpoint`.
        new_heads: Leave the heads of the model (classifiers and the norms before them) as they are, to be trained.
    Raises:
        CheckpointError: As for `read_checkpoint`; or the weights are those of another model, of other classes, or
            have missing, unexpected or misshaped keys, all of which it names.
    """
    checkpoint = read_checkpoint(path, entry)
    _load(model, checkpoint, new_heads)
    return checkpoint


def create_from_checkpoint(
        path: PathLike,
        model_name: Optional[str] = None,
        entry: Optional[str] = None,
        new_heads: bool = False,
        **model_args: Any,
) -> Tuple[nn.Module, Checkpoint]:
    """Make the model that a file holds the weights of, and load them.

    Args:
        path, entry: See `read_checkpoint`.
        model_name: Needed only where the file does not state it (`arch`) and its shapes are not those of exactly one
            model of this package.
        new_heads: See `load_checkpoint`.
        model_args: For `timm.create_model`. By default classes and image channels are those of the weights, and
            other arguments those that the file states (`model_args`).
    Raises:
        CheckpointError: As for `load_checkpoint`; or the model is not known, or not the one that the file states.
    """
    checkpoint = read_checkpoint(path, entry)
    model = _build_model(checkpoint, _choose_model(checkpoint, model_name), **model_args)
    _load(model, checkpoint, new_heads)
    return model, checkpoint


def _load(model: nn.Module, checkpoint: Checkpoint, new_heads: bool) -> None:
    model = unwrap_model(model)
    layout = _Layout.of(model)
    tensors = _match_strictly(layout, checkpoint, new_heads)
    heads = {key: value for key, value in model.state_dict().items() if new_heads and layout.is_head(key)}
    model.load_state_dict({**tensors, **heads})
    _logger.info(
        'Loaded %s from %s, %s%s', layout.model_name, checkpoint.path,
        f'entry {checkpoint.entry}' if checkpoint.entry else 'which is not wrapped',
        f' (not {list_names(checkpoint.entries)})' if checkpoint.entries else '')
    if new_heads:
        _logger.info('The heads of %s are fresh: train them', layout.model_name)


def _match_strictly(layout: _Layout, checkpoint: Checkpoint, skip_heads: bool = False) -> Dict[str, torch.Tensor]:
    """The weights of a checkpoint under the keys of `layout`, which they fit exactly."""
    path, name = checkpoint.path, layout.model_name
    files = layout.match_keys(checkpoint.state_dict)
    if len(files) < len(checkpoint.state_dict):
        raise CheckpointError(f'{path}: has weights under published keys and ours: save each weight once.')
    tensors = {ours: checkpoint.state_dict[theirs] for ours, theirs in files.items()}
    found, wanted = (
        {key: shape for key, shape in shapes.items() if not (skip_heads and layout.is_head(key))}
        for shapes in (_get_shapes(tensors), layout.shapes))
    if found == wanted:
        return {key: tensors[key] for key in wanted}

    found_body, wanted_body = (
        {key: shape for key, shape in shapes.items() if not layout.is_head(key)} for shapes in (found, wanted))
    classes, wanted_classes = layout.count_classes(found), layout.count_classes(wanted)
    if found_body != wanted_body:
        _check_variant(layout, checkpoint)
    elif classes != wanted_classes:
        raise CheckpointError(
            f'{path}: has heads of {list_names(classes)} classes, {name} of {list_names(wanted_classes)}: to keep all '
            f'but the heads and train these afresh, ask for it (new_heads=True, --new-heads).')
    raise CheckpointError(
        f'{path}: does not fit {name}: {_describe_misfit(layout, files, found, wanted)}: take another file or model.')


def _check_variant(layout: _Layout, checkpoint: Checkpoint) -> None:
    """CheckpointError when another model of this package fits better than `layout`."""
    names, fit = _find_models(checkpoint.state_dict)
    if fit < MIN_FIT or fit <= layout.measure_fit(checkpoint.state_dict):
        return
    if layout.model_name in names:
        raise CheckpointError(
            f'{checkpoint.path}: is a checkpoint of {layout.model_name} as it is by default, not of one changed by '
            f'arguments (ablation, features_only ...): make the model without them.')
    right = ' or '.join(names)
    raise CheckpointError(
        f'{checkpoint.path}: is a checkpoint of {right}, not {layout.model_name}: take {right}.')


def _describe_misfit(layout: _Layout, files: Dict[str, str], found: Shapes, wanted: Shapes) -> str:
    """Every key that is missing, unexpected or misshaped, as the file calls or would call it."""
    missing = {key: key for key in wanted if key not in found}
    if any(ours != theirs for ours, theirs in files.items()):
        missing = rename_keys(missing, layout.published_keys, to_published=True)
    kinds = dict(
        missing=list(missing),
        unexpected=[files[key] for key in found if key not in wanted],
        misshaped=[
            f'{files[key]} (is {found[key]}, should be {wanted[key]})' for key in found
            if found[key] != wanted.get(key, found[key])])
    return '; '.join(f'{len(keys)} {kind}: {", ".join(keys)}' for kind, keys in kinds.items() if keys)


# Writing --------------------------------------------------------------------------------------------------------------

def save_checkpoint(
        path: PathLike,
        model: nn.Module,
        *,
        arch: str,
        ema: Optional[nn.Module] = None,
        class_names: Optional[Sequence[str]] = None,
        **rest: Any,
) -> None:
    """Write what this module and plain timm read, whole or not at all: an older file stays until the new one is safe.

    Args:
        path: `.pth.tar`, `.pth` or `.pt`, in a folder that is there.
        model: Its weights, without the wrappers of parallel or compiled models.
        arch: Its name in timm.
        ema: Averaged weights of the same model, which readers prefer.
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
        raise CheckpointError(f'{path}: timm goes by the name: let it end in {" or ".join(TORCH_ENDINGS)}.')
    if is_fused(model):
        raise ValueError(f'{path}: fused networks are not saved. Save what it was made from, and fuse after loading.')
    num_classes = unwrap_model(model).num_classes
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f'{len(class_names)} class names for a model of {num_classes} classes.')
    contents = dict(arch=arch, num_classes=num_classes, version=FORMAT_VERSION, state_dict=get_state_dict(model))
    if ema is not None:
        contents['state_dict_ema'] = get_state_dict(ema)
    if class_names is not None:
        contents['class_names'] = list(class_names)
    write_torch(path, dict(contents, **rest))


def convert_checkpoint(
        source: PathLike, target: PathLike, layout: str, entry: Optional[str] = None, overwrite: bool = False) -> str:
    """Write the weights of `source` to `target` in another layout or another format.

    Args:
        source, entry: See `read_checkpoint`.
        target: `.pth`, `.pth.tar`, `.pt` or `.safetensors`, which decides the format.
        layout: 'published', the weights alone under the official keys in the official order (safetensors has an
            order of its own), or 'caretrans', ours, with what else the file says in numbers and texts.
        overwrite: Replace `target` if it is there.
    Returns:
        One line about what was converted.
    Raises:
        CheckpointError: `source` is not exactly a model of ours, or `target` is there or cannot be written.
        ValueError: Another `layout`.
    """
    target = Path(target)
    if layout not in ('published', 'caretrans'):
        raise ValueError(f'layout must be published or caretrans, not {layout!r}.')
    if not target.name.endswith((*TORCH_ENDINGS, '.safetensors')):
        raise CheckpointError(f'{target}: let the name end in {", ".join(TORCH_ENDINGS)} or .safetensors.')
    if target.exists() and not overwrite:
        raise CheckpointError(f'{target}: is there already: choose another name, or overwrite=True (--overwrite).')
    checkpoint = read_checkpoint(source, entry)
    model_name = _choose_model(checkpoint)
    if model_name not in _list_models():
        raise CheckpointError(f'{source}: is a checkpoint of {model_name}, which is none of ours: it has one layout.')
    model = _build_model(checkpoint, model_name, device='meta')
    tensors, meta = _match_strictly(_Layout.of(model), checkpoint), {}
    if layout == 'caretrans':
        meta = {key: value for key, value in checkpoint.meta.items() if is_plain(value)}
        meta.update(arch=model_name, num_classes=model.num_classes, version=FORMAT_VERSION)
    else:
        table = _get_layout(model_name).published_keys
        tensors = rename_keys(tensors, table, to_published=True)
        tensors = {key: tensors[key] for key in _sort_as_published(tensors, table)}
    if target.suffix == '.safetensors':
        write_safetensors(target, tensors, meta)
    else:
        write_torch(target, dict(meta, state_dict=tensors) if meta else tensors)
    summary = (f'{model_name}, {model.num_classes} classes: {len(tensors)} tensors from {source}'
               f'{f", entry {checkpoint.entry}," if checkpoint.entry else ""} to {target} in the {layout} layout')
    settings = checkpoint.meta.get('eval_config')
    if layout == 'published' and settings:
        summary += (f'; it has no place for class names and settings, so evaluate it with --img-size '
                    f'{settings["input_size"][-1]} --crop-pct {settings["crop_pct"]} '
                    f'--interpolation {settings["interpolation"]}')
        for name, usual in (('crop_mode', 'center'), ('channel_order', 'rgb')):
            if settings.get(name, usual) != usual:
                summary += f' --{name.replace("_", "-")} {settings[name]}'
    return summary


def _sort_as_published(keys: Iterable[str], table: Table) -> List[str]:
    """The keys in the order of a state dict: a module's own tensors first, then its parts as the table lists them."""
    paths = {key: list(accumulate(key.split('.'), '{}.{}'.format)) for key in keys}
    order: Dict[str, int] = {}  # of each key, and of each module that a key is in
    for i, path in enumerate(paths.values()):
        for part in path:
            order.setdefault(part, i)
    listed: Dict[str, List[str]] = {}  # {module: its parts that the table lists, as it lists them}
    for published, _ in table:
        for part in order:
            if f'.{part}'.endswith(f'.{published}'):
                listed.setdefault(part.rpartition('.')[0], []).append(part)
    for parts in listed.values():
        order.update(zip(parts, sorted(order[part] for part in parts), strict=True))
    return sorted(paths, key=lambda key: [(part != key, order[part]) for part in paths[key]])
