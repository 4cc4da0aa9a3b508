"""Training: from a config to a run folder."""
from .run import TrainResult, train
from .trainer import Trainer, build_model

__all__ = ['TrainResult', 'Trainer', 'build_model', 'train']
