"""Latencies measured on phones, by Core ML or in a browser: coreml/results.csv, its columns, and its table."""
import csv
import io
import re
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path

from ..errors import ResultsError
from ..measure.tables import format_table
from ..text import read_text
from .config import COMPRESSIONS, COREML, TOLERANCES

__all__ = [
    'BROWSER', 'COLUMNS', 'NAMES', 'Column', 'check_row', 'describe_results', 'format_row', 'make_row', 'read_results']


BROWSER = 'browser'
IN_BROWSER = {'onnx': ('fused', 'onnxruntime-web'), 'litert': ('bmm', 'LiteRT.js')}  # form of the network, and runtime
UNITS = ('all', 'cpu_and_ne', 'cpu_and_gpu', 'cpu_only')  # of Core ML


@dataclass(frozen=True)
class Column:
    """A column of the file.

    Attributes:
        meaning: For people, with the unit.
        wanted: Allowed contents, for people.
        pattern: Of an allowed text.
        optional: Whether a cell may be empty.
        bounds: Least and most, of a number.
    """
    name: str
    meaning: str
    wanted: str = 'some text'
    pattern: str = r'\S(.*\S)?'
    optional: bool = False
    bounds: tuple[float, float] | None = None

    def allows(self, text: str) -> bool:
        if self.optional and not text:
            return True
        return re.fullmatch(self.pattern, text) is not None and (
            self.bounds is None or self.bounds[0] <= float(text) <= self.bounds[1])


def _choice(name: str, meaning: str, *allowed: str) -> Column:
    return Column(name, meaning, f'one of {", ".join(allowed)}', '|'.join(map(re.escape, allowed)))


def _number(name: str, meaning: str, kind: type, least: float, most: float, optional: bool = False) -> Column:
    wanted = f'{"a whole number" if kind is int else "a number"} from {least:g} to {most:g}'
    return Column(name, meaning, wanted, r'\d+' if kind is int else r'\d+(\.\d+)?', optional, (least, most))


_VERSION = r'\d+(\.\d+){0,2}'

COLUMNS: tuple[Column, ...] = (
    Column('date', 'day of the measurement, YYYY-MM-DD', 'a day as YYYY-MM-DD, not in the future', r'\d{4}-\d\d-\d\d'),
    Column('reporter', 'who measured'),
    Column('device', 'as its maker calls it, e.g. iPhone 15 Pro'),
    Column('os', 'system and version, e.g. iOS 18.1', 'a system and its version, e.g. iOS 18.1',
          rf'[A-Za-z][A-Za-z ]* {_VERSION}'),
    Column('model', 'what was exported, e.g. care_s0', 'a model, e.g. care_s0', r'[a-z0-9_]+(\.[a-z0-9_]+)?'),
    _choice('form', 'phone; fused (onnx) or bmm (litert) in browsers; trained for programs of --unfused', 'phone',
            'fused', 'bmm', 'trained'),
    Column('size', 'of the images, HEIGHTxWIDTH, pixels', 'HEIGHTxWIDTH in pixels, e.g. 224x224',
          r'[1-9]\d{1,3}x[1-9]\d{1,3}'),
    _number('batch', 'images at a time', int, 1, 1024),
    _choice('format', 'mlpackage, mlmodel, onnx or litert', *COREML, *IN_BROWSER),
    _choice('precision', 'fp16 or fp32', 'fp16', 'fp32'),
    _choice('compress', 'how the weights are stored', *COMPRESSIONS),
    _choice('input', 'image or tensor', 'image', 'tensor'),
    Column('target', 'oldest system of the program; empty for mlmodel', 'a value of --target, e.g. iOS16', r'iOS\d{2}',
          optional=True),
    Column('version', 'of caretrans that exported it', 'a version, e.g. 0.1.0', _VERSION),
    _choice('tool', 'what measured', 'xcode', 'coremltools', 'app', BROWSER),
    Column('tool_version', 'of Xcode or coremltools; of the app, a link to it; name and version of the browser'),
    Column('runtime', 'what ran the program, with its version; empty for Core ML', optional=True),
    _choice('compute_units', 'what it was allowed to run on', *UNITS, 'gpu_only'),
    _number('threads', 'of the CPU; empty for Core ML and GPUs', int, 1, 256, optional=True),
    _choice('statistic', 'what latency_ms is of the runs', 'median', 'mean'),
    _number('runs', 'timed predictions; empty where the tool does not say', int, 10, 1e6, optional=True),
    _number('warm_up', 'predictions before them; empty where the tool does not say', int, 0, 1e6, optional=True),
    _number('latency_ms', 'milliseconds of one prediction', float, 0.01, 1e5),
    _number('p10_ms', '10th percentile of the runs', float, 0.01, 1e5, optional=True),
    _number('p90_ms', '90th percentile of the runs', float, 0.01, 1e5, optional=True),
    _number('first_ms', 'milliseconds of the first prediction', float, 0.01, 1e6, optional=True),
    _number('load_ms', 'milliseconds to load the program', float, 0.01, 1e6, optional=True),
    _number('drift', 'median of the last fifth of the runs over that of the first', float, 0.01, 100, optional=True),
    Column('error', 'largest error of a logit over the largest logit', 'a number such as 2.4e-6',
           r'\d(\.\d+)?(e-\d+)?', optional=True),
    Column('program', 'first 12 digits of the SHA-256 of the file', '12 hexadecimal digits', '[0-9a-f]{12}',
           optional=True),
    Column('note', 'anything else: low power mode, case, temperature', optional=True),
)
NAMES = [column.name for column in COLUMNS]
SYSTEMS = {'iPhone': 'iOS', 'iPad': 'iPadOS', 'Mac': 'macOS'}
SHOWN = ('model', 'size', 'format', 'precision', 'compress', 'form', 'device', 'os', 'tool', 'tool_version', 'runtime',
         'compute_units', 'threads', 'latency_ms', 'statistic', 'runs', 'date', 'reporter')

# Narrower columns for rows of each kind
IN_CORE_ML = (
    Column('device', 'as Apple calls it, e.g. iPhone 15 Pro', "Apple's name of the device, e.g. iPhone 15 Pro",
           r'(iPhone|iPad|Mac[a-zA-Z]*)\b.*\S'),
    Column('os', 'system and version, e.g. iOS 18.1', 'a system and its version, e.g. iOS 18.1',
           rf'(iOS|iPadOS|macOS) {_VERSION}'),
    _choice('form', 'phone, or trained for programs of --unfused', 'phone', 'trained'),
    _choice('format', 'mlpackage or mlmodel', *COREML),
    _choice('compute_units', 'what it was allowed to run on', *UNITS))
MEASURED = ('runs', 'warm_up', 'p10_ms', 'p90_ms', 'first_ms', 'load_ms', 'drift', 'error', 'program')
IN_BROWSERS = (
    _choice('form', 'of the network', 'fused', 'bmm'), _choice('format', 'of the program', *IN_BROWSER),
    _choice('compress', 'how the weights are stored', 'none'), _choice('input', 'of the program', 'tensor'),
    Column('target', 'for Core ML only', 'empty', ''),
    Column('runtime', 'what ran the program, with its version', 'a runtime, e.g. onnxruntime-web 1.30.0 wasm',
           r'[A-Za-z.-]+ \d+(\.\d+)+ (wasm|webgpu)'),
    _choice('compute_units', 'what it was allowed to run on', 'cpu_only', 'gpu_only'),
    *(replace(column, optional=False) for column in COLUMNS if column.name in MEASURED))


def _is_past(text: str) -> bool:
    try:
        return date.fromisoformat(text) <= date.today() + timedelta(days=1)  # it is tomorrow somewhere
    except ValueError:
        return False


def _check_core_ml(row: dict[str, str]) -> None:
    wanted = next(system for name, system in SYSTEMS.items() if row['device'].startswith(name))
    if row['os'].split()[0] != wanted:
        raise ResultsError(f'os is {row["os"]!r} with device {row["device"]}: that runs {wanted}.')
    if bool(row['target']) != (row['format'] == 'mlpackage'):
        raise ResultsError(
            f'target is {row["target"]!r} with format {row["format"]}: an mlpackage has one, an mlmodel has none.')


def _check_browser(row: dict[str, str]) -> None:
    form, runtime = IN_BROWSER[row['format']]
    if row['form'] != form or row['runtime'].split()[0] != runtime:
        raise ResultsError(
            f'form is {row["form"]!r} and runtime {row["runtime"]!r} with format {row["format"]}: that has form '
            f'{form}, and {runtime} runs it.')
    on_cpu = row['runtime'].endswith('wasm')
    if on_cpu != (row['compute_units'] == 'cpu_only') or on_cpu != bool(row['threads']):
        raise ResultsError(
            f'compute_units is {row["compute_units"]!r} and threads {row["threads"]!r} with runtime {row["runtime"]}: '
            f'wasm is cpu_only and has threads, webgpu is gpu_only and has none.')
    if row['format'] == 'litert' and not (on_cpu and row['precision'] == 'fp32'):
        raise ResultsError(
            f'precision is {row["precision"]} and runtime {row["runtime"]!r} with format litert: the page runs it in '
            f'fp32 and by wasm only.')
    p10, median, p90 = (float(row[name]) for name in ('p10_ms', 'latency_ms', 'p90_ms'))
    if row['statistic'] != 'median' or not p10 <= median <= p90:
        raise ResultsError(
            f'latency_ms is {row["latency_ms"]}, p10_ms {row["p10_ms"]}, p90_ms {row["p90_ms"]} and statistic '
            f'{row["statistic"]}: a browser reports the median, between the two percentiles.')
    if float(row['error']) > TOLERANCES[row['precision']]:
        raise ResultsError(
            f'error is {row["error"]}, more than {TOLERANCES[row["precision"]]:g}: a program that computes something '
            f'else has no latency.')


def check_row(row: dict[str, str]) -> None:
    """Check each cell of a row, and that cells fit together.

    Raises:
        ResultsError: Names the first mistake.
    """
    is_browser = row['tool'] == BROWSER
    narrow = {column.name: column for column in (IN_BROWSERS if is_browser else IN_CORE_ML)}
    for column in COLUMNS:
        text, column = row[column.name], narrow.get(column.name, column)
        if not column.allows(text) or column.name == 'date' and not _is_past(text):
            raise ResultsError(f'{column.name} ({column.meaning}) is {text!r}, it must be {column.wanted}.')
    (_check_browser if is_browser else _check_core_ml)(row)


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a file, each checked.

    Raises:
        ResultsError: The file cannot be read or holds a mistake; the message names the line.
    """
    rows: list[dict[str, str]] = []
    reader = csv.reader(io.StringIO(read_text(path, ResultsError)), strict=True)
    try:
        names = next(reader, [])
        if names != NAMES:
            missing, unknown = sorted({*NAMES} - {*names}), sorted({*names} - {*NAMES})
            raise ResultsError(
                f'its columns must be {",".join(NAMES)}, in this order'
                + ('; it has no such header' if len(missing) == len(NAMES) else
                   (f'; {", ".join(missing)} missing' if missing else '')
                   + (f'; {", ".join(unknown)} unknown' if unknown else '')) + '.')
        for cells in reader:
            if len(cells) < 2 and not ''.join(cells).strip():  # a blank line
                continue
            if len(cells) != len(names):
                raise ResultsError(
                    f'{len(cells)} cells for {len(names)} columns; text with a comma goes into double quotes.')
            row = dict(zip(names, cells, strict=True))
            check_row(row)
            if row in rows:
                raise ResultsError('it repeats an earlier row: remove one of them.')
            rows.append(row)
    except (ResultsError, csv.Error) as error:
        raise ResultsError(f'{path}, line {max(reader.line_num, 1)}: {error}') from None
    return rows


def format_row(row: dict[str, str]) -> str:
    """A row as a line of the file, checked; missing columns are empty.

    Raises:
        ResultsError: It has unknown columns, or a wrong cell.
    """
    unknown = set(row) - set(NAMES)
    if unknown:
        raise ResultsError(f'no columns of the file: {", ".join(sorted(unknown))}.')
    whole = {name: row.get(name, '') for name in NAMES}
    check_row(whole)
    line = io.StringIO()
    csv.writer(line, lineterminator='').writerow(whole.values())
    return line.getvalue()


def describe_results(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a Markdown table, the fastest of each model first."""
    ordered = sorted(rows, key=lambda row: (row['model'], row['size'], float(row['latency_ms'])))
    return format_table(SHOWN, [[row[name].replace('|', r'\|') for name in SHOWN] for row in ordered], markdown=True)


def make_row(facts: dict[str, str], measured: dict[str, str]) -> dict[str, str]:
    """A row of the metadata in a program (`convert.read_facts`) and of what was measured."""
    return {**{name: facts[name] for name in NAMES if name in facts}, 'version': facts['caretrans'], **measured}
