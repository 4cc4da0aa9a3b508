"""Latencies measured on phones and in browsers: check the file, print it as a table, draw accuracy against latency."""
import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..bench.plots import draw_accuracies
from ..errors import PlotError, require
from ..export.phone_results import BROWSER, describe_results, read_results
from ..flags import FlagParser
from ..measure.published import find_published

__all__ = ['draw_results', 'main', 'name_panels']

FILE = Path('coreml') / 'results.csv'


def _name_panel(row: dict[str, str]) -> str:
    """What measured a row, and how; rows of one panel can be compared."""
    threads = f'{row["threads"]} thread{"s" * (row["threads"] != "1")}' if row['threads'] else row['compute_units']
    runtime = row['runtime'] or f'Core ML {row["format"]}'
    tool = row['tool_version'] if row['tool'] == BROWSER else f'{row["tool"]} {row["tool_version"]}'
    usual = dict(
        form=('phone', 'fused', 'bmm'), batch=('1',), compress=('none',),
        input=('tensor',) if row['tool'] == BROWSER else ('image',))
    unusual = [f'{name} {row[name]}' for name, values in usual.items() if row[name] not in values]
    return ', '.join([row['device'], row['os'], tool]) + '\n' + ', '.join(
        [runtime, threads, row['precision'], *unusual])


def name_panels(rows: Sequence[dict[str, str]]) -> list[str]:
    """The panel of each row, with the size of its images where a model of the panel has several."""
    names = [_name_panel(row) for row in rows]
    sizes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, row in zip(names, rows, strict=True):
        sizes[name, row['model']].add(row['size'])
    several = {name for (name, _), found in sizes.items() if len(found) > 1}
    return [f'{name}, {row["size"]}' if name in several else name for name, row in zip(names, rows, strict=True)]


def draw_results(rows: Sequence[dict[str, str]], path: Path) -> Path:
    """Plot published accuracy against latency, a panel for each device, browser or tool, runtime and settings.

    Args:
        rows: Of `read_results`; several of one model in a panel become their median.
    Raises:
        PlotError: No accuracy is published for any of the models.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rows = [row for row in rows if find_published(row['model'])]
    for panel, row in zip(name_panels(rows), rows, strict=True):
        found[panel][row['model']].append(float(row['latency_ms']))
    if not found:
        raise PlotError('No accuracy is published for any of the models in the file: nothing to draw.')
    panels = {name: [(model, statistics.median(times)) for model, times in models.items()]
              for name, models in found.items()}
    return draw_accuracies(panels, 'Accuracy against latency on devices', 'latency of one image, ms', path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m caretrans results`."""
    parser = FlagParser(prog='python -m caretrans results', description=__doc__)
    parser.add_argument('file', nargs='?', type=Path, default=FILE, metavar='FILE', help=f'(default: {FILE})')
    parser.add_argument('--plot', type=Path, metavar='PNG', help='draw published accuracy against latency')
    args: argparse.Namespace = parser.parse_args(argv)
    if args.plot:
        require('matplotlib')
    rows = read_results(args.file)
    print('\n'.join(describe_results(rows)) if rows else f'{args.file}: no rows yet')
    if args.plot and rows:
        print(f'written to {draw_results(rows, args.plot)}')
    return 0
