"""Reading WebDataset shards: timm's reader of their description, an order and a sharing-out that can be repeated.

timm's own pipeline draws its order from the state of the workers, repeats or skips up to a shard of images per
worker, decodes with Pillow, and only logs what it cannot read. Here the order depends on (seed, epoch, place) alone,
the bytes of the images come out undecoded, and every image that is lost comes out as a record that says why.
"""
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

from timm.data.readers.reader_wds import ReaderWds
from webdataset.tariterators import tarfile_samples

from ..seeds import derive_seed
from .folders import list_endings

__all__ = ['Record', 'ShardReader', 'mix', 'share_shards']

PREFERRED = ['jpg', 'jpeg', 'png', 'webp']  # of several images in a record, as of a mask beside its image
MIXED = 2048  # records in memory from which the next is drawn; ImageNet's are 110 kB each, so 225 MB in every worker


class Record(NamedTuple):
    """An image of a shard, not decoded: `data` is None when it is lost, and `reason` says why."""
    name: str
    data: bytes | None
    label: int = -1
    reason: str = ''


def share_shards(shards: Sequence[int], part: int, parts: int) -> list[tuple[int, int, int]]:
    """(shard, first record, step) that one of `parts` readers reads: whole shards, or every so many records of one."""
    if len(shards) >= parts:
        return [(shard, 0, 1) for shard in shards[part::parts]]
    place = part % len(shards)
    return [(shards[place], part // len(shards), len(range(place, parts, len(shards))))]


def mix(records: Iterable[Record], generator: random.Random, size: int = MIXED) -> Iterator[Record]:
    """The records in an order drawn from a buffer of `size`."""
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


class ShardReader(ReaderWds):
    """Shards described by an `_info.json`: timm's `splits`, and the names of the `classes` where it has them."""

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.class_to_idx: dict[str, int] = {name: i for i, name in enumerate(self.info.get('classes', []))}
        self.urls = [f'{root}/{name}' for name in self.split_info.filenames]
        self.lengths = self.split_info.shard_lengths or [0] * len(self.urls)

    def __len__(self) -> int:
        return self.num_samples

    def read(self, part: int, parts: int) -> Iterator[Record]:
        """The records of one of `parts` readers, in order; all readers together give every record once."""
        return self._read_shards(range(len(self.urls)), part, parts)

    def read_mixed(self, part: int, parts: int, seed: int, epoch: int) -> Iterator[Record]:
        """The same without end and mixed. Round after round the shards change hands, each record once in a round."""
        for turn in count():
            shards = list(range(len(self.urls)))
            random.Random(derive_seed(seed, epoch, turn)).shuffle(shards)
            generator = random.Random(derive_seed(seed, epoch, turn, part))
            empty = True
            for record in mix(self._read_shards(shards, part, parts), generator):
                empty = False
                yield record
            if empty:
                raise RuntimeError(f'Reader {part} of {parts} gets no images of {self.root}: use fewer workers.')

    def _read_shards(self, shards: Sequence[int], part: int, parts: int) -> Iterator[Record]:
        for shard, first, step in share_shards(shards, part, parts):
            for i, record in enumerate(self._read_shard(self.urls[shard], self.lengths[shard])):
                if i % step == first:
                    yield record

    def _read_shard(self, url: str, length: int) -> Iterator[Record]:
        """All records of a shard; with `length` known, those that a damaged one lost among them."""
        errors: list[Exception] = []
        found = 0
        for sample in tarfile_samples([dict(url=url)], handler=lambda error: errors.append(error) or True):
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
