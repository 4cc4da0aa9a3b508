"""Plots of measurements as PNG; every title names device, number format, batch size, image size and threads."""
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PlotError
from ..measure.published import find_published
from .profile import KINDS
from .record import Record

__all__ = ['draw_accuracies', 'draw_accuracy_by_gmacs', 'draw_accuracy_by_latency', 'draw_growth', 'draw_parts']

FACTS = {'device': '{}', 'dtype': '{}', 'batch': 'batch {}', 'height': '{} px', 'threads': 'threads {}'}
CORNERS = ((1, -1), (-1, 1), (1, 1))  # of a point, where its label can be
TOP1 = 'ImageNet-1K top-1, %, published'


def _describe_facts(records: Sequence[Record], *skip: str) -> str:
    """Device, number format, batch, size and threads, each with all values among the records."""
    parts = []
    for key, pattern in FACTS.items():
        values = list(dict.fromkeys(str(value) for r in records if (value := getattr(r, key)) not in (None, '')))
        on_gpu = key == 'threads' and all(record.device.startswith('cuda') for record in records)
        if values and key not in skip and not on_gpu:
            parts.append(pattern.format(' / '.join(values)))
    return ', '.join(parts)


def _make_figure(title: str, width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # slow to import; draws without a display

    figure = Figure(figsize=(width, height), layout='constrained')
    figure.suptitle(title, fontsize=10)
    return figure


def _save(figure: Any, path: Path, footnote: str) -> Path:
    figure.supxlabel(footnote, fontsize=7, color='0.35', wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    return path


# Accuracy -------------------------------------------------------------------------------------------------------------

def _split_name(model: str) -> tuple[str, str]:
    """Family and size of a published model: CAS-ViT and XS of casvit_xs."""
    family, _, size = find_published(model).name.rpartition('-')
    return family, size


def _plot_families(axes: Any, points: Sequence[tuple[str, float]], styles: dict[str, dict[str, Any]]) -> None:
    """Plot a line for each family through its points (model, x), each labelled with the size of the model.

    Args:
        styles: Style of each family; families are added as they appear, so that all panels agree.
    """
    points = sorted(points, key=lambda point: point[1])
    tops = [find_published(model).top1 for model, _ in points]
    for family in sorted({_split_name(model)[0]: None for model, _ in points}, key=lambda name: name != 'CARE'):
        style = styles.setdefault(family, dict(
            color=f'C{len(styles)}', marker='osD^vPX*'[len(styles) % 8],
            **(dict(linewidth=2.2, markersize=7, zorder=3) if family == 'CARE' else dict(linewidth=1.2, markersize=5))))
        own = [i for i, (model, _) in enumerate(points) if _split_name(model)[0] == family]
        axes.plot([points[i][1] for i in own], [tops[i] for i in own], label=family, **style)
    places = np.stack([np.log([x for _, x in points]) / 1.15, np.array(tops) / 6], axis=1)  # about an inch is 1
    for (model, x), top1, place in zip(points, tops, places, strict=True):
        others = places[(places != place).any(axis=1)]
        right, up = max(CORNERS, key=lambda corner: np.linalg.norm(  # the corner with most room
            others - place - 0.2 * np.array(corner), axis=1).min(initial=9))
        family, size = _split_name(model)
        axes.annotate(size, (x, top1), textcoords='offset points', xytext=(5 * right, 4 if up > 0 else -9),
                      ha='left' if right > 0 else 'right', fontsize=7.5, color=styles[family]['color'],
                      weight='bold' if family == 'CARE' else 'normal')


def draw_accuracies(panels: Mapping[str, Sequence[tuple[str, float]]], title: str, xlabel: str, path: Path) -> Path:
    """Plot published accuracy against x: a panel for each name, with points (model, x), a colour for each family.

    Args:
        panels: At least one, each with points of models whose accuracy is published.
    """
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    columns = math.ceil(math.sqrt(len(panels)))
    rows = -(-len(panels) // columns)
    figure = _make_figure(title, 7 if columns == 1 else 4.6 * columns, 1.2 + 3.6 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    styles: dict[str, dict[str, Any]] = {}
    for axes, (name, points) in zip(grid, panels.items(), strict=False):
        _plot_families(axes, points, styles)
        axes.set_xscale('log')
        low, high = min(x for _, x in points), max(x for _, x in points)
        axes.set_xticks([tick for power in range(-2, 6) for digit in (1, 2, 5)
                         if low / 2 <= (tick := digit * 10. ** power) <= high * 2])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=xlabel, xlim=(low / 1.25, high * 1.35))
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
    for axes in grid[len(panels):]:
        axes.set_visible(False)
    grid[0].set_ylabel(TOP1)
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    grid[0].legend(handles.values(), handles.keys(), fontsize=8, loc='lower right', frameon=False)
    notes = {f'{_split_name(model)[0]}: {note.partition(":")[0]}': None
             for points in panels.values() for model, _ in points if (note := find_published(model).accuracy_note)}
    return _save(figure, path, '. '.join(['Top-1 as published, not measured here', *notes]) + '.')


def draw_accuracy_by_latency(records: Sequence[Record], path: Path) -> Path:
    """Plot published accuracy against the measured median latency, a panel for each backend, number format and layout.

    Args:
        records: Records of inference with one batch and image size; models without a published accuracy are skipped.
    Raises:
        PlotError: No accuracy is published for any model, or the batches or sizes differ.
    """
    drawn = [record for record in records if record.median_ms is not None and find_published(record.model)]
    if not drawn:
        raise PlotError('No accuracy is published for any of the models measured: nothing to draw against latency.')
    mixed = [key for key in ('device', 'batch', 'height', 'width') if len({getattr(r, key) for r in drawn}) > 1]
    if mixed:
        raise PlotError(f'Records have several values of {", ".join(mixed)}: draw one plot for each.')
    panels: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for record in drawn:
        kernels = [record.kernels] * (record.kernels != 'torch')
        panels[', '.join([record.backend, record.dtype, record.layout, *kernels])].append(
            (record.model, record.median_ms))
    batch = 'one image' if drawn[0].batch == 1 else f'a batch of {drawn[0].batch}'
    return draw_accuracies(
        panels, f'Accuracy against latency: {_describe_facts(drawn)}', f'latency of {batch}, median, ms', path)


def draw_accuracy_by_gmacs(gmacs: Mapping[str, float], path: Path) -> Path:
    """Plot published accuracy against counted multiply-adds.

    Args:
        gmacs: Billions of multiply-adds by model; models without a published accuracy are skipped.
    Raises:
        PlotError: No accuracy is published for any of the models.
    """
    points = [(model, value) for model, value in gmacs.items() if find_published(model)]
    if not points:
        raise PlotError(f'No accuracy is published for {", ".join(gmacs) or "no model"}: nothing to plot.')
    return draw_accuracies(
        {"one image, counted by PyTorch's FlopCounterMode": points}, 'Accuracy against multiply-adds', 'GMACs', path)


# Growth and parts -----------------------------------------------------------------------------------------------------

def draw_growth(records: Sequence[Record], path: Path) -> Path:
    """Plot latency against resolution for linear and softmax attention, with 10th to 90th percentiles.

    Args:
        records: Result of `growth.measure_growth`.
    Raises:
        PlotError: There are no such records.
    """
    curves: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.height):
        if record.attention:
            curves[f'{record.model}, {record.attention} attention'].append(record)
    if not curves:
        raise PlotError('No records of growth: measure them by measure_growth.')
    figure = _make_figure(f'Latency against resolution\n{_describe_facts(records, "height")}', 8, 5)
    axes = figure.subplots()
    for name, points in curves.items():
        sides = [record.height for record in points]
        line, = axes.plot(sides, [record.median_ms for record in points], 'o-', label=name)
        axes.fill_between(sides, [record.p10_ms for record in points], [record.p90_ms for record in points],
                          color=line.get_color(), alpha=0.2)
    axes.set(xlabel='side of the square image, pixels', ylabel='latency, median and p10 to p90, ms',
             xticks=sorted({record.height for record in records}))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path, 'Softmax attention of the same queries, keys and values shows only its cost: no network '
                               'was trained with it.')


def draw_parts(profiles: Mapping[str, Sequence[Record]], path: Path) -> Path:
    """Plot the time of a forward pass as stacked bars, by kind of operation and by part, a bar for each profile.

    Args:
        profiles: {name of a bar, e.g. 'eager' or 'fused': result of `profile.list_profile`}.
    Raises:
        PlotError: There are no profiles.
    """
    records = [record for rows in profiles.values() for record in rows]
    if not records:
        raise PlotError('No profiles to draw.')
    figure = _make_figure(f'Time by part, {records[0].model}\n{_describe_facts(records)}',
                          2.5 + 2.2 * max(len(profiles), 2), 6.5)
    parts = dict.fromkeys(record.part for record in records)
    for axes, key, names in zip(figure.subplots(1, 2, sharey=True), ('kind', 'part'), (KINDS, parts), strict=True):
        bottoms = [0.] * len(profiles)
        for number, name in enumerate(names):
            heights = [sum(r.ms for r in rows if getattr(r, key) == name) for rows in profiles.values()]
            if any(heights):
                axes.bar(list(profiles), heights, bottom=bottoms, label=name, color=f'C{number % 10}',
                         hatch='//' if number >= 10 else None)
                bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
        for place, (top, rows) in enumerate(zip(bottoms, profiles.values(), strict=True)):
            axes.annotate(f'{rows[0].total_ms:.1f} ms', (place, top), ha='center', va='bottom', fontsize=8)
        axes.set(ylabel='ms' if key == 'kind' else None, title=f'by {key}')
        axes.legend(fontsize=7, loc='upper center', bbox_to_anchor=(0.5, -0.08), ncols=2)
    return _save(figure, path, 'Time of the operations themselves, under the profiler; above each bar the time of a '
                               'whole call without it.')
