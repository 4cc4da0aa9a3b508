"""References of the published pre-training (tests/data/selfsup), computed in float64 by its unchanged modules.

Weights are filled from their published keys, so that the teacher differs from the student.
"""
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from reference import _normal, fill_tensor, filled_input

from caretrans.selfsup import Design
from caretrans.selfsup.weights import publish

DATA = Path(__file__).parents[1] / 'data' / 'selfsup'
TAG = 'a'  # begins the names of all inputs


@lru_cache(maxsize=None)
def golden(name: str) -> dict:
    with np.load(DATA / f'{name}_golden.npz') as arrays:
        return dict(arrays)


def layout(name: str) -> dict:
    return json.loads((DATA / f'{name}.json').read_text(encoding='utf-8'))


def probe(name: str, shape) -> torch.Tensor:
    """Random numbers to multiply an array with, so that its signs and places show in the sum."""
    return torch.from_numpy(_normal(f'{name}.probe', shape))


def fill(module: torch.nn.Module, prefix: str) -> None:
    """Fill the weights of a module from its keys after a prefix, in float64."""
    module.double().load_state_dict(
        {key: fill_tensor(prefix + key, tuple(value.shape)) for key, value in module.state_dict().items()})


def views(arrays: dict, step: int) -> list:
    """Both views of a step of a golden file."""
    shape = (int(arrays['batch']), 3, int(arrays['size']), int(arrays['size']))
    return [filled_input(shape, f'{TAG}.step{step}.view{v}').double() for v in (1, 2)]


def error(y, wanted) -> float:
    """The largest difference between arrays, relative where values are above 1."""
    y = np.asarray(y.data if isinstance(y, torch.Tensor) else y)
    wanted = np.asarray(wanted)
    assert y.shape == wanted.shape, f'{y.shape}, not {wanted.shape}'
    return float((np.abs(y - wanted) / np.maximum(np.abs(wanted), 1)).max())


def published_weights(module) -> dict:
    """Filled weights under published keys, for every weight of a module."""
    return {key: fill_tensor(key, tuple(value.shape)) for key, value in publish(module).items()}


def published_file(module, path: Path) -> Path:
    """A file as the published code writes it, with filled weights."""
    weights = {f'module.{key}': value for key, value in published_weights(module).items()}
    torch.save(dict(start_epoch=100, model=weights, optimizer=dict(state={}, param_groups=[])), path)
    return path


SMALL = Design(model='resnet18', img_size=96, hidden=64, out=32, blocks=3, head_dim=32)
