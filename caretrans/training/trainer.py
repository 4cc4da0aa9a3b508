"""What training needs, of any kind: data, model, loss, optimizer and schedule, built and checked before the first step.

A kind of training is a subclass of `Trainer`: `ClassificationTrainer` here, others in their own packages.
"""
import inspect
import os
from collections.abc import Callable, Iterator, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from torch.nn.parallel import DistributedDataParallel

from ..config import RunConfig
from ..data.loaders import Pass, TrainLoader
from ..distributed import Processes
from ..errors import CheckpointError, ConfigError, DataError
from ..seeds import seed_everything
from ..text import count_noun
from .state import Division, EpochRow, Evaluation
from .steps import Stepper

__all__ = ['Trainer', 'build_schedule', 'save_memory']


def build_schedule(config: RunConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int):
    """The learning rate schedule: (scheduler, total number of epochs including cool-down)."""
    return create_scheduler_v2(optimizer, **config.schedule_options(steps_per_epoch))


def save_memory(network: nn.Module, name: str) -> None:
    """Recompute activations in the backward pass.

    Raises:
        ConfigError: The network cannot.
    """
    if not hasattr(network, 'set_grad_checkpointing'):
        raise ConfigError(f'{name} has no gradient checkpointing: omit --grad-checkpointing.')
    network.set_grad_checkpointing(True)


class Trainer:
    """Data, model, loss, optimizer and schedule of a run.

    Attributes:
        best_score: Column of the score by which the best epoch is chosen; more is better.
        score_title: Of the panel of curves.png that shows the scores.
        weights_entry: Entry of a checkpoint with the weights of `model`, from which a run resumes.
        has_fixed_size: Whether all training images of a run have the same size.
        saves_before_evaluation: Write a checkpoint before an evaluation, because it can fail.
        counted: What parameters are counted, where it is more than the network of `config.model`.
        loading_remedy: What else helps when the device waits for data.
        model: The trained weights, without wrappers.
        ema: Their average over the steps, or None.
        task: Forward pass and loss; compiled if the config says so, and distributed after `distribute`.
        splits: For each training image size, (images per pass and process, passes per step).
        train_set, val_set: Data sets; `val_set` is None if nothing is evaluated.
        classes, num_classes: Names of the classes, where the data name them, and their number.
        train_loader: Loader of the training images.
    Raises:
        ConfigError, DataError, CheckpointError: The settings, the data or the checkpoint cannot work.
    """

    best_score: str
    score_title: str
    weights_entry = 'state_dict'
    has_fixed_size = False
    saves_before_evaluation = False
    counted = ''
    loading_remedy = 'put the data on a local disk'
    model: nn.Module
    task: TrainingTask
    train_set: Sized
    val_set: Sized | None
    classes: list[str] | None
    num_classes: int
    train_loader: TrainLoader

    def __init__(self, config: Any, processes: Processes, device: torch.device) -> None:
        self.config, self.processes, self.device = config, processes, device
        seed_everything(config.seed)
        self.splits = config.split_steps(processes.world_size)
        self.device_batch, self.accumulation = self.splits[0]
        self.open_data()
        if len(self.train_set) < config.batch_size:
            raise DataError(f'The {len(self.train_set)} training images do not fill a batch of {config.batch_size}: '
                            f'use a smaller --batch-size.')
        try:
            self._build()
        except (CheckpointError, ConfigError, DataError):
            raise
        except torch.OutOfMemoryError as error:
            raise ConfigError(f'The model does not fit into the memory of {self.device}: {error}') from error
        except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:  # how timm refuses a setting
            raise ConfigError(f'These settings do not work: {" ".join(str(error).split())}') from error

    def _build(self) -> None:
        config, device, processes = self.config, self.device, self.processes
        if config.sync_bn and device.type == 'cpu' and not processes.is_alone:
            raise ConfigError("sync_bn needs GPUs, PyTorch's SyncBatchNorm does not run on cpu: omit --sync-bn.")
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        model = self.build_model()
        if config.sync_bn:
            model = self.synchronise(model)
        self.model = model.to(device, memory_format=self.memory_format)
        self.build_parts()
        self.ema: nn.Module | None = None
        if config.ema:
            self.ema = self.task.setup_ema(config.ema_decay, use_warmup=config.ema_warmup).module
        self.compile()
        self.eval_model = self.task.get_eval_model(ema=config.ema)
        optimizer = create_optimizer_v2(self.trained, **config.optimizer_options())
        self.schedule, self.epochs = build_schedule(config, optimizer, self.train_loader.steps)
        self.stepper = Stepper(
            optimizer, self.schedule, torch.amp.GradScaler(device.type) if config.amp == 'fp16' else None,
            clip=config.clip_grad, clip_mode=config.clip_mode,
            max_skips=config.max_skips if config.on_nan == 'skip' else 0)

    # What a kind of training defines

    @classmethod
    def check(cls, config: Any, processes: Processes, device: torch.device) -> None:
        """Refuse settings that cannot work, and fetch data, before any data are read; called by every process."""

    @classmethod
    def adopt(cls, config: Any, path: Path) -> dict[str, Any]:
        """Settings that a run has which resumes from a folder, because its version did not know them."""
        return {}

    def open_data(self) -> None:
        """Set `train_set`, `val_set` and `classes`."""
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        """The model, with the weights that the config asks for."""
        raise NotImplementedError

    def synchronise(self, model: nn.Module) -> nn.Module:
        """The model with a BatchNorm over the images of all devices."""
        return convert_sync_batchnorm(model)

    @property
    def trained(self) -> nn.Module:
        """The part of the model whose parameters the optimizer has."""
        return self.model

    def build_parts(self) -> None:
        """Set `train_loader` and `task`, and what `evaluate` needs; the model is on its device."""
        raise NotImplementedError

    def compile(self) -> None:
        """Compile the task, if the config says so."""

    def begin_epoch(self, epoch: int) -> None:
        """Set what depends on the epoch: the learning rate, unless it changes per step."""
        if not self.config.step_schedule:
            self.schedule.step(epoch)

    def run_passes(self, epoch: int, start_step: int) -> Iterator[Pass]:
        """The forward passes of an epoch from a step on."""
        return self.train_loader.run(epoch, start_step)

    def check_terms(self, epoch: int, terms: dict[str, float]) -> None:
        """Stop the run if the terms of an epoch, counted from 1, show that it cannot succeed.

        Raises:
            TrainingError: They do.
        """

    def evaluate(self, check: Callable[[int], None]) -> Evaluation:
        """Scores of the evaluation images, equal on all processes.

        Args:
            check: Called after every batch.
        Raises:
            EvaluationError: A number is not finite.
        """
        raise NotImplementedError

    def empty_scores(self) -> dict[str, float | None]:
        """The scores of an epoch without evaluation: their columns, None."""
        raise NotImplementedError

    def describe_scores(self, row: EpochRow) -> str:
        """The scores of a row in a few words."""
        raise NotImplementedError

    def write_checkpoint(self, path: Path, **entries: Any) -> None:
        """Write the weights, what is needed to use them, and further entries."""
        raise NotImplementedError

    def list_facts(self) -> dict[str, Any]:
        """Facts of this kind of training, for environment.json."""
        return {}

    def introduce(self) -> Iterator[str]:
        """Lines about the run, before its first step."""
        config, devices = self.config, '' if self.processes.is_alone else f' x {self.processes.world_size} processes'
        for at_size, (images, passes) in zip(self.name_splits(), self.splits, strict=True):
            forward = count_noun(passes, 'forward pass', 'forward passes')
            yield (f'batch of {config.batch_size}{at_size} = {images} images x {forward}{devices}, '
                   f'{self.train_loader.steps} steps per epoch, {count_noun(self.epochs, "epoch")}, rate up to '
                   f'{config.lr:g}')
            if config.device_batch and images < config.device_batch and not at_size:
                yield f'BatchNorm sees {images} images at a time, not the {config.device_batch} of --device-batch'

    def name_splits(self) -> list[str]:
        """Words for each of `splits`."""
        return [''] * len(self.splits)

    # The same for every kind

    def distribute(self) -> None:
        """Average the gradients over the processes; within an epoch each keeps its own BatchNorm statistics."""
        if self.processes.is_alone:
            return
        options = inspect.signature(DistributedDataParallel.__init__).parameters
        leave_buffers = 'forward_sync_buffers' if 'forward_sync_buffers' in options else 'broadcast_buffers'
        is_cuda = self.device.type == 'cuda'
        # Looking for unused parameters keeps the summation order of the first step. Otherwise the order changes after
        # it, and the last bits of a resumed run differ. On GPUs it would cost time and not help.
        self.task.prepare_distributed(
            device_ids=[self.device.index] if is_cuda else None, find_unused_parameters=not is_cuda,
            **{leave_buffers: False})

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The model, and its average if there is one."""
        return dict(model=self.model, **({'ema': self.ema} if self.ema is not None else {}))

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the parts of the loss that are reported."""
        return getattr(self.task, 'terms', ())

    @property
    def division(self) -> Division:
        return Division(
            self.processes.world_size, self.device_batch, self.accumulation, self.train_loader.sampler is None,
            self.config.workers)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings for a checkpoint, with the absolute folder of the data."""
        config = self.config
        return dict(config.to_dict(), data=os.path.abspath(config.data) if config.data else '')

    def describe(self) -> dict[str, Any]:
        """Facts derived from the settings, for environment.json."""
        config = self.config
        return dict(
            asdict(self.division), model=config.model, parameters=sum(p.numel() for p in self.model.parameters()),
            train_images=len(self.train_set), val_images=len(self.val_set) if self.val_set is not None else 0,
            device=str(self.device), batch_size=config.batch_size, epochs=self.epochs,
            steps_per_epoch=self.train_loader.steps, lr=config.lr, **self.list_facts())

    def resume_state(self) -> dict[str, Any]:
        """State of optimizer and scaler, which a resumed run needs besides the weights."""
        scaler = self.stepper.scaler
        return dict(
            optimizer=self.stepper.optimizer.state_dict(), steps=self.stepper.steps, skipped=self.stepper.skipped,
            scaler=scaler.state_dict() if scaler is not None else None)

    def load_state(self, weights: dict[str, Any], averaged: dict[str, Any] | None, meta: dict[str, Any]) -> None:
        """Load the weights and the `resume_state` of a checkpoint of the same run."""
        self.model.load_state_dict(weights)
        if self.ema is not None:
            self.ema.load_state_dict(averaged)
        self.stepper.optimizer.load_state_dict(meta['optimizer'])
        self.stepper.steps, self.stepper.skipped = meta['steps'], meta['skipped']
        if self.stepper.scaler is not None:
            self.stepper.scaler.load_state_dict(meta['scaler'])
        if self.config.step_schedule:
            self.schedule.step_update(self.stepper.steps)
