"""ImageNet (ILSVRC 2012) from its archives: checked, extracted in parallel, resumed after any interruption, offline.

    python -m caretrans.data.imagenet [ARCHIVES] [TARGET]     (what `bash data/extract_ILSVRC.sh` runs)

reads ARCHIVES/ILSVRC2012_img_train.tar (one tar of JPEG images per class), ILSVRC2012_img_val.tar (images) and
ILSVRC2012_devkit_t12.tar.gz (their labels), and makes TARGET/train/CLASS/*.JPEG and TARGET/val/CLASS/*.JPEG. Archives
are only read. A class is extracted into a temporary folder and then renamed, so a class folder that exists is complete.
Members are copied under plain names; no path that an archive chooses is ever followed.
"""
import argparse
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..config import number
from ..errors import DataError, list_names, require
from ..progress import Progress

__all__ = ['ILSVRC2012', 'Archive', 'Devkit', 'Edition', 'Plan', 'Record', 'main', 'prepare_imagenet', 'read_devkit']

SPLITS = ('train', 'val')
Counts = list[int]  # images, bytes
SOURCE = 'get it from https://image-net.org (it needs an account)'
AGAIN = 'then run the same command again'
GROUND_TRUTH = 'ILSVRC2012_validation_ground_truth.txt'
WNID = re.compile(r'n\d{8}')
INNER_TAR = re.compile(r'n\d{8}\.tar')
CHUNK = 2 ** 22  # bytes read at a time; the memory of a worker
IMAGE = re.compile(r'\w[\w.-]*\.jpe?g', re.IGNORECASE | re.ASCII)


# Editions -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Archive:
    """The name of an archive, its MD5, and its size in bytes where that is known (a wrong size then needs no MD5)."""
    name: str
    md5: str
    size: int | None = None


@dataclass(frozen=True)
class Edition:
    """What a data set packed like ILSVRC 2012 consists of."""
    train: Archive
    val: Archive
    classes: int
    train_images: int
    val_images: int
    devkit: Archive = Archive('ILSVRC2012_devkit_t12.tar.gz', 'fa75699e90414af021442c21a62c3abf')

    def images(self, split: str) -> int:
        return self.train_images if split == 'train' else self.val_images


ILSVRC2012 = Edition(  # MD5: torchvision.datasets.imagenet; sizes: the server's Content-Length, as users report it
    train=Archive('ILSVRC2012_img_train.tar', '1d675b47d978889d74fa0da5fadfb00e', 147897477120),
    val=Archive('ILSVRC2012_img_val.tar', '29b22e2961454d5413ddabcf34fc5622', 6744924160),
    classes=1000, train_images=1281167, val_images=50000)


# Archives -------------------------------------------------------------------------------------------------------------

class Member(NamedTuple):
    """A file in a tar: its plain name, where its bytes begin in the (outer) archive, and how many they are."""
    name: str
    offset: int
    size: int


def list_members(path: Path, pattern: re.Pattern, start: int = 0, size: int | None = None) -> list[Member]:
    """The files of the tar that lies at bytes `start` to `start + size` of `path`; reads headers only.

    Raises:
        DataError: It is damaged or incomplete; or a member is no plain file, leads out of its folder, occurs twice, or
            its name does not match `pattern`.
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
        except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two come of damaged numbers
            raise DataError(f'{path}: is damaged or incomplete ({error}): {SOURCE} again, {AGAIN}.') from None
        file.seek(position)
        if position < end and any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
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
        wnids: WordNet id of each ILSVRC id, the number in the ground truth; their order is not that of the WordNet ids.
        train_images: Training images of each WordNet id, {} where it does not say.
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
        DataError: It is no devkit.
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
    except Exception as error:  # damaged bytes make gzip, tarfile and scipy raise nearly anything
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
    try:
        return [line.split() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{path}: cannot be read as labels ({error}): give a text with a line per image.') from None


# Target folder --------------------------------------------------------------------------------------------------------

class Record:
    """State of a target folder, kept in it as one JSON pair per line; its lock keeps out a second run.

    A name of an archive goes with its size, time of change and verified MD5, a class folder with images and bytes. A
    line that was cut short by a kill counts as not written: its folder is then compared with the archive.
    """

    def __init__(self, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        self.file = open(target / '.imagenet.jsonl', 'a+', encoding='utf-8', errors='replace')
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise DataError(f'{target}: another extraction into it is running: wait for its end or stop it.') from None
        except OSError as error:  # some network file systems
            print(f'{target} cannot be locked ({error.strerror}): start no second extraction into it.', file=sys.stderr)
        self.file.seek(0)
        text = self.file.read()
        self.entries: dict[str, Any] = {}
        for line in text.splitlines():
            with suppress(ValueError, TypeError):
                key, value = json.loads(line)
                self.entries[key] = value
        if text and not text.endswith('\n'):
            self.file.write('\n')

    def __enter__(self) -> 'Record':
        return self

    def __exit__(self, *exception: Any) -> None:
        self.file.close()

    def get(self, key: str) -> Any:
        return self.entries.get(key)

    def add(self, key: str, value: Any) -> None:
        self.entries[key] = value
        self.file.write(json.dumps([key, value]) + '\n')
        self.file.flush()


def measure_split(folder: Path) -> dict[str, Counts]:
    """Images and bytes of each class folder; what a killed run left half done is removed.

    Raises:
        DataError: There are files beside the class folders, as in a flat validation folder.
    """
    found, files = {}, []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if re.fullmatch(r'\.n\d{8}\.partial', path.name):
            shutil.rmtree(path)
        elif path.is_dir():
            sizes = _measure_files(path)
            found[path.name] = [len(sizes), sum(sizes.values())]
        else:
            files.append(path.name)
    if files:
        raise DataError(f'{folder}: has files beside the class folders ({list_names(files, 3)}): move them away.')
    return found


def _measure_files(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}


# Extraction -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """A class to extract: from the tar of `size` bytes at `offset` of `archive`, or `members` where they are known."""
    archive: Path
    folder: Path
    size: int
    offset: int = 0
    members: list[Member] | None = None


class Stopped(Exception):
    """A class is left because another one failed."""


def _extract_class(job: Job, stop: threading.Event) -> Counts:
    """Extract a class into a temporary folder and rename it; a folder that exists must hold the same files already.

    Raises:
        DataError: Its tar is damaged, the folder holds something else, or it cannot be written; `stop` is set.
        Stopped: `stop` was set.
    """
    partial = job.folder.with_name(f'.{job.folder.name}.partial')
    try:
        members = job.members or list_members(job.archive, IMAGE, job.offset, job.size)
        if not members:
            raise DataError(f'{job.archive}: has no images of it: {SOURCE} again, {AGAIN}.')
        sizes = {member.name: member.size for member in members}
        if not job.folder.exists():
            partial.mkdir(parents=True)
            with open(job.archive, 'rb') as file:
                for member in members:
                    if stop.is_set():
                        raise Stopped
                    _copy(file, member, partial / member.name)
            partial.rename(job.folder)
        elif _measure_files(job.folder) != sizes:
            raise DataError(f'{job.folder}: has other files than the archive: remove this folder, {AGAIN}.')
        return [len(sizes), sum(sizes.values())]
    except (DataError, OSError) as error:
        stop.set()
        remedy = '' if isinstance(error, DataError) else f': make room or check the disks, {AGAIN}.'
        split, wnid = job.folder.parent.name, job.folder.name
        raise DataError(f'{split}, class {wnid}: {error}{remedy} Complete classes stay.') from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(archive: io.BufferedReader, member: Member, path: Path) -> None:
    archive.seek(member.offset)
    left = member.size
    with open(path, 'xb') as image:
        while left:
            chunk = archive.read(min(left, CHUNK))
            if not chunk:
                raise DataError(f'{archive.name}: ends within {member.name}: {SOURCE} again, {AGAIN}.')
            image.write(chunk)
            left -= len(chunk)


def extract_classes(jobs: list[Job], record: Record, workers: int) -> None:
    """Run the jobs in threads, which mostly wait for the disk; the first failure, or Ctrl-C, ends all."""
    stop, done = threading.Event(), 0
    total = sum(job.size for job in jobs) >> 20
    with Progress(total, unit='MiB') as progress, ThreadPoolExecutor(workers) as pool:
        progress.describe('extracting')
        futures = {pool.submit(_extract_class, job, stop): job for job in jobs}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                if isinstance(future.exception(), Stopped):  # what stopped it is reported instead
                    continue
                job = futures[future]
                record.add(f'{job.folder.parent.name}/{job.folder.name}', future.result())
                progress.update((done + job.size >> 20) - (done >> 20), classes=count)
                done += job.size
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


# The command ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """What to extract, and how.

    Attributes:
        archives: The folder of the archives; nothing in it is changed.
        target: Where to extract to; made if it is not there.
        edition: What the archives and the result should be.
        splits: 'train', 'val' or both.
        val_labels: Labels of the validation images (see `label_images`), by default those of the devkit archive.
        workers: Classes extracted at a time.
        checksums: Compare the MD5 of the archives. Otherwise a damaged image is not noticed.
    """
    archives: Path
    target: Path
    edition: Edition = ILSVRC2012
    splits: Sequence[str] = SPLITS
    val_labels: Path | None = None
    workers: int = 4
    checksums: bool = True


def prepare_imagenet(plan: Plan) -> dict[str, list[int]]:
    """Make train/CLASS and val/CLASS in the target folder from the archives, or what is missing of them.

    Returns:
        Classes and images of each split.
    Raises:
        DataError: Archives, labels, target folder or the result are not as they should be; what is complete stays.
    """
    try:
        with Record(plan.target) as record:
            found = {split: measure_split(plan.target / split) for split in plan.splits}
            pending = [split for split in found if not _is_done(plan, record, split, found[split])]
            if pending:
                found.update(_complete(dataclasses.replace(plan, splits=pending), record, found))
    except OSError as error:
        where = error.filename or plan.target
        raise DataError(f'{where}: {error.strerror}: check path, permissions and disk, {AGAIN}.') from error
    return {split: [len(folders), _count_images(folders)] for split, folders in found.items()}


def _count_images(folders: dict[str, Counts]) -> int:
    return sum(images for images, _ in folders.values())


def _is_done(plan: Plan, record: Record, split: str, folders: dict[str, Counts]) -> bool:
    """Whether all of a split is there, and the record vouches for it, though not for labels that are given anew."""
    archive = getattr(plan.edition, split)
    if split == 'val' and plan.val_labels is not None:
        return False
    return (len(folders) == plan.edition.classes and _count_images(folders) == plan.edition.images(split)
            and all(record.get(f'{split}/{wnid}') == counts for wnid, counts in folders.items())
            and (not plan.checksums or (record.get(archive.name) or [None])[-1] == archive.md5))


def _complete(plan: Plan, record: Record, found: dict[str, dict[str, Counts]]) -> dict[str, dict[str, Counts]]:
    """Extract what is missing and check the result; returns what is there then."""
    edition = plan.edition
    paths = {split: find_archive(plan.archives, getattr(edition, split)) for split in plan.splits}
    devkit = _find_devkit(plan, record)
    expected: dict[str, Mapping[str, int]] = {  # images of each class, where they are known
        'train': devkit.train_images if devkit is not None and len(devkit.wnids) == edition.classes else {}}
    jobs = []
    if 'val' in plan.splits:
        members = list_members(paths['val'], IMAGE)
        if len(members) != edition.val_images:
            raise DataError(f'{paths["val"]}: has {len(members):,} of {edition.val_images:,} images: {SOURCE} again.')
        labels = label_images([member.name for member in members], plan.val_labels, devkit)
        expected['val'] = Counter(labels.values())
        _require_classes(
            plan.val_labels or 'The labels of the devkit', set(expected['val']), edition, set(expected['train']))
        jobs = _plan_val(plan, paths['val'], members, labels, found['val'])
    if 'train' in plan.splits:
        known = set(expected['train'] or expected.get('val') or found.get('val', {}))
        jobs = _plan_train(plan, record, paths['train'], known, found['train']) + jobs
    _require_space(plan.target, jobs)
    for split in plan.splits if plan.checksums else ():
        _verify_checksum(paths[split], getattr(edition, split), record)
    if jobs:
        print(f'Extracting or comparing {len(jobs):,} class folders, {plan.workers} at a time.', flush=True)
        extract_classes(jobs, record, plan.workers)
    found = {split: measure_split(plan.target / split) for split in plan.splits}
    for split in plan.splits:
        _require_counts(plan, split, found[split], expected[split])
    return found


def _find_devkit(plan: Plan, record: Record) -> Devkit | None:
    path, needed = plan.archives / plan.edition.devkit.name, 'val' in plan.splits and plan.val_labels is None
    if not path.is_file() and not needed:
        return None
    find_archive(plan.archives, plan.edition.devkit, hint=', or give the labels with --val-labels FILE')
    if plan.checksums:
        _verify_checksum(path, plan.edition.devkit, record)
    return read_devkit(path)


def _verify_checksum(path: Path, archive: Archive, record: Record) -> None:
    """Compare the MD5 of an archive, once: the record keeps it with size and time of change."""
    stat = path.stat()
    state = [stat.st_size, stat.st_mtime_ns, archive.md5]
    if record.get(archive.name) == state:
        return
    print(f'Checking the MD5 of {path} ({stat.st_size / 1e9:.1f} GB).', flush=True)
    with Progress(total=stat.st_size >> 20, unit='MiB') as progress:
        progress.describe('checking')
        md5 = compute_md5(path, progress)
    if md5 != archive.md5:
        raise DataError(f'{path}: its MD5 is {md5}, not {archive.md5}: damaged or another file; {SOURCE} again.')
    record.add(archive.name, state)


def _plan_val(
        plan: Plan, archive: Path, members: list[Member], labels: dict[str, str], found: dict[str, Counts],
) -> list[Job]:
    """A job for every class: those that are there are compared with the labels."""
    classes: dict[str, list[Member]] = {}
    for member in members:
        classes.setdefault(labels[member.name], []).append(member)
    _require_no_others(plan.target / 'val', set(found) - set(classes))
    return [Job(archive, plan.target / 'val' / wnid, sum(image.size for image in images), members=images)
            for wnid, images in sorted(classes.items())]


def _plan_train(plan: Plan, record: Record, archive: Path, known: set[str], found: dict[str, Counts]) -> list[Job]:
    """A job for every class whose folder is not as the record says."""
    tars = {member.name[:-len('.tar')]: member for member in list_members(archive, INNER_TAR)}
    _require_classes(archive, set(tars), plan.edition, known)
    _require_no_others(plan.target / 'train', set(found) - set(tars))
    return [Job(archive, plan.target / 'train' / wnid, tar.size, tar.offset) for wnid, tar in tars.items()
            if wnid not in found or record.get(f'train/{wnid}') != found[wnid]]


def _require_classes(where: Path | str, wnids: set[str], edition: Edition, known: set[str]) -> None:
    missing, extra = sorted(known - wnids), sorted(wnids - known) if known else []
    if len(wnids) != edition.classes or missing or extra:
        names = f': missing {list_names(missing) or "none"}; unexpected {list_names(extra) or "none"}' if known else ''
        raise DataError(
            f'{where}: {len(wnids):,} of {edition.classes:,} classes{names}. Take the files of one edition; {SOURCE}.')


def _require_no_others(folder: Path, others: set[str]) -> None:
    if others:
        raise DataError(f'{folder}: has folders of other data ({list_names(sorted(others))}): move them away, {AGAIN}.')


def _require_space(target: Path, jobs: list[Job]) -> None:
    """Room for what is missing, 2 % for the last blocks of the files, and 64 MB."""
    missing = sum(job.size for job in jobs if not job.folder.exists())
    needed, free = 1.02 * missing + 64e6, shutil.disk_usage(target).free
    if missing and free < needed:
        raise DataError(
            f'{target}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free: make room or take another folder.')


def _require_counts(
        plan: Plan, split: str, found: dict[str, Counts], expected: Mapping[str, int]) -> None:
    wanted = plan.edition.images(split)
    if len(found) != plan.edition.classes or _count_images(found) != wanted:
        differ = [f'{wnid} {found.get(wnid, [0])[0]} instead of {images}' for wnid, images in sorted(expected.items())
                  if found.get(wnid, [0])[0] != images]
        differ = f'differing: {list_names(differ)}' if differ else 'the devkit archive is needed to list them'
        raise DataError(
            f'{plan.target / split}: has {len(found):,} classes with {_count_images(found):,} images, not '
            f'{plan.edition.classes:,} with {wanted:,}; {differ}. Check the archive; remove these folders, {AGAIN}.')


def _parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='extract_ILSVRC.sh',
        description='Extract ImageNet (ILSVRC 2012) from its archives; resumes after an interruption.')
    parser.add_argument('archives', nargs='?', type=Path, help='folder of the archives, only read')
    parser.add_argument('target', nargs='?', type=Path, help='folder that gets train/ and val/')
    parser.add_argument('--folder', type=Path, default=Path(), help='default of ARCHIVES and TARGET')
    parser.add_argument('--only', choices=SPLITS, help='this split alone')
    parser.add_argument('--val-labels', type=Path, help='labels of the validation images, where there is no devkit')
    parser.add_argument('--workers', type=number(int, 1), default=min(8, os.cpu_count() or 1), help='classes at a time')
    parser.add_argument('--skip-checksums', action='store_true', help='do not compare the MD5 of the archives')
    flags = parser.parse_intermixed_args(argv)
    if flags.only == 'train' and flags.val_labels is not None:
        parser.error('--val-labels has no effect with --only train: remove one of them')
    return flags


def main(argv: Sequence[str] | None = None, edition: Edition = ILSVRC2012) -> int:
    """Run the command; `edition` says what the archives should be.

    Returns:
        The exit code: 0, 2 after a `DataError`, 130 after Ctrl-C.
    """
    flags = _parse_flags(argv)
    target = flags.target or flags.folder
    if flags.skip_checksums:
        print('CHECKSUMS ARE SKIPPED: only counts are checked, a damaged image is not noticed.', file=sys.stderr)
    try:
        counts = prepare_imagenet(Plan(
            flags.archives or flags.folder, target, edition, (flags.only,) if flags.only else SPLITS, flags.val_labels,
            flags.workers, not flags.skip_checksums))
    except DataError as error:
        print(f'extract_ILSVRC.sh: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('extract_ILSVRC.sh: stopped; run the same command again to resume', file=sys.stderr)
        return 130
    print(f'{target}: ' + '; '.join(
        f'{split} {classes:,} classes, {images:,} images' for split, (classes, images) in counts.items()))
    folder = shlex.quote(str(target.resolve()))
    missing = [split for split in SPLITS if not (target / split).is_dir()]
    print(f'next: the same command without --only, for {missing[0]}' if missing else
          f'next: bash cmd/train.sh {folder} --recipe care_s0_imagenet')
    return 0


if __name__ == '__main__':
    sys.exit(main())
