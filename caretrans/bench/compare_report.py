"""Figures of a comparison of trained models: their records, a table, a plot, CSV, JSON and Markdown."""
import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import ConfigError
from ..measure.tables import format_table, format_value
from ..models.backbone import find_family
from ..strict_json import replace_non_finite, to_json
from ..text import count_noun, escape, read_text, write_text
from .compare_plan import TITLE, Plan
from .record import ModelCounts, Record, write_csv

__all__ = ['Budget', 'Comparison', 'Machine', 'ModelFigures', 'RunFacts', 'RunFigures', 'describe_comparison',
           'draw_comparison', 'write_comparison']

MARKERS = dict(fused=('o', 'full'), eager=('o', 'none'))  # backend: shape and filling of its points


@dataclass(frozen=True)
class Budget:
    """Sizes of a run that must be equal for all models."""
    train_images: int
    val_images: int
    num_classes: int
    batch_size: int
    epochs: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class RunFacts:
    """Facts that the trainer derived from the settings of a model: the content of environment.json."""
    described: dict[str, Any]

    @cached_property
    def budget(self) -> Budget:
        return Budget(**{item.name: self.described[item.name] for item in dataclasses.fields(Budget)})

    @property
    def eval_config(self) -> dict[str, Any]:
        """Preparation of the evaluated images."""
        return self.described['eval_config']


@dataclass(frozen=True)
class Machine:
    """Versions and machine of a run, and the settings that change how it computes, not what; None if unknown."""
    git_commit: str | None
    python: str | None
    torch: str | None
    torchvision: str | None
    timm: str | None
    numpy: str | None
    device: str | None
    gpu: str | None
    machine: str | None
    threads: int | None
    compile: bool | None
    kernels: bool | None
    grad_checkpointing: bool | None


@dataclass(frozen=True)
class RunFigures:
    """A finished run: accuracies in percent after the last epoch and at the best one, losses, and its machine."""
    model: str
    seed: int
    top1: float
    top5: float
    val_loss: float
    train_loss: float
    best_top1: float
    best_epoch: int
    seconds: float
    folder: str
    machine: Machine

    @classmethod
    def read(cls, model: str, seed: int, folder: Path) -> 'RunFigures':
        result = json.loads(read_text(folder / 'result.json', ConfigError))
        environment = json.loads(read_text(folder / 'environment.json', ConfigError))
        config = yaml.safe_load(read_text(folder / 'config.yaml', ConfigError))
        rows = csv.DictReader(read_text(folder / 'summary.csv', ConfigError).splitlines())
        seconds = sum(float(row['seconds']) for row in rows)
        last, best = result['last'], result['best']
        modes = {name: config.get(name) for name in ('compile', 'kernels', 'grad_checkpointing')}
        known = {**environment, **modes}
        return cls(
            model, seed, last['val_top1'], last['val_top5'], last['val_loss'], last['train_loss'], best['val_top1'],
            best['epoch'], seconds, str(folder),
            Machine(**{item.name: known.get(item.name) for item in dataclasses.fields(Machine)}))


@dataclass(frozen=True)
class ModelFigures:
    """A model: means over its runs, counts and latencies.

    Attributes:
        top1_std: Standard deviation over the seeds; None with one seed.
        latencies: {backend: record}, of 'eager' and 'fused'; one that failed is missing.
    """
    counts: ModelCounts
    runs: list[RunFigures]
    latencies: dict[str, Record]

    @property
    def model(self) -> str:
        return self.counts.model

    @property
    def family(self) -> str:
        return find_family(self.model)

    @property
    def top1_std(self) -> float | None:
        return float(np.std([run.top1 for run in self.runs], ddof=1)) if len(self.runs) > 1 else None

    def mean(self, name: str) -> float:
        """The mean over the runs of a field of `RunFigures`."""
        return float(np.mean([getattr(run, name) for run in self.runs]))

    def to_dict(self) -> dict[str, Any]:
        top1, counts = [run.top1 for run in self.runs], self.counts
        return dict(
            model=self.model, family=self.family, seeds=[run.seed for run in self.runs], top1=self.mean('top1'),
            top1_std=self.top1_std, top1_min=min(top1), top1_max=max(top1), best_top1=self.mean('best_top1'),
            val_loss=self.mean('val_loss'), train_minutes=self.mean('seconds') / 60, parameters=counts.parameters,
            parameters_fused=counts.parameters_fused, gmacs=counts.gmacs, gmacs_fused=counts.gmacs_fused,
            height=counts.height, width=counts.width,
            **{f'{backend}_{key}': getattr(record, key) for backend, record in self.latencies.items()
               for key in ('median_ms', 'p10_ms', 'p90_ms', 'noisy', 'error')})


@dataclass
class Comparison:
    """The figures of a comparison, and remarks for the reader.

    Attributes:
        models: Figures of each model.
        facts: Facts of the runs of each model in the plan.
        failures: Failures, a line each.
    """
    plan: Plan
    models: list[ModelFigures]
    facts: dict[str, RunFacts]
    device: str
    versions: dict[str, str]
    commit: str | None
    failures: list[str]

    @property
    def runs(self) -> list[RunFigures]:
        return [run for figures in self.models for run in figures.runs]

    @property
    def latencies(self) -> list[Record]:
        return [record for figures in self.models for record in figures.latencies.values()]

    @property
    def budget(self) -> Budget:
        """The budget that all models share."""
        return next(iter(self.facts.values())).budget

    def to_dict(self) -> dict[str, Any]:
        plan = self.plan
        return dict(
            models=[figures.to_dict() for figures in self.models], runs=[dataclasses.asdict(run) for run in self.runs],
            latencies=[record.to_dict() for record in self.latencies],
            facts={model: facts.described for model, facts in self.facts.items()}, settings=plan.list_settings(),
            recipe=plan.recipe, left_out=plan.skipped_args,
            model_args={m.model: plan.configs[m.model, plan.seeds[0]].model_args for m in self.models},
            device=self.device, versions=self.versions, commit=self.commit, failures=self.failures)


# Text -----------------------------------------------------------------------------------------------------------------

def _list_differences(comparison: Comparison) -> list[str]:
    """Lines about settings that differ between models."""
    lines = []
    without: dict[str, list[str]] = {}
    for model, args in comparison.plan.skipped_args.items():
        without.setdefault(', '.join(f'{name}={value}' for name, value in args.items()), []).append(model)
    for named, models in without.items():
        lines.append(f'differs: {named}, which the recipe sets for its own model family, does not apply to '
                     f'{", ".join(models)}')
    for key in vars(comparison.runs[0].machine):
        values: dict[str, list[str]] = {}
        for run in comparison.runs:
            values.setdefault(str(getattr(run.machine, key)), []).append(f'{run.model} (seed {run.seed})')
        if len(values) > 1:
            named = '; '.join(f'{value} of {", ".join(runs)}' for value, runs in values.items())
            lines.append(f'differs: {key} of the runs, {named}')
    configs = {model: facts.eval_config for model, facts in comparison.facts.items()}
    for key in next(iter(configs.values())):
        values = {model: config[key] for model, config in configs.items()}
        if len({json.dumps(value) for value in values.values()}) > 1:
            named = ', '.join(f'{value} of {model}' for model, value in values.items())
            lines.append(f"differs: {key} of evaluated images, {named}: each model's own")
    return lines


def describe_comparison(comparison: Comparison, markdown: bool = False) -> list[str]:
    """Lines of the table and of the remarks."""
    plan, models, budget = comparison.plan, comparison.models, comparison.budget
    side = models[0].counts.height
    rows = []
    for m in models:
        spread = '' if m.top1_std is None else f' ± {m.top1_std:.1f}'
        latencies = [m.latencies.get(backend) for backend in ('eager', 'fused')]
        rows.append([
            f'`{m.model}`' if markdown else m.model, f'{m.counts.parameters / 1e6:.2f}', f'{m.counts.gmacs:.3f}',
            f'{m.mean("top1"):.1f}{spread}', f'{m.mean("best_top1"):.1f}', f'{m.mean("val_loss"):.3f}',
            *(record and format_value(record.median_ms) + (' (noisy)' if record.noisy else '') for record in latencies),
            f'{m.mean("seconds") / 60:.1f}'])
    header = ['model', f'parameters, M, {budget.num_classes} classes', f'GMACs at {side} px', 'top-1, %', 'best, %',
              'loss', 'eager, ms', 'fused, ms', 'training, minutes']
    tested = ' or '.join(dict.fromkeys(str(f.eval_config['input_size'][-1]) for f in comparison.facts.values()))
    share = max((m.mean('top1') for m in models), key=lambda top1: -abs(top1 - 50)) / 100
    error = 100 * math.sqrt(share * (1 - share) / budget.val_images)
    seeds = max(len(m.runs) for m in models)
    spread = f'±: standard deviation over {seeds} seeds' if seeds > 1 else \
        'one seed: the spread between seeds is not known here (--seeds 0 1 2)'
    remarks = [
        f'a comparison at this small budget, not of the published accuracies: {count_noun(budget.epochs, "epoch")} = '
        f'{budget.steps:,} steps of {budget.batch_size} images = {budget.steps * budget.batch_size:,} images of '
        f'{plan.config.img_size} px from random weights, the same for every model',
        f'data {plan.data_name}: {budget.train_images:,} training and {budget.val_images:,} validation images, '
        f'{budget.num_classes} classes (chance: {100 / budget.num_classes:.1f} %), evaluated at {tested} px; recipe '
        f'{plan.recipe or "defaults of train.py"}; every setting in comparison.json',
        'top-1: of the last epoch, so that no epoch is chosen by the validation images; best: of the epoch that '
        'happened to be best among those evaluated',
        *_list_differences(comparison),
        f'{spread}; the number of validation images alone leaves a standard error of {error:.1f} points']
    for timed in comparison.latencies[:1]:
        remarks.append(
            f'latency: {comparison.device}, {count_noun(timed.threads, "thread")}, batch 1, {timed.dtype}, median, '
            f'interleaved; eager: the original network; fused: the same network fused for inference')
    remarks += [', '.join(f'{name} {value}' for name, value in comparison.versions.items())
                + (f', commit {comparison.commit}' if comparison.commit else ''),
                *(f'failed: {failure}' for failure in comparison.failures)]
    return [*format_table(header, rows, markdown), '', *(f'- {line}' if markdown else line for line in remarks)]


def draw_comparison(comparison: Comparison, path: Path) -> Path:
    """Plot accuracy against latency: a colour for each family, filled points fused, hollow ones eager."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    families = list(dict.fromkeys(m.family for m in comparison.models))
    for m in comparison.models:
        colour, top1 = f'C{families.index(m.family)}', m.mean('top1')
        points = {backend: m.latencies[backend].median_ms for backend in MARKERS if backend in m.latencies}
        axes.plot(list(points.values()), [top1] * len(points), ':', color=colour, linewidth=0.8)
        for backend, x in points.items():
            shape, filling = MARKERS[backend]
            axes.errorbar(x, top1, yerr=m.top1_std, fmt=shape, fillstyle=filling, color=colour, capsize=3)
        if points:
            axes.annotate(m.model, (next(iter(points.values())), top1), textcoords='offset points', xytext=(5, 6))
    axes.legend(fontsize=8, handles=[
        *(Line2D([], [], color=f'C{number}', label=family) for number, family in enumerate(families)),
        *(Line2D([], [], color='grey', marker=shape, fillstyle=filling, linestyle='', label=backend)
          for backend, (shape, filling) in MARKERS.items())])
    plan, budget, side = comparison.plan, comparison.budget, comparison.models[0].counts.height
    axes.set(xlabel='latency of one image, median, ms', ylabel='top-1 after the last epoch, %')
    data = escape(plan.data_name).replace('$', r'\$')  # between two of them matplotlib reads a formula
    axes.set_title(
        f'Trained on equal terms: {budget.epochs} epochs of {budget.train_images:,} images, {data}, '
        f'{plan.config.img_size} px\n{comparison.device}, {side} px, float32', fontsize=10)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.supxlabel('At this small budget; not the published accuracies. Bars: standard deviation over seeds, where '
                     'there are several.', fontsize=7)
    figure.savefig(path, dpi=150)
    return path


def write_comparison(comparison: Comparison) -> None:
    """Write comparison.csv (a row for each model), .json (everything), .md and .png into the folder of the plan.

    The page of --update, if it is given, gets the table as well.

    Raises:
        ConfigError: They cannot be written.
    """
    folder, page = comparison.plan.folder, comparison.plan.update
    text = '\n'.join(describe_comparison(comparison, markdown=True)) + '\n'
    try:
        write_text(folder / 'comparison.json', to_json(replace_non_finite(comparison.to_dict()), indent=2) + '\n')
        write_csv(folder / 'comparison.csv', [
            {**row, 'seeds': ' '.join(map(str, row['seeds']))} for row in map(ModelFigures.to_dict, comparison.models)])
        write_text(folder / 'comparison.md', text)
        draw_comparison(comparison, folder / 'comparison.png')
        if page:
            Path(page).parent.mkdir(parents=True, exist_ok=True)
            write_text(
                page,
                f'{TITLE}\n\n`bash cmd/compare.sh --update` replaces this whole page; see '
                f'[comparison.md](comparison.md).\n\n{text}')
    except OSError as error:
        raise ConfigError(f'{folder} or {page} cannot be written to ({error}): the runs are complete.') from None
