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
import io
import json
import os
import re
import shlex
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, list_names, run_command
from ..flags import number
from ..progress import Progress
from .imagenet_archives import (
    AGAIN, CHUNK, IMAGE, INNER_TAR, SOURCE, Archive, Devkit, Member, compute_md5, find_archive, label_images,
    list_members, read_devkit)

__all__ = ['ILSVRC2012', 'Archive', 'Devkit', 'Edition', 'Plan', 'Record', 'main', 'prepare_imagenet', 'read_devkit']

SPLITS = ('train', 'val')
Counts = list[int]  # images, bytes


# Editions -------------------------------------------------------------------------------------------------------------

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


# Target folder --------------------------------------------------------------------------------------------------------

class Record:
    """What is verified in a target folder: a file in it with one JSON pair per line, locked against a second run.

    The name of an archive is paired with its size, modification time and verified MD5, that of a class folder with its
    images and bytes. A line cut short by a kill is ignored: that folder is compared with the archive again.
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
    """Images and bytes of each class folder; removes temporary folders of a killed run.

    Raises:
        DataError: There are files outside of class folders, as in a flat validation folder.
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
        raise DataError(f'{folder}: has files outside of class folders ({list_names(files, 3)}): move them away.')
    return found


def _measure_files(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}


# Extraction -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """A class to extract: the tar of `size` bytes at `offset` of `archive`, or the given `members` of `archive`."""
    archive: Path
    folder: Path
    size: int
    offset: int = 0
    members: list[Member] | None = None


class Stopped(Exception):
    """A class is abandoned because another one failed."""


def _extract_class(job: Job, stop: threading.Event) -> Counts:
    """Extract a class into a temporary folder and rename it; an existing folder must hold the same files.

    Raises:
        DataError: Its tar is damaged, the folder has other files, or it cannot be written; sets `stop`.
        Stopped: `stop` was set by another class.
    """
    partial = job.folder.with_name(f'.{job.folder.name}.partial')
    try:
        members = job.members or list_members(job.archive, IMAGE, job.offset, job.size)
        if not members:
            raise DataError(f'{job.archive}: has no images of this class: {SOURCE} again, {AGAIN}.')
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
    """Run the jobs in threads, which mostly wait for the disk; the first failure or Ctrl-C stops all."""
    stop, done = threading.Event(), 0
    total = sum(job.size for job in jobs) >> 20
    with Progress(total, unit='MiB') as progress, ThreadPoolExecutor(workers) as pool:
        progress.describe('extracting')
        futures = {pool.submit(_extract_class, job, stop): job for job in jobs}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                if isinstance(future.exception(), Stopped):  # the failure that stopped it is reported
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
        archives: Folder of the archives, only read.
        target: Folder of the result; created if missing.
        edition: Expected archives and result.
        splits: 'train', 'val' or both.
        val_labels: Labels of the validation images (see `label_images`), by default those of the devkit archive.
        workers: Classes extracted at a time.
        checksums: Compare the MD5 of the archives; without it, a damaged image is not noticed.
    """
    archives: Path
    target: Path
    edition: Edition = ILSVRC2012
    splits: Sequence[str] = SPLITS
    val_labels: Path | None = None
    workers: int = 4
    checksums: bool = True


def prepare_imagenet(plan: Plan) -> dict[str, list[int]]:
    """Extract train/CLASS and val/CLASS into the target folder, or what is missing of them.

    Returns:
        The numbers of classes and images of each split.
    Raises:
        DataError: The archives, the labels, the target folder or the result are wrong; complete classes stay.
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
    """Whether a split is complete and verified according to the record; never with labels from a file."""
    archive = getattr(plan.edition, split)
    if split == 'val' and plan.val_labels is not None:
        return False
    return (len(folders) == plan.edition.classes and _count_images(folders) == plan.edition.images(split)
            and all(record.get(f'{split}/{wnid}') == counts for wnid, counts in folders.items())
            and (not plan.checksums or (record.get(archive.name) or [None])[-1] == archive.md5))


def _complete(plan: Plan, record: Record, found: dict[str, dict[str, Counts]]) -> dict[str, dict[str, Counts]]:
    """Extract what is missing and check the result; returns the measured splits."""
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
    """Compare the MD5 of an archive, unless the record says that this was done and the file has not changed."""
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
    """A job for every class; existing folders are compared with the labels."""
    classes: dict[str, list[Member]] = {}
    for member in members:
        classes.setdefault(labels[member.name], []).append(member)
    _require_no_others(plan.target / 'val', set(found) - set(classes))
    return [Job(archive, plan.target / 'val' / wnid, sum(image.size for image in images), members=images)
            for wnid, images in sorted(classes.items())]


def _plan_train(plan: Plan, record: Record, archive: Path, known: set[str], found: dict[str, Counts]) -> list[Job]:
    """A job for every class whose folder is missing or differs from the record."""
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
    """Require room for the missing classes, 2 % for partly filled blocks, and 64 MB."""
    missing = sum(job.size for job in jobs if not job.folder.exists())
    needed, free = 1.02 * missing + 64e6, shutil.disk_usage(target).free
    if missing and free < needed:
        raise DataError(
            f'{target}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free: make room or use another folder.')


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
    """Run the command and return its exit code."""
    flags = _parse_flags(argv)
    target = flags.target or flags.folder
    if flags.skip_checksums:
        print('CHECKSUMS ARE SKIPPED: only counts are checked, a damaged image is not noticed.', file=sys.stderr)

    def run() -> int:
        counts = prepare_imagenet(Plan(
            flags.archives or flags.folder, target, edition, (flags.only,) if flags.only else SPLITS, flags.val_labels,
            flags.workers, not flags.skip_checksums))
        print(f'{target}: ' + '; '.join(
            f'{split} {classes:,} classes, {images:,} images' for split, (classes, images) in counts.items()))
        missing = [split for split in SPLITS if not (target / split).is_dir()]
        print(f'next: the same command without --only, for {missing[0]}' if missing else
              f'next: bash cmd/train.sh {shlex.quote(str(target.resolve()))} --recipe care_s0_imagenet')
        return 0

    code = run_command('extract_ILSVRC.sh', run)
    if code == 130:
        print('extract_ILSVRC.sh: stopped; run the same command again to resume', file=sys.stderr)
    return code


if __name__ == '__main__':
    sys.exit(main())
