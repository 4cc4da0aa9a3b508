"""Checkpoints to load, small ones and hollow ones, and how to look at what comes of it."""
from pathlib import Path

import pytest
import timm
import torch

from caretrans.errors import CheckpointError
from caretrans.models.care import CareTransformer
from caretrans.models.published_keys import rename_keys

TINY = dict(depths=(1, 1, 1, 1), slice_chs=(4, 4, 8, 8), ratios=((1, 1),) * 4, num_heads=(0, 0, 1, 1))


def make_tiny(seed=0, num_classes=5, **kwargs):
    """A care_s0 of 20 thousand parameters, every tensor of it random."""
    model = timm.create_model('care_s0', num_classes=num_classes, **{**TINY, **kwargs})
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + seed + 1
             for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def publish(state_dict):
    """The weights under published keys."""
    return rename_keys(state_dict, CareTransformer.published_keys, to_published=True)


def same(a, b):
    """Whether two state dicts have the same keys and values."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def hollow(state_dict):
    """Zeros of the same shapes that take no room in a file."""
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state_dict.items()}


def hollow_checkpoint(path, name, published=True, **kwargs):
    """A file of the keys and shapes of the model `name`."""
    model = timm.create_model(name, device='meta', **kwargs)
    state_dict = hollow(model.state_dict())
    torch.save(rename_keys(state_dict, model.published_keys, to_published=True) if published else state_dict, path)
    return path


def error_of(function, *args, **kwargs):
    """The line of the CheckpointError that a call raises; the first argument that is a file must be named first."""
    with pytest.raises(CheckpointError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert '\n' not in message and message.endswith('.')
    assert message.startswith(next(str(arg) for arg in args if isinstance(arg, Path)) + ': ')
    return message
