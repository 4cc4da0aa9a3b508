"""What a comparison of trained models says: a table, a plot, CSV, JSON and Markdown."""
import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..measure.tables import format_table, format_value

__all__ = ['Comparison', 'describe_comparison', 'draw_comparison', 'summarise_models', 'write_comparison']

MARKERS = dict(fused=('o', 'full', 'fused'), eager=('o', 'none', 'eager'))  # shape, filling, name in the legend


@dataclass
class Comparison:
    """The figures of a comparison, and all that a reader must know beside them.

    Attributes:
        models: A record for each model, of `summarise_models`.
        runs: A record for each model and seed.
        latencies: Records of `inference.measure_group`.
        facts: Of the trainer, by model.
        settings: That all runs share.
        model_args, left_out: Of the models; what the recipe gives to its own family alone.
    """
    models: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    latencies: list[dict[str, Any]]
    facts: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    recipe: str
    left_out: dict[str, dict[str, Any]]
    model_args: dict[str, dict[str, Any]]
    device: str
    versions: dict[str, str]
    commit: str | None
    failures: list[str]


def _spread(values: Sequence[float]) -> float | None:
    """The standard deviation of several values; None of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def summarise_models(
        runs: Sequence[dict[str, Any]], counts: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]],
        families: dict[str, str]) -> list[dict[str, Any]]:
    """One flat record for each model: means over the seeds, counts, latencies.

    Args:
        runs: The finished ones, with model, seed, top1, best_top1, val_loss and seconds.
        counts: Of `inference.count_network`, one for each model, in order.
        records: Of latencies.
        families: By model.
    """
    models = []
    for count in counts:
        own = [run for run in runs if run['model'] == count['model']]
        top1 = [run['top1'] for run in own]
        record = dict(
            model=count['model'], family=families[count['model']], seeds=[run['seed'] for run in own],
            top1=float(np.mean(top1)), top1_std=_spread(top1), top1_min=min(top1), top1_max=max(top1),
            best_top1=float(np.mean([run['best_top1'] for run in own])),
            val_loss=float(np.mean([run['val_loss'] for run in own])),
            train_minutes=float(np.mean([run['seconds'] for run in own])) / 60,
            parameters=count['parameters'], parameters_fused=count['parameters_fused'], gmacs=count['gmacs'],
            gmacs_fused=count['gmacs_fused'], height=count['height'], width=count['width'])
        for timed in records:
            if timed['model'] == count['model']:
                record.update({f'{timed["backend"]}_{key}': timed[key] for key in (
                    'median_ms', 'p10_ms', 'p90_ms', 'noisy', 'error')})
        models.append(record)
    return models


# Text -----------------------------------------------------------------------------------------------------------------

def _show_accuracy(record: dict[str, Any]) -> str:
    spread = record['top1_std']
    return f'{record["top1"]:.1f}' + (f' ± {spread:.1f}' if spread is not None else '')


def _show_latency(record: dict[str, Any], backend: str) -> str | None:
    if f'{backend}_median_ms' not in record:
        return None
    return format_value(record[f'{backend}_median_ms']) + (' (noisy)' if record[f'{backend}_noisy'] else '')


def _list_equal(comparison: Comparison) -> list[str]:
    facts, settings = next(iter(comparison.facts.values())), comparison.settings
    images = facts['epochs'] * facts['steps_per_epoch'] * facts['batch_size']
    chance = 100 / facts['num_classes']
    data = Path(settings['data'] or settings['dataset']).name
    tested = ' or '.join(dict.fromkeys(str(facts['eval_config']['input_size'][-1]) for facts in
                                       comparison.facts.values()))
    return [
        f'a comparison at this small budget, not of the published accuracies: {facts["epochs"]} epochs = '
        f'{facts["epochs"] * facts["steps_per_epoch"]:,} steps of {facts["batch_size"]} images = {images:,} images of '
        f'{settings["img_size"]} px from random weights, the same for every model',
        f'data {data}: {facts["train_images"]:,} training and {facts["val_images"]:,} validation images, '
        f'{facts["num_classes"]} classes (chance: {chance:.1f} %), evaluated at {tested} px; recipe '
        f'{comparison.recipe or "defaults of train.py"}; every setting in comparison.json',
        'top-1: of the last epoch, so that no epoch is chosen by the validation images; best: of the epoch that '
        'happened to be best among those evaluated']


def _list_differences(comparison: Comparison) -> list[str]:
    """What is not the same for all models."""
    lines = []
    without: dict[str, list[str]] = {}
    for model, args in comparison.left_out.items():
        without.setdefault(', '.join(f'{name}={value}' for name, value in args.items()), []).append(model)
    for named, models in without.items():
        lines.append(f'differs: {named}, which the recipe gives to its own family, is not given to {", ".join(models)}')
    for key in comparison.runs[0]['machine']:
        values = {}
        for run in comparison.runs:
            values.setdefault(str(run['machine'][key]), []).append(f'{run["model"]} (seed {run["seed"]})')
        if len(values) > 1:
            named = '; '.join(f'{value} of {", ".join(runs)}' for value, runs in values.items())
            lines.append(f'differs: {key} of the runs, {named}')
    configs = {model: facts['eval_config'] for model, facts in comparison.facts.items()}
    for key in next(iter(configs.values())):
        values = {model: config[key] for model, config in configs.items()}
        if len({json.dumps(value) for value in values.values()}) > 1:
            named = ', '.join(f'{value} of {model}' for model, value in values.items())
            lines.append(f'differs: {key} of evaluated images, {named}: each as its authors have it')
    return lines


def _list_noise(comparison: Comparison) -> list[str]:
    images = next(iter(comparison.facts.values()))['val_images']
    share = max((record['top1'] for record in comparison.models), key=lambda top1: -abs(top1 - 50)) / 100
    error = 100 * math.sqrt(share * (1 - share) / images)
    seeds = max(len(record['seeds']) for record in comparison.models)
    trained = f'±: standard deviation over {seeds} seeds' if seeds > 1 else \
        'one seed: how far seeds are apart is not known here (--seeds 0 1 2)'
    return [f'{trained}; the number of validation images alone leaves a standard error of {error:.1f} points']


def _list_conditions(comparison: Comparison) -> list[str]:
    versions = ', '.join(f'{name} {value}' for name, value in comparison.versions.items())
    lines = []
    if comparison.latencies:
        first = comparison.latencies[0]
        lines.append(
            f'latency: {comparison.device}, {first["threads"]} thread(s), batch 1, {first["dtype"]}, median, '
            f'interleaved; eager: as trained; fused: the same network folded')
    return [*lines, f'{versions}' + (f', commit {comparison.commit}' if comparison.commit else '')]


def describe_comparison(comparison: Comparison, markdown: bool = False) -> list[str]:
    """The table, and what a reader must know, a line each."""
    classes = next(iter(comparison.facts.values()))['num_classes']
    side = comparison.models[0]['height']
    header = ['model', f'parameters, M, {classes} classes', f'GMACs at {side} px', 'top-1, %', 'best, %', 'loss',
              'eager, ms', 'fused, ms', 'training, minutes']
    rows = [[
        f'`{record["model"]}`' if markdown else record['model'], f'{record["parameters"] / 1e6:.2f}',
        f'{record["gmacs"]:.3f}', _show_accuracy(record), f'{record["best_top1"]:.1f}', f'{record["val_loss"]:.3f}',
        _show_latency(record, 'eager'), _show_latency(record, 'fused'), f'{record["train_minutes"]:.1f}']
        for record in comparison.models]
    remarks = [*_list_equal(comparison), *_list_differences(comparison), *_list_noise(comparison),
               *_list_conditions(comparison), *(f'failed: {failure}' for failure in comparison.failures)]
    return [*format_table(header, rows, markdown), '', *(f'- {line}' if markdown else line for line in remarks)]


# Files ----------------------------------------------------------------------------------------------------------------

def _place(record: dict[str, Any], backend: str) -> tuple[float, float] | None:
    latency = record.get(f'{backend}_median_ms')
    return None if latency is None else (latency, record['top1'])


def draw_comparison(comparison: Comparison, path: Path) -> Path:
    """Accuracy against latency: a colour for each family, filled points fused, hollow ones as trained."""
    from matplotlib.figure import Figure  # slow to import, and wanted once
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    colours = {family: f'C{number}' for number, family in enumerate(
        dict.fromkeys(record['family'] for record in comparison.models))}
    for record in comparison.models:
        colour = colours[record['family']]
        points = {backend: place for backend in MARKERS if (place := _place(record, backend))}
        axes.plot([x for x, _ in points.values()], [y for _, y in points.values()], ':', color=colour, linewidth=0.8)
        for backend, (x, y) in points.items():
            shape, filling, _ = MARKERS[backend]
            axes.errorbar(x, y, yerr=record['top1_std'], fmt=shape, fillstyle=filling, color=colour, capsize=3)
        if points:
            axes.annotate(record['model'], next(iter(points.values())), textcoords='offset points', xytext=(5, 6))
    handles = [Line2D([], [], color=colour, label=family) for family, colour in colours.items()] + [
        Line2D([], [], color='grey', marker=shape, fillstyle=filling, linestyle='', label=name)
        for shape, filling, name in MARKERS.values()]
    axes.legend(handles=handles, fontsize=8)
    facts, settings = next(iter(comparison.facts.values())), comparison.settings
    axes.set(xlabel='latency of one image, median, ms', ylabel='top-1 after the last epoch, %')
    axes.set_title(
        f'Trained alike: {facts["epochs"]} epochs of {facts["train_images"]:,} images, '
        f'{Path(settings["data"] or settings["dataset"]).name}, {settings["img_size"]} px\n{comparison.device}, '
        f'{comparison.models[0]["height"]} px, float32', fontsize=10)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.supxlabel('At this small budget; not the published accuracies. Bars: standard deviation over seeds, where '
                     'there are several.', fontsize=7)
    figure.savefig(path, dpi=150)
    return path


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write comparison.csv (a row for each model), .json (everything), .md and .png into a folder.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        (folder / 'comparison.json').write_text(json.dumps(dataclasses.asdict(comparison), indent=2) + '\n')
        names = list(dict.fromkeys(key for record in comparison.models for key in record))
        with open(folder / 'comparison.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows({**record, 'seeds': ' '.join(map(str, record['seeds']))} for record in comparison.models)
        (folder / 'comparison.md').write_text('\n'.join(describe_comparison(comparison, markdown=True)) + '\n')
        draw_comparison(comparison, folder / 'comparison.png')
    except OSError as error:
        raise ConfigError(f'{folder} cannot be written ({error}): the runs in it are whole.') from None
