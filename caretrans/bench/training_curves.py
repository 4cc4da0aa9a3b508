"""Whether a faster way of training learns the same: loss curves on real images, held against the spread of seeds.

Two runs of one seed see the same images in the same order and start from the same weights. Rounding makes them drift
apart all the same, as any change of the seed would. So the published way is run with several seeds; a faster way is
within noise when its smoothed curve is no farther from the published one of the same seed than those of two seeds are
from each other, on average.
"""
import csv
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import TrainConfig
from ..distributed import Processes
from ..errors import ConfigError
from ..training.steps import train_steps
from ..training.trainer import Trainer
from .training_ways import PUBLISHED, Way, parse_way, training_precision

__all__ = [
    'Comparison', 'compare_curves', 'describe_curves', 'draw_curves', 'measure_distance', 'record_curves',
    'smooth_curve', 'write_curves']

SMOOTHING = 20  # of the steps: a mean over this part of the curve


def smooth_curve(losses: Sequence[float], window: int | None = None) -> np.ndarray:
    """Means over `window` steps, by default a twentieth of the curve: (len(losses) - window + 1,)."""
    window = window or max(len(losses) // SMOOTHING, 1)
    return np.convolve(np.asarray(losses, dtype=float), np.full(window, 1 / window), mode='valid')


def measure_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The mean absolute difference of two smoothed curves of the same length."""
    return float(np.abs(smooth_curve(a) - smooth_curve(b)).mean())


@dataclass(frozen=True)
class Comparison:
    """Curves and what they say.

    Attributes:
        way: The faster way.
        curves: {run: loss of each step}; runs are called by way and seed.
        distance: Of the faster way from the published one, same seed.
        spread: Of the published way between two seeds, the mean over all pairs.
        final: Mean loss over the last twentieth of the steps, by run.
        steps: Of each run.
        description: What was trained on what.
    """
    way: str
    curves: dict[str, list[float]]
    distance: float
    spread: float
    final: dict[str, float]
    steps: int
    description: str

    @property
    def is_within_noise(self) -> bool:
        """Whether the ways are no farther apart than the seeds are."""
        return self.distance <= self.spread


def _run(config: TrainConfig, way: Way, steps: int, device: torch.device, report: Callable[[], None]) -> list[float]:
    """The losses of the first steps of a run."""
    with training_precision(way):
        torch.compiler.reset()
        trainer = Trainer(replace(config, **way.settings), Processes(), device)
        losses: list[float] = []
        try:
            for epoch in range(math.ceil(steps / trainer.train_loader.steps)):
                if not config.step_schedule:
                    trainer.schedule.step(epoch)
                passes = trainer.train_loader.run(epoch)
                for step in train_steps(trainer.task, passes, trainer.stepper, trainer.config.amp, trainer.mixup,
                                        trainer.memory_format):
                    losses.append(step.loss)
                    report()
                    if len(losses) == steps:
                        return losses
        finally:
            trainer.train_loader.close()
    return losses


def _set_epochs(config: TrainConfig, steps: int, device: torch.device) -> TrainConfig:
    """The config with as many epochs as hold the steps, for a schedule that ends where they do."""
    trainer = Trainer(replace(config, compile=False, kernels=False), Processes(), device)
    trainer.train_loader.close()
    epochs = math.ceil(steps / trainer.train_loader.steps)
    return replace(config, epochs=epochs, warmup_epochs=min(config.warmup_epochs, epochs - 1), cooldown_epochs=0)


def compare_curves(
        config: TrainConfig, way: str, device: torch.device, steps: int = 500, seeds: Sequence[int] = (0, 1, 2),
        report: Callable[[], None] = lambda: None,
) -> Comparison:
    """Train in the published way with each seed, and in another way with the first.

    Args:
        config: Of the runs, on real images; its precision, layout, compiler and seed are replaced, and so are its
            epochs, by as many as hold the steps.
        way: For `training_ways.parse_way`.
        seeds: At least two.
        report: Called after each step, `steps` * (`len(seeds)` + 1) times.
    Raises:
        ConfigError: Fewer than two seeds or steps, the published way itself, or settings that do not work.
    """
    if len(set(seeds)) < 2 or steps < 2:
        raise ConfigError(f'seeds={tuple(seeds)}, steps={steps}: the spread needs two different seeds and two steps.')
    chosen = parse_way(way, device)
    if not chosen.changes:
        raise ConfigError(f'way={way!r} is the published one: name another, e.g. channels_last+bf16.')
    config = _set_epochs(config, steps, device)
    curves = {f'{PUBLISHED}, seed {seed}': _run(replace(config, seed=seed), Way(), steps, device, report)
              for seed in seeds}
    published = list(curves.values())
    curves[f'{chosen.name}, seed {seeds[0]}'] = faster = _run(
        replace(config, seed=seeds[0]), chosen, steps, device, report)
    spread = np.mean([measure_distance(a, b) for a, b in itertools.combinations(published, 2)])
    last = max(steps // SMOOTHING, 1)
    return Comparison(
        chosen.name, curves, measure_distance(faster, published[0]), float(spread),
        {name: float(np.mean(losses[-last:])) for name, losses in curves.items()}, steps,
        f'{config.model}, teacher {config.teacher}, batch {config.batch_size} at {config.img_size} px, '
        f'{config.data or config.dataset}, {device}')


# For people and for files ---------------------------------------------------------------------------------------------

def describe_curves(comparison: Comparison) -> str:
    """The verdict, with what it is made of."""
    c = comparison
    verdict = 'within noise' if c.is_within_noise else 'NOT within noise'
    return '\n'.join([
        f'{c.steps} steps of {c.description}',
        *(f'  {name}: final loss {loss:.4f}' for name, loss in c.final.items()),
        f'{c.way} is {c.distance:.4f} from the published way of the same seed, mean difference of the smoothed losses; '
        f'seeds are {c.spread:.4f} apart: {verdict}'])


def record_curves(comparison: Comparison) -> dict[str, Any]:
    """The verdict as a flat record."""
    c = comparison
    return dict(bench='curves', way=c.way, steps=c.steps, distance=c.distance, spread=c.spread,
                within_noise=c.is_within_noise, **{f'final {name}': loss for name, loss in c.final.items()},
                description=c.description)


def write_curves(comparison: Comparison, path: Path) -> Path:
    """A CSV of the losses: a row for each step, a column for each run."""
    with open(path, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['step', *comparison.curves])
        steps = enumerate(zip(*comparison.curves.values(), strict=True), 1)
        writer.writerows([step, *losses] for step, losses in steps)
    return path


def draw_curves(comparison: Comparison, path: Path) -> Path:
    """A PNG of the smoothed losses, the faster way on top."""
    from matplotlib.figure import Figure  # slow to import, and wanted once

    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axes = figure.subplots()
    for name, losses in comparison.curves.items():
        smooth = smooth_curve(losses)
        is_published = name.startswith(PUBLISHED)
        axes.plot(range(len(losses) - len(smooth) + 1, len(losses) + 1), smooth, label=name,
                  linewidth=1 if is_published else 2, color=None if is_published else 'black')
    axes.set(xlabel='step', ylabel=f'training loss, mean of {max(comparison.steps // SMOOTHING, 1)} steps')
    axes.set_title(f'{comparison.description}\n{comparison.way}: {comparison.distance:.4f} from published, '
                   f'seeds {comparison.spread:.4f} apart', fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path
