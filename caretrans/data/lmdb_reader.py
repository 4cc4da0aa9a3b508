"""Images and labels in an LMDB file, in the layout of the published self-supervised pre-training.

The file `SPLIT.lmdb` has the keys b'0' to b'N-1', whose values are the bytes of an image and its label, b'__len__' and
b'__keys__'. A value was written by `pyarrow.serialize`, which pyarrow 12 removed: 16 bytes, then an Arrow stream that
every pyarrow reads. This module writes the same, so that the published code reads it with the pyarrow of its time.
"""
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

import lmdb
import pyarrow
from timm.data.readers.reader import Reader

from ..errors import DataError
from ..text import utf8_path
from .folders import FolderReader

__all__ = ['LmdbReader', 'decode_value', 'encode_value', 'write_lmdb']

HEADER = bytes(16)  # the numbers of tensors and buffers beside the stream: none
NULL, BINARY, INTEGER, TUPLE, LIST = '0', '4', '2', '12', '10'  # kinds of values in pyarrow.serialize
COMMIT = 5000  # images per transaction
ROOM = 1.25  # of the map beyond the bytes of the images, for pages that are not full
MIN_MAP = 1 << 24


def decode_value(value: bytes) -> Any:
    """The object of a value: a list of the bytes of an image and its label, a number, or a list of bytes.

    Raises:
        DataError: The value has another layout.
    """
    try:
        return pyarrow.ipc.open_stream(pyarrow.py_buffer(value)[len(HEADER):]).read_all().to_pylist()[0]['list']
    except (pyarrow.ArrowInvalid, OSError, IndexError, KeyError) as error:
        raise DataError(f'not written by pyarrow.serialize ({" ".join(str(error).split())[:100]})') from None


def _make_union(kinds: Sequence[str], children: dict[str, pyarrow.Array]) -> pyarrow.UnionArray:
    """Values of these kinds in order, as the dense union that pyarrow.serialize made: its first child is null."""
    children = {NULL: pyarrow.array([], pyarrow.null()), **children}
    codes = [list(children).index(kind) for kind in kinds]
    counters = defaultdict(count)
    places = [next(counters[kind]) for kind in kinds]
    return pyarrow.UnionArray.from_dense(
        pyarrow.array(codes, pyarrow.int8()), pyarrow.array(places, pyarrow.int32()), list(children.values()),
        list(children))


def encode_value(value: int | Sequence[Any]) -> bytes:
    """The value of a number, of a list of bytes, or of the bytes of an image and its label; see `decode_value`."""
    if isinstance(value, int):
        column = _make_union([INTEGER], {INTEGER: pyarrow.array([value], pyarrow.int64())})
    else:
        kinds = [INTEGER if isinstance(item, int) else BINARY for item in value]
        children = {BINARY: pyarrow.array([item for item in value if isinstance(item, bytes)], pyarrow.binary())}
        if INTEGER in kinds:
            children[INTEGER] = pyarrow.array([item for item in value if isinstance(item, int)], pyarrow.int64())
        items = pyarrow.ListArray.from_arrays([0, len(kinds)], _make_union(kinds, children))
        kind = TUPLE if INTEGER in kinds else LIST
        column = _make_union([kind], {kind: items})
    batch, stream = pyarrow.record_batch([column], ['list']), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(stream, batch.schema) as writer:
        writer.write_batch(batch)
    return HEADER + stream.getvalue().to_pybytes()


@lru_cache(maxsize=None)
def _open_file(path: str) -> lmdb.Environment:
    """The open file, one per process: LMDB refuses to open a file twice.

    Without locks and for reading only, a worker that was forked may use that of its parent.
    """
    with utf8_path(path) as name:
        return lmdb.open(name, subdir=False, readonly=True, lock=False, readahead=False, meminit=False)


class LmdbReader(Reader):
    """Images of an LMDB file, for timm's `ImageDataset`; copies in other processes open it again.

    Raises:
        DataError: It is no LMDB file, or not in this layout.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = str(path)
        self._open()
        try:
            self.length = int(self._get(b'__len__'))
        except (TypeError, ValueError):
            raise DataError(f'{path}: its __len__ is no number: write the file again.') from None

    def _open(self) -> None:
        try:
            self.environment = _open_file(os.path.realpath(self.path))
        except lmdb.Error as error:
            raise DataError(f'{self.path} is not a complete LMDB file ({error}): copy or write it again.') from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != 'environment'}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _get(self, key: bytes) -> Any:
        with self.environment.begin(buffers=True) as transaction:
            value = transaction.get(key)
            if value is None:
                raise DataError(f'{self.path} has no key {key.decode()}: it is incomplete, or not of images.')
            try:
                return decode_value(value)
            except DataError as error:
                raise DataError(f'{self.path}, key {key.decode()}: {error}.') from None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        image, label = self._get(str(index).encode())
        return io.BytesIO(image), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{os.path.basename(self.path) if basename else self.path}:{index}'


# Writing --------------------------------------------------------------------------------------------------------------

def _batch(reader: FolderReader) -> Iterator[list[tuple[bytes, bytes]]]:
    """The entries of the images, in lists that are written together."""
    for first in range(0, len(reader), COMMIT):
        entries = []
        for index in range(first, min(first + COMMIT, len(reader))):
            file, label = reader[index]
            with file:
                entries.append((str(index).encode(), encode_value([file.read(), label])))
        yield entries


def _fill(target: Path, batches: Iterable[list[tuple[bytes, bytes]]], size: int) -> None:
    with utf8_path(target.parent) as folder:
        environment = lmdb.open(os.path.join(folder, target.name), subdir=False, map_size=size, lock=False)
        try:
            for entries in batches:
                with environment.begin(write=True) as transaction:
                    for key, value in entries:
                        transaction.put(key, value)
            environment.sync()
        finally:
            environment.close()


def write_lmdb(source: str | Path, target: str | Path) -> int:
    """Write a folder of class folders as an LMDB file; the file gets its name once it is complete.

    Args:
        source: Folder with CLASS/*.jpg; labels are the classes in order.
        target: FILE.lmdb, beside which the published code expects its folder.
    Returns:
        The number of images.
    Raises:
        DataError: There are no images, or the target exists or cannot be written.
    """
    target, reader = Path(target), FolderReader(source)
    if target.exists():
        raise DataError(f'{target} already exists: choose another name, or remove it.')
    size = sum(os.path.getsize(path) for path, _ in reader.samples)
    keys = [str(index).encode() for index in range(len(reader))]
    last = [(b'__keys__', encode_value(keys)), (b'__len__', encode_value(len(keys)))]
    part = target.with_name(f'.{target.name}.part')
    part.unlink(missing_ok=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # a page of 4 kB at least for each image, and its overhead
        _fill(part, chain(_batch(reader), [last]), int(ROOM * size) + 8192 * len(keys) + MIN_MAP)
        part.replace(target)
    except (OSError, lmdb.Error) as error:
        part.unlink(missing_ok=True)
        raise DataError(f'{target} cannot be written ({error}): check the folder and free space.') from None
    return len(keys)
