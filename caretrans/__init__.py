"""CARE Transformer, CAS-ViT and MLLA in PyTorch. Importing this package registers its models with timm, no more.

    import caretrans
    model = timm.create_model('care_s1')
    model = caretrans.get_model('care_s1', pretrained='CARETrans_S1.pth.tar')
"""
try:
    from . import models  # noqa: F401 (registers the models)
except ModuleNotFoundError as error:
    if error.name not in ('torch', 'timm', 'torchvision'):
        raise
    raise ModuleNotFoundError(
        f'{error}: use .venv/bin/python, which the scripts in cmd/ create, or pip install .', name=error.name) from None
from .get_model import get_model

__all__ = ['get_model']
__version__ = '0.1.0'
