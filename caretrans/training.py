"""A training run from its config to its run folder."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional

import timm
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, TrainingTask
from timm.utils import NativeScaler, random_seed

from .checkpoint import CheckpointError, load_checkpoint
from .config import ConfigError, TrainConfig, derive_batches
from .data import DataError, build_eval_loader, build_train_loader, list_classes, open_dataset, resolve_eval_config
from .engine import Stepper, TrainingError, evaluate, resolve_device, train_epoch
from .progress import Progress
from .run_folder import RunFolder

__all__ = ['TrainResult', 'Trainer', 'build_model', 'build_task', 'train']


@dataclass(frozen=True)
class TrainResult:
    """Where a run was written and how it ended: its rows of summary.csv, the last and the best."""

    folder: Path
    last: Dict[str, float]
    best: Dict[str, float]


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """The model of a run, with the weights of `config.checkpoint` if there is one."""
    if not timm.is_model(config.model):
        near = ', '.join(timm.list_models(f'*{config.model.split("_")[0]}*')[:8]) or 'none'
        raise ConfigError(f'No model {config.model!r}; near: {near}.')
    rates = {key: value for key, value in (('drop_rate', config.drop), ('drop_path_rate', config.drop_path)) if value}
    try:
        model = timm.create_model(config.model, num_classes=num_classes, **{**rates, **config.model_args})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f'{config.model}: {error}') from None
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint, new_heads=config.new_heads)
    return model


def build_task(config: TrainConfig, model: nn.Module, device: torch.device) -> TrainingTask:
    """Forward pass and loss of a run."""
    soft_targets = bool(config.mixup or config.cutmix)
    return ClassificationTask(
        model, criterion_kwargs=dict(smoothing=config.smoothing, soft_targets=soft_targets), device=device,
        verbose=False)


def build_mixup(config: TrainConfig, num_classes: int) -> Optional[Mixup]:
    """Mixup and CutMix of whole batches, or None when both are off."""
    if not config.mixup and not config.cutmix:
        return None
    if (config.device_batch or config.batch_size) % 2:
        raise ConfigError('mixup and cutmix pair the images of a batch: take an even batch_size and device_batch.')
    return Mixup(
        mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, label_smoothing=config.smoothing,
        num_classes=num_classes)


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int):
    """The learning rate over the run: (schedule, epochs in all, cool-down included)."""
    return create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=config.epochs, cooldown_epochs=config.cooldown_epochs,
        min_lr=config.min_lr, warmup_lr=config.warmup_lr, warmup_epochs=config.warmup_epochs,
        step_on_epochs=not config.step_schedule, updates_per_epoch=steps_per_epoch)


class Trainer:
    """Everything a run needs, built and checked before the first step.

    Raises:
        ConfigError, DataError, CheckpointError: The settings, the data or the checkpoint cannot work.
    """

    def __init__(self, config: TrainConfig) -> None:
        random_seed(config.seed)
        self.config = config
        self.device = resolve_device(config.device)
        self.device_batch, self.accumulation = derive_batches(config.batch_size, 1, config.device_batch)
        self._open_data()
        try:
            self._build()
        except (CheckpointError, ConfigError, DataError):
            raise
        except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:  # how timm refuses a setting
            raise ConfigError(f'These settings do not work: {" ".join(str(error).split())}') from error

    def _open_data(self) -> None:
        config = self.config
        options = dict(
            name=config.dataset, download=config.download, batch_size=self.device_batch, seed=config.seed)
        self.train_set = open_dataset(config.data, config.train_split, is_training=True, **options)
        self.classes = list_classes(self.train_set)
        self.val_set = open_dataset(config.data, config.val_split, classes=self.classes, **options)
        if self.classes is None and config.num_classes is None:
            raise ConfigError(f'{config.dataset} does not name its classes: give their number with --num-classes.')
        self.num_classes = config.num_classes or len(self.classes)
        if self.classes and len(self.classes) != self.num_classes:
            raise ConfigError(f'num_classes={self.num_classes}, but the data have {len(self.classes)}: leave it out.')

    def _build(self) -> None:
        config = self.config
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = build_model(config, self.num_classes).to(self.device, memory_format=self.memory_format)
        if getattr(self.model, 'in_chans', 3) != 3:
            raise ConfigError(f'The model takes {self.model.in_chans} channels, the images have 3: leave in_chans out.')
        self.eval_config = resolve_eval_config(
            self.model, img_size=config.val_img_size or config.img_size, crop_pct=config.crop_pct)
        self.train_loader = build_train_loader(
            self.train_set, config, self.eval_config, self.device_batch, self.device)
        self.val_loader = build_eval_loader(
            self.val_set, self.eval_config, self.device_batch, config.workers, self.device)
        self.steps_per_epoch = len(self.train_loader) // self.accumulation
        if not self.steps_per_epoch:
            raise DataError(f'The {len(self.train_set)} training images do not fill a batch of {config.batch_size}.')
        self.task = build_task(config, self.model, self.device)
        self.mixup = build_mixup(config, self.num_classes)
        optimizer = create_optimizer_v2(self.model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
        self.schedule, self.epochs = build_schedule(config, optimizer, self.steps_per_epoch)
        scaler = NativeScaler(device=self.device.type) if config.amp == 'fp16' else None
        self.stepper = Stepper(optimizer, self.schedule, self.accumulation, scaler)

    def describe(self) -> Dict[str, Any]:
        """What was derived from the settings."""
        return dict(
            model=self.config.model, parameters=sum(p.numel() for p in self.model.parameters()),
            train_images=len(self.train_set), val_images=len(self.val_set), num_classes=self.num_classes,
            device=str(self.device), batch_size=self.config.batch_size, device_batch=self.device_batch,
            accumulation=self.accumulation, epochs=self.epochs, eval_config=self.eval_config)

    def run_epoch(self, epoch: int, progress: Progress) -> Dict[str, Any]:
        """Train one epoch, evaluate if it is due: the row of summary.csv, with None for what was not measured."""
        config, seen = self.config, 0
        if not config.step_schedule:
            self.schedule.step(epoch)

        def report(images: int, **figures: float) -> None:
            nonlocal seen
            progress.update(images - seen, **figures)
            seen = images

        progress.describe(f'epoch {epoch + 1}/{self.epochs}')
        trained = train_epoch(
            self.task, self.train_loader, self.stepper, self.device, config.amp, self.mixup, self.memory_format, report)
        due = (epoch + 1) % config.val_interval == 0 or epoch + 1 == self.epochs
        tested = evaluate(self.task.get_eval_model(), self.val_loader, self.device, config.amp) if due else {}
        return dict(
            epoch=epoch + 1, train_loss=trained['loss'], val_loss=tested.get('loss'), val_top1=tested.get('top1'),
            val_top5=tested.get('top5'), lr=trained['lr'], images_per_s=trained['images_per_s'],
            seconds=trained['seconds'] + tested.get('seconds', 0.))

    def checkpoint_meta(self) -> Dict[str, Any]:
        """What a checkpoint says beside the weights."""
        config = self.config
        return dict(
            arch=config.model, model_args=config.model_args, class_names=self.classes, eval_config=self.eval_config,
            config=config.to_dict())

    def resume_state(self) -> Dict[str, Any]:
        """What going on from this point needs beside the weights."""
        return dict(optimizer=self.stepper.optimizer.state_dict(), steps=self.stepper.steps)


def summarise(row: Dict[str, Any], epochs: int) -> str:
    """One line for people about an epoch."""
    tested = '' if row['val_top1'] is None else \
        f'  val loss {row["val_loss"]:.3f}  top-1 {row["val_top1"]:.1f} %  top-5 {row["val_top5"]:.1f} %'
    return (f'epoch {row["epoch"]}/{epochs}  loss {row["train_loss"]:.3f}{tested}  lr {row["lr"]:.2e}'
            f'  {row["images_per_s"]:.0f} images/s  {row["seconds"]:.0f} s')


def train(config: TrainConfig) -> TrainResult:
    """Train as `config` says, print progress, and leave everything in the run folder.

    Raises:
        ConfigError, DataError, CheckpointError: Before the first step.
        TrainingError: The loss is not finite.
    """
    trainer = Trainer(config)
    facts = trainer.describe()
    folder = RunFolder(config, facts)
    print(f'{config.model} ({facts["parameters"] / 1e6:.2f} M parameters) on {trainer.device}, into {folder.path}')
    print(f'{facts["train_images"]} training, {facts["val_images"]} validation images, {trainer.num_classes} classes')
    print(f'batch of {config.batch_size} = {trainer.device_batch} images x {trainer.accumulation} forward pass(es), '
          f'{trainer.steps_per_epoch} steps per epoch, {trainer.epochs} epochs', flush=True)
    images = trainer.epochs * trainer.steps_per_epoch * config.batch_size
    try:
        with Progress(images) as progress:
            for epoch in range(trainer.epochs):
                row = trainer.run_epoch(epoch, progress)
                folder.log_epoch(row)
                folder.save(trainer.model, row, trainer.resume_state(), **trainer.checkpoint_meta())
                progress.write(summarise(row, trainer.epochs))
    except TrainingError as error:
        last = folder.path / 'last.pth.tar'
        raise TrainingError(f'{error} Last good checkpoint: {last if last.exists() else "none yet"}.') from error
    finally:
        folder.close()
    return TrainResult(folder.path, row, folder.best)
