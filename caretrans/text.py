"""Text files in UTF-8, whatever the locale says, and names that are not UTF-8.

Python keeps the bytes of such names of files and classes as surrogates, which no encoding can write. Wherever a name is
printed or written, they are escaped: 'caf\\udce9'.
"""
import codecs
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ['count_noun', 'escape', 'escape_output', 'open_text', 'read_text', 'to_utf8', 'utf8_path', 'write_text']

BYTE_ORDER_MARKS = {codecs.BOM_UTF8: 'utf-8-sig', codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
WRITING = dict(encoding='utf-8', errors='backslashreplace')
SURROGATE = re.compile('[\ud800-\udfff]')
CONTROLS = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029]')


def count_noun(number: int, singular: str, plural: str = '') -> str:
    """'1 epoch', '2 epochs', '3 forward passes'."""
    return f'{number} {singular if number == 1 else plural or singular + "s"}'


def read_text(path: str | Path, error: type[Exception], flag: str = '') -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, as some programs on Windows write it.

    Args:
        flag: Flag that names the file, for messages.
    Raises:
        error: The file cannot be read, or has another encoding; the message names the line.
    """
    name = f'{flag} {path}'.lstrip()
    try:
        data = Path(path).read_bytes()
    except OSError as problem:
        raise error(f'{name} cannot be read: {problem.strerror or problem}.') from None
    encoding = next((codec for mark, codec in BYTE_ORDER_MARKS.items() if data.startswith(mark)), 'utf-8')
    try:
        text = data.decode(encoding)
        if '\0' in text:
            raise UnicodeDecodeError(encoding, data, data.index(b'\0'), len(data), 'zero byte')
    except UnicodeDecodeError as problem:
        line = data[:problem.start].count(b'\n') + 1
        raise error(
            f'{name} is not {encoding[:6].rstrip("-").upper()} text ({problem.reason} in line {line}): save it as '
            f'UTF-8.') from None
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8."""
    Path(path).write_text(text, **WRITING)


def open_text(path: str | Path, mode: str) -> Any:
    """Open a file to write lines in UTF-8, with the line ends of the caller, such as `csv`."""
    return open(path, mode, newline='', **WRITING)


def escape(text: Any) -> str:
    """One line of text for messages, and for libraries that refuse surrogates: these and control characters escaped."""
    text = CONTROLS.sub(lambda match: match[0].encode('unicode_escape').decode(), str(text))
    return text.encode(**WRITING).decode('utf-8')


def to_utf8(name: str) -> str:
    """A name of a file as it is under a UTF-8 locale, so that the classes of a folder do not depend on the locale."""
    return os.fsencode(name).decode('utf-8', sys.getfilesystemencodeerrors())


@contextmanager
def utf8_path(path: str | Path) -> Iterator[str]:
    """The path of a file or folder for libraries that accept only UTF-8. Other names exist on Linux only."""
    if SURROGATE.search(str(path)) is None:
        yield str(path)
        return
    file = os.open(path, os.O_RDONLY)
    try:
        yield f'/proc/self/fd/{file}'
    finally:
        os.close(file)


def escape_output() -> None:
    """Let stdout and stderr escape what their encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
