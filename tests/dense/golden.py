"""References of dense prediction (tests/data/dense): what mmdet, mmseg and the published backbones computed in float64.

Weights are filled from their published keys; detectors and segmenters were run on maps that are filled as well.
"""
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from reference import fill_tensor, filled_input

from caretrans.dense import create_from_checkpoint

DATA = Path(__file__).parents[1] / 'data' / 'dense'
LAYOUTS = {'retinanet': 'retinanet_rcvit_xs', 'mask_rcnn': 'mask_rcnn_rcvit_xs', 'semantic_fpn': 'sem_fpn_rcvit_xs'}


def layout(name: str) -> dict:
    return json.loads((DATA / f'{name}_layout.json').read_text(encoding='utf-8'))


@lru_cache(maxsize=None)
def golden(name: str) -> dict:
    with np.load(DATA / f'{name}.npz') as arrays:
        return dict(arrays)


def filled(name: str) -> dict:
    """The weights of a published file; those of CAS-ViT with a gain below 1."""
    gain = .4 if name.startswith('rcvit') else 1.
    return {key: fill_tensor(key, tuple(shape), .4 if key.startswith('backbone.') else gain)
            for key, shape in layout(name).items()}


def published_file(task: str, folder: Path, **meta) -> Path:
    """A file as mmdet and mmseg write them."""
    path = folder / f'{task}.pth'
    torch.save(dict(state_dict=filled(LAYOUTS[task]), meta=meta), path)
    return path


def published_model(task: str, folder: Path):
    return create_from_checkpoint(published_file(task, folder))[0].double()


@lru_cache(maxsize=None)
def filled_maps() -> list:
    """The four maps of casvit_xs for images of 160 x 224."""
    return [filled_input((2, chs, 160 // stride, 224 // stride), f'feat{i}').double()
            for i, (chs, stride) in enumerate(((48, 4), (56, 8), (112, 16), (220, 32)))]


def map_error(arrays: dict, name: str, y: torch.Tensor) -> float:
    """The largest difference of means, deviations and a corner of a map (B, C, H, W) from a reference."""
    assert tuple(y.shape) == tuple(arrays[f'{name}_shape'])
    corner = arrays[f'{name}_crop']
    return max(difference(y.mean((2, 3)), arrays[f'{name}_mean']), difference(y.std((2, 3)), arrays[f'{name}_std']),
               difference(y[..., :corner.shape[-2], :corner.shape[-1]], corner))


def difference(y: torch.Tensor, wanted: np.ndarray) -> float:
    assert tuple(y.shape) == wanted.shape
    return float(np.abs(y.detach().numpy() - wanted).max())
