"""Pages with tables of models: recount their parameters and multiply-adds, and write docs/benchmarks.md."""
import os
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

__all__ = ['PAGE', 'README', 'check_page', 'check_readme', 'write_page']

ROOT = Path(__file__).parents[2]
README, PAGE = ROOT / 'README.md', ROOT / 'docs' / 'benchmarks.md'
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
    except RuntimeError:  # fusing this model needs memory, whatever the values
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
    for block in re.findall(r'(?:^\|.*\|\n)+', Path(path).read_text(), re.MULTILINE):
        header, *rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in block.splitlines()]
        found += [line for row in rows[1:] for line in _compare(header, row)]
    if not found:
        raise ConfigError(f'{path} has no table of models with a column of {", ".join(COLUMNS)}.')
    return len(found), [line for line in found if line]


# Write ----------------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Benchmarks

This page is written whole by `bash cmd/benchmark.sh --update`: change its text in `caretrans/bench/readme.py`.

```bash
# parameters, GMACs by stage and kind, latency of every backend
python benchmark.py --model care_s1
# several number formats and batch sizes; what a backend does not support is skipped
python benchmark.py --model care_s1 --dtype float32 bfloat16 int8 --batch-size 1 32
# CARE and the models it is compared with, in one table; `paper` stands for the models of the CARE paper's table
python benchmark.py --model 'care_*' 'casvit_*' 'mlla_*'
# the setup of the paper's RTX 4090 column
python benchmark.py --model care_s1 --published --device cuda
# where the time goes, and the roofline
python benchmark.py --model care_s1 --bench profile
# training steps, as published and faster
python benchmark.py --model care_s0 --bench train --teacher none regnety_160
# accuracy of a trained model in each number format
python benchmark.py --model care_s0 --bench accuracy --checkpoint FILE --dtype bfloat16 int8
# plots: accuracy against latency and GMACs, time by part, growth with resolution; or one picture alone
python benchmark.py --model paper --plots plots
bash cmd/benchmark.sh --backend openvino --plots docs/images/accuracy_latency.png
# recounts the parameters and GMACs of README.md and this page
python benchmark.py --check
# writes this page, in about 5 minutes
bash cmd/benchmark.sh --update --backend eager fused onnxruntime openvino --runs 10
# everything that needs a GPU
bash cmd/benchmark_gpu.sh
```

ONNX Runtime and OpenVINO are installed by `pip install ".[benchmark]"`, or by the scripts in `cmd/`. Results
are written to `runs/benchmark/` as JSON and CSV.

## Method

`eager` is the original network, as published. Every other backend runs its fused form: batch norms, layer scales and
both heads are folded into the convolutions around them, exactly (`caretrans.fuse`); models of timm are reparameterized
as their authors do.

All candidates run in one process with one CPU thread, unless `--threads` says otherwise. They are timed interleaved:
ten rounds of short blocks in random order; a speed-up is the median over the rounds of the ratios of blocks in the same
round. The reference is timed twice; if the two disagree, or the runs vary too much, the row is marked `noisy`. Before a
candidate is timed, its logits are compared with the original network in float64, on real images, with random weights
chosen so that an error in any layer shows.

See [inference-speed.md](inference-speed.md) for the profile and what was tried, [gpu.md](gpu.md) for the Triton
kernels, and [comparison.md](comparison.md) for models trained on equal terms.

## Results
"""


def check_page(path: Path) -> None:
    """Refuse a page that cannot be written, or that `write_page` did not write, before anything is measured.

    Raises:
        ConfigError: It is such a page, or a folder.
    """
    nearest = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f'{path} cannot be written: name a writable file with --readme.')
    if path.exists() and not path.read_text().startswith(INTRODUCTION.splitlines()[0]):
        raise ConfigError(
            f'--update {path}: the page was not written by this command and would be replaced: name another with '
            f'--readme.')


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Write docs/benchmarks.md, or another page: the introduction, then the lines of the results.

    Args:
        lines: From `report.describe_result`, in Markdown.
    """
    path.write_text('\n'.join([INTRODUCTION, *lines, '']))
