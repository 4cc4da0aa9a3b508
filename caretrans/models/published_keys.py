"""Rename the keys of a state dict between the published layout of a model and the layout of this package."""
import re
from functools import lru_cache
from typing import Any, Dict, Iterable, Sequence, Tuple

import torch.nn as nn

__all__ = ['Table', 'rename_keys', 'rename_on_load']

# Rows (part of a published key, part of a key of this package), each part between dots; ^ anchors a part at the
# beginning of the key. All rows are applied to a key, in order.
Table = Iterable[Tuple[str, str]]


def _match_part(part: str) -> str:
    """A regular expression for a part of a key between dots; its first group must be kept in front."""
    front, part = (r'^()', part[1:]) if part.startswith('^') else (r'(^|\.)', part)
    return rf'{front}{re.escape(part)}(?=\.|$)'


@lru_cache
def _compile_row(old: str, new: str) -> Tuple[Any, Any, str]:
    """Expressions for the part to replace and, if the new one contains it, for the part that is there already."""
    done = re.compile(_match_part(new)) if old.lstrip('^') in new else None
    return re.compile(_match_part(old)), done, new.lstrip('^')


@lru_cache(maxsize=2 ** 16)  # keys are compared with every model when a file does not say whose it is
def _rename_key(key: str, rows: Tuple[Tuple[str, str], ...]) -> str:
    for row in rows:
        old, done, new = _compile_row(*row)
        if done is None or not done.search(key):
            key = old.sub(rf'\g<1>{new}', key)
    return key


def rename_keys(
        state_dict: Dict[str, Any], table: Table, to_published: bool = False,
        drop: Sequence[str] = ()) -> Dict[str, Any]:
    """Return the entries under the keys of this package, or with `to_published` under published keys, in their order.

    A dict that already has the wanted layout is returned unchanged, because the parts of one layout do not occur in
    the other, or only within the part that replaces them.

    Args:
        drop: Endings of keys to omit.
    """
    rows = tuple((ours, published) if to_published else (published, ours) for published, ours in table)
    renamed = {}
    for key, value in state_dict.items():
        if not (drop and key.endswith(tuple(drop))):
            renamed[_rename_key(key, rows[::-1] if to_published else rows)] = value
    return renamed


def rename_on_load(model: nn.Module, table: Table, drop: Sequence[str] = ()) -> None:
    """Let `model.load_state_dict` also accept published keys, even if `model` is part of a larger module."""
    model.register_load_state_dict_pre_hook(_Renamer(table, drop))


class _Renamer:
    """A load_state_dict pre-hook; a class, so that models stay picklable."""

    def __init__(self, table: Table, drop: Sequence[str]) -> None:
        self.table, self.drop = tuple(table), tuple(drop)

    def __call__(self, module, state_dict, prefix, *args) -> None:
        own = {key[len(prefix):]: key for key in state_dict if key.startswith(prefix)}
        for key in own.values():
            if self.drop and key.endswith(self.drop):
                del state_dict[key]
        for new, old in rename_keys(own, self.table, drop=self.drop).items():
            if prefix + new != old:
                state_dict[prefix + new] = state_dict.pop(old)
