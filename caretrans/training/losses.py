"""Losses of a run: on labels, with a teacher's predictions, or with those of the averaged weights (MESA)."""
import logging
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import ClassificationTask, TokenDistillationTask, TrainingTask

from ..checkpoint.load import create_from_checkpoint, create_pretrained
from ..config import TrainConfig
from ..errors import CheckpointError, ConfigError, list_names
from ..evaluation.metrics import list_non_finite

__all__ = ['SelfDistillationTask', 'build_task', 'build_teacher']

PAPER_TEACHER = 'regnety_160.deit_in1k'

_logger = logging.getLogger(__name__)


def build_teacher(config: TrainConfig, num_classes: int) -> nn.Module:
    """The teacher of a run, frozen, in evaluation mode.

    It is `config.teacher` with the weights from timm's hub, or with those of `config.teacher_checkpoint`. A teacher of
    this package predicts with the mean of its two heads.

    Raises:
        ConfigError: There is no such model, its weights cannot be downloaded, or its classes are not `num_classes`.
        CheckpointError: The file cannot be used.
    """
    name = config.teacher
    if not timm.is_model(name):
        raise ConfigError(f'No teacher {name!r}: use a model of timm or caretrans; the paper uses {PAPER_TEACHER}.')
    if name == 'regnety_160':
        _logger.warning(
            f'The teacher regnety_160 without a tag is not the model of the paper, which is {PAPER_TEACHER}.')
    if config.teacher_checkpoint:
        teacher = create_from_checkpoint(config.teacher_checkpoint, name)[0]
    else:
        try:
            teacher = create_pretrained(name, 'use a file with --teacher-checkpoint, or --teacher none')[0]
        except CheckpointError as error:
            raise ConfigError(f'No teacher: {error}') from error
    broken = list_non_finite(teacher)
    if broken:
        raise ConfigError(
            f'The teacher {name} has {len(broken)} tensors that are not finite ({list_names(broken, 3)}): use another '
            f'--teacher-checkpoint, or --teacher none.')
    if teacher.num_classes != num_classes:
        raise ConfigError(
            f'The teacher {name} has {teacher.num_classes} classes, the data {num_classes}: use a teacher trained on '
            f'these classes, or --teacher none.')
    if getattr(teacher, 'in_chans', 3) != 3:
        raise ConfigError(f'The teacher {name} takes {teacher.in_chans} channels, but images have 3: use another.')
    return teacher.eval().requires_grad_(False)


class SelfDistillationTask(ClassificationTask):
    """Classification with self-distillation from the averaged weights (MESA).

    From epoch `start` on, the loss of a batch, mixed or not, is
        criterion(out, target) + weight * H(softmax(average(x)), softmax(out)),   H(p, q) = -sum p log q,
    where the average is in evaluation mode and has no gradient, and the entropies are means over the batch in float32.
    The loss depends on the epoch alone. Call `setup_ema` before the first such epoch.

    Source: Du et al. 2022, Sharpness-aware training for free, arXiv:2205.14083; the form of the loss is that of the
    MLLA training code.

    Args:
        start: First epoch with distillation, counted from 0.
        kwargs: See `timm.task.ClassificationTask`.
    """

    def __init__(self, model: nn.Module, weight: float, start: int, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.weight, self.start, self.is_distilling = weight, start, False

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, of the next steps."""
        self.is_distilling = epoch >= self.start

    def train(self, mode: bool = True) -> 'SelfDistillationTask':
        """Set the mode of the model; the average, a submodule of the task, stays in evaluation mode."""
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

    Without a teacher: (soft-target) cross entropy or binary cross entropy of the labels and the output of the model in
    training mode. With a teacher: hard distillation (Touvron et al. 2021, arXiv:2012.12877, section 4), that is
    `task_weight` times the loss of the first head on the labels, plus (1 - `task_weight`) times the cross entropy of
    the second head and the teacher's top-1 for the same augmented and mixed image; the teacher is compiled and under
    autocast if the student is. With `config.mesa`: a `SelfDistillationTask`, whose epoch the caller sets.

    Args:
        teacher: Teacher to use instead of the one in `config`.
    Raises:
        ConfigError: The model has no second head; see also `build_teacher`.
    """
    criterion = dict(
        loss_type=config.loss, smoothing=config.smoothing, soft_targets=bool(config.mixup or config.cutmix))
    options = dict(criterion_kwargs=criterion, device=device, verbose=False)
    if config.mesa:
        return SelfDistillationTask(model, config.mesa, config.mesa_epoch, **options)
    if config.teacher == 'none':
        return ClassificationTask(model, **options)
    if not hasattr(model, 'set_distilled_training'):
        raise ConfigError(f'{config.model} has no second head to learn from a teacher: use --teacher none.')
    if not getattr(model, 'distilled', True):
        raise ConfigError(
            f'{config.model} has one head, but learning from a teacher needs a second one: use --model-args '
            f'distilled=true, or --teacher none.')
    teacher = (teacher or build_teacher(config, model.num_classes)).to(device, memory_format=memory_format)
    return TokenDistillationTask(
        model, teacher, distill_type='hard', task_loss_weight=config.task_weight, **options)
