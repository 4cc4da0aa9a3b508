"""Tables, JSON and CSV files of the results of `benchmark.py`."""
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..measure.counts import KINDS
from ..measure.published import list_footnotes, mark_accuracy
from ..measure.tables import format_table, format_value
from ..strict_json import replace_non_finite, to_json
from ..text import count_noun, read_text, write_text
from .backends import UNSEEN
from .config import BenchConfig
from .record import BenchResult, ModelCounts, Record, write_csv

__all__ = ['check_folder', 'check_page', 'describe_accuracy', 'describe_counts', 'describe_result', 'write_result']

PUBLISHED_COLUMNS = {
    'gmacs': '{} GMACs', 'params_m': '{} M parameters', 'top1': 'top-1 {} %',
    'rtx4090_ms': 'RTX 4090 {} ms (64 images)', 'iphone13_ms': 'iPhone 13 {} ms', 'intel_i9_ms': 'Intel i9 {} ms'}


# Counts ---------------------------------------------------------------------------------------------------------------

def _describe_model(count: ModelCounts) -> list[str]:
    """One model in full, with its multiply-adds by part and kind."""
    heads = f' (one head {count.parameters_one_head:,})' if count.parameters != count.parameters_one_head else ''
    lines = [
        f'{count.model} at {count.height} x {count.width}',
        f'parameters   {count.parameters:,}{heads}, fused {count.parameters_fused:,}',
        f'GMACs        {count.gmacs:.4f}, fused {count.gmacs_fused:.4f} (multiply-adds of convolutions, linear layers '
        f'and matmuls)',
        f'activations  {count.activations_m:.2f} M, fused {count.activations_fused_m:.2f} M (elements of outputs)']
    if count.published:
        figures = {key: getattr(count.published, key) for key in PUBLISHED_COLUMNS}
        lines.append(f'published    at {count.published.size} x {count.published.size}: ' + ', '.join(
            PUBLISHED_COLUMNS[key].format(value) for key, value in figures.items() if value is not None))
    kinds = [kind for kind in KINDS if count.gmacs_by_kind[kind]]
    rows = [[part, sum(macs.values()), *(macs.get(kind) for kind in kinds)]
            for part, macs in count.gmacs_by_part.items()]
    rows.append(['all', count.gmacs, *(count.gmacs_by_kind[kind] for kind in kinds)])
    shown = [[row[0], *(None if value is None else f'{value:.4f}' for value in row[1:])] for row in rows]
    return [*lines, '', *format_table(['GMACs', 'all', *kinds], shown)]


def describe_counts(counts: Sequence[ModelCounts], markdown: bool = False) -> list[str]:
    """A table with a row for each model, and columns of what its authors published."""
    header = ['model', 'image', 'parameters, M', 'fused, M', 'GMACs', 'GMACs fused', 'activations fused, M',
              'top-1 %, published', 'GMACs, published', 'parameters, M, published', 'RTX 4090 ms, published']
    models = [count.model for count in counts]
    rows = []
    for count in counts:
        published = [getattr(count.published, key, None) for key in ('gmacs', 'params_m', 'rtx4090_ms')]
        rows.append([
            f'`{count.model}`' if markdown else count.model, f'{count.height} x {count.width}',
            f'{count.parameters / 1e6:.2f}', f'{count.parameters_fused / 1e6:.2f}', f'{count.gmacs:.3f}',
            f'{count.gmacs_fused:.3f}', f'{count.activations_fused_m:.1f}', mark_accuracy(count.model, models),
            *(None if value is None else str(value) for value in published)])
    return format_table(header, rows, markdown)


# Latency and accuracy -------------------------------------------------------------------------------------------------

def _describe_records(records: Sequence[Record]) -> list[str]:
    """A table with a row for each candidate: milliseconds of a batch, images/s, memory, speed-up over its reference."""
    has_kernels = any(r.kernels != 'torch' for r in records)
    header = ['model', 'backend', 'format', 'layout', *['kernels'] * has_kernels, 'image', 'batch', 'median ms', 'p10',
              'p90', 'mean ms', 'images/s', 'peak MiB', 'speed-up', 'p10 to p90', 'error', '']
    rows = [[
        r.model, r.backend, r.dtype, r.layout, *[r.kernels] * has_kernels, f'{r.height} x {r.width}', r.batch,
        r.median_ms, r.p10_ms, r.p90_ms, r.mean_ms, r.images_per_s, r.peak_mib, r.ratio,
        f'{r.ratio_p10:.2f} to {r.ratio_p90:.2f}', f'{r.error:.0e}', 'noisy' if r.noisy else ''] for r in records]
    return format_table(header, rows)


def _name_setup(record: Record) -> str:
    return f'{record.backend} {record.dtype}' + (f' {record.kernels}' if record.kernels != 'torch' else '')


def _compare_models(records: Sequence[Record]) -> list[str]:
    """A Markdown table with a row for each model, size and batch, and for each setup milliseconds and speed-up."""
    setups = list(dict.fromkeys(map(_name_setup, records)))
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for r in records:
        cell = f'{format_value(r.median_ms)} ({r.ratio:.2f}' + (', noisy)' if r.noisy else ')')
        rows.setdefault((f'`{r.model}`', f'{r.height} x {r.width}', r.batch), {})[_name_setup(r)] = cell
    return format_table(
        ['model', 'image', 'batch', *(f'{setup}, ms' for setup in setups)],
        [[*row, *(cells.get(setup) for setup in setups)] for row, cells in rows.items()], markdown=True)


def describe_accuracy(records: Sequence[Record], markdown: bool = False) -> list[str]:
    """A table with a row for each setup."""
    first = records[0]
    header = [
        'backend', 'format', 'layout', 'kernels', 'top-1 %', 'change', 'same prediction as float32 eager, %', 'loss']
    rows = [[r.backend, r.dtype, r.layout, r.kernels, f'{r.top1:.2f}', f'{r.top1_change:+.2f}', f'{r.agreement:.2f}',
             f'{r.loss:.4f}'] for r in records]
    return [f'Accuracy of {first.model} from {first.checkpoint} on {first.images} images of {first.data}, '
            f'{first.height} x {first.width}, {first.device}', '', *format_table(header, rows, markdown)]


# Remarks --------------------------------------------------------------------------------------------------------------

def _describe_conditions(result: BenchResult) -> list[str]:
    first = result.records[0]
    runs = sorted({record.runs for record in result.records})
    setups = {record.reference.split(' ', 1)[1] for record in result.records}
    reference = setups.pop() if len(setups) == 1 else 'the first setup'
    return [
        f'{result.device}, {count_noun(first.threads, "thread")}; {first.warmup} runs to warm up, then '
        f'{" to ".join(str(n) for n in (runs[0], runs[-1])[:len(runs)])} timed, interleaved',
        ', '.join(f'{name} {version}' for name, version in first.versions.items()),
        f'speed-up (in brackets where each setup has a column): over {reference} of the same model, median of rounds; '
        f'error: of the logits against float64, relative to the largest']


def _describe_notes(records: Sequence[Record]) -> list[str]:
    """The notes of the records, each once, with the candidates that it is about."""
    about: dict[str, list[str]] = {}
    for record in records:
        for note in record.notes:
            if note != UNSEEN:  # a dash says it
                about.setdefault(note, []).append(f'{record.model} {_name_setup(record)}, batch {record.batch}')
    return [f'{note} ({"all" if len(names) == len(records) > 1 else "; ".join(names)})'
            for note, names in about.items()]


def describe_result(result: BenchResult, markdown: bool = False) -> list[str]:
    """All results as text; in Markdown a table of several models, whose cells name the noisy ones."""
    lines: list[str] = []
    if len(result.counts) == 1 and not markdown:
        lines += [*_describe_model(result.counts[0]), '']
    elif result.counts:
        lines += [*describe_counts(result.counts, markdown), '']
    if result.records:
        lines += [*(_compare_models if markdown else _describe_records)(result.records), '']
    remarks = [
        *(_describe_conditions(result) if result.records else []), *result.remarks, *_describe_notes(result.records),
        *list_footnotes([count.model for count in result.counts]), *(f'plot: {path}' for path in result.plots),
        *(f'failed: {failure}' for failure in result.failures)]
    if markdown:
        remarks = [f'- {remark}' for remark in remarks if not remark.startswith('noisy: ')]
    return lines + [line for text in result.texts for line in ('', *text.splitlines(), '')] + remarks


# Files ----------------------------------------------------------------------------------------------------------------

def check_folder(folder: str, flag: str) -> None:
    """Refuse a folder that cannot be created or written to; it is not created yet.

    Raises:
        ConfigError: It cannot.
    """
    path = Path(folder).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f'{flag} {folder}: {nearest} is not a folder that can be written to; choose another.')


def check_page(page: str | Path, line: str, flag: str) -> None:
    """Refuse a page that cannot be written, or was not written by this command before: it lacks the heading `line`.

    Raises:
        ConfigError: It is such a page.
    """
    page = Path(page)
    check_folder(str(page.parent), flag)
    if page.exists() and not (
            page.is_file() and os.access(page, os.W_OK) and line in read_text(page, ConfigError, flag).splitlines()):
        raise ConfigError(
            f'{flag} {page}: it is not a writable page with the heading "{line}", below which everything is replaced; '
            f'choose another.')


def write_result(result: BenchResult, config: BenchConfig) -> Path:
    """Write results.json, and results, counts, training, accuracy, dense, profiles as CSV, into the folder of a config.

    Raises:
        ConfigError: It cannot be written.
    """
    folder = Path(config.output or f'runs/benchmark/{time.strftime("%Y%m%d-%H%M%S")}')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        contents = dict(result.to_dict(), config=dataclasses.asdict(config))
        write_text(folder / 'results.json', to_json(replace_non_finite(contents), indent=2) + '\n')
        profiles = [row for rows in contents['profiles'].values() for row in rows]
        for name, rows in dict(
                results=contents['records'], counts=contents['counts'], training=contents['training'],
                accuracy=contents['accuracy'], dense=contents['dense'], profiles=profiles).items():
            write_csv(folder / f'{name}.csv', rows)
    except OSError as error:
        raise ConfigError(f'{folder} cannot be written ({error}): choose another --output.') from None
    return folder
