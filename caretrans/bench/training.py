"""Images per second and memory of training steps, in the published way and in faster ones, interleaved.

A step is that of a run (`engine.train_steps`): mixup or CutMix, forward pass, loss, backward pass, norm of the
gradient, AdamW. Its images are random and lie on the device, so that no loader is measured. There is no stochastic
depth, so that the first step of every way can be held against float64.
"""
import copy
import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from ..measure.sample_network import randomize
from ..measure.timing import (
    compare_rounds, is_out_of_memory, judge_noise, measure_peak, summarise, time_block, time_interleaved)
from ..seeds import seed_everything
from ..training.losses import build_task
from ..training.steps import Step, Stepper, train_steps
from ..training.trainer import build_mixup, build_model, put_kernels
from .training_ways import PUBLISHED, Way, list_ways, parse_way, training_precision

__all__ = ['TOLERANCES', 'TrainingBench', 'bench_training', 'describe_training']

ENLIVENING = 8  # images from which BatchNorm takes its statistics
RECIPE = 'care_s0_imagenet'
NUM_CLASSES = 1000
AGAIN = f'{PUBLISHED} again'  # the reference takes part twice
ATTEMPTS = 17  # at a first step: from the loss scale of 2 ** 16 with which float16 begins down to 1
# Largest error of the first step against float64: of the loss, relative to it, and of the gradient, of the norm of the
# difference relative to the norm.
TOLERANCES = {'float32': 2e-4, 'tf32': 5e-2, 'float16': 5e-2, 'bfloat16': 0.2}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingBench:
    """What is trained.

    Attributes:
        model: Any model of timm or caretrans.
        teacher: Any model, with random weights: its time does not depend on them; 'none' for plain labels.
        batch: Images per step.
        img_size: Their side, pixels.
        block_seconds: Least time of a candidate in a round.
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

    def configure(self, batch: int, way: Way) -> TrainConfig:
        """The recipe of the paper, but for stochastic depth and a rate so low that the weights hardly move."""
        return TrainConfig(**{
            **read_recipe(RECIPE), 'model': self.model, 'model_args': dict(self.model_args), 'teacher': self.teacher,
            'batch_size': batch, 'device_batch': None, 'img_size': self.img_size, 'drop_path': 0., 'lr': 1e-6,
            'min_lr': 1e-6, 'workers': 0, **way.settings})


@dataclass(frozen=True)
class Subject:
    """What all ways train, on the CPU: a network and a teacher in which every part counts, random images and labels."""
    model: nn.Module
    teacher: nn.Module | None
    images: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def make(cls, bench: TrainingBench, batch: int) -> 'Subject':
        config = bench.configure(batch, Way())
        seed_everything(config.seed)
        images = torch.randn(batch, 3, bench.img_size, bench.img_size)
        model = randomize(build_model(config, NUM_CLASSES).eval(), images[:ENLIVENING])
        teacher = None if bench.teacher == 'none' else _make_teacher(bench.teacher, images[:ENLIVENING])
        return cls(model, teacher, images, torch.randint(NUM_CLASSES, (batch,)))


def _make_teacher(name: str, images: torch.Tensor) -> nn.Module:
    if not timm.is_model(name):
        raise ConfigError(f'No teacher {name!r}: name a model of timm, regnety_160 in the paper, or none.')
    return randomize(timm.create_model(name, num_classes=NUM_CLASSES).eval(), images).requires_grad_(False)


class First(NamedTuple):
    """The loss of a first step, and its gradient by parameter that has one, up to a factor."""
    loss: float
    gradient: dict[str, torch.Tensor]


class Candidate:
    """A way of training, ready: each call makes one step.

    Args:
        dtype: Of weights and images.
    """

    def __init__(
            self, bench: TrainingBench, subject: Subject, way: Way, dtype: torch.dtype = torch.float32) -> None:
        self.way, device, batch = way, bench.device, len(subject.images)
        config = bench.configure(batch, way)
        model = copy.deepcopy(subject.model).to(device, dtype, memory_format=way.memory_format)
        teacher = None if subject.teacher is None else copy.deepcopy(subject.teacher).to(dtype)
        put_kernels(model, config)
        task = build_task(config, model, device, way.memory_format, teacher)
        if config.compile:
            task.compile()
        self.stepper = Stepper(
            create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay),
            scaler=torch.amp.GradScaler(device.type) if config.amp == 'fp16' else None)
        self.images, targets, self.seed = subject.images.to(device, dtype), subject.targets.to(device), config.seed
        self.parameters = dict(model.named_parameters())
        self.tensors = [*task.parameters(), *task.buffers(), self.images]
        passes = (Pass(self.images.clone(), targets, number) for number in count())  # mixup writes into its input
        self.steps = train_steps(
            task, passes, self.stepper, config.amp, build_mixup(config, NUM_CLASSES), way.memory_format)

    def __call__(self) -> Step:
        with training_precision(self.way):
            return next(self.steps)

    def make_first(self) -> 'First':
        """The first step that is taken, with the same random numbers in all ways: float16 leaves out those that
        overflow and halves its scale of the loss.

        Raises:
            TrainingError: Every one overflows.
        """
        states = self.stepper.optimizer.state
        for _ in range(ATTEMPTS):
            seed_everything(self.seed)
            loss = self().loss
            if states:
                # After one step AdamW's average of the gradients is the gradient, times the same number for all.
                return First(loss, {name: states[parameter]['exp_avg'].double().cpu()
                                    for name, parameter in self.parameters.items() if parameter in states})
        raise TrainingError(f'The first step was left out {ATTEMPTS} times: every gradient overflows.')

    @property
    def held(self) -> int:
        """Bytes that stay between steps: weights, of the teacher too, the optimizer's averages, the images."""
        averages = [value for state in self.stepper.optimizer.state.values() for value in state.values()
                    if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in [*self.tensors, *averages])


# Memory and correctness -----------------------------------------------------------------------------------------------

def _make_reference(bench: TrainingBench, subject: Subject) -> tuple[First, str]:
    """The first step in float64, and the name of that; in float32 where float64 does not fit."""
    try:
        return Candidate(bench, subject, Way(), torch.float64).make_first(), 'float64'
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    _release(bench.device)
    return Candidate(bench, subject, Way()).make_first(), 'float32'


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def _measure_error(first: First, reference: First) -> float:
    """Of the loss and of the gradient, the larger.

    Raises:
        TrainingError: They have not the same parameters.
    """
    shapes, wanted_shapes = ({(name, tuple(value.shape)) for name, value in step.gradient.items()}
                             for step in (first, reference))
    if shapes != wanted_shapes:
        name, shape = min(shapes ^ wanted_shapes)
        raise TrainingError(f'Not the parameters of the reference have a gradient: {name} {shape} is in one alone.')
    wanted, got = (torch.cat([step.gradient[name].flatten() for name in reference.gradient])
                   for step in (reference, first))
    errors = (abs(first.loss / reference.loss - 1), float((got - wanted).norm() / wanted.norm()))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


# Measurement ----------------------------------------------------------------------------------------------------------

@dataclass
class TrainState:
    """What is known of a way: its candidate, as long as it takes part, its error and memory, and what to say of it."""
    way: Way
    notes: list[str]
    candidate: Candidate | None = None
    error: float | None = None
    peak_mib: float | None = None
    steps: int = 0


def _prepare(bench: TrainingBench, subject: Subject, way: Way, reference: First, usual: float = 0.) -> TrainState:
    """Build a way, hold its first step against the reference, warm it up; it takes no part if it fails.

    Args:
        usual: Error of the published way, from rounding alone: very small batches have large ones. More than its
            own tolerance is no excuse for others.
    """
    standing = TrainState(way, [])
    try:
        candidate = Candidate(bench, subject, way)
        standing.error = _measure_error(candidate.make_first(), reference)
        limit = max(TOLERANCES[way.dtype], 10 * min(usual, TOLERANCES['float32']))
        if standing.error > limit:
            off = f'first step is off by {standing.error:.2g}, more than {limit:g}'
            if way.changes:
                standing.notes.append(f'not timed: its {off}')
                return standing
            standing.notes.append(f'the published way is not exact itself: its {off}; others are held against float64')
        for _ in range(bench.warmup - 1):
            candidate()
        standing.peak_mib = measure_peak(candidate, bench.device, candidate.held)
        standing.steps = max(round(bench.block_seconds / sum(time_block(candidate, 1, bench.device))), 1)
        standing.candidate = candidate
    except Exception as error:  # compilers and kernels fail in many ways; the other ways are measured all the same
        if is_out_of_memory(error) or not way.changes:
            raise
        _logger.warning(f'{bench.model}, {way.name} failed: {error}')
        standing.notes.append(f'not timed: {type(error).__name__}: {" ".join(str(error).split())[:200]}')
    return standing


def _measure(
        bench: TrainingBench, ways: Sequence[Way], batch: int, report: Callable[[], None]) -> list[dict[str, Any]]:
    """The records of all ways, the published one first, with a batch.

    Raises:
        RuntimeError, MemoryError: It does not fit.
    """
    subject = Subject.make(bench, batch)
    torch.compiler.reset()  # PyTorch compiles one function only so many times
    reference, precision = _make_reference(bench, subject)
    _release(bench.device)
    published = _prepare(bench, subject, ways[0], reference)
    standings = [published, *(_prepare(bench, subject, way, reference, published.error) for way in ways[1:])]
    runs = {s.way.name: s.candidate for s in standings if s.candidate is not None}
    counts = {s.way.name: s.steps for s in standings}
    times = time_interleaved(
        {**runs, AGAIN: runs[PUBLISHED]}, bench.device, {**counts, AGAIN: counts[PUBLISHED]}, bench.rounds,
        report=report)
    self_ratio = compare_rounds(times[PUBLISHED], times[AGAIN])['ratio']
    return [_record(bench, batch, standing, times, self_ratio, precision) for standing in standings]


def _record(
        bench: TrainingBench, batch: int, standing: TrainState, times: dict[str, list[list[float]]], self_ratio: float,
        precision: str,
) -> dict[str, Any]:
    way, notes = standing.way, [*standing.notes]
    figures: dict[str, Any] = dict.fromkeys((
        'median_ms', 'p10_ms', 'p90_ms', 'mean_ms', 'images_per_s', 'ratio', 'ratio_p10', 'ratio_p90', 'noisy'))
    if standing.candidate is not None:
        figures.update(summarise(times[way.name]), **compare_rounds(times[PUBLISHED], times[way.name]))
        reasons = judge_noise(figures, self_ratio)
        figures.update(images_per_s=1e3 * batch / figures['median_ms'], noisy=bool(reasons))
        notes += reasons
    if batch < bench.batch:
        notes.append(f'a batch of {bench.batch} did not fit: {batch}')
    if bench.teacher != 'none':
        notes.append(f'teacher {bench.teacher} with random weights')
    notes.append(f'random images on the device, mixup or CutMix, no stochastic depth; error of loss and gradient of '
                 f'the first step against {precision}')
    return dict(
        model=bench.model, bench='train', way=way.name, teacher=bench.teacher,
        backend='compile' if 'compile' in way.changes else 'eager', device=describe_device(bench.device),
        dtype=way.dtype, layout='channels_last' if 'channels_last' in way.changes else 'nchw', batch=batch,
        height=bench.img_size, width=bench.img_size, threads=torch.get_num_threads(), warmup=bench.warmup,
        runs=standing.steps * bench.rounds if standing.candidate is not None else 0, **figures,
        peak_mib=standing.peak_mib, error=standing.error,
        kernels='triton' if 'kernels' in way.changes else 'torch', versions=list_versions(), notes=notes)


def bench_training(
        bench: TrainingBench, ways: Sequence[str] | None = None, report: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Measure ways of training, the published one among them, and give a record for each.

    A batch that does not fit is halved, for all ways. A way that fails, or whose first step is wrong, is not timed; its
    record says why.

    Args:
        ways: Names for `training_ways.parse_way`; by default those of `training_ways.list_ways`.
        report: Called after each block, for a progress bar.
    Raises:
        ConfigError: An unknown model, teacher or way, or not even two images fit.
    """
    names = [PUBLISHED, *(name for name in ways or list_ways(bench.device) if name != PUBLISHED)]
    chosen = [parse_way(name, bench.device) for name in dict.fromkeys(names)]
    batch = bench.batch
    while batch >= 2:
        try:
            return _measure(bench, chosen, batch, report)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__):
                raise
        _release(bench.device)
        batch = batch // 4 * 2  # an even number, for mixup pairs images
    raise ConfigError(f'{bench.model} does not fit into the memory of {bench.device}, not even with 2 images.')


def describe_training(records: Sequence[dict[str, Any]]) -> str:
    """A table for people: a row for each way, then the fastest, then what to know."""
    first = records[0]
    lines = [
        f'Training steps of {first["model"]}, teacher {first["teacher"]}, batch {first["batch"]} at '
        f'{first["height"]} x {first["width"]}, {first["device"]}, {first["threads"]} threads', '',
        f'{"way":36} {"images/s":>9} {"ms, median (p10 to p90)":>28} {"times published":>22} {"MiB":>8} {"error":>8}']
    lines += map(_describe_row, records)
    timed = [record for record in records if record['ratio'] is not None]
    best = max(timed, key=lambda record: record['ratio'])
    notes = dict.fromkeys(
        note for record in records for note in record['notes'] if not note.startswith(('not timed', 'noisy')))
    return '\n'.join([*lines, '', f'fastest: {best["way"]}, {best["ratio"]:.2f} times the published way', *notes])


def _describe_row(record: dict[str, Any]) -> str:
    if record['ratio'] is None:
        return f'{record["way"]:36} {record["notes"][0]}'
    spread = f'{record["median_ms"]:.2f} ({record["p10_ms"]:.2f} to {record["p90_ms"]:.2f})'
    ratio = f'{record["ratio"]:.2f} ({record["ratio_p10"]:.2f} to {record["ratio_p90"]:.2f})'
    peak = '' if record['peak_mib'] is None else f'{record["peak_mib"]:.0f}'
    return (f'{record["way"]:36} {record["images_per_s"]:9.1f} {spread:>28} {ratio:>22} {peak:>8} '
            f'{record["error"]:8.1e}{"  noisy" if record["noisy"] else ""}')
