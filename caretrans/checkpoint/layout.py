"""Keys and shapes of the weights of our models in every layout, and the model that fits a file."""
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import timm
import torch
import torch.nn as nn

from .. import models  # noqa: F401 (registers the models)
from ..models.backbone import Backbone, resolve_alias
from ..models.published_keys import Table, rename_keys

__all__ = [
    'Layout', 'Shapes', 'find_models', 'get_layout', 'get_shapes', 'list_models', 'match_layout', 'sort_as_published']

HEADS = ('head', 'head_dist')
MMPRETRAIN_PREFIX = 'backbone.'  # unique to this layout

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Keys and shapes of the weights of a model, and the modules that depend on the data.

    Attributes:
        model_name: Without tag, and not an alias.
        shapes: Under our keys.
        published_keys, mmpretrain_keys, computed_keys: See `Backbone`.
        classifiers, first_conv: Names of modules.
        optional_heads: Whether the argument `distilled` chooses between one head and two.
    """
    model_name: str
    shapes: Shapes
    published_keys: Table
    mmpretrain_keys: Table
    computed_keys: tuple[str, ...]
    classifiers: tuple[str, ...]
    first_conv: str
    optional_heads: bool

    @classmethod
    def of(cls, model: nn.Module) -> 'Layout':
        cfg = getattr(model, 'pretrained_cfg', {})
        classifiers = cfg.get('classifier') or ()
        return cls(
            model_name=cfg.get('architecture') or type(model).__name__,
            shapes=get_shapes(model.state_dict()),
            published_keys=getattr(model, 'published_keys', ()),
            mmpretrain_keys=getattr(model, 'mmpretrain_keys', ()),
            computed_keys=getattr(model, 'computed_keys', ()),
            classifiers=(classifiers,) if isinstance(classifiers, str) else tuple(classifiers),
            first_conv=cfg.get('first_conv') or '',
            optional_heads=isinstance(model, Backbone) and 'distilled' in inspect.signature(type(model)).parameters)

    def match_keys(self, state_dict: Mapping[str, Any]) -> dict[str, str]:
        """{our key: key in the file}, for the keys of any layout, without computed ones.

        If two keys of the file are the same key of ours, the last one is used.
        """
        keys = {key: key for key in state_dict if not self.is_computed(key)}
        if self.is_for_mmpretrain(keys):
            keys = rename_keys(keys, self.mmpretrain_keys, to_published=True)
        return rename_keys(keys, self.published_keys)

    def name_as_in_file(self, keys: Iterable[str], files: Mapping[str, str]) -> list[str]:
        """Our `keys` as named in the file of `files`, a result of `match_keys`."""
        names = {key: key for key in keys}
        if any(ours != theirs for ours, theirs in files.items()):
            names = rename_keys(names, self.published_keys, to_published=True)
        if self.is_for_mmpretrain(files.values()):
            names = rename_keys(names, self.mmpretrain_keys)
        return list(names)

    def is_computed(self, key: str) -> bool:
        return bool(self.computed_keys) and key.endswith(self.computed_keys)

    def is_for_mmpretrain(self, keys: Iterable[str]) -> bool:
        return bool(self.mmpretrain_keys) and any(key.startswith(MMPRETRAIN_PREFIX) for key in keys)

    def is_head(self, key: str) -> bool:
        """Whether `key` belongs to a classifier or to its module, which also contains its norm."""
        names = (*self.classifiers, *HEADS)  # a file may have a second head that the model lacks
        return any(key.startswith((name.rpartition('.')[0] or name) + '.') for name in names)

    def count_heads(self, keys: Iterable[str]) -> int:
        """The number of heads among our `keys`."""
        return len({key.partition('.')[0] for key in keys}.intersection(HEADS))

    def count_classes(self, shapes: Shapes) -> list[int]:
        """The distinct numbers of classes of the heads; 0 without heads."""
        return sorted({shapes[f'{name}.weight'][0] for name in self.classifiers if f'{name}.weight' in shapes}) or [0]

    def measure_fit(self, state_dict: Mapping[str, torch.Tensor]) -> float:
        """The share of keys with equal shapes, 0 to 1, ignoring the numbers of classes and image channels."""
        shapes = {ours: tuple(state_dict[theirs].shape) for ours, theirs in self.match_keys(state_dict).items()}
        free = {f'{name}.{kind}' for name in (*self.classifiers, self.first_conv) for kind in ('weight', 'bias')}
        agree = sum(key in self.shapes and (key in free or self.shapes[key] == shapes[key]) for key in shapes)
        return agree / len(self.shapes.keys() | shapes.keys())


def get_shapes(state_dict: Mapping[str, torch.Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state_dict.items()}


@lru_cache(maxsize=None)
def get_layout(model_name: str, **model_args: Any) -> Layout:
    """The layout of a registered model."""
    return Layout.of(timm.create_model(model_name, device='meta', **model_args))


def match_layout(model_name: str, state_dict: Mapping[str, torch.Tensor]) -> Layout:
    """The layout of a registered model with the number of heads of the weights, if it supports one and two."""
    layout = get_layout(model_name)
    heads = layout.count_heads(layout.match_keys(state_dict))
    if not layout.optional_heads or heads in (0, layout.count_heads(layout.shapes)):
        return layout
    return get_layout(model_name, distilled=heads == len(HEADS))


def list_models() -> list[str]:
    """The models of this package, without aliases."""
    package = __name__.partition('.')[0]
    return [name for name in timm.list_models() if resolve_alias(name) == name
            and timm.model_entrypoint(name).__module__.startswith(f'{package}.')]


def find_models(state_dict: Mapping[str, torch.Tensor]) -> tuple[list[str], float]:
    """The models of this package whose keys and shapes fit best, with one head or two, and their fit (0 to 1)."""
    fits = {name: match_layout(name, state_dict).measure_fit(state_dict) for name in list_models()}
    best = max(fits.values())
    return [name for name, fit in fits.items() if fit == best], best


def sort_as_published(keys: Iterable[str], table: Table) -> list[str]:
    """The keys in the order of a state dict: a module's own tensors first, then its parts in the order of the table."""
    paths = {key: list(accumulate(key.split('.'), '{}.{}'.format)) for key in keys}
    order: dict[str, int] = {}  # of each key, and of each module that a key is in
    for i, path in enumerate(paths.values()):
        for part in path:
            order.setdefault(part, i)
    listed: dict[str, list[str]] = {}  # {module: its parts in the table, in that order}
    for published, _ in table:
        for part in order:
            if f'.{part}'.endswith(f'.{published}'):
                listed.setdefault(part.rpartition('.')[0], []).append(part)
    for parts in listed.values():
        order.update(zip(parts, sorted(order[part] for part in parts), strict=True))
    return sorted(paths, key=lambda key: [(part != key, order[part]) for part in paths[key]])
