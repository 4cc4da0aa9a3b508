"""The loss of a run: on labels alone, or on a teacher's decisions too."""
import logging
from typing import Optional

import timm
import torch
import torch.nn as nn
from timm.task import ClassificationTask, TokenDistillationTask, TrainingTask

from .checkpoint import CheckpointError, create_from_checkpoint
from .config import ConfigError, TrainConfig

__all__ = ['build_task', 'build_teacher']

PAPER_TEACHER = 'regnety_160.deit_in1k'

_logger = logging.getLogger(__name__)


def build_teacher(config: TrainConfig, num_classes: int) -> nn.Module:
    """The teacher of a run, frozen, in evaluation mode.

    It is `config.teacher` with the weights that timm's hub has for it, or with those of `config.teacher_checkpoint`;
    of ours, the mean of the two heads decides.

    Raises:
        ConfigError: There is no such model, its weights cannot be fetched, or it has other classes than the student.
        CheckpointError: The file cannot be used.
    """
    name = config.teacher
    if not timm.is_model(name):
        raise ConfigError(f'No teacher {name!r}: name a model of timm or caretrans, {PAPER_TEACHER} in the paper.')
    if name == 'regnety_160':
        _logger.warning(
            f'The teacher regnety_160 without a tag is another model than that of the paper: it is {PAPER_TEACHER}.')
    if config.teacher_checkpoint:
        teacher = create_from_checkpoint(config.teacher_checkpoint, name)[0]
    else:
        try:
            teacher = timm.create_model(name, pretrained=True)
        except CheckpointError:
            raise
        except Exception as error:  # the clients of the hub raise nearly anything without a network
            raise ConfigError(
                f'The weights of the teacher {name} could not be fetched ({type(error).__name__}: '
                f'{" ".join(str(error).split())[:200]}): give a file with --teacher-checkpoint, or --teacher none.'
            ) from error
    if teacher.num_classes != num_classes:
        raise ConfigError(
            f'The teacher {name} knows {teacher.num_classes} classes, the data have {num_classes}: '
            f'take one that was trained on these classes, or --teacher none.')
    if getattr(teacher, 'in_chans', 3) != 3:
        raise ConfigError(f'The teacher {name} takes {teacher.in_chans} channels, the images have 3: take another.')
    return teacher.eval().requires_grad_(False)


def build_task(
        config: TrainConfig, model: nn.Module, device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format, teacher: Optional[nn.Module] = None,
) -> TrainingTask:
    """Forward pass and loss of a run.

    Without a teacher: (soft-target) cross entropy or binary cross entropy of the labels with what the model gives in
    training. With one, hard distillation (Touvron et al. 2021, arXiv:2012.12877, section 4): `task_weight` times the
    loss of the first head on the labels, plus the rest of 1 times the cross entropy of the second head with the class
    that the teacher finds in the same, augmented and mixed, image. Under autocast, and compiled, where the student is.

    Args:
        teacher: Instead of one with the weights that `config` names.
    Raises:
        ConfigError: The model has no second head; else see `build_teacher`.
    """
    criterion = dict(
        loss_type=config.loss, smoothing=config.smoothing, soft_targets=bool(config.mixup or config.cutmix))
    if config.teacher == 'none':
        return ClassificationTask(model, criterion_kwargs=criterion, device=device, verbose=False)
    if not hasattr(model, 'set_distilled_training'):
        raise ConfigError(f'{config.model} has no second head to learn from a teacher: give --teacher none.')
    teacher = (teacher or build_teacher(config, model.num_classes)).to(device, memory_format=memory_format)
    return TokenDistillationTask(
        model, teacher, criterion_kwargs=criterion, distill_type='hard', task_loss_weight=config.task_weight,
        device=device, verbose=False)
