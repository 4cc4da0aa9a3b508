"""A miniature ILSVRC 2012: real images, packed and labelled as the real one is."""
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
from photos import FRUIT

from caretrans.data.imagenet import ILSVRC2012, Archive, Edition, main

WNIDS = {1: 'n02119789', 2: 'n03000684', 3: 'n01440764'}  # by ILSVRC id: not in the order of the WordNet ids
TRAIN_IMAGES = {'n02119789': 3, 'n03000684': 4, 'n01440764': 5}
VAL_IDS = [3, 1, 2, 2, 3, 1]
FIELDS = ['ILSVRC2012_ID', 'WNID', 'words', 'gloss', 'num_children', 'children', 'wordnet_height', 'num_train_images']


class Miniature(NamedTuple):
    """Its archives, what they are, the same as JSON, and all files that extraction should make."""
    folder: Path
    edition: Edition
    json: Path
    files: dict[str, bytes]


def pack(files: dict[str, bytes], mode: str = 'w') -> bytes:
    """A tar of files by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pack_devkit(val_ids: list[int] = VAL_IDS) -> bytes:
    """The development kit in its real layout; one synset is no class but a parent of the classes."""
    rows = [(number, wnid, f'{wnid}, a fruit', 'round', 0, np.zeros(0), 0, TRAIN_IMAGES[wnid])
            for number, wnid in WNIDS.items()]
    rows.append((4, 'n00000001', 'fruit', 'any', 3, np.array([1., 2., 3.]), 1, 0))
    synsets = np.array(rows, dtype=[(name, object) for name in FIELDS]).reshape(-1, 1)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {'synsets': synsets})
    truth = ''.join(f'{val_id}\n' for val_id in val_ids).encode()
    data = 'ILSVRC2012_devkit_t12/data'
    return pack({f'{data}/meta.mat': meta.getvalue(), f'{data}/ILSVRC2012_validation_ground_truth.txt': truth}, 'w:gz')


def read_images(split: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((FRUIT / split).glob('*/*.jpg'))[::40]]


def train_tars() -> dict[str, bytes]:
    photos, tars = iter(read_images('train')), {}
    for wnid, count in TRAIN_IMAGES.items():
        tars[f'{wnid}.tar'] = pack({f'{wnid}_{i}.JPEG': next(photos) for i in range(10, 10 + count)})
    return tars


def val_images() -> dict[str, bytes]:
    return {f'ILSVRC2012_val_{i:08d}.JPEG': photo for i, photo in enumerate(read_images('val')[:len(VAL_IDS)], 1)}


def build_miniature(folder: Path, **replaced: bytes) -> Miniature:
    """Write the archives into `folder`/archives.

    Args:
        folder: Where to.
        replaced: Bytes of `train`, `val` or `devkit` instead of the right ones; the edition has their MD5.
    """
    tars, images = train_tars(), val_images()
    contents = {'train': pack(tars), 'val': pack(images), 'devkit': pack_devkit(), **replaced}
    archives = folder / 'the archives'
    archives.mkdir(parents=True)
    entries = {}
    for key, data in contents.items():
        name = getattr(ILSVRC2012, key).name
        (archives / name).write_bytes(data)
        entries[key] = Archive(name, hashlib.md5(data).hexdigest(), len(data))
    edition = Edition(**entries, classes=3, train_images=12, val_images=6)
    description = folder / 'miniature.json'
    description.write_text(json.dumps(asdict(edition)), encoding='utf-8')
    files = {f'val/{WNIDS[val_id]}/{name}': images[name] for name, val_id in zip(sorted(images), VAL_IDS, strict=True)}
    for name, data in tars.items():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files.update({f'train/{name[:-4]}/{info.name}': tar.extractfile(info).read() for info in tar})
    return Miniature(archives, edition, description, files)


def run(arguments: Sequence[object]) -> int:
    """The command, for the edition that the first argument, `Miniature.json`, describes."""
    description, *flags = map(str, arguments)
    fields = json.loads(Path(description).read_text(encoding='utf-8'))
    edition = Edition(**{key: Archive(**value) if isinstance(value, dict) else value for key, value in fields.items()})
    return main(flags, edition)


if __name__ == '__main__':
    sys.exit(run(sys.argv[1:]))
