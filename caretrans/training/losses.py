"""The loss of a run: on labels alone, on a teacher's decisions too, or on those of the averaged weights."""
import logging
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import ClassificationTask, TokenDistillationTask, TrainingTask

from ..checkpoint.load import create_from_checkpoint
from ..config import TrainConfig
from ..errors import CheckpointError, ConfigError

__all__ = ['SelfDistillationTask', 'build_task', 'build_teacher']

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


class SelfDistillationTask(ClassificationTask):
    """Classification in which the average of the weights over the steps teaches the weights (MESA).

    From epoch `start` on the loss of a batch, mixed or not, is
        criterion(out, target) + weight * H(softmax(average(x)), softmax(out)),   H(p, q) = -sum p log q,
    where the average is in evaluation mode and has no gradient, and the entropies are means over the batch in float32.
    What it does follows from the epoch alone. `setup_ema` comes before the first such epoch.

    Source: Du et al. 2022, Sharpness-aware training for free, arXiv:2205.14083; the form of the loss as
    MLLA was trained.

    Args:
        start: Epoch, from 0 on.
        kwargs: Of `timm.task.ClassificationTask`.
    """

    def __init__(self, model: nn.Module, weight: float, start: int, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.weight, self.start, self.is_distilling = weight, start, False

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch, from 0 on, the next steps are of."""
        self.is_distilling = epoch >= self.start

    def train(self, mode: bool = True) -> 'SelfDistillationTask':
        """Set the mode of the model; the average, which is a part of the task, stays in evaluation mode."""
        super().train(mode)
        if self.has_ema():
            self.get_eval_model(ema=True).eval()
        return self

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        result = super().forward(input, target)
        if not self.is_distilling:
            return result
        with torch.no_grad():
            belief = self.get_eval_model(ema=True)(input).float().softmax(dim=-1)
        distilled = F.cross_entropy(result['output'].float(), belief)
        return dict(result, loss=result['loss'] + self.weight * distilled, task_loss=result['loss'],
                    distill_loss=distilled)


def build_task(
        config: TrainConfig, model: nn.Module, device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format, teacher: nn.Module | None = None,
) -> TrainingTask:
    """Forward pass and loss of a run.

    Without a teacher: (soft-target) cross entropy or binary cross entropy of the labels with what the model gives in
    training. With one, hard distillation (Touvron et al. 2021, arXiv:2012.12877, section 4): `task_weight` times the
    loss of the first head on the labels, plus the rest of 1 times the cross entropy of the second head with the class
    that the teacher finds in the same, augmented and mixed, image. Under autocast, and compiled, where the student is.
    With `config.mesa` there is a `SelfDistillationTask`, to be told the epochs.

    Args:
        teacher: Instead of one with the weights that `config` names.
    Raises:
        ConfigError: The model has no second head; else see `build_teacher`.
    """
    criterion = dict(
        loss_type=config.loss, smoothing=config.smoothing, soft_targets=bool(config.mixup or config.cutmix))
    options = dict(criterion_kwargs=criterion, device=device, verbose=False)
    if config.mesa:
        return SelfDistillationTask(model, config.mesa, config.mesa_epoch, **options)
    if config.teacher == 'none':
        return ClassificationTask(model, **options)
    if not hasattr(model, 'set_distilled_training'):
        raise ConfigError(f'{config.model} has no second head to learn from a teacher: give --teacher none.')
    if not getattr(model, 'distilled', True):
        raise ConfigError(
            f'{config.model} has one head, and a second one learns from the teacher: give --model-args distilled=true, '
            f'or --teacher none.')
    teacher = (teacher or build_teacher(config, model.num_classes)).to(device, memory_format=memory_format)
    return TokenDistillationTask(
        model, teacher, distill_type='hard', task_loss_weight=config.task_weight, **options)
