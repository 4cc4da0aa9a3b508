"""Tables of text: aligned for a terminal, or in Markdown."""
import re
from collections.abc import Sequence
from typing import Any

__all__ = ['format_table', 'format_value']

NUMBER = re.compile(r'-|[\d.,]+(e[-+]\d+)?')


def format_value(value: Any) -> str:
    """Floats with about three significant digits, integers in full, '-' for None."""
    if value is None:
        return '-'
    if isinstance(value, int):
        return f'{value:,}'
    if isinstance(value, float):
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
        return f'{value:,.{digits}f}'
    return str(value)


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]], markdown: bool = False) -> list[str]:
    """Lines of a table; columns of words are left-aligned, of numbers right-aligned."""
    cells = [list(header)] + [[format_value(value) for value in row] for row in rows]
    if markdown:
        return [f'| {" | ".join(row)} |' for row in [cells[0], ['---'] * len(header), *cells[1:]]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    words = [not all(NUMBER.fullmatch(row[i]) for row in cells[1:]) for i in range(len(header))]
    return ['  '.join(cell.ljust(width) if left else cell.rjust(width)
                      for cell, width, left in zip(row, widths, words, strict=True)).rstrip() for row in cells]
