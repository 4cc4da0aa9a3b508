"""The tables of a README: their parameters and multiply-adds counted again, and the measured ones written anew."""
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn

from ..errors import ConfigError
from ..fuse import to_form
from ..measure.counts import count_operations, count_parameters, make_empty
from ..measure.names import parse_size

__all__ = ['BEGIN', 'END', 'check_readme', 'find_place', 'update_readme']

BEGIN, END = '<!-- benchmark: begin -->', '<!-- benchmark: end -->'
COLUMNS = {  # header of a column: what it holds, in units of
    'parameters, two heads': ('parameters_two_heads', 1), 'one head': ('parameters_one_head', 1),
    'GMACs at 224 x 224': ('gmacs', 1), 'GMACs': ('gmacs', 1), 'GMACs rewritten': ('gmacs_fused', 1),
    'parameters, M': ('parameters', 1e6), 'rewritten, M': ('parameters_fused', 1e6),
    'activations rewritten, M': ('activations_fused', 1e6),
}


def _list_tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows of each Markdown table."""
    for block in re.findall(r'(?:^\|.*\|\n)+', text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in block.splitlines()]
        if len(rows) > 2:
            yield rows[0], rows[2:]


def _rewrite(model: nn.Module, name: str) -> nn.Module:
    try:
        return to_form(model)
    except RuntimeError:  # a rewrite that needs values
        return to_form(timm.create_model(name).eval())


@lru_cache(maxsize=None)
def _count(name: str, size: tuple[int, int]) -> dict[str, Any]:
    model = make_empty(name)
    fused = _rewrite(model, name)
    trained, rewritten = count_operations(model, size), count_operations(fused, size)
    two_headed = make_empty(name, distilled=True) if getattr(model, 'distilled', None) is False else model
    return dict(
        count_parameters(model, fused), parameters_two_heads=count_parameters(two_headed)['parameters'],
        gmacs=trained.gmacs, gmacs_fused=rewritten.gmacs, activations_fused=rewritten.activations)


def _compare(header: list[str], row: list[str]) -> Iterator[str]:
    """For each figure of a row that can be counted, '' or how it differs; rows of models have a name in backticks."""
    name, cells = row[0].strip('`'), dict(zip(header, row, strict=False))
    wanted = {column: COLUMNS[column] for column in header if column in COLUMNS}
    if not wanted or not timm.is_model(name):
        if wanted and row[0].startswith('`'):
            yield f'{name}: no such model'
        return
    counts = _count(name, parse_size(cells.get('image', '224').replace(' ', '')))
    for column, (key, unit) in wanted.items():
        cell = cells.get(column, '')
        counted = f'{counts[key] / unit:,.{len(cell.partition(".")[2])}f}'
        yield '' if counted == cell else f'{name}, {column}: {cell or "nothing"} there, {counted} counted'


def check_readme(path: Path) -> tuple[int, list[str]]:
    """Count parameters and multiply-adds of the models in the tables of a Markdown file again.

    Returns:
        How many figures were compared, and a line for each that differs, which names model and column.
    Raises:
        ConfigError: The file is not there, or has no such table.
    """
    if not Path(path).is_file():
        raise ConfigError(f'{path} is not there: name the file with --readme.')
    found = [line for header, rows in _list_tables(Path(path).read_text()) for row in rows
             for line in _compare(header, row)]
    if not found:
        raise ConfigError(f'{path} has no table of models with a column of {", ".join(COLUMNS)}.')
    return len(found), [line for line in found if line]


def find_place(path: Path) -> tuple[str, str]:
    """What stands before and after the measured tables of a file, with the markers `BEGIN` and `END`.

    Raises:
        ConfigError: The file or the markers are not there, or it cannot be written.
    """
    if not Path(path).is_file() or not os.access(path, os.R_OK | os.W_OK):
        raise ConfigError(f'{path} is not a file that can be written: name one with --readme.')
    before, begin, rest = Path(path).read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f'{path} has no place for the tables: put {BEGIN} and {END} where they belong.')
    return before + begin, end + after


def update_readme(path: Path, lines: Sequence[str]) -> None:
    """Put lines between the markers `BEGIN` and `END` of a file, in place of those that are there.

    Raises:
        ConfigError: As of `find_place`.
    """
    before, after = find_place(path)
    Path(path).write_text('\n'.join([before, *lines, after]))
