"""What `benchmark.py` prints and writes: tables of counts and of timings, JSON and CSV."""
import csv
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..measure.counts import KINDS
from ..measure.tables import format_table, format_value
from .config import BenchConfig
from .inference import BenchResult, shorten
from ..measure.published import list_footnotes, mark_accuracy
from .training_curves import draw_curves, record_curves, write_curves

__all__ = [
    'check_folder', 'describe_counts', 'describe_records', 'describe_result', 'list_contents', 'write_result']

PUBLISHED_COLUMNS = {
    'gmacs': '{} GMACs', 'params_m': '{} M parameters', 'top1': 'top-1 {} %',
    'rtx4090_ms': 'RTX 4090 {} ms (64 images)', 'iphone13_ms': 'iPhone 13 {} ms', 'intel_i9_ms': 'Intel i9 {} ms'}
NOT_IN_TABLE = ('the memory of this backend is not seen',)  # a dash says it


def _describe_parts(count: dict[str, Any]) -> list[str]:
    kinds = [kind for kind in KINDS if count['gmacs_by_kind'][kind]]
    rows = [[part, sum(macs.values()), *(macs.get(kind) for kind in kinds)]
            for part, macs in count['gmacs_by_part'].items()]
    rows.append(['all', count['gmacs'], *(count['gmacs_by_kind'][kind] for kind in kinds)])
    shown = [[row[0], *(None if value is None else f'{value:.4f}' for value in row[1:])] for row in rows]
    return format_table(['GMACs', 'all', *kinds], shown)


def _describe_model(count: dict[str, Any]) -> list[str]:
    """One model in full."""
    heads = count['parameters'] != count['parameters_one_head']
    lines = [
        f'{count["model"]} at {count["height"]} x {count["width"]}',
        f'parameters   {count["parameters"]:,}' + (f' (one head {count["parameters_one_head"]:,})' if heads else '')
        + f', rewritten for inference {count["parameters_fused"]:,}',
        f'GMACs        {count["gmacs"]:.4f}, rewritten {count["gmacs_fused"]:.4f} (multiply-adds of convolutions, '
        f'linear layers and matrix products)',
        f'activations  {count["activations_m"]:.2f} M, rewritten {count["activations_fused_m"]:.2f} M (elements of the '
        f'outputs of these)']
    row = count['published']
    if row:
        lines.append('published    ' + ', '.join(
            text.format(row[key]) for key, text in PUBLISHED_COLUMNS.items() if row[key] is not None))
    return [*lines, '', *_describe_parts(count)]


def describe_counts(counts: Sequence[dict[str, Any]], markdown: bool = False) -> list[str]:
    """Models side by side, a line each, with what their authors published of them in columns of their own."""
    header = ['model', 'image', 'parameters, M', 'rewritten, M', 'GMACs', 'GMACs rewritten', 'activations rewritten, M',
              'top-1 %, published', 'GMACs, published', 'parameters, M, published', 'RTX 4090 ms, published']
    rows, models = [], [count['model'] for count in counts]
    for count in counts:
        row = count['published'] or {}
        rows.append([
            f'`{count["model"]}`' if markdown else count['model'], f'{count["height"]} x {count["width"]}',
            f'{count["parameters"] / 1e6:.2f}', f'{count["parameters_fused"] / 1e6:.2f}', f'{count["gmacs"]:.3f}',
            f'{count["gmacs_fused"]:.3f}', f'{count["activations_fused_m"]:.1f}',
            mark_accuracy(count['model'], models),
            *(None if row.get(key) is None else str(row[key]) for key in ('gmacs', 'params_m', 'rtx4090_ms'))])
    return format_table(header, rows, markdown)


def describe_records(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each candidate: milliseconds of a batch, images/s, memory, and how it compares with its reference."""
    has_kernels = any(r['kernels'] != 'torch' for r in records)
    header = ['model', 'backend', 'format', 'layout', *['kernels'] * has_kernels, 'image', 'batch', 'median ms', 'p10',
              'p90', 'mean ms', 'images/s', 'peak MiB', 'times as fast', 'p10 to p90', 'error', '']
    rows = [[
        r['model'], r['backend'], r['dtype'], r['layout'],
        *[r['kernels']] * has_kernels, f'{r["height"]} x {r["width"]}', r['batch'], r['median_ms'], r['p10_ms'],
        r['p90_ms'], r['mean_ms'], r['images_per_s'], r['peak_mib'], r['ratio'],
        f'{r["ratio_p10"]:.2f} to {r["ratio_p90"]:.2f}', f'{r["error"]:.0e}',
        'noisy' if r['noisy'] else ''] for r in records]
    return format_table(header, rows)


def compare_models(records: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table: a row for each model, size and batch, for each way of running it ms and times as fast."""
    ways = list(dict.fromkeys(_name_way(record) for record in records))
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for r in records:
        cell = f'{format_value(r["median_ms"])} ({r["ratio"]:.2f}' + (', noisy)' if r['noisy'] else ')')
        rows.setdefault((f'`{r["model"]}`', f'{r["height"]} x {r["width"]}', r['batch']), {})[_name_way(r)] = cell
    return format_table(
        ['model', 'image', 'batch', *(f'{way}, ms' for way in ways)],
        [[*row, *(cells.get(way) for way in ways)] for row, cells in rows.items()], markdown=True)


def _name_way(record: dict[str, Any]) -> str:
    kernels = '' if record['kernels'] == 'torch' else f' {record["kernels"]}'
    return f'{record["backend"]} {record["dtype"]}{kernels}'


def _describe_conditions(result: BenchResult) -> list[str]:
    first = result.records[0]
    versions = ', '.join(f'{name} {version}' for name, version in first['versions'].items())
    runs = sorted({record['runs'] for record in result.records})
    return [
        f'{result.device}, {first["threads"]} thread(s); {first["warmup"]} runs to warm up, then '
        f'{" to ".join(str(n) for n in (runs[0], runs[-1])[:len(runs)])} timed, interleaved',
        f'{versions}',
        f'times as fast (in brackets where each way has a column): than {_name_references(result)}, median of rounds; '
        f'error: of the logits against float64, relative to the largest']


def _name_references(result: BenchResult) -> str:
    references = {record['reference'] for record in result.records}
    ways = {reference.split(' ', 1)[1] for reference in references}
    return f'{ways.pop()} of the same model' if len(ways) == 1 else 'the first way of the same model'


def _name_candidate(record: dict[str, Any]) -> str:
    return f'{record["model"]} {_name_way(record)}, batch {record["batch"]}'


def _describe_notes(records: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the figures must know, each once, with the candidates that it is about."""
    about: dict[str, list[str]] = {}
    for record in records:
        for note in record['notes']:
            if note not in NOT_IN_TABLE:
                about.setdefault(note, []).append(_name_candidate(record))
    return [f'{note} ({"all" if len(names) == len(records) > 1 else "; ".join(names)})'
            for note, names in about.items()]


def _describe_remarks(result: BenchResult) -> list[str]:
    """What holds for the whole of a result, a line each."""
    published = list_footnotes([count['model'] for count in result.counts])
    return [*result.remarks, *_describe_notes(result.records), *published, *(f'plot: {path}' for path in result.plots),
            *(f'failed: {failure}' for failure in result.failures)]


def describe_result(result: BenchResult, markdown: bool = False) -> list[str]:
    """All that was measured, for people; in Markdown tables of several models, which name the noisy ones."""
    lines: list[str] = []
    if len(result.counts) == 1 and not markdown:
        lines += _describe_model(result.counts[0]) + ['']
    elif result.counts:
        lines += describe_counts(result.counts, markdown) + ['']
    if result.records:
        lines += compare_models(result.records) if markdown else describe_records(result.records)
        lines += ['']
    remarks = (_describe_conditions(result) if result.records else []) + _describe_remarks(result)
    if markdown:
        remarks = [f'- {remark}' for remark in remarks if not remark.startswith('noisy: ')]
    return lines + [line for text in result.texts for line in ('', *text.splitlines(), '')] + remarks


def _flatten(record: dict[str, Any]) -> dict[str, Any]:
    """For CSV: lists as text, dictionaries as JSON."""
    return {key: '; '.join(value) if isinstance(value, list) else json.dumps(value) if isinstance(value, dict)
            else value for key, value in record.items()}


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(map(_flatten, rows))


def list_contents(result: BenchResult) -> dict[str, Any]:
    """A result as plain values, for JSON."""
    return dict(dataclasses.asdict(result), curves=[record_curves(comparison) for comparison in result.curves])


def _write_curves(result: BenchResult, folder: Path) -> None:
    for number, comparison in enumerate(result.curves, 1):
        stem = 'curves' if len(result.curves) == 1 else f'curves-{number}'
        write_curves(comparison, folder / f'{stem}.csv')
        try:
            result.plots.append(str(draw_curves(comparison, folder / f'{stem}.png')))
        except Exception as error:  # whatever the drawing raises: the figures are written all the same
            result.failures.append(f'plot {stem}.png: {shorten(error)}')


def check_folder(folder: str, flag: str) -> None:
    """Refuse a folder that cannot be made or written into; it is not made yet.

    Raises:
        ConfigError: It cannot.
    """
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f'{flag} {folder}: {there} is not a folder that can be written into; name another.')


def write_result(result: BenchResult, config: BenchConfig) -> Path:
    """Write results.json, and results, counts, training, profiles and curves as CSV, into the folder of a config.

    Raises:
        ConfigError: It cannot be written.
    """
    folder = Path(config.output or f'runs/benchmark/{time.strftime("%Y%m%d-%H%M%S")}')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_curves(result, folder)
        contents = dict(list_contents(result), config=dataclasses.asdict(config))
        (folder / 'results.json').write_text(json.dumps(contents, indent=2) + '\n')
        _write_csv(folder / 'results.csv', result.records)
        _write_csv(folder / 'counts.csv', result.counts)
        _write_csv(folder / 'training.csv', result.training)
        _write_csv(folder / 'accuracy.csv', result.accuracy)
        _write_csv(folder / 'profiles.csv', [row for rows in result.profiles.values() for row in rows])
    except OSError as error:
        raise ConfigError(f'{folder} cannot be written ({error}): give another --output.') from None
    return folder
