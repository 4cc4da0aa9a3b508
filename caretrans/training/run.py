"""A training run from its config to its run folder: the epochs, the checkpoints, and what may go wrong."""
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn

from ..checkpoint.load import read_checkpoint
from ..config import TrainConfig
from ..data.datasets import open_dataset
from ..devices import resolve_device
from ..distributed import Processes, find_processes, join_processes, leave_processes
from ..errors import CheckpointError, ConfigError, Preempted, TrainingError, list_names
from ..evaluation.metrics import evaluate
from ..progress import Progress
from .failures import explain_failures
from .folder import RunFolder, find_run, list_checkpoints
from .state import TrainState, describe_world_change, gather_train_state, restore_train_state
from .steps import Step, train_steps
from .trainer import Trainer, check_kernels

__all__ = ['TrainResult', 'train']

MOST_WAITING = 0.1  # share of the time in which the device may wait for data
SETTLED, SETTLED_EARLY = 10, 50  # steps from which on that share says something, at the end of an epoch and before


@dataclass(frozen=True)
class TrainResult:
    """Where a run was written and how it ended: its rows of summary.csv, the last and the best."""

    folder: Path
    last: dict[str, float]
    best: dict[str, float]


class StopRequest:
    """Whether SIGTERM came: what preemption, time limits and shut-downs send."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> 'StopRequest':
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: Any) -> None:
        self.came = True

    def __call__(self) -> bool:
        return self.came


def summarise(row: dict[str, Any], epochs: int) -> str:
    """One line for people about an epoch."""
    tested = '' if row['val_top1'] is None else \
        f'  val loss {row["val_loss"]:.3f}  top-1 {row["val_top1"]:.1f} %  top-5 {row["val_top5"]:.1f} %'
    return (f'epoch {row["epoch"]}/{epochs}  loss {row["train_loss"]:.3f}{tested}  lr {row["lr"]:.2e}'
            f'  {row["images_per_s"]:.0f} images/s  {row["seconds"]:.0f} s')


class Run:
    """The epochs of a run, from where it stands to its end.

    Args:
        folder: Of the run, on the primary process alone.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder | None, standing: TrainState, stop: StopRequest) -> None:
        self.trainer, self.folder, self.standing, self.stop = trainer, folder, standing, stop
        self.config, self.processes = trainer.config, trainer.processes
        self.steps = trainer.train_loader.steps
        total = trainer.epochs * self.steps * self.config.batch_size
        self.progress = Progress(total) if folder is not None else None
        self.warned = False
        if self.progress is not None:
            self.progress.skip((standing.epoch * self.steps + standing.step) * self.config.batch_size)

    def say(self, line: str) -> None:
        if self.progress is not None:
            self.progress.write(line)

    def finish_epochs(self) -> None:
        """Train until the last epoch is done.

        Raises:
            Preempted: The run was asked to stop.
            TrainingError: It cannot go on.
        """
        with explain_failures(self.trainer, self.folder):
            while self.standing.epoch < self.trainer.epochs:
                if self.progress is not None:
                    self.progress.describe(f'epoch {self.standing.epoch + 1}/{self.trainer.epochs}')
                if self.standing.trained is None:
                    self._train()
                self._end_epoch(self._evaluate())

    # Training half of an epoch

    def _train(self) -> None:
        trainer, standing = self.trainer, self.standing
        trainer.begin_epoch(standing.epoch)
        first, waited = standing.step, trainer.train_loader.waited
        start = time.perf_counter()
        steps = train_steps(
            trainer.task, trainer.train_loader.run(standing.epoch, standing.step), trainer.stepper, self.config.amp,
            trainer.mixup, trainer.memory_format, self.processes, self.stop)
        for step in steps:
            if not step.skipped:
                trainer.task.update_ema(step=trainer.stepper.steps)
            now = time.perf_counter()
            standing.seconds, start = standing.seconds + now - start, now
            if standing.step > first:  # the first batch waits for the workers to start
                standing.waited += trainer.train_loader.waited - waited
            waited = trainer.train_loader.waited
            self._count(step)
            saved = self.config.save_steps and trainer.stepper.steps % self.config.save_steps == 0
            if (saved or step.stop) and standing.step < self.steps:
                self._save_step()
                start = time.perf_counter()
            if step.stop:
                self._leave(save=standing.step == self.steps)
        self._sum_up()

    def _count(self, step: Step) -> None:
        standing = self.standing
        standing.step, standing.lr = step.number + 1, step.lr
        standing.images += step.images
        if not step.skipped:
            standing.counted += step.images
            standing.loss_total += step.loss * step.images
        if self.trainer.train_loader.unreadable:
            standing.unreadable = _join([standing.unreadable, self.trainer.train_loader.unreadable])
            self.trainer.train_loader.unreadable.clear()
        if step.skipped:
            self.say(f'step {self.trainer.stepper.steps - 1} was left out: loss {step.loss}, gradient norm '
                     f'{step.grad_norm:.3g} ({self.trainer.stepper.skipped} of {self.config.max_skips})')
        if self.progress is not None:
            self.progress.update(
                self.config.batch_size, loss=standing.loss_total / max(standing.counted, 1), lr=step.lr,
                grad_norm=step.grad_norm)
        self._check_unreadable(standing.unreadable)
        if standing.step >= SETTLED_EARLY:
            self._check_waiting(standing.waited / standing.seconds)

    def _sum_up(self) -> None:
        """Put together what the processes saw; average the statistics of BatchNorm over them."""
        standing = self.standing
        images, counted, loss = self.processes.total([standing.images, standing.counted, standing.loss_total])
        seconds, waited = self.processes.largest([standing.seconds, standing.waited])
        found = _join(self.processes.gather(standing.unreadable))
        standing.trained = dict(
            loss=loss / max(counted, 1), lr=standing.lr, seconds=seconds, images_per_s=images / seconds,
            data_wait=waited / seconds)
        if found and self.folder is not None:
            file = self.folder.list_images(found, f'unreadable-epoch-{standing.epoch + 1}.txt')
            self.say(f'{len(found)} of {len(self.trainer.train_set)} training images could not be read, others took '
                     f'their place: {list_names((name for name, _ in found), 5)}; listed in {file}')
        self._check_unreadable(found, shared=True)
        if self.steps >= SETTLED:
            self._check_waiting(standing.trained['data_wait'])
        if not self.processes.is_alone:
            for module in self.trainer.modules.values():
                distribute_bn(module, self.processes.world_size, reduce=True)

    def _check_unreadable(self, found: list[tuple[str, str]], shared: bool = False) -> None:
        """Stop when those found, by this process or by all, are too many."""
        images = len(self.trainer.train_set)
        if len(found) > self.config.max_unreadable * images:
            name, reason = found[0]
            raise TrainingError(
                f'{len(found)} of {images} training images cannot be read, more than max_unreadable='
                f'{self.config.max_unreadable:g}: mend the data, or raise it. The first is {name} ({reason}).', shared)

    def _check_waiting(self, share: float) -> None:
        if share > MOST_WAITING and not self.warned:
            self.warned = True
            self.say(describe_waiting(share, self.config))

    # Evaluation half of an epoch

    def _evaluate(self) -> dict[str, float]:
        epoch, trainer = self.standing.epoch + 1, self.trainer
        if epoch % self.config.val_interval and epoch != trainer.epochs:
            return {}

        alone = self.processes.is_alone
        if not alone:  # now, while all are here: in the middle of an evaluation each may have to leave by itself
            self._save_step()

        def check(_: int) -> None:
            if self.stop():
                self._leave(save=alone)

        result = evaluate(
            trainer.eval_model, trainer.val_loader, trainer.device, self.config.amp, check, self.processes,
            trainer.num_classes)
        trainer.val_loader.unreadable.clear()
        if result['unreadable']:
            self.say(f'{len(result["unreadable"])} of {len(trainer.val_set)} validation images could not be read and '
                     f'are left out: {list_names((name for name, _ in result["unreadable"]), 5)}')
        return result

    def _end_epoch(self, tested: dict[str, float]) -> None:
        standing, trained = self.standing, self.standing.trained
        row = dict(
            epoch=standing.epoch + 1, train_loss=trained['loss'], val_loss=tested.get('loss'),
            val_top1=tested.get('top1'), val_top5=tested.get('top5'), lr=trained['lr'],
            images_per_s=trained['images_per_s'], seconds=trained['seconds'] + tested.get('seconds', 0.),
            data_wait=trained['data_wait'])
        standing.begin_epoch(standing.epoch + 1)
        state = self._gather_state()
        if self.folder is not None:
            meta = dict(self.trainer.checkpoint_meta(), epoch=standing.epoch)
            self.folder.log_epoch(row, self.trainer.model, state, **meta)
        self.say(summarise(row, self.trainer.epochs))
        if any(self.processes.largest([self.stop()])) and standing.epoch < self.trainer.epochs:
            self._leave(save=False)

    # Checkpoints

    def _gather_state(self) -> dict[str, Any]:
        for name, value in self.trainer.model.named_parameters():
            if not torch.isfinite(value).all():
                raise TrainingError(f'The weight {name} is not finite, so no checkpoint was written.')
        standing = gather_train_state(self.standing, self.trainer.modules, self.processes)
        facts = {key: value for key, value in self.trainer.describe().items() if key in DIVISION}
        return dict(self.trainer.resume_state(), standing=standing, division=facts)

    def _save_step(self) -> None:
        state = self._gather_state()
        if self.folder is not None:
            rows = self.folder.rows
            metrics = {k: v for k, v in rows[-1].items() if v is not None} if rows else {}
            self.folder.save_step(
                self.trainer.model, state, epoch=self.standing.epoch, metrics=metrics, **self.trainer.checkpoint_meta())

    def _leave(self, save: bool = True) -> None:
        if save:
            self._save_step()
        raise Preempted(
            f'Asked to stop (SIGTERM) in epoch {self.standing.epoch + 1} after step {self.standing.step}: '
            f'the checkpoint is written, the same command goes on from it.')


DIVISION = ('world_size', 'device_batch', 'accumulation', 'streams', 'workers')


def _join(lists: Iterable[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The (name, reason) of all lists, each name once: an image may be met as itself and in place of another."""
    return list({name: (name, reason) for entries in lists for name, reason in entries}.values())


def describe_waiting(share: float, config: TrainConfig) -> str:
    """What to change when the device waits for data."""
    return (f'The device waited for data {100 * share:.0f} % of the time: take more --workers than {config.workers} if '
            f'there are cores, put the data on a local disk or into shards (python -m caretrans shard), or take a '
            f'lighter --auto-augment.')


def _resume(trainer: Trainer, candidates: list[Path], warn: Any) -> tuple[TrainState, dict[str, Any], Path]:
    """Load the newest checkpoint that can be read into the trainer: where the run stands, what it says, its path."""
    problems = []
    for path in candidates:
        try:
            loaded = read_checkpoint(path, 'state_dict')
            averaged = read_checkpoint(path, 'state_dict_ema').state_dict if trainer.ema is not None else None
        except CheckpointError as error:
            problems.append(str(error))
            continue
        break
    else:
        raise CheckpointError(f'No checkpoint to go on from: {" ".join(problems)} Remove them to begin anew.')
    for problem in problems:
        warn(f'{problem} The one before it is taken: {path}.')
    meta = loaded.meta
    if meta.get('class_names') != trainer.classes or meta['num_classes'] != trainer.num_classes:
        raise ConfigError(
            f'{path} was trained on {meta["num_classes"]} classes ({list_names(meta.get("class_names") or (), 3)}), '
            f'the data have {trainer.num_classes} ({list_names(trainer.classes or (), 3)}): give another --output.')
    trainer.load_state(loaded.state_dict, averaged, meta)
    standing = restore_train_state(meta['standing'], trainer.modules, trainer.processes)
    after = {key: value for key, value in trainer.describe().items() if key in DIVISION}
    change = describe_world_change(meta['division'], after)
    if change:
        warn(change)
    return standing, meta, path


def _introduce(trainer: Trainer, path: Path) -> Iterator[str]:
    facts, config = trainer.describe(), trainer.config
    yield f'{config.model} ({facts["parameters"] / 1e6:.2f} M parameters) on {trainer.device}, into {path}'
    yield f'{facts["train_images"]} training, {facts["val_images"]} validation images, {trainer.num_classes} classes'
    devices = '' if trainer.processes.is_alone else f' x {trainer.processes.world_size} processes'
    for size, (images, passes) in zip(config.list_sizes(), trainer.splits, strict=True):
        at_size = f' at {size} px' if config.train_img_sizes else ''
        yield (f'batch of {config.batch_size}{at_size} = {images} images x {passes} forward pass(es){devices}, '
               f'{facts["steps_per_epoch"]} steps per epoch, {trainer.epochs} epochs, rate up to {config.lr:g}')
        if config.device_batch and images < config.device_batch and not at_size:
            yield f'BatchNorm sees {images} images at a time here, {config.device_batch} with device_batch'
    if config.kernels:
        yield f'kernels: {trainer.kernels}'
    if config.teacher != 'none':
        yield f'teacher {config.teacher}, {1 - config.task_weight:g} of the loss'
    if config.mesa:
        yield f'self-distillation from epoch {config.mesa_epoch + 1} on, weight {config.mesa:g}'


@contextmanager
def _joined(config: TrainConfig) -> Iterator[tuple[Processes, torch.device]]:
    device = resolve_device(config.device, find_processes().local_rank)
    try:
        yield join_processes(device), device
    finally:
        leave_processes()


def _set_precision(config: TrainConfig) -> None:
    """TF32 is what a GPU does with float32 by default, in convolutions at least; here it is asked for."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    torch.backends.cudnn.benchmark = not config.train_img_sizes


def _download(config: TrainConfig) -> None:
    for split in (config.train_split, config.val_split):
        open_dataset(config.data, split, config.dataset, download=True)


def train(config: TrainConfig) -> TrainResult:
    """Train as `config` says, print progress, and leave everything in the run folder; or go on with such a run.

    Under torchrun all processes call it; the first one prints and writes.

    Raises:
        ConfigError, DataError, CheckpointError: Before the first step; CheckpointError too when one cannot be written.
        TrainingError: Training cannot go on; names the last good checkpoint.
        Preempted: SIGTERM came; the checkpoint is written.
    """
    with _joined(config) as (processes, device), StopRequest() as stop:
        _set_precision(config)
        check_kernels(config, device)
        if config.dataset_download:  # once on each machine
            processes.together(lambda: _download(config) if processes.local_rank == 0 else None)
        path, candidates = processes.first(lambda: find_run(config))
        trainer = processes.together(lambda: Trainer(config, processes, device))
        folder = processes.first(
            lambda: RunFolder(path, config, trainer.describe(), is_new=not candidates), keep=True)
        trainer.distribute()  # before statistics are restored: it gives all processes those of the first
        lines = list(_introduce(trainer, path))
        standing = TrainState()
        try:
            if candidates:
                standing, meta, file = processes.together(lambda: _resume(trainer, candidates, lines.append))
                lines.append(f'goes on from {file}: epoch {standing.epoch + 1}, step {standing.step}')
                if folder is not None:
                    folder.restore(meta['rows'], meta['best'])
            run = Run(trainer, folder, standing, stop)
            for line in lines:
                run.say(line)
            run.finish_epochs()
            if folder is not None:
                folder.finish()
                return TrainResult(path, folder.rows[-1], folder.best)
            return TrainResult(path, {}, {})
        except TrainingError as error:
            last = next(iter(list_checkpoints(path)), None)
            how = f'Last good checkpoint: {last}; the same command goes on from it.' if last else \
                'There is no checkpoint yet; the same command begins anew.'
            raise TrainingError(f'{error} {how}', error.is_shared) from error
        finally:
            trainer.train_loader.close()
            if folder is not None:
                folder.close()
