"""Reader of WebDataset shards, on top of timm's reader of their description.

timm's own pipeline draws its order from the state of the workers, repeats or skips up to a shard of images per worker,
decodes with Pillow, and only logs what it cannot read. Here the order depends on (seed, epoch, place) alone, images are
returned as bytes, and a missing image is a record with the reason.
"""
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

from timm.data.readers.reader_wds import ReaderWds
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_iterator

from ..errors import DataError
from ..seeds import derive_seed
from .folders import list_endings

__all__ = ['Record', 'ShardReader', 'mix', 'share_shards']

PREFERRED = ['jpg', 'jpeg', 'png', 'webp']  # of several images in a record, as of a mask beside its image
MIXED = 2048  # records in memory from which the next is drawn; ImageNet's are 110 kB each, so 225 MB in every worker


class Record(NamedTuple):
    """The bytes of an image in a shard; if it is missing, `data` is None and `reason` says why."""
    name: str
    data: bytes | None
    label: int = -1
    reason: str = ''


def share_shards(shards: Sequence[int], part: int, parts: int) -> list[tuple[int, int, int]]:
    """(shard, first record, step) of one of `parts` readers: whole shards, or every `step`th record of one shard."""
    if len(shards) >= parts:
        return [(shard, 0, 1) for shard in shards[part::parts]]
    place = part % len(shards)
    return [(shards[place], part // len(shards), len(range(place, parts, len(shards))))]


def mix(records: Iterable[Record], generator: random.Random, size: int = MIXED) -> Iterator[Record]:
    """Shuffle records in a buffer of `size`."""
    buffer: list[Record] = []
    for record in records:
        if len(buffer) < size:
            buffer.append(record)
            continue
        place = generator.randrange(size)
        yield buffer[place]
        buffer[place] = record
    generator.shuffle(buffer)
    yield from buffer


def _keep(errors: list[Exception]) -> Callable[[Exception], bool]:
    """A handler of webdataset that collects the errors and continues."""
    return lambda error: errors.append(error) or True


def _list_files(url: str, errors: list[Exception]) -> Iterator[dict[str, Any]]:
    """The files in a shard. webdataset itself would take 'a:b/x.tar' for a protocol, and skip a class '__x__'."""
    try:
        with open(url, 'rb') if os.path.isfile(url) else gopen(url) as stream:
            for file in tar_file_iterator(stream, skip_meta=None, handler=_keep(errors)):
                yield dict(file, __url__=url)
    except Exception as error:  # whatever a damaged tar or a server raises
        errors.append(error)


def _split_name(name: str) -> tuple[str | None, str | None]:
    """The key and the kind of a file: its path up to the first dot of its name, and what follows."""
    folder, slash, file = name.rpartition('/')
    stem, dot, kind = file.partition('.')
    return (folder + slash + stem, kind) if stem and dot else (None, None)


class ShardReader(ReaderWds):
    """Shards described by an `_info.json`: timm's `splits`, and optionally the names of the `classes`."""

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.class_to_idx: dict[str, int] = {name: i for i, name in enumerate(self.info.get('classes', []))}
        self.urls = [f'{root}/{name}' for name in self.split_info.filenames]
        self.lengths = self.split_info.shard_lengths or [0] * len(self.urls)

    def __len__(self) -> int:
        return self.num_samples

    def read(self, part: int, parts: int) -> Iterator[Record]:
        """The records of one of `parts` readers, in order; all readers together return every record once."""
        return self._read_shards(range(len(self.urls)), part, parts)

    def read_mixed(self, part: int, parts: int, seed: int, epoch: int) -> Iterator[Record]:
        """The same, shuffled and without end: in every round the shards are shared anew, each record comes once."""
        for turn in count():
            shards = list(range(len(self.urls)))
            random.Random(derive_seed(seed, epoch, turn)).shuffle(shards)
            generator = random.Random(derive_seed(seed, epoch, turn, part))
            empty = True
            for record in mix(self._read_shards(shards, part, parts), generator):
                empty = False
                yield record
            if empty:
                raise DataError(f'Reader {part} of {parts} has no images of {self.root}: use fewer workers.')

    def _read_shards(self, shards: Sequence[int], part: int, parts: int) -> Iterator[Record]:
        for shard, first, step in share_shards(shards, part, parts):
            for i, record in enumerate(self._read_shard(self.urls[shard], self.lengths[shard])):
                if i % step == first:
                    yield record

    def _read_shard(self, url: str, length: int) -> Iterator[Record]:
        """All records of a shard; if `length` is known, also one for each image that a damaged shard lost."""
        errors: list[Exception] = []
        found = 0
        for sample in group_by_keys(_list_files(url, errors), keys=_split_name, handler=_keep(errors)):
            found += 1
            yield self._to_record(sample, url)
        reason = f'{type(errors[0]).__name__}: {errors[0].args[0]}' if errors else 'the shard ends early'
        for place in range(found, length or found + bool(errors)):
            yield Record(f'{url}, image {place}', None, reason=reason)

    def _to_record(self, sample: dict[str, Any], url: str) -> Record:
        name = f'{url}, {sample["__key__"]}'
        kinds = [key for key in [*PREFERRED, *sample] if key in sample and f'.{key}' in list_endings()]
        data = sample[kinds[0]] if kinds else None
        if data is None:
            return Record(name, None, reason=f'no image among {", ".join(k for k in sample if k[0] != "_")}')
        try:
            field = self.split_info.alt_label  # of a JSON object beside the image; else a number in .cls
            return Record(name, data, int(json.loads(sample['json'])[field]) if field else int(sample['cls']))
        except (KeyError, ValueError, TypeError) as error:
            return Record(name, None, reason=f'no label: {type(error).__name__}: {error}')
