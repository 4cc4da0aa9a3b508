"""The reference: deterministic weights and inputs, and what the published network made of them (tests/data).

Every tensor of a published checkpoint is filled from its own key name alone, with NumPy's frozen legacy generator, so
that the same weights can be rebuilt anywhere without shipping them. tests/data holds, per model,

- `*_official_layout.json`: {published key: shape}, in the order of the checkpoint;
- `*_golden.npz`: arrays computed in float64 by the published network, in evaluation mode, for
  `filled_input((2, 3, 224, 224))` (of CAS-ViT, with the two heads of its layouts, and MLLA the logits alone);
  `*_train_golden.npz` the same for one training step.
"""
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn

import caretrans  # noqa: F401 (registers the models)

SHALLOW = (1, 1, 2, 1)  # depths
DATA = Path(__file__).parent / 'data' / 'reference'


def _normal(name: str, shape: Sequence[int]) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))


@lru_cache(maxsize=None)
def fill_tensor(name: str, shape: tuple[int, ...], gain: float = 1.) -> torch.Tensor:
    """Values for the checkpoint entry `name`; `gain` scales the weights of convolutions and linear layers. Shared."""
    if name.endswith('num_batches_tracked'):
        return torch.tensor(100)
    x = _normal(name, shape)
    if name.endswith('running_var'):
        x = 0.5 + np.abs(x)
    elif name.endswith('running_mean'):
        x = 0.3 * x
    elif name.endswith('gamma'):  # layer scale
        x = 0.5 + 0.2 * x
    elif name.endswith('bias'):
        x = 0.1 * x
    elif len(shape) == 1:  # weight of a norm
        x = 1 + 0.2 * x
    else:  # (out, in / groups, height, width) of a convolution or (out, in) of a linear layer
        x = gain * x / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(x.astype(np.float32))


def filled_input(shape: Sequence[int], name: str = 'input') -> torch.Tensor:
    return torch.from_numpy(_normal(name, shape).astype(np.float32))


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/data/{name}_golden.npz."""
    with np.load(DATA / f'{name}_golden.npz') as arrays:
        return dict(arrays)


def published_layout(name: str) -> dict[str, Sequence[int]]:
    return json.loads((DATA / f'{name}_official_layout.json').read_text(encoding='utf-8'))


def published_state_dict(name: str) -> dict[str, torch.Tensor]:
    """A checkpoint of `name` with filled weights under published keys; its tensors are shared, do not change them.

    Networks whose blocks multiply features stay finite with weights that are smaller.
    """
    gain = 0.4 if name.startswith('rcvit') else 1.
    return {key: fill_tensor(key, tuple(shape), gain) for key, shape in published_layout(name).items()}


def published_model(name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Module:
    """The model `name` with the weights of `published_state_dict`, in evaluation mode."""
    model = timm.create_model(name, **kwargs)
    model.load_state_dict(published_state_dict(name))
    return model.to(dtype).eval()


def filled_model(name: str, gain: float = 0.5, **kwargs: Any) -> nn.Module:
    """Any model with weights filled from our own key names, in evaluation mode.

    Fresh weights would hide errors: their layer scale of 1e-6 switches the blocks off.
    """
    model = timm.create_model(name, **kwargs)
    filled = {key: fill_tensor(key, value.shape, gain) for key, value in model.state_dict().items()}
    model.load_state_dict(filled)
    return model.eval()


def shallow_model(name: str, gain: float = 0.5, **kwargs: Any) -> nn.Module:
    """`filled_model` with few blocks, for tests in which the depth does not matter."""
    return filled_model(name, gain, **{'depths': SHALLOW, **kwargs})
