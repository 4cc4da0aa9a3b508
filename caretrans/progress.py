"""Progress reports: a bar in a terminal, plain lines elsewhere."""
import logging
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ['Progress', 'show_messages']


def show_messages(everything: bool = True) -> None:
    """Print the log messages of the package to stderr: which checkpoint was loaded, which heads are new.

    Args:
        everything: Whether to print all messages; else only errors, for processes that would repeat the same messages.
    """
    logging.basicConfig(level=logging.WARNING if everything else logging.ERROR, format='%(message)s', stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO if everything else logging.ERROR)


class Progress:
    """A counter towards a total that shows figures such as loss or lr, the rate and the time left.

        with Progress(total=1000, unit='images') as progress:
            progress.update(32, loss=2.3)
            progress.write('a permanent line')

    Args:
        total: Number of units.
        unit: Name of what is counted, plural.
        interval: Seconds between plain lines.
        stream: Output, stdout by default; a terminal gets a bar.
    """

    def __init__(
            self, total: int, unit: str = 'images', interval: float = 10., stream: TextIO | None = None) -> None:
        self.total, self.unit, self.interval = total, unit, interval
        self.stream = stream or sys.stdout
        self.count, self.skipped, self.label = 0, 0, ''
        self.start = self.last_line = time.perf_counter()
        self.bar = tqdm(total=total, unit=' ' + unit, file=self.stream, dynamic_ncols=True, leave=False) \
            if self.stream.isatty() else None

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def describe(self, label: str) -> None:
        """Name the part of the work that starts, e.g. 'epoch 3/15'."""
        self.label = label
        if self.bar is not None:
            self.bar.set_description(label)

    def skip(self, amount: int) -> None:
        """Count `amount` as already done; it does not enter the rate."""
        self.count = self.skipped = amount
        if self.bar is not None:
            self.bar.initial = self.bar.n = amount
            self.bar.refresh()

    def update(self, amount: int, **figures: float) -> None:
        """Count `amount` more; show `figures` beside the bar, or in a plain line if one is due."""
        self.count += amount
        shown = {name: f'{value:.4g}' for name, value in figures.items()}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(amount)
        elif time.perf_counter() - self.last_line >= self.interval:
            self.last_line = time.perf_counter()
            self.stream.write('  '.join([self.label, f'{self.count}/{self.total} {self.unit}']
                                        + [f'{name} {value}' for name, value in shown.items()]
                                        + [f'{self._rate():.0f} {self.unit}/s', f'{self._left()} left']) + '\n')
            self.stream.flush()

    def write(self, line: str) -> None:
        """Print a permanent line above the bar."""
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            self.stream.write(line + '\n')
            self.stream.flush()

    def _rate(self) -> float:
        return (self.count - self.skipped) / max(time.perf_counter() - self.start, 1e-9)

    def _left(self) -> str:
        return tqdm.format_interval((self.total - self.count) / max(self._rate(), 1e-9))
