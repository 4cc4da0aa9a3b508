"""Backbones and model names for mmpretrain, mmdet and mmseg; import it only where OpenMMLab's mmengine is installed.

    import mmpretrain
    import caretrans.openmm

    model = mmpretrain.get_model('casvit-small_8xb256_in1k', pretrained='rcvit_s.pth')
    backbone = dict(type='CASViT', arch='small', out_indices=(0, 1, 2, 3))  # in a config
"""
from importlib.util import find_spec
from pathlib import Path

from .backbones import CARETransformer, CASViT, MLLA

__all__ = ['MLLA', 'CARETransformer', 'CASViT']

if find_spec('mmpretrain'):  # mmdet and mmseg need mmengine alone
    from mmpretrain.apis import ModelHub

    ModelHub.register_model_index(Path(__file__).parent / 'metafile.yml')
