"""Latencies that people measured on phones: coreml/results.csv, what its columns may hold, and the table of it."""
import csv
import datetime
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ResultsError
from ..measure.tables import format_table
from .config import COMPRESSIONS, COREML

__all__ = [
    'COLUMNS', 'Column', 'check_row', 'describe_results', 'format_row',
    'make_row', 'read_results']


# What a cell may hold: its text, or a ValueError that says what it should be ------------------------------------------

def _match(pattern: str, wanted: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(wanted)
        return text
    return read


def _choose(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f'one of {", ".join(allowed)}')
        return text
    return read


def _number(kind: type, least: float, most: float) -> Callable[[str], str]:
    wanted = f'{"a whole number" if kind is int else "a number"} from {least:g} to {most:g}'

    def read(text: str) -> str:
        if not re.fullmatch(r'\d+' if kind is int else r'\d+(\.\d+)?', text) or not least <= kind(text) <= most:
            raise ValueError(wanted)
        return text
    return read


def _read_date(text: str) -> str:
    wanted = 'a day as YYYY-MM-DD, not in the future'
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(wanted) from None
    if len(text) != 10 or day > datetime.date.today() + datetime.timedelta(days=1):  # it is tomorrow somewhere
        raise ValueError(wanted)
    return text


@dataclass(frozen=True)
class Column:
    """A column of the file.

    Attributes:
        meaning: For people, with the unit.
        read: The text of a cell, unchanged; ValueError says what it should be.
        optional: Whether a cell may be empty.
    """
    name: str
    meaning: str
    read: Callable[[str], str]
    optional: bool = False


_SOME_TEXT = _match(r'\S(.*\S)?', 'some text')
_VERSION = r'\d+(\.\d+){0,2}'

COLUMNS: tuple[Column, ...] = (
    Column('date', 'day of the measurement, YYYY-MM-DD', _read_date),
    Column('reporter', 'who measured', _SOME_TEXT),
    Column('device', 'as Apple calls it, e.g. iPhone 15 Pro', _match(
        r'(iPhone|iPad|Mac[a-zA-Z]*)\b.*\S', "Apple's name of the device, e.g. iPhone 15 Pro")),
    Column('os', 'system and version, e.g. iOS 18.1', _match(
        rf'(iOS|iPadOS|macOS) {_VERSION}', 'a system and its version, e.g. iOS 18.1')),
    Column('model', 'what was exported, e.g. care_s0', _match(r'[a-z0-9_]+(\.[a-z0-9_]+)?', 'a model, e.g. care_s0')),
    Column('form', 'phone, or trained for programs of --unfused', _choose('phone', 'trained')),
    Column('size', 'of the images, HEIGHTxWIDTH, pixels', _match(
        r'[1-9]\d{1,3}x[1-9]\d{1,3}', 'HEIGHTxWIDTH in pixels, e.g. 224x224')),
    Column('batch', 'images at a time', _number(int, 1, 1024)),
    Column('format', 'mlpackage or mlmodel', _choose(*COREML)),
    Column('precision', 'fp16 or fp32', _choose('fp16', 'fp32')),
    Column('compress', 'how the weights are stored', _choose(*COMPRESSIONS)),
    Column('input', 'image or tensor', _choose('image', 'tensor')),
    Column('target', 'oldest system of the program; empty for mlmodel', _match(
        r'iOS\d{2}', 'as --target says, e.g. iOS16'), True),
    Column('version', 'of caretrans that exported it', _match(rf'{_VERSION}', 'a version, e.g. 0.1.0')),
    Column('tool', 'what measured', _choose('xcode', 'coremltools', 'app')),
    Column('tool_version', 'of Xcode or coremltools; of the app, a link to it', _SOME_TEXT),
    Column('compute_units', 'what it was allowed to run on', _choose('all', 'cpu_and_ne', 'cpu_and_gpu', 'cpu_only')),
    Column('statistic', 'what latency_ms is of the runs', _choose('median', 'mean')),
    Column('runs', 'timed predictions; empty where the tool does not say', _number(int, 10, 1e6), True),
    Column('warm_up', 'predictions before them; empty where the tool does not say', _number(int, 0, 1e6), True),
    Column('latency_ms', 'milliseconds of one prediction', _number(float, 0.01, 1e5)),
    Column('load_ms', 'milliseconds to load the program', _number(float, 0.01, 1e6), True),
    Column('note', 'anything else: low power mode, case, temperature', _SOME_TEXT, True),
)
SYSTEMS = {'iPhone': 'iOS', 'iPad': 'iPadOS', 'Mac': 'macOS'}
SHOWN = ('model', 'size', 'format', 'precision', 'compress', 'form', 'device', 'os', 'compute_units', 'latency_ms',
         'statistic', 'runs', 'tool', 'date', 'reporter')


def check_row(row: dict[str, str]) -> None:
    """Whether each cell of a row holds what it may, and whether they fit together.

    Raises:
        ResultsError: Of the first that does not.
    """
    for column in COLUMNS:
        text = row[column.name]
        if not text and column.optional:
            continue
        try:
            column.read(text)
        except ValueError as error:
            raise ResultsError(f'{column.name} ({column.meaning}) is {text!r}, it must be {error}.') from None
    device, system = re.match(r'[a-zA-Z]+', row['device'])[0], row['os'].split()[0]
    wanted = next(value for name, value in SYSTEMS.items() if device.startswith(name))
    if system != wanted:
        raise ResultsError(f'os is {row["os"]!r} with device {row["device"]}: that runs {wanted}.')
    if bool(row['target']) != (row['format'] == 'mlpackage'):
        raise ResultsError(
            f'target is {row["target"]!r} with format {row["format"]}: an mlpackage has one, an mlmodel has none.')


def _check_names(names: list[str]) -> None:
    wanted = [column.name for column in COLUMNS]
    if names != wanted:
        missing, unknown = [n for n in wanted if n not in names], [n for n in names if n not in wanted]
        raise ResultsError(
            f'its columns must be {",".join(wanted)}, in this order'
            + (f'; {", ".join(missing)} missing' if missing else '')
            + (f'; {", ".join(unknown)} unknown' if unknown else '') + '.')


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a file, each checked.

    Raises:
        ResultsError: The file cannot be read or holds a mistake; the message names the line.
    """
    rows: list[dict[str, str]] = []
    try:
        with open(path, newline='', encoding='utf-8') as file:
            reader = csv.reader(file, strict=True)
            try:
                names = next(reader, [])
                _check_names(names)
                for cells in reader:
                    if len(cells) != len(names):
                        raise ResultsError(
                            f'{len(cells)} cells for {len(names)} columns; text with a comma goes into double quotes.')
                    row = dict(zip(names, cells, strict=True))
                    check_row(row)
                    if row in rows:
                        raise ResultsError('it repeats an earlier row: take one of them out.')
                    rows.append(row)
            except (ResultsError, csv.Error) as error:
                raise ResultsError(f'{path}, line {max(reader.line_num, 1)}: {error}') from None
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f'{path} cannot be read: {error}') from error
    return rows


def format_row(row: dict[str, str]) -> str:
    """A row as a line of the file, checked; columns that are left out are empty.

    Raises:
        ResultsError: It has other columns, or a wrong cell.
    """
    unknown = set(row) - {column.name for column in COLUMNS}
    if unknown:
        raise ResultsError(f'no columns of the file: {", ".join(sorted(unknown))}.')
    whole = {column.name: row.get(column.name, '') for column in COLUMNS}
    check_row(whole)
    line = io.StringIO()
    csv.writer(line, lineterminator='').writerow(whole.values())
    return line.getvalue()


def describe_results(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a Markdown table, the fastest of each model first."""
    ordered = sorted(rows, key=lambda row: (row['model'], row['size'], float(row['latency_ms'])))
    return format_table(SHOWN, [[row[name].replace('|', r'\|') for name in SHOWN] for row in ordered], markdown=True)


def make_row(facts: dict[str, str], measured: dict[str, str]) -> dict[str, str]:
    """A row of what a program says of itself (`coreml.read_facts`) and what was measured of it."""
    own = {column.name: facts[column.name] for column in COLUMNS if column.name in facts}
    return {**own, 'version': facts['caretrans'], **measured}
