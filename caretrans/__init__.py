"""CARE Transformer, CAS-ViT and MLLA in PyTorch. Importing this package registers its models with timm, no more.

    import caretrans
    model = timm.create_model('care_s1')
"""
from . import models  # noqa: F401 (registers the models)

__version__ = '0.1.0'
