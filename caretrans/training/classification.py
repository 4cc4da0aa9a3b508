"""Training of classifiers."""
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.data import Mixup

from ..checkpoint.load import NOT_ARCHITECTURE, create_pretrained, load_checkpoint, save_checkpoint
from ..checkpoint.preparation import resolve_eval_config
from ..config import TrainConfig
from ..data.datasets import check_labels, list_classes, open_dataset
from ..data.loaders import Pass, build_eval_loader, build_train_loader
from ..distributed import Processes
from ..errors import CheckpointError, ConfigError, list_names
from ..evaluation.metrics import check_forward, evaluate, list_non_finite
from ..kernels import describe_placements, use_kernels, why_unavailable
from ..models.backbone import disable_drop_path
from ..text import count_noun
from .folder import choose_orientation
from .losses import SelfDistillationTask, build_task
from .state import EpochRow, Evaluation
from .steps import mix_passes
from .trainer import Trainer, save_memory

__all__ = ['ClassificationTrainer', 'build_mixup', 'build_model', 'check_batch', 'check_kernels', 'put_kernels']

SINGLE_VALUE = 'Expected more than 1 value per channel'  # how PyTorch's BatchNorm refuses a batch of one value


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """The model of a run, with the weights of `config.checkpoint`, or the published ones, if it asks for them.

    Raises:
        ConfigError: No such model, or it does not fit the settings.
        CheckpointError: The weights cannot be loaded.
    """
    if not timm.is_model(config.model):
        near = ', '.join(timm.list_models(f'*{config.model.split("_")[0]}*')[:8]) or 'none'
        raise ConfigError(f'No model {config.model!r}; near: {near}.')
    rates = {key: value for key, value in (('drop_rate', config.drop), ('drop_path_rate', config.drop_path)) if value}
    wrong = [name for name in config.model_args if name in NOT_ARCHITECTURE]
    if wrong:
        raise ConfigError(f'The model_args name {list_names(wrong)}: use --pretrained or --checkpoint.')
    if 'num_classes' in config.model_args:
        raise ConfigError('The model_args name num_classes: use --num-classes.')
    arguments = dict(num_classes=num_classes, **{**rates, **config.model_args})
    try:
        model = create_pretrained(config.model, **arguments)[0] if config.pretrained else \
            timm.create_model(config.model, **arguments)
    except CheckpointError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f'{config.model}: {error}') from None
    except Exception as error:  # whatever a model raises for arguments that make no sense
        if not config.model_args:
            raise
        shown = ' '.join(f'{name}={value}' for name, value in config.model_args.items())
        raise ConfigError(
            f'{config.model} cannot be made with --model-args {shown} ({type(error).__name__}: '
            f'{" ".join(str(error).split())[:200]}): correct or omit them.') from error
    if not arguments.get('drop_path_rate'):
        disable_drop_path(model)
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint, new_heads=config.new_heads)
    broken = list_non_finite(model) if config.checkpoint or config.pretrained else []
    if broken:
        raise CheckpointError(
            f'{config.checkpoint or config.model}: {len(broken)} tensors of the weights are not finite '
            f'({list_names(broken, 3)}), so that every loss would be: use another file.')
    if getattr(model, 'in_chans', 3) != 3:
        raise ConfigError(f'The model takes {model.in_chans} channels, but images have 3: remove in_chans.')
    if config.grad_checkpointing:
        save_memory(model, config.model)
    return model


def check_kernels(config: TrainConfig, device: torch.device) -> None:
    """Refuse kernels that cannot run, before any data is read.

    Raises:
        ConfigError: The device cannot run them, or no part of the model uses them.
    """
    if not config.kernels:
        return
    reason = why_unavailable(device)
    if reason:
        raise ConfigError(f'kernels with device={device}: {reason}: omit --kernels.')
    if not use_kernels(build_model(replace(config, checkpoint=''), num_classes=1), parts=()):
        raise ConfigError(f'kernels: no part of {config.model} uses them: omit --kernels.')


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Refuse passes of one image in which BatchNorm sees a single value per channel, before any data is read.

    Raises:
        ConfigError: The last map of the model has 1 x 1 pixels, or it normalises pooled features.
    """
    sizes = [size for size, (images, _) in zip(config.list_sizes(), config.split_steps(world_size), strict=True)
             if images == 1]
    if not sizes or config.sync_bn and world_size > 1:
        return
    model = build_model(replace(config, checkpoint='', pretrained=False), num_classes=2).train()
    for size in sizes:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            if SINGLE_VALUE not in str(error):
                raise ConfigError(f'img_size={size}: {config.model}: {" ".join(str(error).split())}') from None
            raise ConfigError(
                f'A forward pass of 1 image of {size} px leaves BatchNorm of {config.model} one value per channel '
                f'(batch_size={config.batch_size}, device_batch={config.device_batch}, '
                f'{count_noun(world_size, "process", "processes")}): use 2 or more per pass and process with '
                f'--batch-size or --device-batch, or --img-size 64.') from None


def put_kernels(model: nn.Module, config: TrainConfig) -> str:
    """Use Triton kernels in a model that is on its device, if the config says so; the state dict stays the same.

    Returns:
        Which kernels run, and where.
    Raises:
        ConfigError: No kernel runs.
    """
    if not config.kernels:
        return 'torch'
    placements = use_kernels(model)
    lines = describe_placements(placements)
    if not any(placement.runs == 'triton' for placement in placements):
        raise ConfigError(f'kernels: none runs in {config.model} ({"; ".join(lines) or "no part uses them"}): '
                          f'omit --kernels.')
    import triton  # not on every machine
    return f'triton {triton.__version__} ({"; ".join(lines)})'


def build_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """Mixup and CutMix of whole batches, or None if both are off."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, label_smoothing=config.smoothing,
        num_classes=num_classes)


def _download(config: TrainConfig) -> None:
    for split in (config.train_split, config.val_split):
        open_dataset(config.data, split, config.dataset, download=True)


class ClassificationTrainer(Trainer):
    """Training of a classifier.

    Attributes:
        kernels: Which kernels run.
        eval_config: Preparation of the evaluation images.
    """

    best_score = 'val_top1'
    score_title = 'top-1, %'
    loading_remedy = (
        'put the data on a local disk or into shards (python -m caretrans shard), or use a lighter --auto-augment')

    @classmethod
    def check(cls, config: TrainConfig, processes: Processes, device: torch.device) -> None:
        check_kernels(config, device)
        check_batch(config, processes.world_size)
        if config.dataset_download:  # once per machine
            processes.together(lambda: _download(config) if processes.local_rank == 0 else None)

    @classmethod
    def adopt(cls, config: TrainConfig, path: Path) -> dict[str, Any]:
        return dict(orientation=choose_orientation(path, config))

    @property
    def has_fixed_size(self) -> bool:
        return not self.config.train_img_sizes

    def open_data(self) -> None:
        config = self.config
        options = dict(
            name=config.dataset, download=config.dataset_download, batch_size=self.device_batch, seed=config.seed)
        self.train_set = open_dataset(config.data, config.train_split, is_training=True, **options)
        self.classes = list_classes(self.train_set)
        self.val_set = open_dataset(config.data, config.val_split, classes=self.classes, **options)
        if self.classes is None and config.num_classes is None:
            raise ConfigError(f'{config.dataset} does not name its classes: set their number with --num-classes.')
        self.num_classes = config.num_classes or len(self.classes)
        if self.classes and len(self.classes) != self.num_classes:
            raise ConfigError(
                f'num_classes={self.num_classes}, but the data has {len(self.classes)} classes: omit --num-classes.')
        for dataset in (self.train_set, self.val_set):
            check_labels(dataset, self.num_classes)

    def build_model(self) -> nn.Module:
        return build_model(self.config, self.num_classes)

    def build_parts(self) -> None:
        config, device, processes = self.config, self.device, self.processes
        self.kernels = put_kernels(self.model, config)  # before its average, compiled and distributed forms are made
        self.eval_config = resolve_eval_config(
            self.model, img_size=config.val_img_size or config.img_size, crop_pct=config.crop_pct,
            crop_mode=config.crop_mode, orientation=config.orientation)
        for side in {*config.list_sizes(), self.eval_config.size[0]}:
            check_forward(self.model, (3, side, side), device)
        self.train_loader = build_train_loader(
            self.train_set, config, self.eval_config, self.splits, processes, device, self.num_classes)
        self.val_loader = build_eval_loader(
            self.val_set, self.eval_config, self.device_batch, config.workers, processes, device, self.num_classes)
        self.task = build_task(config, self.model, device, self.memory_format)
        self.mixup = build_mixup(config, self.num_classes)

    def compile(self) -> None:
        if self.config.compile:
            self.task.compile()
            self.task.compile_ema()

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rate, unless it changes per step, and whether there is self-distillation."""
        super().begin_epoch(epoch)
        if isinstance(self.task, SelfDistillationTask):
            self.task.set_epoch(epoch)

    def run_passes(self, epoch: int, start_step: int) -> Iterator[Pass]:
        return mix_passes(self.train_loader.run(epoch, start_step), self.mixup, self.memory_format)

    def evaluate(self, check: Callable[[int], None]) -> Evaluation:
        scores = evaluate(
            self.eval_model, self.val_loader, self.device, self.config.amp, check, self.processes, self.num_classes)
        self.val_loader.unreadable.clear()
        return Evaluation(
            dict(val_loss=scores.loss, val_top1=scores.top1, val_top5=scores.top5), scores.seconds, scores.unreadable)

    def empty_scores(self) -> dict[str, float | None]:
        return dict.fromkeys(('val_loss', 'val_top1', 'val_top5'))

    def describe_scores(self, row: EpochRow) -> str:
        loss, top1, top5 = row.scores.values()
        return f'val loss {loss:.3f}  top-1 {top1:.1f} %  top-5 {top5:.1f} %'

    def write_checkpoint(self, path: Path, **entries: Any) -> None:
        save_checkpoint(
            path, self.model, arch=self.config.model, model_args=self.config.model_args, class_names=self.classes,
            eval_config=self.eval_config.to_dict(), config=self.settings, ema=self.ema, **entries)

    def list_facts(self) -> dict[str, Any]:
        config = self.config
        sizes = dict(zip(config.list_sizes(), self.splits, strict=True)) if config.train_img_sizes else None
        return dict(
            num_classes=self.num_classes, kernels=self.kernels, size_batches=sizes,
            eval_config=self.eval_config.to_dict())

    def introduce(self) -> Iterator[str]:
        config = self.config
        yield f'{len(self.train_set)} training, {len(self.val_set)} validation images, {self.num_classes} classes'
        yield from super().introduce()
        if config.kernels:
            yield f'kernels: {self.kernels}'
        if config.teacher != 'none':
            yield f'teacher {config.teacher}, {1 - config.task_weight:g} of the loss'
        if config.mesa:
            yield f'self-distillation from epoch {config.mesa_epoch + 1} on, weight {config.mesa:g}'

    def name_splits(self) -> list[str]:
        return [f' at {size} px' if self.config.train_img_sizes else '' for size in self.config.list_sizes()]
