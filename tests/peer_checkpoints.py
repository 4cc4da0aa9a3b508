"""Checkpoints of CAS-ViT and MLLA, small ones and hollow ones, as their authors name and wrap them."""
import argparse
from collections import OrderedDict

import pytest
import timm
import torch
from checkpoints import hollow
from reference import published_layout

from caretrans.models.published_keys import rename_keys

PUBLISHED_NAMES = {  # of the layouts, CAS-ViT with a second head
    **{f'casvit_{size}': f'rcvit_{size}' for size in ('xs', 's', 'm', 't')},
    **{f'mlla_{size}': f'mlla_{size}' for size in ('t', 's', 'b')}}
TINY = dict(
    casvit_xs=dict(depths=(1, 1, 1, 1), widths=(8, 12, 16, 20), num_classes=5),
    mlla_t=dict(depths=(1, 2, 1, 1), width=32, num_classes=5))
CAS_VITS = [name for name in PUBLISHED_NAMES if name.startswith('casvit')]
MLLAS = [name for name in PUBLISHED_NAMES if name.startswith('mlla')]

each_peer = pytest.mark.parametrize('name', PUBLISHED_NAMES)
each_tiny = pytest.mark.parametrize('name', TINY)


def make_tiny(name, seed=0, **kwargs):
    """A small network, every tensor of it random."""
    model = timm.create_model(name, **{**TINY[name], **kwargs})
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + seed + 1
             for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def publish(model):
    return rename_keys(model.state_dict(), model.published_keys, to_published=True)


def layout_of(name, heads=1):
    """{published key: shape} with one head or two."""
    layout = {key: value for key, value in published_layout(PUBLISHED_NAMES[name]).items() if 'dist_head' not in key}
    if heads == 2:
        second = 'dist_head' if name in CAS_VITS else 'head_dist'  # which the published MLLA has not
        layout.update({f'{second}.{kind}': layout[f'head.{kind}'] for kind in ('weight', 'bias')})
    return layout


def save_hollow(path, layout, **rest):
    torch.save(dict(rest, model=hollow({key: torch.zeros(shape) for key, shape in layout.items()})), path)
    return path


def save_casvit(path, model, ema=None, stated='rcvit_xs', side=224):
    """A file with all that the training of CAS-ViT saves."""
    args = argparse.Namespace(model=stated, input_size=side, lr=6e-3, output_dir=None)
    contents = dict(
        model=OrderedDict(publish(model)), optimizer=torch.optim.AdamW(model.parameters()).state_dict(), epoch=299,
        scaler=dict(scale=65536., growth_factor=2.), args=args)
    if ema is not None:
        contents['model_ema'] = OrderedDict((f'module.{key}', value) for key, value in publish(ema).items())
    torch.save(contents, path)
    return path
