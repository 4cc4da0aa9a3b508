"""Pages with tables of models: recount their parameters and multiply-adds, and write the results of docs/benchmarks.md.
"""
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm

from ..errors import ConfigError
from ..fuse import to_form
from ..measure.counts import count_operations, count_parameters, make_empty
from ..measure.names import parse_size
from ..text import read_text, write_text

__all__ = ['PAGE', 'README', 'RESULTS', 'check_readme', 'write_page']

ROOT = Path(__file__).parents[2]
README, PAGE = ROOT / 'README.md', ROOT / 'docs' / 'benchmarks.md'
RESULTS = '## Results'  # heading that the results of --update follow
COLUMNS = {  # header of a column: what it holds, in units of
    'parameters, two heads': ('parameters_two_heads', 1), 'one head': ('parameters_one_head', 1),
    'GMACs at 224 x 224': ('gmacs', 1), 'GMACs': ('gmacs', 1), 'GMACs fused': ('gmacs_fused', 1),
    'parameters, M': ('parameters', 1e6), 'fused, M': ('parameters_fused', 1e6),
    'activations fused, M': ('activations_fused', 1e6),
}


# Check ----------------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=None)
def _count(name: str, size: tuple[int, int]) -> dict[str, Any]:
    model = make_empty(name)
    try:
        fused = to_form(model)
    except RuntimeError:  # a model that cannot be fused on the meta device
        fused = to_form(model.to_empty(device='cpu')).to('meta')
        model = make_empty(name)
    counts, fused_counts = count_operations(model, size), count_operations(fused, size)
    two_headed = make_empty(name, distilled=True) if getattr(model, 'distilled', None) is False else model
    return dict(
        count_parameters(model, fused), parameters_two_heads=count_parameters(two_headed)['parameters'],
        gmacs=counts.gmacs, gmacs_fused=fused_counts.gmacs, activations_fused=fused_counts.activations)


def _compare(header: list[str], row: list[str]) -> Iterator[str]:
    """Compare each countable figure of a row: '' or the difference; rows of models have a name in backticks."""
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
        yield '' if counted == cell else f'{name}, {column}: the page has {cell or "nothing"}, counted {counted}'


def check_readme(path: Path) -> tuple[int, list[str]]:
    """Count parameters and multiply-adds of the models in the tables of a Markdown file again.

    Returns:
        The number of figures compared, and a line for each that differs, which names model and column.
    Raises:
        ConfigError: The file does not exist, or has no such table.
    """
    if not Path(path).is_file():
        raise ConfigError(f'{path} does not exist: name the file with --readme.')
    found = []
    for block in re.findall(r'(?:^\|.*\|\n)+', read_text(path, ConfigError), re.MULTILINE):
        header, *rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in block.splitlines()]
        found += [line for row in rows[1:] for line in _compare(header, row)]
    if not found:
        raise ConfigError(f'{path} has no table of models with a column of {", ".join(COLUMNS)}.')
    return len(found), [line for line in found if line]


# Write ----------------------------------------------------------------------------------------------------------------

def write_page(page: Path, lines: Sequence[str]) -> None:
    """Write the results into docs/benchmarks.md or another page, in place of everything below its heading of results.

    Args:
        lines: Result of `report.describe_result`, in Markdown.
    """
    text = read_text(page, ConfigError) if page.exists() else f'# Benchmarks\n\n{RESULTS}\n'
    introduction = text.splitlines()[:text.splitlines().index(RESULTS) + 1]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, '\n'.join([*introduction, '', *lines, '']))
