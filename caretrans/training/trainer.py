"""Data, model, loss, optimizer and schedule of a run, built from its config and checked before the first step."""
import inspect
import os
from dataclasses import asdict, replace
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.load import NOT_ARCHITECTURE, create_pretrained, load_checkpoint
from ..checkpoint.preparation import resolve_eval_config
from ..config import TrainConfig
from ..data.datasets import check_labels, list_classes, open_dataset
from ..data.loaders import build_eval_loader, build_train_loader
from ..distributed import Processes
from ..errors import CheckpointError, ConfigError, DataError, list_names
from ..evaluation.metrics import list_non_finite
from ..evaluation.metrics import check_forward
from ..kernels import describe_placements, use_kernels, why_unavailable
from ..seeds import seed_everything
from .losses import SelfDistillationTask, build_task
from .state import Division
from .steps import Stepper

__all__ = ['Trainer', 'build_mixup', 'build_model', 'build_schedule', 'check_batch', 'check_kernels', 'put_kernels']

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
        if not hasattr(model, 'set_grad_checkpointing'):
            raise ConfigError(f'{config.model} has no gradient checkpointing: omit --grad-checkpointing.')
        model.set_grad_checkpointing(True)
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
                f'(batch_size={config.batch_size}, device_batch={config.device_batch}, {world_size} process(es)): '
                f'use 2 or more per pass and process with --batch-size or --device-batch, or --img-size 64.') from None


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


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int):
    """The learning rate schedule: (scheduler, total number of epochs including cool-down)."""
    return create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=config.epochs, cooldown_epochs=config.cooldown_epochs,
        min_lr=config.min_lr, warmup_lr=config.warmup_lr, warmup_epochs=config.warmup_epochs,
        step_on_epochs=not config.step_schedule, updates_per_epoch=steps_per_epoch)


class Trainer:
    """Data, model, loss, optimizer and schedule of a run.

    Attributes:
        model: The trained weights, without wrappers.
        ema: Their average over the steps, or None.
        kernels: Which kernels run.
        task: Forward pass and loss; compiled if the config says so, and distributed after `distribute`.
        splits: For each training image size, (images per pass and process, passes per step).
    Raises:
        ConfigError, DataError, CheckpointError: The settings, the data or the checkpoint cannot work.
    """

    def __init__(self, config: TrainConfig, processes: Processes, device: torch.device) -> None:
        self.config, self.processes, self.device = config, processes, device
        seed_everything(config.seed)
        self.splits = config.split_steps(processes.world_size)
        self.device_batch, self.accumulation = self.splits[0]
        self._open_data()
        try:
            self._build()
        except (CheckpointError, ConfigError, DataError):
            raise
        except torch.OutOfMemoryError as error:
            raise ConfigError(f'The model does not fit into the memory of {self.device}: {error}') from error
        except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:  # how timm refuses a setting
            raise ConfigError(f'These settings do not work: {" ".join(str(error).split())}') from error

    def _open_data(self) -> None:
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

    def _build(self) -> None:
        config, device, processes = self.config, self.device, self.processes
        if config.sync_bn and device.type == 'cpu' and not processes.is_alone:
            raise ConfigError("sync_bn needs GPUs, PyTorch's SyncBatchNorm does not run on cpu: omit --sync-bn.")
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        model = build_model(config, self.num_classes)
        if config.sync_bn:
            model = convert_sync_batchnorm(model)
        self.model = model.to(device, memory_format=self.memory_format)
        self.kernels = put_kernels(self.model, config)  # before its average, compiled and distributed forms are made

        self.eval_config = resolve_eval_config(
            self.model, img_size=config.val_img_size or config.img_size, crop_pct=config.crop_pct,
            crop_mode=config.crop_mode, orientation=config.orientation)
        for side in {*config.list_sizes(), self.eval_config.size[0]}:
            check_forward(self.model, (3, side, side), device)
        self.train_loader = build_train_loader(
            self.train_set, config, self.eval_config, self.splits, processes, device, self.num_classes)
        if not self.train_loader.steps:
            raise DataError(f'The {len(self.train_set)} training images do not fill a batch of {config.batch_size}.')
        self.val_loader = build_eval_loader(
            self.val_set, self.eval_config, self.device_batch, config.workers, processes, device, self.num_classes)

        self.task = build_task(config, self.model, device, self.memory_format)
        self.mixup = build_mixup(config, self.num_classes)
        self.ema: nn.Module | None = None
        if config.ema:
            self.ema = self.task.setup_ema(config.ema_decay, use_warmup=config.ema_warmup).module
        if config.compile:
            self.task.compile()
            self.task.compile_ema()
        self.eval_model = self.task.get_eval_model(ema=config.ema)

        optimizer = create_optimizer_v2(self.model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
        self.schedule, self.epochs = build_schedule(config, optimizer, self.train_loader.steps)
        self.stepper = Stepper(
            optimizer, self.schedule, torch.amp.GradScaler(device.type) if config.amp == 'fp16' else None,
            clip=config.clip_grad, clip_mode=config.clip_mode,
            max_skips=config.max_skips if config.on_nan == 'skip' else 0)

    def begin_epoch(self, epoch: int) -> None:
        """Set what depends on the epoch: the learning rate, unless it changes per step, and self-distillation."""
        if not self.config.step_schedule:
            self.schedule.step(epoch)
        if isinstance(self.task, SelfDistillationTask):
            self.task.set_epoch(epoch)

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
    def division(self) -> Division:
        return Division(
            self.processes.world_size, self.device_batch, self.accumulation, self.train_loader.sampler is None,
            self.config.workers)

    def describe(self) -> dict[str, Any]:
        """Facts derived from the settings, for environment.json."""
        config = self.config
        sizes = dict(zip(config.list_sizes(), self.splits, strict=True)) if config.train_img_sizes else None
        return dict(
            asdict(self.division), model=config.model, parameters=sum(p.numel() for p in self.model.parameters()),
            train_images=len(self.train_set), val_images=len(self.val_set), num_classes=self.num_classes,
            device=str(self.device), kernels=self.kernels, batch_size=config.batch_size, size_batches=sizes,
            epochs=self.epochs, steps_per_epoch=self.train_loader.steps, lr=config.lr,
            eval_config=self.eval_config.to_dict())

    def checkpoint_meta(self) -> dict[str, Any]:
        """Everything `save_checkpoint` stores besides the weights and the resume state."""
        config = self.config
        settings = dict(config.to_dict(), data=os.path.abspath(config.data) if config.data else '')
        return dict(
            arch=config.model, model_args=config.model_args, class_names=self.classes,
            eval_config=self.eval_config.to_dict(), config=settings, ema=self.ema)

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
