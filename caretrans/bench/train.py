"""Images per second and memory of training steps, as published and in faster modes, interleaved.

A step is that of a run (`training.steps.train_steps`): mixup or CutMix, forward pass, loss, backward pass, norm of the
gradient, AdamW. Its images are random and lie on the device, so that no loader is measured. There is no stochastic
depth, so that the first step of every mode can be compared with float64.
"""
import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2

from ..config import TrainConfig, read_recipe
from ..data.loaders import Pass
from ..devices import describe_device, list_versions
from ..errors import ConfigError, TrainingError
from ..kernels import why_unavailable
from ..measure.sample_network import randomize
from ..measure.tables import format_table
from ..measure.timing import (
    compare_rounds, free_memory, is_out_of_memory, measure_peak, time_block, time_interleaved)
from ..seeds import seed_everything
from ..training.losses import build_task
from ..training.steps import Step, Stepper, mix_passes, train_steps
from ..training.classification import build_mixup, build_model, put_kernels
from .device_rates import allow_tf32
from .record import Record, shorten

__all__ = [
    'PUBLISHED', 'TOLERANCES', 'Mode', 'TrainingBench', 'bench_training', 'describe_training', 'has_second_head',
    'list_modes', 'parse_mode', 'training_precision']

CHANGES = ('tf32', 'channels_last', 'bf16', 'fp16', 'compile', 'kernels')
PUBLISHED = 'published'
AGAIN = f'{PUBLISHED} again'  # the reference is timed twice
RECIPE = 'care_s0_imagenet'
NUM_CLASSES = 1000
STATISTICS_IMAGES = 8  # images from which BatchNorm takes its statistics
ATTEMPTS = 17  # at a first step: from the loss scale of 2 ** 16 with which float16 begins down to 1
# Largest error of the first step against float64: of the loss, relative to it, and of the gradient, of the norm of the
# difference relative to the norm.
TOLERANCES = {'float32': 2e-4, 'tf32': 5e-2, 'float16': 5e-2, 'bfloat16': 0.2}

_logger = logging.getLogger(__name__)


# Modes ----------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Mode:
    """Mode of a training step: a set of `CHANGES` to the published mode (float32, eager, NCHW).

    They change its speed, not its mathematics.
    """
    changes: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return '+'.join(change for change in CHANGES if change in self.changes) or PUBLISHED

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of a `TrainConfig`."""
        amp = next(iter(self.changes & {'bf16', 'fp16'}), 'off')
        switches = ('tf32', 'channels_last', 'compile', 'kernels')
        return dict(amp=amp, **{name: name in self.changes for name in switches})

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if 'channels_last' in self.changes else torch.contiguous_format

    @property
    def dtype(self) -> str:
        """Number format of matmuls, as records name it."""
        names = {'bf16': 'bfloat16', 'fp16': 'float16', 'tf32': 'tf32'}
        return next((names[change] for change in names if change in self.changes), 'float32')


def parse_mode(name: str, device: torch.device) -> Mode:
    """Parse the name of a mode: 'published', or changes joined by '+', e.g. 'channels_last+bf16+compile'.

    Raises:
        ConfigError: An unknown change, two precisions, or a change that does not work on this device.
    """
    changes = frozenset() if name == PUBLISHED else frozenset(name.split('+'))
    if changes - set(CHANGES):
        raise ConfigError(
            f'No training mode {name!r}: choose {PUBLISHED}, or some of {", ".join(CHANGES)} joined by +.')
    if {'bf16', 'fp16'} <= changes:
        raise ConfigError(f'{name!r} has two precisions: choose bf16 or fp16.')
    absent = [change for change in ('tf32', 'fp16') if change in changes]
    if device.type != 'cuda' and absent:
        raise ConfigError(f'{name!r}: {", ".join(absent)} needs a GPU, the device is {device}: remove it.')
    reason = why_unavailable(device) if 'kernels' in changes else ''
    if reason:
        raise ConfigError(f'{name!r}: {reason}: remove kernels.')
    return Mode(changes)


def list_modes(device: torch.device) -> tuple[str, ...]:
    """The published mode, each change alone, and useful combinations."""
    alone = ('channels_last', 'bf16', 'compile')
    if device.type != 'cuda':
        return (PUBLISHED, *alone, 'channels_last+compile', 'channels_last+bf16+compile')
    kernels = () if why_unavailable(device) else ('kernels',)
    together = ('channels_last+bf16', 'channels_last+bf16+compile')
    return (PUBLISHED, 'tf32', *alone, *kernels, *together, *(f'{mode}+kernels' for mode in together if kernels))


def has_second_head(model: nn.Module) -> bool:
    """True if a model can learn from a teacher."""
    return hasattr(model, 'set_distilled_training') and getattr(model, 'distilled', True)


@contextmanager
def training_precision(mode: Mode) -> Iterator[None]:
    """TF32 as set by the mode, and cuDNN's search for the fastest convolutions, which training uses in every mode."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with allow_tf32('tf32' in mode.changes):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


# One mode -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainingBench:
    """Settings of a training bench.

    Attributes:
        model: Any model of timm or caretrans.
        teacher: Any model, with random weights, on which its time does not depend; 'none' for plain labels.
        batch: Images per step.
        img_size: Their side, pixels.
        block_seconds: Least time of a mode in a round.
        model_args: Further arguments of the model.
    """
    model: str = 'care_s0'
    teacher: str = 'none'
    batch: int = 128
    img_size: int = 224
    device: torch.device = torch.device('cpu')
    rounds: int = 7
    warmup: int = 3
    block_seconds: float = 0.5
    model_args: tuple[tuple[str, Any], ...] = ()

    def configure(self, mode: Mode) -> TrainConfig:
        """The recipe of the paper without stochastic depth, and with a rate so low that the weights hardly move."""
        return TrainConfig(**{
            **read_recipe(RECIPE), 'model': self.model, 'model_args': dict(self.model_args), 'teacher': self.teacher,
            'batch_size': self.batch, 'device_batch': None, 'img_size': self.img_size, 'drop_path': 0., 'lr': 1e-6,
            'min_lr': 1e-6, 'workers': 0, **mode.settings})

    def make_record(self, mode: Mode) -> Record:
        """The record of a mode before it is measured."""
        changes = mode.changes
        return Record(
            model=self.model, bench='train', way=mode.name, teacher=self.teacher,
            backend='compile' if 'compile' in changes else 'eager', device=describe_device(self.device),
            dtype=mode.dtype, layout='channels_last' if 'channels_last' in changes else 'nchw',
            kernels='triton' if 'kernels' in changes else 'torch', threads=torch.get_num_threads(), batch=self.batch,
            height=self.img_size, width=self.img_size, warmup=self.warmup, runs=0, versions=list_versions())


@dataclass(frozen=True)
class Subject:
    """Network, teacher, images and labels that all modes train with, on the CPU, with random sample weights."""
    model: nn.Module
    teacher: nn.Module | None
    images: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def make(cls, bench: TrainingBench) -> 'Subject':
        config = bench.configure(Mode())
        seed_everything(config.seed)
        images = torch.randn(bench.batch, 3, bench.img_size, bench.img_size)
        model = randomize(build_model(config, NUM_CLASSES).eval(), images[:STATISTICS_IMAGES])
        teacher = None
        if bench.teacher != 'none':
            if not timm.is_model(bench.teacher):
                raise ConfigError(
                    f'No teacher {bench.teacher!r}: name a model of timm, regnety_160 in the paper, or none.')
            teacher = timm.create_model(bench.teacher, num_classes=NUM_CLASSES).eval()
            teacher = randomize(teacher, images[:STATISTICS_IMAGES]).requires_grad_(False)
        return cls(model, teacher, images, torch.randint(NUM_CLASSES, (bench.batch,)))


class First(NamedTuple):
    """Loss of a first step, and the gradient of each parameter that has one, up to a factor."""
    loss: float
    gradient: dict[str, torch.Tensor]


class Candidate:
    """A mode of training, ready: each call makes one step.

    Args:
        dtype: Number format of weights and images.
    """

    def __init__(
            self, bench: TrainingBench, subject: Subject, mode: Mode, dtype: torch.dtype = torch.float32) -> None:
        self.mode, device, config = mode, bench.device, bench.configure(mode)
        model = copy.deepcopy(subject.model).to(device, dtype, memory_format=mode.memory_format)
        teacher = None if subject.teacher is None else copy.deepcopy(subject.teacher).to(dtype)
        put_kernels(model, config)
        task = build_task(config, model, device, mode.memory_format, teacher)
        if config.compile:
            task.compile()
        self.stepper = Stepper(
            create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay),
            scaler=torch.amp.GradScaler(device.type) if config.amp == 'fp16' else None)
        self.images, targets, self.seed = subject.images.to(device, dtype), subject.targets.to(device), config.seed
        self.parameters = dict(model.named_parameters())
        self.tensors = [*task.parameters(), *task.buffers(), self.images]
        passes = (Pass(self.images.clone(), targets, number) for number in count())  # mixup writes into its input
        passes = mix_passes(passes, build_mixup(config, NUM_CLASSES), mode.memory_format)
        self.steps = train_steps(task, passes, self.stepper, config.amp)

    def __call__(self) -> Step:
        with training_precision(self.mode):
            return next(self.steps)

    def make_first(self) -> First:
        """The first step, with the same random numbers in all modes. Float16 skips steps that overflow and halves its
        scale of the loss.

        Raises:
            TrainingError: Every attempt overflows.
        """
        states = self.stepper.optimizer.state
        for _ in range(ATTEMPTS):
            seed_everything(self.seed)
            loss = self().loss
            if states:
                # After one step AdamW's average of the gradients is the gradient, times the same number for all.
                return First(loss, {name: states[parameter]['exp_avg'].double().cpu()
                                    for name, parameter in self.parameters.items() if parameter in states})
        raise TrainingError(f'The first step was skipped {ATTEMPTS} times: every gradient overflows.')

    @property
    def held(self) -> int:
        """Bytes kept between steps: weights, also of the teacher, averages of the optimizer, images."""
        averages = [value for state in self.stepper.optimizer.state.values() for value in state.values()
                    if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in [*self.tensors, *averages])


# Correctness ----------------------------------------------------------------------------------------------------------

def _measure_error(first: First, reference: First) -> float:
    """The larger error, of the loss or of the gradient.

    Raises:
        TrainingError: The parameters with a gradient are not the same.
    """
    shapes, wanted_shapes = ({(name, tuple(value.shape)) for name, value in step.gradient.items()}
                             for step in (first, reference))
    if shapes != wanted_shapes:
        name, shape = min(shapes ^ wanted_shapes)
        raise TrainingError(
            f'{name} {shape} has a gradient either in this mode or in the reference, but not in both.')
    wanted, got = (torch.cat([step.gradient[name].flatten() for name in reference.gradient])
                   for step in (reference, first))
    errors = (abs(first.loss / reference.loss - 1), float((got - wanted).norm() / wanted.norm()))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


# Measurement ----------------------------------------------------------------------------------------------------------

@dataclass
class Measured:
    """The record of a mode, and if it is to be timed, its candidate and the steps in a round."""
    record: Record
    candidate: Candidate | None = None
    steps: int = 0


def _prepare(bench: TrainingBench, subject: Subject, mode: Mode, reference: First, usual: float = 0.) -> Measured:
    """Build a mode, compare its first step with the reference, and warm it up; without a candidate if this fails.

    Args:
        usual: Error of the published mode, caused by rounding: very small batches have large ones. An error beyond
            its own tolerance does not excuse other modes.
    """
    record = bench.make_record(mode)
    try:
        candidate = Candidate(bench, subject, mode)
        record.error = _measure_error(candidate.make_first(), reference)
        limit = max(TOLERANCES[mode.dtype], 10 * min(usual, TOLERANCES['float32']))
        if record.error > limit:
            off = f'first step is off by {record.error:.2g}, more than {limit:g}'
            if mode.changes:
                record.notes.append(f'not timed: its {off}')
                return Measured(record)
            record.notes.append(
                f'the published mode itself is not exact: its {off}; the others are compared with float64')
        for _ in range(bench.warmup - 1):
            candidate()
        record.peak_mib = measure_peak(candidate, bench.device, candidate.held)
        steps = max(round(bench.block_seconds / sum(time_block(candidate, 1, bench.device))), 1)
        return Measured(record, candidate, steps)
    except Exception as error:  # compilers and kernels fail in many ways; the other modes are still measured
        if is_out_of_memory(error) or not mode.changes:
            raise
        _logger.warning(f'{bench.model}, {mode.name} failed: {error}')
        record.notes.append(f'not timed: {shorten(error)}')
        return Measured(record)


def _measure(bench: TrainingBench, modes: Sequence[Mode], report: Callable[[], None]) -> list[Record]:
    """The records of all modes, the published one first.

    Raises:
        RuntimeError, MemoryError: The batch does not fit.
    """
    subject = Subject.make(bench)
    torch.compiler.reset()  # PyTorch limits how often it compiles a function
    try:
        reference, precision = Candidate(bench, subject, Mode(), torch.float64).make_first(), 'float64'
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reference, precision = None, 'float32'
    free_memory()
    if reference is None:
        reference = Candidate(bench, subject, Mode()).make_first()
        free_memory()
    published = _prepare(bench, subject, modes[0], reference)
    measured = [published, *(_prepare(bench, subject, mode, reference, published.record.error) for mode in modes[1:])]
    timed = {m.record.way: m for m in measured if m.candidate is not None} | {AGAIN: published}
    times = time_interleaved(
        {name: m.candidate for name, m in timed.items()}, bench.device, {name: m.steps for name, m in timed.items()},
        bench.rounds, report=report)
    self_ratio = compare_rounds(times[PUBLISHED], times[AGAIN])['ratio']
    conditions = [f'teacher {bench.teacher} with random weights'] if bench.teacher != 'none' else []
    conditions.append(f'random images on the device, mixup or CutMix, no stochastic depth; error of loss and gradient '
                      f'of the first step against {precision}')
    for m in measured:
        if m.candidate is not None:
            m.record.add_times(times[m.record.way], times[PUBLISHED], self_ratio=self_ratio)
        m.record.notes += conditions
    return [m.record for m in measured]


def bench_training(
        bench: TrainingBench, modes: Sequence[str] | None = None, report: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Measure training modes, always including the published one, and return a record for each.

    A batch that does not fit is halved, for all modes. A mode that fails, or whose first step is wrong, is not timed;
    its record says why.

    Args:
        modes: Names for `parse_mode`; by default `list_modes`.
        report: Called after each block, for a progress bar.
    Raises:
        ConfigError: An unknown model, teacher or mode, or too little memory for two images.
    """
    names = [PUBLISHED, *(name for name in modes or list_modes(bench.device) if name != PUBLISHED)]
    chosen = [parse_mode(name, bench.device) for name in dict.fromkeys(names)]
    batch = bench.batch
    while batch >= 2:
        try:
            records = _measure(replace(bench, batch=batch), chosen, report)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__):
                raise
        else:
            if batch < bench.batch:
                for record in records:
                    record.notes.append(f'a batch of {bench.batch} did not fit: {batch}')
            return records
        free_memory()
        batch = batch // 4 * 2  # an even number, for mixup pairs images
    raise ConfigError(f'{bench.model} does not fit into the memory of {bench.device}, not even with 2 images.')


def describe_training(records: Sequence[Record]) -> str:
    """A table with a row for each mode, the fastest mode, and notes."""
    first, timed = records[0], [record for record in records if record.ratio is not None]
    rows = [[
        r.way, f'{r.images_per_s:.1f}', f'{r.median_ms:.2f} ({r.p10_ms:.2f} to {r.p90_ms:.2f})',
        f'{r.ratio:.2f} ({r.ratio_p10:.2f} to {r.ratio_p90:.2f})',
        None if r.peak_mib is None else f'{r.peak_mib:.0f}', f'{r.error:.1e}', 'noisy' if r.noisy else '']
        for r in timed]
    best = max(timed, key=lambda record: record.ratio)
    notes = dict.fromkeys(note for r in records for note in r.notes if not note.startswith(('not timed', 'noisy')))
    return '\n'.join([
        f'Training steps of {first.model}, teacher {first.teacher}, batch {first.batch} at '
        f'{first.height} x {first.width}, {first.device}, {first.threads} threads', '',
        *format_table(['mode', 'images/s', 'ms, median (p10 to p90)', 'speed-up', 'MiB', 'error', ''], rows),
        *(f'{r.way}  {r.notes[0]}' for r in records if r.ratio is None), '',
        f'fastest: {best.way}, speed-up {best.ratio:.2f} over the published mode', *notes])
