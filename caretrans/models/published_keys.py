"""Rename the keys of a state dict between the published layout of a model and ours."""
import re
from typing import Any, Dict, Iterable, Tuple

import torch.nn as nn

__all__ = ['rename_keys', 'rename_on_load']

Table = Iterable[Tuple[str, str]]  # (part of a published key, part of ours), each between dots


def rename_keys(state_dict: Dict[str, Any], table: Table, to_published: bool = False) -> Dict[str, Any]:
    """Return the entries under our keys, or with `to_published` under the published ones, in their order.

    A dict that is in the wanted layout already comes back unchanged: the parts of one layout do not occur in the
    other, or are followed there by the part they would become.
    """
    renames = []
    for published, ours in table:
        old, new = (ours, published) if to_published else (published, ours)
        keep = '' if old not in new else r'(?<!' + re.escape(new[:-len(old)]) + ')'  # gamma, but not layer_scale.gamma
        renames.append((re.compile(rf'(^|\.){keep}{re.escape(old)}(?=\.|$)'), rf'\g<1>{new}'))
    renamed = {}
    for key, value in state_dict.items():
        for pattern, new in renames:
            key, found = pattern.subn(new, key)
            if found:
                break
        renamed[key] = value
    return renamed


def rename_on_load(model: nn.Module, table: Table) -> None:
    """Let `model.load_state_dict` take published keys too, also where `model` is a part of a larger module."""
    model.register_load_state_dict_pre_hook(_Renamer(table))


class _Renamer:
    """A load_state_dict pre-hook; a class, so that models stay picklable."""

    def __init__(self, table: Table) -> None:
        self.table = tuple(table)

    def __call__(self, module, state_dict, prefix, *args) -> None:
        own = {key[len(prefix):]: key for key in state_dict if key.startswith(prefix)}
        for new, old in zip(rename_keys(own, self.table), own.values(), strict=True):
            if prefix + new != old:
                state_dict[prefix + new] = state_dict.pop(old)
