"""Writer of WebDataset shards from folders of images: tars are read sequentially, which is fast on any disk.

The images of a split are shuffled with a fixed seed, so that every shard holds many classes. The bytes of the files are
kept. The same source and settings give bit-identical shards.
"""
import hashlib
import json
import os
import random
import re
import shutil
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, list_names
from ..progress import Progress
from ..text import open_text, read_text
from .datasets import INFO, VALIDATION, list_classes, open_dataset
from .folders import FolderReader

__all__ = ['write_shards']

RECORD = '_shards.json'  # fingerprint of each split in a folder of shards
TAR_BLOCK = 512


@dataclass(frozen=True)
class Entry:
    """An image, and its names in a shard: `key`.`kind`, and `key`.cls for its label."""
    path: str
    label: int
    size: int
    key: str
    kind: str


def make_keys(paths: Sequence[str]) -> list[tuple[str, str]]:
    """(key, kind) of each path relative to its split: the path without its extension, and 'jpg' for any JPEG.

    WebDataset ends a key at the first dot, so other dots become _. Of paths with the same key, all but the first get a
    number.
    """
    taken: set[str] = set()
    keys = []
    for path in paths:
        folder, name = os.path.split(path)
        stem, extension = os.path.splitext(name)
        base = key = os.path.join(folder, stem.replace('.', '_')).replace(os.sep, '/')
        number = 0
        while key in taken:
            number += 1
            key = f'{base}~{number}'
        taken.add(key)
        kind = extension[1:].lower()
        keys.append((key, 'jpg' if kind == 'jpeg' else kind))
    return keys


def plan_shards(
        source: str, split: str, images_per_shard: int | None, shard_size: float, seed: int,
        classes: list[str] | None = None,
) -> tuple[list[list[Entry]], list[str]]:
    """The images of each shard, and the classes; shards differ by at most one image."""
    dataset = open_dataset(source, split, classes=classes, is_training=split not in VALIDATION)
    if not isinstance(dataset.reader, FolderReader):
        raise DataError(f'{source}, split {split!r}, is not a folder of images: expected {split}/CLASS/IMAGE.jpg.')
    keys = make_keys([os.path.relpath(path, dataset.reader.root) for path, _ in dataset.reader.samples])
    entries = [
        Entry(path, int(label), os.path.getsize(path), *key) for (path, label), key in zip(
            dataset.reader.samples, keys, strict=True)]
    random.Random(seed).shuffle(entries)
    total = sum(entry.size for entry in entries)
    number = -(-len(entries) // images_per_shard) if images_per_shard else int(total / (shard_size * 1e6)) + 1
    number = min(number, len(entries))
    bounds = [len(entries) * i // number for i in range(number + 1)]
    return [entries[a:b] for a, b in zip(bounds, bounds[1:], strict=False)], list_classes(dataset)


def fingerprint(shards: Sequence[Sequence[Entry]]) -> str:
    """A hash of the names, labels and sizes in each shard."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(json.dumps([[e.key, e.kind, e.label, e.size] for e in shard]).encode())
    return digest.hexdigest()


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_name(path.name + '.partial')
    with open_text(partial, 'w') as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(read_text(path, DataError)) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise DataError(f'{path} is not JSON: {error}. Remove the folder and start again.') from None


def _write_shard(path: Path, entries: Sequence[Entry]) -> None:
    """Write a temporary file and rename it, so that a shard with its final name is complete."""
    from webdataset import TarWriter
    partial = path.with_name(path.name + '.partial')
    with open(partial, 'wb') as file:
        writer = TarWriter(file, encoder=False, mtime=0., format='PAX_FORMAT')
        for entry in entries:
            data = Path(entry.path).read_bytes()
            if len(data) != entry.size:
                raise DataError(f'{entry.path} changed while its shard was written: run the command again.')
            writer.write({'__key__': entry.key, entry.kind: data, 'cls': str(entry.label).encode()})
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _is_whole(path: Path, entries: Sequence[Entry]) -> bool:
    """Whether a shard exists with the right names and sizes in its headers."""
    if not path.exists():
        return False
    try:
        with tarfile.open(path, 'r:') as tar:
            found = {member.name: member.size for member in tar}
    except (tarfile.TarError, OSError):
        return False
    wanted = {f'{e.key}.{e.kind}': e.size for e in entries}
    wanted.update({f'{e.key}.cls': len(str(e.label)) for e in entries})
    return found == wanted


def _check_target(target: Path, split: str, mark: str) -> None:
    """Refuse a folder with shards of other images or settings."""
    record = _read_json(target / RECORD).get(split)
    there = [path.name for path in sorted(target.glob('*.tar')) if re.fullmatch(rf'{re.escape(split)}-\d+', path.stem)]
    if record is None and there:
        raise DataError(f'{target} has shards of unknown origin, {list_names(there, 3)}: use another folder.')
    if record is not None and record != mark:
        raise DataError(
            f'{target} has shards of split {split!r} made of other images or with other settings: '
            'use the same ones, or another folder.')


def _check_space(target: Path, shards: Sequence[Sequence[Entry]]) -> None:
    needed = sum(entry.size + 6 * TAR_BLOCK for shard in shards for entry in shard) + 64e6
    free = shutil.disk_usage(target).free
    if needed > free:
        raise DataError(f'{target} needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free.')


def _write_split(target: Path, split: str, shards: Sequence[Sequence[Entry]], workers: int) -> dict[str, Any]:
    """Write the missing shards of a split; returns the description of all for timm's reader."""
    paths = [target / f'{split}-{i:05d}.tar' for i in range(len(shards))]
    with ThreadPoolExecutor(workers) as pool:
        whole = list(pool.map(_is_whole, paths, shards))
        todo = [(path, shard) for path, shard, done in zip(paths, shards, whole, strict=True) if not done]
        _check_space(target, [shard for _, shard in todo])
        with Progress(sum(len(shard) for _, shard in todo), 'images') as progress:
            progress.describe(f'{split}, {len(todo)} shards of {len(shards)}')
            jobs = {pool.submit(_write_shard, path, shard): len(shard) for path, shard in todo}
            try:
                for job in as_completed(jobs):
                    job.result()
                    progress.update(jobs[job])
            finally:
                for job in jobs:
                    job.cancel()
        broken = [path.name for path, done in zip(paths, pool.map(_is_whole, paths, shards), strict=True) if not done]
    if broken:
        raise DataError(f'{target}: {list_names(broken)} differ from what was written: check the disk.')
    lengths = [len(shard) for shard in shards]
    return dict(
        name=split, num_samples=sum(lengths), filenames=[path.name for path in paths], shard_lengths=lengths)


def write_shards(
        source: str, target: str, splits: Sequence[str] = ('train', 'val'), images_per_shard: int | None = None,
        shard_size: float = 100., workers: int = 4, seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Write splits of a folder of images as WebDataset shards, with an `_info.json` for timm's reader.

    Run it again after an interruption: it writes what is missing.

    Args:
        images_per_shard: Maximum; None for shards of `shard_size` megabytes on average.
        workers: Shards written in parallel.
    Returns:
        The `splits` of `_info.json`: num_samples, filenames and shard_lengths of each.
    Raises:
        DataError: The source is not a folder of images, the classes of the splits differ, the target holds other
            shards, the disk is too small, or a file cannot be read.
    """
    folder = Path(target)
    if folder.resolve() == Path(source).resolve():
        raise DataError(f'{target} holds the images: use another folder for the shards.')
    info = _read_json(folder / INFO)
    classes, plans, marks = info.get('classes'), {}, {}
    for split in splits:
        plans[split], classes = plan_shards(source, split, images_per_shard, shard_size, seed, classes)
        marks[split] = fingerprint(plans[split])
        _check_target(folder, split, marks[split])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / RECORD, {**_read_json(folder / RECORD), **marks})
        written = {split: _write_split(folder, split, plans[split], workers) for split in splits}
    except OSError as error:
        raise DataError(f'Writing {target} failed: {error}') from None
    _write_json(folder / INFO, dict(
        name=folder.name, classes=classes, splits={**info.get('splits', {}), **written}))
    return written
