"""Small checkpoints and hollow ones (shapes without data), named and wrapped like those of the authors."""
import argparse
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from reference import published_layout

from caretrans.errors import CheckpointError
from caretrans.models.care import CareTransformer
from caretrans.models.published_keys import rename_keys

PUBLISHED_NAMES = {  # of the published layouts; CAS-ViT has a second head
    **{f'casvit_{size}': f'rcvit_{size}' for size in ('xs', 's', 'm', 't')},
    **{f'mlla_{size}': f'mlla_{size}' for size in ('t', 's', 'b')}}
TINY = dict(
    care_s0=dict(depths=(1, 1, 1, 1), slice_chs=(4, 4, 8, 8), ratios=((1, 1),) * 4, num_heads=(0, 0, 1, 1)),
    casvit_xs=dict(depths=(1, 1, 1, 1), widths=(8, 12, 16, 20)),
    mlla_t=dict(depths=(1, 2, 1, 1), width=32))
CAS_VITS = [name for name in PUBLISHED_NAMES if name.startswith('casvit')]
MLLAS = [name for name in PUBLISHED_NAMES if name.startswith('mlla')]

each_peer = pytest.mark.parametrize('name', PUBLISHED_NAMES)
each_tiny = pytest.mark.parametrize('name', ['casvit_xs', 'mlla_t'])


def make_tiny(seed=0, name='care_s0', num_classes=5, **kwargs):
    """A small network with random values in every tensor."""
    model = timm.create_model(name, num_classes=num_classes, **{**TINY[name], **kwargs})
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + seed + 1
             for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def publish(state_dict):
    """The weights of a care_s0 under published keys."""
    return rename_keys(state_dict, CareTransformer.published_keys, to_published=True)


def publish_model(model):
    """The weights of any model under published keys."""
    return rename_keys(model.state_dict(), model.published_keys, to_published=True)


def same(a, b):
    """Whether two state dicts have the same keys and values."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def hollow(state_dict):
    """Zeros of the same shapes that take no space in a file."""
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state_dict.items()}


def hollow_checkpoint(path, name, published=True, **kwargs):
    """A file of the keys and shapes of the model `name`."""
    model = timm.create_model(name, device='meta', **kwargs)
    state_dict = hollow(model.state_dict())
    torch.save(rename_keys(state_dict, model.published_keys, to_published=True) if published else state_dict, path)
    return path


def error_of(function, *args, **kwargs):
    """The message of the CheckpointError that a call raises: one line that begins with the first path argument."""
    with pytest.raises(CheckpointError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert '\n' not in message and message.endswith('.')
    assert message.startswith(next(str(arg) for arg in args if isinstance(arg, Path)) + ': ')
    return message


def layout_of(name, heads=1):
    """{published key: shape} with one head or two."""
    layout = {key: value for key, value in published_layout(PUBLISHED_NAMES[name]).items() if 'dist_head' not in key}
    if heads == 2:
        second = 'dist_head' if name in CAS_VITS else 'head_dist'  # the published MLLA has one head
        layout.update({f'{second}.{kind}': layout[f'head.{kind}'] for kind in ('weight', 'bias')})
    return layout


def save_hollow(path, layout, **rest):
    torch.save(dict(rest, model=hollow({key: torch.zeros(shape) for key, shape in layout.items()})), path)
    return path


def save_casvit(path, model, ema=None, stated='rcvit_xs', side=224):
    """A file like those that the training code of CAS-ViT saves."""
    args = argparse.Namespace(model=stated, input_size=side, lr=6e-3, output_dir=None)
    contents = dict(
        model=OrderedDict(publish_model(model)), optimizer=torch.optim.AdamW(model.parameters()).state_dict(),
        epoch=299, scaler=dict(scale=65536., growth_factor=2.), args=args)
    if ema is not None:
        contents['model_ema'] = OrderedDict((f'module.{key}', value) for key, value in publish_model(ema).items())
    torch.save(contents, path)
    return path
