"""Latencies measured on phones and in browsers: check the file, print it as a table, draw accuracy against latency."""
import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..bench.plots import draw_accuracies
from ..errors import PlotError, require
from ..export.phone_results import describe_results, read_results
from ..flags import FlagParser
from ..measure.published import find_published

__all__ = ['draw_results', 'main']

FILE = Path('coreml') / 'results.csv'


def _name_panel(row: dict[str, str]) -> str:
    """Where a row was measured; rows of one panel can be compared."""
    threads = f'{row["threads"]} thread{"s" * (row["threads"] != "1")}' if row['threads'] else row['compute_units']
    runtime = row['runtime'] or f'Core ML {row["format"]}'
    return ', '.join([row['device'], row['os'], runtime, threads, row['precision']])


def draw_results(rows: Sequence[dict[str, str]], path: Path) -> Path:
    """Plot published accuracy against latency, a panel for each device, runtime, thread count and precision.

    Args:
        rows: Of `read_results`; several of one model in a panel become their median.
    Raises:
        PlotError: No accuracy is published for any of the models.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if find_published(row['model']):
            found[_name_panel(row)][row['model']].append(float(row['latency_ms']))
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
    if args.plot:
        print(f'written to {draw_results(rows, args.plot)}')
    return 0
