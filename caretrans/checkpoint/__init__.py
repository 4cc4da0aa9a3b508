"""Checkpoint files: read safely, loaded strictly, written atomically, converted.

    model, checkpoint = create_from_checkpoint('CARETrans_S0.pth.tar')  # the model is read from the file, or inferred
"""
from ..errors import CheckpointError
from .convert import convert_checkpoint
from .file import Checkpoint, read_checkpoint
from .load import (
    LAYOUTS, create_from_checkpoint, create_pretrained, is_dense, is_pretraining, load_checkpoint, save_checkpoint)

__all__ = [
    'LAYOUTS', 'Checkpoint', 'CheckpointError', 'convert_checkpoint', 'create_from_checkpoint', 'create_pretrained',
    'is_dense', 'is_pretraining', 'load_checkpoint', 'read_checkpoint', 'save_checkpoint']
