"""Contents of ImageNet's archives: members of tars, and the labels of the validation images."""
import hashlib
import io
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import DataError, list_names, require
from ..progress import Progress
from ..text import read_text

__all__ = [
    'AGAIN', 'CHUNK', 'IMAGE', 'INNER_TAR', 'SOURCE', 'Archive', 'Devkit', 'Member', 'compute_md5', 'find_archive',
    'label_images', 'list_members', 'read_devkit']

SOURCE = 'get it from https://image-net.org (it needs an account)'
AGAIN = 'then run the same command again'
GROUND_TRUTH = 'ILSVRC2012_validation_ground_truth.txt'
WNID = re.compile(r'n\d{8}')
INNER_TAR = re.compile(r'n\d{8}\.tar')
IMAGE = re.compile(r'\w[\w.-]*\.jpe?g', re.IGNORECASE | re.ASCII)
CHUNK = 2 ** 22  # bytes read at a time; the memory of a worker


@dataclass(frozen=True)
class Archive:
    """The name of an archive, its MD5, and its size in bytes where that is known (a wrong size then needs no MD5)."""
    name: str
    md5: str
    size: int | None = None


class Member(NamedTuple):
    """A file in a tar: its plain name, where its bytes begin in the (outer) archive, and how many they are."""
    name: str
    offset: int
    size: int


def list_members(path: Path, pattern: re.Pattern, start: int = 0, size: int | None = None) -> list[Member]:
    """The files of the tar at bytes `start` to `start + size` of `path`; reads headers only.

    Raises:
        DataError: It is damaged or incomplete; or a member is not a plain file, leads out of its folder, occurs twice,
            or has a name that does not match `pattern`.
    """
    end = start + (path.stat().st_size if size is None else size)
    members: dict[str, Member] = {}
    position = start
    with open(path, 'rb') as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode='r:') as tar:
                for info in tar:
                    if info.offset >= end:  # the next member of the outer archive
                        break
                    name = _plain_name(info, pattern, path)
                    position = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if position > end or name in members:
                        raise tarfile.ReadError(f'{info.name} ' + ('occurs twice' if name in members else 'is cut off'))
                    if name:
                        members[name] = Member(name, info.offset_data, info.size)
        except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two from damaged numbers
            raise DataError(f'{path}: is damaged or incomplete ({error}): {SOURCE} again, {AGAIN}.') from None
        file.seek(position)
        if position < end and any(file.read(tarfile.BLOCKSIZE)):  # tarfile treats a damaged header as the end
            raise DataError(
                f'{path}: is damaged or incomplete (no member at byte {position}): {SOURCE} again, {AGAIN}.')
    return list(members.values())


def _plain_name(info: tarfile.TarInfo, pattern: re.Pattern, path: Path) -> str:
    """The name of a member that may be written into a folder; '' for a folder, which is skipped."""
    parts = PurePosixPath(info.name).parts
    if info.name.startswith('/') or '..' in parts:
        problem = 'leads out of its folder'
    elif info.isdir():
        return ''
    elif not info.isreg() or info.issparse():
        problem = 'is a link, a device or another special file'
    elif not pattern.fullmatch('/'.join(parts)):
        problem = f'has an unexpected name (expected: {pattern.pattern})'
    else:
        return parts[0]
    raise DataError(f'{path}: the member {info.name!r} {problem}, so the archive is refused: {SOURCE}.')


def find_archive(folder: Path, archive: Archive, hint: str = '') -> Path:
    path = folder / archive.name
    if not path.is_file():
        raise DataError(f'{path}: no such archive: {SOURCE} and put it there{hint}.')
    if archive.size is not None and path.stat().st_size != archive.size:
        raise DataError(f'{path}: has {path.stat().st_size:,} of {archive.size:,} bytes: {SOURCE} again.')
    return path


def compute_md5(path: Path, progress: Progress) -> str:
    """The MD5 of a file in hexadecimal; `progress` counts MiB."""
    digest, done = hashlib.md5(usedforsecurity=False), 0
    with open(path, 'rb') as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.update((done + len(chunk) >> 20) - (done >> 20))
            done += len(chunk)
    return digest.hexdigest()


# Labels ---------------------------------------------------------------------------------------------------------------

class Devkit(NamedTuple):
    """Contents of the development kit.

    Attributes:
        wnids: WordNet id of each ILSVRC id, the number in the ground truth; they are ordered differently.
        train_images: Number of training images of each WordNet id; {} if not stated.
        val_ids: ILSVRC id of each validation image, in the order of their names.
    """
    wnids: dict[int, str]
    train_images: dict[str, int]
    val_ids: list[str]


def read_devkit(path: Path) -> Devkit:
    """Read meta.mat and the ground truth of the validation images out of the devkit archive; nothing is extracted.

    Departure: torchvision's `parse_devkit_archive` gives the same labels (a test compares them), but knows one MD5
    only, unpacks the archive by the paths in it and writes beside it.

    Raises:
        DataError: It is not a devkit.
    """
    require('scipy')
    import scipy.io

    try:
        with tarfile.open(path, 'r:gz') as tar:
            wanted = {name.name.rpartition('/')[2]: name for name in tar if name.isreg()}
            meta, truth = (tar.extractfile(wanted[name]).read() for name in ('meta.mat', GROUND_TRUTH))
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)['synsets']
        leaves = [synset for synset in synsets if synset['num_children'] == 0]
        counted = 'num_train_images' in synsets.dtype.names
        return Devkit(
            wnids={int(leaf['ILSVRC2012_ID']): str(leaf['WNID']) for leaf in leaves},
            train_images={str(leaf['WNID']): int(leaf['num_train_images']) for leaf in leaves if counted},
            val_ids=truth.decode().split())
    except Exception as error:  # damaged bytes can raise anything in gzip, tarfile and scipy
        reason = f'{type(error).__name__}: {error}'
        raise DataError(f'{path}: cannot be read as devkit ({reason}): {SOURCE} again.') from error


def label_images(names: Iterable[str], labels: Path | None, devkit: Devkit | None) -> dict[str, str]:
    """The WordNet id of each validation image.

    Args:
        names: The images of the archive.
        labels: A file with a line per image in the order of their names, ILSVRC ids (of the devkit's ground truth) or
            WordNet ids, or pairs of image and WordNet id. None: the ground truth of `devkit`.
        devkit: Translates ILSVRC ids.
    Raises:
        DataError: The file does not label these images.
    """
    names = sorted(names)
    lines = [[val_id] for val_id in devkit.val_ids] if labels is None else _read_lines(labels)
    where = labels or 'The ground truth of the devkit'
    if len(lines) != len(names):
        raise DataError(f'{where}: has {len(lines):,} labels for {len(names):,} images: take the file of this edition.')
    if all(len(line) == 2 for line in lines):
        pairs = {image if IMAGE.fullmatch(image) else f'{image}.JPEG': wnid for image, wnid in lines}
        if pairs.keys() != set(names):
            raise DataError(f'{where}: has no label for {list_names(sorted(set(names) - pairs.keys()))}.')
        values = [pairs[name] for name in names]
    else:
        values = [' '.join(line) for line in lines]
    if all(value.isdecimal() for value in values):
        if devkit is None:
            raise DataError(
                f'{where}: has ILSVRC ids (1, 2, ...), which are not in the order of the class folders; the devkit '
                f'archive, which translates them, is missing: add it or give WordNet ids (n01751748).')
        values = [devkit.wnids.get(int(value), value) for value in values]
    for line, value in enumerate(values, 1):
        if not WNID.fullmatch(value):
            raise DataError(f'{where}: label {line} is {value!r}: expected a WordNet id such as n01751748, the same '
                            f"after the image's name, or an ILSVRC id, in all lines alike.")
    return dict(zip(names, values, strict=True))


def _read_lines(path: Path) -> list[list[str]]:
    return [line.split() for line in read_text(path, DataError).splitlines() if line.strip()]
