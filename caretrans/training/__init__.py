"""Training: from a config to a run folder."""
from .classification import ClassificationTrainer, build_model
from .run import TrainResult, train
from .trainer import Trainer

__all__ = ['ClassificationTrainer', 'TrainResult', 'Trainer', 'build_model', 'train']
