"""Plots of measurements, as PNG: every title says on what, in which dtype and batch, and with how many threads."""
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import PlotError
from ..models.backbone import find_family
from .operations import KINDS
from ..measure.published import find_published, list_footnotes

__all__ = ['draw_accuracy_by_gmacs', 'draw_accuracy_by_latency', 'draw_growth', 'draw_parts']

Record = Mapping[str, Any]
FACTS = (('device', '{}'), ('dtype', '{}'), ('batch', 'batch {}'), ('height', '{} px'), ('threads', 'threads {}'))


def _describe_facts(records: Sequence[Record], *leave_out: str) -> str:
    """Device, dtype, batch, size, threads; of those that differ among the records all values."""
    parts = []
    for key, pattern in FACTS:
        values = list(dict.fromkeys(str(record[key]) for record in records if record.get(key) is not None))
        on_gpu = key == 'threads' and all(str(record['device']).startswith('cuda') for record in records)
        if values and key not in leave_out and not on_gpu:
            parts.append(pattern.format(' / '.join(values)))
    return ', '.join(parts)


def _start(title: str, facts: str, xlabel: str, ylabel: str, width: float = 8.) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import; draws without a display

    figure = Figure(figsize=(width, 5), layout='constrained')
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(f'{title}\n{facts}', fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path, footnote: str = '') -> Path:
    if footnote:
        figure.supxlabel(footnote, fontsize=7, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


# Accuracy -------------------------------------------------------------------------------------------------------------

def _scatter(axes: Any, series: Mapping[str, list[tuple[float, float, str]]]) -> None:
    """Points (x, y, model) of each series; CARE filled and joined, others hollow; a model is named at its least x."""
    for number, (name, points) in enumerate(series.items()):
        ours = sorted(point[:2] for point in points if _is_ours(point[2]))
        for x, y, model in points:
            axes.plot(x, y, 'o', color=f'C{number}', markerfacecolor=f'C{number}' if _is_ours(model) else 'none')
        axes.plot([x for x, _ in ours], [y for _, y in ours], '-o', color=f'C{number}', alpha=0.5, label=name)
    for model in dict.fromkeys(point[2] for points in series.values() for point in points):
        places = sorted(point[:2] for points in series.values() for point in points if point[2] == model)
        axes.plot([x for x, _ in places], [y for _, y in places], ':', color='grey', linewidth=0.7, zorder=0)
        axes.annotate(model, places[0], textcoords='offset points', xytext=(5, 5), fontsize=7,
                      weight='bold' if _is_ours(model) else 'normal')
    axes.margins(x=0.15, y=0.08)
    axes.set_xlim(left=0)
    if len(series) > 1:
        axes.legend(fontsize=8)


def _describe_accuracies(models: Sequence[str]) -> str:
    """The footnote of published accuracies: those that are numbered."""
    notes = [line for line in list_footnotes(models) if line.startswith('[')]
    return ' '.join(['Top-1 as published, not measured here.', *notes])


def _is_ours(model: str) -> bool:
    return find_family(model) == 'care'


def _find_accuracy(model: str) -> float | None:
    row = find_published(model)
    return None if row is None else row.top1


def draw_accuracy_by_latency(
        records: Sequence[Record], path: Path, find_accuracy: Callable[[str], float | None] = _find_accuracy,
) -> Path:
    """Published accuracy against the measured median latency, a series for each backend, dtype and layout.

    Args:
        records: Of inference, of one batch and size.
        find_accuracy: Top-1 % of a model, None where none is published; such models are left out.
    Raises:
        PlotError: Of no model measured an accuracy is published, or the batches or sizes differ.
    """
    series: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    drawn = [record for record in records
             if record.get('median_ms') is not None and find_accuracy(record['model']) is not None]
    if not drawn:
        raise PlotError('No accuracy is published of any of the models measured: nothing to draw against latency.')
    mixed = [key for key in ('device', 'batch', 'height', 'width') if len({record[key] for record in drawn}) > 1]
    if mixed:
        raise PlotError(f'Records of several values of {", ".join(mixed)} in one plot: draw each by itself.')
    for record in drawn:
        ours = [record['kernels']] * (record['kernels'] != 'torch')
        name = ', '.join([record['backend'], record['dtype'], record['layout'], *ours])
        series[name].append((record['median_ms'], find_accuracy(record['model']), record['model']))
    figure, axes = _start(
        'Accuracy against latency', _describe_facts(drawn), f'latency of a batch of {drawn[0]["batch"]}, median, ms',
        'ImageNet-1K top-1, %, published')
    _scatter(axes, series)
    return _save(figure, path, _describe_accuracies([record['model'] for record in drawn]))


def draw_accuracy_by_gmacs(
        gmacs: Mapping[str, float], path: Path, find_accuracy: Callable[[str], float | None] = _find_accuracy,
) -> Path:
    """Published accuracy against counted multiply-adds.

    Args:
        gmacs: Billions of multiply-adds by model.
    Raises:
        PlotError: Of none of the models an accuracy is published.
    """
    points = [(value, accuracy, model) for model, value in gmacs.items()
              if (accuracy := find_accuracy(model)) is not None]
    if not points:
        raise PlotError(f'No accuracy is published of {", ".join(gmacs) or "no model"}: nothing to draw against GMACs.')
    figure, axes = _start(
        'Accuracy against multiply-adds', "counted by PyTorch's FlopCounterMode, one image", 'GMACs',
        'ImageNet-1K top-1, %, published')
    _scatter(axes, dict(models=points))
    return _save(figure, path, _describe_accuracies([model for _, _, model in points]))


# Growth ---------------------------------------------------------------------------------------------------------------

def draw_growth(records: Sequence[Record], path: Path) -> Path:
    """Latency against resolution, linear beside softmax attention, with their 10th to 90th percentiles.

    Args:
        records: Of `growth.measure_growth`.
    Raises:
        PlotError: There are no such records.
    """
    curves: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if 'attention' in record:
            curves[f'{record["model"]}, {record["attention"]} attention'].append(record)
    if not curves:
        raise PlotError('No records of growth: measure them by measure_growth.')
    figure, axes = _start(
        'Latency against resolution', _describe_facts(records, 'height'), 'side of the square image, pixels',
        'latency, median and p10 to p90, ms')
    for name, points in curves.items():
        points = sorted(points, key=lambda record: record['height'])
        sides = [record['height'] for record in points]
        line, = axes.plot(sides, [record['median_ms'] for record in points], 'o-', label=name)
        axes.fill_between(sides, *([record[key] for record in points] for key in ('p10_ms', 'p90_ms')),
                          color=line.get_color(), alpha=0.2)
    axes.set_xticks(sorted({record['height'] for record in records}))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return _save(figure, path, 'Softmax attention of the same queries, keys and values, for its cost alone: no network '
                               'was trained with it.')


# Parts ----------------------------------------------------------------------------------------------------------------

def draw_parts(profiles: Mapping[str, Sequence[Record]], path: Path) -> Path:
    """Time of a forward pass as stacked bars, by kind of operation and by part of the network, a bar for each profile.

    Args:
        profiles: {name of a bar, e.g. 'eager' or 'fused': records of `profiling.list_profile`}.
    Raises:
        PlotError: There are no profiles.
    """
    records = [record for rows in profiles.values() for record in rows]
    if not records:
        raise PlotError('No profiles to draw.')
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 2.2 * max(len(profiles), 2), 6.5), layout='constrained')
    figure.suptitle(f'Where the time goes, {records[0].get("model", "")}\n{_describe_facts(records)}', fontsize=10)
    parts = dict.fromkeys(record['part'] for record in records)
    for axes, key, names in zip(figure.subplots(1, 2, sharey=True), ('kind', 'part'), (KINDS, parts), strict=True):
        _stack(axes, profiles, key, names)
    return _save(figure, path, 'Time of the operations themselves, under the profiler; above each bar the time of a '
                               'whole call without it.')


def _stack(axes: Any, profiles: Mapping[str, Sequence[Record]], key: str, names: Iterable[str]) -> None:
    bottoms = [0.] * len(profiles)
    for number, name in enumerate(names):
        heights = [sum(record['ms'] for record in rows if record[key] == name) for rows in profiles.values()]
        if any(heights):
            axes.bar(list(profiles), heights, bottom=bottoms, label=name, color=f'C{number % 10}',
                     hatch='//' if number >= 10 else None)
            bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    for place, (top, rows) in enumerate(zip(bottoms, profiles.values(), strict=True)):
        if rows and rows[0].get('total_ms') is not None:
            axes.annotate(f'{rows[0]["total_ms"]:.1f} ms', (place, top), ha='center', va='bottom', fontsize=8)
    axes.set(ylabel='ms' if key == 'kind' else None, title=f'by {key}')
    axes.legend(fontsize=7, loc='upper center', bbox_to_anchor=(0.5, -0.08), ncols=2)
