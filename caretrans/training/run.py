"""A training run: epochs, evaluation and checkpoints, from a config to a run folder."""
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn

from ..checkpoint.load import read_checkpoint
from ..config import RunConfig
from ..devices import resolve_device
from ..distributed import Processes, find_processes, join_processes, leave_processes, shared_errors
from ..errors import CheckpointError, ConfigError, EvaluationError, Preempted, TrainingError, list_names
from ..evaluation.metrics import list_non_finite
from ..progress import Progress
from .failures import explain_failures
from .classification import ClassificationTrainer
from .folder import RunFolder, find_run, list_checkpoints
from .state import (
    Division, EpochRow, Evaluation, TrainScores, TrainState, describe_world_change, gather_train_state,
    restore_train_state)
from .steps import Step, train_steps
from .trainer import Trainer

__all__ = ['TrainResult', 'run_training', 'train']

MOST_WAITING = 0.1  # largest share of the time that the device may wait for data without a warning
SETTLED, SETTLED_EARLY = 10, 50  # steps after which that share is meaningful, at the end of an epoch and before


@dataclass(frozen=True)
class TrainResult:
    """Folder of a finished run, with its last and its best row of summary.csv, on the primary process only.

    Attributes:
        best_score, score_title: See `Trainer`.
    """

    folder: Path
    last: EpochRow | None = None
    best: EpochRow | None = None
    best_score: str = ''
    score_title: str = ''


class StopRequest:
    """Whether SIGTERM was received, which preemption, time limits and shut-downs send."""

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


def summarise(row: EpochRow, trainer: Trainer) -> str:
    """One readable line about an epoch."""
    is_tested = any(value is not None for value in row.scores.values())
    return (f'epoch {row.epoch}/{trainer.epochs}  loss {row.train_loss:.3f}'
            f'{f"  {trainer.describe_scores(row)}" if is_tested else ""}  lr {row.lr:.2e}  {row.images_per_s:.0f} '
            f'images/s  {row.seconds:.0f} s')


class Run:
    """The epochs of a run, from its train state to the end.

    Args:
        folder: Run folder, on the primary process only.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder | None, state: TrainState, stop: StopRequest) -> None:
        self.trainer, self.folder, self.state, self.stop = trainer, folder, state, stop
        self.config, self.processes = trainer.config, trainer.processes
        self.steps = trainer.train_loader.steps
        total = trainer.epochs * self.steps * self.config.batch_size
        self.progress = Progress(total) if folder is not None else None
        self.warned = False
        if self.progress is not None:
            self.progress.skip((state.epoch * self.steps + state.step) * self.config.batch_size)

    def say(self, line: str) -> None:
        if self.progress is not None:
            self.progress.write(line)

    def finish_epochs(self) -> None:
        """Train until the last epoch is finished.

        Raises:
            Preempted: The run was asked to stop.
            TrainingError: Training cannot continue.
        """
        with explain_failures(self.trainer, self.folder):
            while self.state.epoch < self.trainer.epochs:
                if self.progress is not None:
                    self.progress.describe(f'epoch {self.state.epoch + 1}/{self.trainer.epochs}')
                if self.state.trained is None:
                    self._train()
                self._end_epoch(self._evaluate())

    # Training

    def _train(self) -> None:
        trainer, state = self.trainer, self.state
        trainer.begin_epoch(state.epoch)
        first, waited = state.step, trainer.train_loader.waited
        start = time.perf_counter()
        steps = train_steps(
            trainer.task, trainer.run_passes(state.epoch, state.step), trainer.stepper, self.config.amp,
            self.processes, self.stop)
        for step in steps:
            if not step.skipped:
                trainer.task.update_ema(step=trainer.stepper.steps)
            now = time.perf_counter()
            state.seconds, start = state.seconds + now - start, now
            if state.step > first:  # the first batch waits until the workers have started
                state.waited += trainer.train_loader.waited - waited
            waited = trainer.train_loader.waited
            self._count(step)
            saved = self.config.save_steps and trainer.stepper.steps % self.config.save_steps == 0
            if (saved or step.stop) and state.step < self.steps:
                self._save_step()
                start = time.perf_counter()
            if step.stop:
                self._leave(save=state.step == self.steps)
        self._sum_up()

    def _count(self, step: Step) -> None:
        state = self.state
        state.step, state.lr = step.number + 1, step.lr
        state.images += step.images
        if not step.skipped:
            state.counted += step.images
            state.loss_total += step.loss * step.images
            totals = state.term_totals or [0.] * len(step.terms)
            state.term_totals = [total + term * step.images for total, term in zip(totals, step.terms, strict=True)]
        if self.trainer.train_loader.unreadable:
            state.unreadable = _join([state.unreadable, self.trainer.train_loader.unreadable])
            self.trainer.train_loader.unreadable.clear()
        if step.skipped:
            self.say(f'step {self.trainer.stepper.steps - 1} was skipped: loss {step.loss}, gradient norm '
                     f'{step.grad_norm:.3g} ({self.trainer.stepper.skipped} of {self.config.max_skips})')
        if self.progress is not None:
            self.progress.update(
                self.config.batch_size, loss=state.loss_total / max(state.counted, 1), lr=step.lr,
                grad_norm=step.grad_norm)
        self._check_unreadable(state.unreadable)
        if state.step >= SETTLED_EARLY:
            self._check_waiting(state.waited / state.seconds)

    def _sum_up(self) -> None:
        """Combine the figures of the processes and average their BatchNorm statistics."""
        state = self.state
        totals = state.term_totals or [0.] * len(self.trainer.terms)
        images, counted, loss, *terms = self.processes.total([state.images, state.counted, state.loss_total, *totals])
        seconds, waited = self.processes.largest([state.seconds, state.waited])
        found = _join(self.processes.gather(state.unreadable))
        state.trained = TrainScores(
            loss=loss / max(counted, 1), lr=state.lr, seconds=seconds, images_per_s=images / seconds,
            data_wait=waited / seconds,
            terms={name: term / max(counted, 1) for name, term in zip(self.trainer.terms, terms, strict=True)})
        self.trainer.check_terms(state.epoch + 1, state.trained.terms)
        if found and self.folder is not None:
            file = self.folder.list_images(found, f'unreadable-epoch-{state.epoch + 1}.txt')
            self.say(f'{len(found)} of {len(self.trainer.train_set)} training images could not be read and were '
                     f'replaced by others: {list_names((name for name, _ in found), 5)}; listed in {file}')
        self._check_unreadable(found, shared=True)
        if self.steps >= SETTLED:
            self._check_waiting(state.trained.data_wait)
        if not self.processes.is_alone:
            for module in self.trainer.modules.values():
                distribute_bn(module, self.processes.world_size, reduce=True)

    def _check_unreadable(self, found: list[tuple[str, str]], shared: bool = False) -> None:
        """Stop if too many were found, by this process or (`shared`) by all."""
        images = len(self.trainer.train_set)
        if len(found) > self.config.max_unreadable * images:
            name, reason = found[0]
            raise TrainingError(
                f'{len(found)} of {images} training images cannot be read, more than max_unreadable='
                f'{self.config.max_unreadable:g}: fix the data, or raise it. The first is {name} ({reason}).', shared)

    def _check_waiting(self, share: float) -> None:
        if share > MOST_WAITING and not self.warned:
            self.warned = True
            self.say(
                f'The device waited for data {100 * share:.0f} % of the time: use more --workers than '
                f'{self.config.workers} if there are cores, {self.trainer.loading_remedy}.')

    # Evaluation

    def _evaluate(self) -> Evaluation:
        """The validation scores, each None in an epoch without validation."""
        epoch, trainer = self.state.epoch + 1, self.trainer
        if trainer.val_set is None or epoch % self.config.val_interval and epoch != trainer.epochs:
            return Evaluation(trainer.empty_scores())

        alone = self.processes.is_alone
        if not alone or trainer.saves_before_evaluation:  # together: later each process may have to leave by itself
            self._save_step()

        def check(_: int) -> None:
            if self.stop():
                self._leave(save=alone)

        try:
            found = trainer.evaluate(check)
        except EvaluationError as error:
            raise TrainingError(
                f'{error} These are {"the averaged weights" if trainer.ema is not None else "the weights"} after epoch '
                f'{epoch}; start a run with other settings, such as a lower rate.', is_shared=True,
                has_remedy=True) from error
        if found.unreadable:
            self.say(f'{len(found.unreadable)} of {len(trainer.val_set)} validation images could not be read and '
                     f'are skipped: {list_names((name for name, _ in found.unreadable), 5)}')
        return found

    def _end_epoch(self, found: Evaluation) -> None:
        trained = self.state.trained
        row = EpochRow(
            epoch=self.state.epoch + 1, train_loss=trained.loss,
            terms={f'train_{name}': term for name, term in trained.terms.items()}, scores=found.scores,
            lr=trained.lr, images_per_s=trained.images_per_s, seconds=trained.seconds + found.seconds,
            data_wait=trained.data_wait)
        self.state = TrainState(epoch=row.epoch)
        saved = self._gather_state()
        if self.folder is not None:
            self.folder.log_epoch(row, self.trainer.write_checkpoint, saved)
        self.say(summarise(row, self.trainer))
        if any(self.processes.largest([self.stop()])) and row.epoch < self.trainer.epochs:
            self._leave(save=False)

    # Checkpoints

    def _gather_state(self) -> dict[str, Any]:
        broken = [f'{part}: {key}' if part != 'model' else key for part, module in self.trainer.modules.items()
                  for key in list_non_finite(module)]
        found = sorted({name for names in self.processes.gather(broken) for name in names})
        if found:
            raise TrainingError(
                f'{len(found)} tensors of the weights are not finite ({list_names(found, 3)}); no checkpoint was '
                f'written.', is_shared=True)
        saved = gather_train_state(self.state, self.trainer.modules, self.processes)
        return dict(self.trainer.resume_state(), standing=saved, division=asdict(self.trainer.division))

    def _save_step(self) -> None:
        state = self._gather_state()
        if self.folder is not None:
            self.folder.save_step(self.state.epoch, self.trainer.write_checkpoint, state)

    def _leave(self, save: bool = True) -> None:
        if save:
            self._save_step()
        raise Preempted(
            f'Asked to stop (SIGTERM) in epoch {self.state.epoch + 1} after step {self.state.step}: '
            f'the checkpoint is written; the same command resumes from it.')


def _join(lists: Iterable[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The (name, reason) pairs of all lists, each name once; an image may also be read as a replacement of another."""
    return list({name: (name, reason) for entries in lists for name, reason in entries}.values())


def _resume(
        trainer: Trainer, candidates: list[Path], lines: list[str]) -> tuple[TrainState, dict[str, Any]]:
    """Load the newest readable checkpoint into the trainer: its train state and its entries; warnings go to `lines`."""
    problems = []
    for path in candidates:
        try:
            loaded = read_checkpoint(path, trainer.weights_entry)
            averaged = read_checkpoint(path, 'state_dict_ema').state_dict if trainer.ema is not None else None
        except CheckpointError as error:
            problems.append(str(error))
            continue
        break
    else:
        raise CheckpointError(f'No checkpoint to resume from: {" ".join(problems)} Remove them to start a new run.')
    lines.extend(f'{problem} Using the checkpoint before it: {path}.' for problem in problems)
    meta = loaded.meta
    if meta.get('class_names') != trainer.classes or meta['num_classes'] != trainer.num_classes:
        raise ConfigError(
            f'{path} was trained on {meta["num_classes"]} classes ({list_names(meta.get("class_names") or (), 3)}), '
            f'the data has {trainer.num_classes} ({list_names(trainer.classes or (), 3)}): choose another --output.')
    trainer.load_state(loaded.state_dict, averaged, meta)
    state = restore_train_state(meta['standing'], trainer.modules, trainer.processes)
    change = describe_world_change(Division(**meta['division']), trainer.division)
    lines.extend([change] if change else [])
    lines.append(f'resumes from {path}: epoch {state.epoch + 1}, step {state.step}')
    return state, meta


def _introduce(trainer: Trainer, path: Path) -> Iterator[str]:
    parameters = sum(parameter.numel() for parameter in trainer.trained.parameters())
    yield (f'{trainer.config.model} ({parameters / 1e6:.2f} M parameters{trainer.counted}) on {trainer.device}, into '
           f'{path}')
    yield from trainer.introduce()


def _check_start(config: RunConfig) -> None:
    """Refuse to fine-tune nothing."""
    if getattr(config, 'new_heads', False) and not (config.checkpoint or config.pretrained):
        raise ConfigError('new_heads: there are no weights to fine-tune: add --checkpoint FILE or --pretrained, or '
                          '--no-new-heads to train from random weights.')


def train(config: RunConfig, kind: type[Trainer] = ClassificationTrainer) -> TrainResult:
    """Train as `config` says, or resume such a run; print progress and write everything to the run folder.

    Under torchrun all processes call it; the primary one prints and writes.

    Args:
        kind: Of training, which fits the config.
    Raises:
        ConfigError, DataError, CheckpointError: Before the first step; CheckpointError also if one cannot be written.
        TrainingError: Training cannot continue; the message names the last good checkpoint.
        Preempted: SIGTERM was received and the checkpoint is written.
    """
    with shared_errors():
        _check_start(config)
    device = resolve_device(config.device, find_processes().local_rank)
    try:
        processes = join_processes(device)
        with StopRequest() as stop:
            return _train(config, kind, processes, device, stop)
    finally:
        leave_processes()


def run_training(
        name: str, config: RunConfig, kind: type[Trainer], report: Callable[[TrainResult], Iterable[str]]) -> int:
    """The body of a command that trains.

    Args:
        name: What the command is called in messages.
        config, kind: See `train`.
        report: Lines about a finished run.
    Returns:
        The exit code: 0 also after SIGTERM, 130 after Ctrl-C.
    Raises:
        CaretransError: See `train`.
    """
    is_primary = find_processes().is_primary
    try:
        result = train(config, kind)
    except Preempted as stop:
        if is_primary:
            print(stop)
        return 0
    except KeyboardInterrupt:
        if is_primary:
            print(f'{name}: stopped; the same command resumes from the last checkpoint', file=sys.stderr)
        return 130
    if is_primary:
        print('\n'.join(report(result)))
    return 0


def _train(
        config: RunConfig, kind: type[Trainer], processes: Processes, device: torch.device, stop: StopRequest,
) -> TrainResult:
    # GPUs use TF32 for float32 by default, at least in convolutions; here only if the config says so.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    kind.check(config, processes, device)
    path, candidates = processes.first(lambda: find_run(config))
    if candidates:
        vars(config).update(processes.first(lambda: kind.adopt(config, path)))
    trainer = processes.together(lambda: kind(config, processes, device))
    torch.backends.cudnn.benchmark = trainer.has_fixed_size
    folder = processes.first(lambda: RunFolder(
        path, config, trainer.describe(), not candidates, trainer.best_score, trainer.score_title), keep=True)
    trainer.distribute()  # before statistics are restored, because it copies those of the primary to all processes
    lines, state = list(_introduce(trainer, path)), TrainState()
    try:
        if candidates:
            state, meta = processes.together(lambda: _resume(trainer, candidates, lines))
            if folder is not None:
                folder.restore(meta['rows'], meta['best'])
        run = Run(trainer, folder, state, stop)
        for line in lines:
            run.say(line)
        run.finish_epochs()
        if folder is None:
            return TrainResult(path)
        folder.finish()
        return TrainResult(path, folder.rows[-1], folder.best, trainer.best_score, trainer.score_title)
    except TrainingError as error:
        last = next(iter(list_checkpoints(path)), None)
        remedy = f'Last good checkpoint: {last}' if last else 'There is no checkpoint yet'
        if not error.has_remedy:
            remedy += '; the same command resumes from it' if last else '; the same command starts again'
        raise TrainingError(f'{error} {remedy}.', error.is_shared) from error
    finally:
        trainer.train_loader.close()
        if folder is not None:
            folder.close()
