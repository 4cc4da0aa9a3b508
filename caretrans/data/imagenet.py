"""ImageNet (ILSVRC 2012) from its archives: checked, extracted in parallel, resumed after an interruption, offline.

    python -m caretrans.data.imagenet [ARCHIVES] [TARGET]     (what `bash data/extract_ILSVRC.sh` runs)

reads ARCHIVES/ILSVRC2012_img_train.tar (one tar of JPEG images per class), ILSVRC2012_img_val.tar (images) and
ILSVRC2012_devkit_t12.tar.gz (their labels), and writes TARGET/train/CLASS/*.JPEG and TARGET/val/CLASS/*.JPEG. Archives
are only read. A class is extracted into a temporary folder that is then renamed, so a class folder that exists is
complete and the next run skips it. Members are copied under plain names; no path that an archive chooses is followed.
"""
import argparse
import hashlib
import io
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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import DataError, list_names, require, run_command
from ..flags import number
from ..progress import Progress

__all__ = ['ILSVRC2012', 'Archive', 'Devkit', 'Edition', 'main', 'prepare_imagenet', 'read_devkit']

SPLITS = ('train', 'val')
SOURCE = 'get it from https://image-net.org (it needs an account)'
AGAIN = 'then run the same command again'
GROUND_TRUTH = 'ILSVRC2012_validation_ground_truth.txt'
WNID = re.compile(r'n\d{8}')
INNER_TAR = re.compile(r'n\d{8}\.tar')
IMAGE = re.compile(r'\w[\w.-]*\.jpe?g', re.IGNORECASE | re.ASCII)
CHUNK = 2 ** 22  # bytes read at a time


# Editions -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Archive:
    """The name of an archive, its MD5, and its size in bytes where that is known (a wrong size then needs no MD5)."""
    name: str
    md5: str
    size: int | None = None


@dataclass(frozen=True)
class Edition:
    """Archives and counts of a data set packed like ILSVRC 2012."""
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

def list_members(tar: tarfile.TarFile, pattern: re.Pattern, path: Path) -> list[tarfile.TarInfo]:
    """The files of an open tar in the archive `path`; reads headers only.

    Raises:
        DataError: The tar is damaged; or a member is no plain file, leads out of its folder, occurs twice, or its name
            does not match `pattern`.
    """
    members, position = {}, 0
    for info in tar:
        parts, problem = PurePosixPath(info.name).parts, ''
        position = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if info.name.startswith('/') or '..' in parts:
            problem = 'leads out of its folder'
        elif info.isdir():
            continue
        elif not info.isreg() or info.issparse():
            problem = 'is a link, a device or another special file'
        elif not pattern.fullmatch('/'.join(parts)):
            problem = f'has an unexpected name (expected: {pattern.pattern})'
        elif parts[0] in members:
            problem = 'occurs twice'
        if problem:
            raise DataError(f'{path}: the member {info.name!r} {problem}, so the archive is refused: {SOURCE}.')
        members[parts[0]] = info
    tar.fileobj.seek(position)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError(f'no member at byte {position}')
    return list(members.values())


def find_archive(folder: Path, archive: Archive, hint: str = '') -> Path:
    path = folder / archive.name
    if not path.is_file():
        raise DataError(f'{path}: no such archive: {SOURCE} and put it there{hint}.')
    if archive.size is not None and path.stat().st_size != archive.size:
        raise DataError(f'{path}: has {path.stat().st_size:,} of {archive.size:,} bytes: {SOURCE} again.')
    return path


def verify_checksum(path: Path, archive: Archive) -> None:
    """Compare the MD5 of an archive.

    Raises:
        DataError: It differs; the message has both.
    """
    size, done, digest = path.stat().st_size, 0, hashlib.md5(usedforsecurity=False)
    print(f'Checking the MD5 of {path} ({size / 1e9:.1f} GB).', flush=True)
    with open(path, 'rb') as file, Progress(total=size >> 20, unit='MiB') as progress:
        progress.describe('checking')
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.update((done + len(chunk) >> 20) - (done >> 20))
            done += len(chunk)
    if digest.hexdigest() != archive.md5:
        raise DataError(
            f'{path}: its MD5 is {digest.hexdigest()}, not {archive.md5}: damaged or another file; {SOURCE} again.')


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


# Extraction -----------------------------------------------------------------------------------------------------------

class Job(NamedTuple):
    """A class to extract: `members` of a tar, or all images of the tar that `members` is in the archive."""
    archive: Path
    folder: Path
    members: list[tarfile.TarInfo] | tarfile.TarInfo

    @property
    def size(self) -> int:
        return self.members.size if isinstance(self.members, tarfile.TarInfo) else sum(m.size for m in self.members)


def _extract_class(job: Job, stop: threading.Event) -> None:
    """Extract a class into a temporary folder and rename it; does nothing once `stop` is set.

    Raises:
        DataError: The tar is damaged or the folder cannot be written; `stop` is set.
    """
    partial = job.folder.with_name(f'.{job.folder.name}.partial')
    where = f'{job.folder.parent.name}, class {job.folder.name}'
    try:
        with tarfile.open(job.archive, 'r:') as tar:
            if isinstance(job.members, tarfile.TarInfo):  # one tar in another
                with tarfile.open(fileobj=tar.extractfile(job.members), mode='r:') as inner:
                    complete = _copy_members(inner, list_members(inner, IMAGE, job.archive), partial, stop)
            else:
                complete = _copy_members(tar, job.members, partial, stop)
        if complete:
            partial.rename(job.folder)
    except DataError as error:
        stop.set()
        raise DataError(f'{where}: {error}') from None
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two from damaged numbers
        stop.set()
        raise DataError(f'{where}: {job.archive} is damaged or incomplete ({error}): {SOURCE} again, {AGAIN}. '
                        f'Complete classes are kept.') from None
    except OSError as error:
        stop.set()
        raise DataError(
            f'{where}: {error}: make room or check the disks, {AGAIN}. Complete classes are kept.') from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_members(
        tar: tarfile.TarFile, members: list[tarfile.TarInfo], folder: Path, stop: threading.Event) -> bool:
    """Copy members into a new folder; returns False if it was stopped."""
    if not members:
        raise tarfile.ReadError('it has no images')
    folder.mkdir(parents=True)
    for member in members:
        if stop.is_set():
            return False
        _copy(tar, member, folder / PurePosixPath(member.name).name)
    return True


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    with open(path, 'xb') as image:
        shutil.copyfileobj(tar.extractfile(member), image, CHUNK)
    if path.stat().st_size != member.size:
        raise tarfile.ReadError(f'{member.name} is cut off')


def extract_classes(jobs: list[Job], workers: int) -> None:
    """Run the jobs in threads, which mostly wait for the disk; the first failure, or Ctrl-C, ends all."""
    stop, done = threading.Event(), 0
    print(f'Extracting {len(jobs):,} classes, {workers} at a time.', flush=True)
    with Progress(sum(job.size for job in jobs) >> 20, unit='MiB') as progress, ThreadPoolExecutor(workers) as pool:
        progress.describe('extracting')
        futures = {pool.submit(_extract_class, job, stop): job for job in jobs}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                future.result()
                size = futures[future].size
                progress.update((done + size >> 20) - (done >> 20), classes=count)
                done += size
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def count_images(folder: Path) -> dict[str, int]:
    """The images of each class folder; temporary folders of a killed run are removed.

    Raises:
        DataError: There are files beside the class folders, as in a flat validation folder.
    """
    found, files = {}, []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if re.fullmatch(r'\.n\d{8}\.partial', path.name):
            shutil.rmtree(path)
        elif path.is_dir():
            found[path.name] = len(os.listdir(path))
        else:
            files.append(path.name)
    if files:
        raise DataError(f'{folder}: has files beside the class folders ({list_names(files, 3)}): move them away.')
    return found


# The command ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """What to extract, and how.

    Attributes:
        archives: Folder of the archives, which are only read.
        target: Folder to extract into; created if missing.
        edition: What the archives and the result should be.
        splits: 'train', 'val' or both.
        val_labels: Labels of the validation images (see `label_images`); by default those of the devkit archive.
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


def prepare_imagenet(plan: Plan) -> dict[str, tuple[int, int]]:
    """Extract train/CLASS and val/CLASS into the target folder, or what is missing of them.

    Returns:
        Classes and images of each split.
    Raises:
        DataError: Archives, labels, target folder or the result are not as expected; complete classes are kept.
    """
    try:
        plan.target.mkdir(parents=True, exist_ok=True)
        found = {split: count_images(plan.target / split) for split in plan.splits}
        pending = [split for split, images in found.items() if plan.val_labels is not None and split == 'val'
                   or (len(images), sum(images.values())) != (plan.edition.classes, plan.edition.images(split))]
        if pending:
            found.update(_complete(plan, pending, found))
    except OSError as error:
        where = error.filename or plan.target
        raise DataError(f'{where}: {error.strerror}: check path, permissions and disk, {AGAIN}.') from error
    return {split: (len(images), sum(images.values())) for split, images in found.items()}


def _complete(plan: Plan, splits: Sequence[str], found: Mapping[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Extract what is missing of some splits and check the result; returns the images of each class."""
    edition = plan.edition
    paths = {split: find_archive(plan.archives, getattr(edition, split)) for split in splits}
    devkit, needed = plan.archives / edition.devkit.name, 'val' in splits and plan.val_labels is None
    if devkit.is_file() or needed:
        find_archive(plan.archives, edition.devkit, hint=', or give the labels with --val-labels FILE')
        if plan.checksums:
            verify_checksum(devkit, edition.devkit)
    kit = read_devkit(devkit) if devkit.is_file() else None
    expected = {'train': kit.train_images if kit is not None and len(kit.wnids) == edition.classes else {}}
    classes: dict[str, dict[str, list[tarfile.TarInfo] | tarfile.TarInfo]] = {}
    for split in reversed(splits):  # the labels of val tell the classes of train where there is no devkit
        members = _open_members(paths[split], INNER_TAR if split == 'train' else IMAGE)
        if split == 'val':
            if len(members) != edition.val_images:
                raise DataError(
                    f'{paths[split]}: has {len(members):,} of {edition.val_images:,} images: {SOURCE} again.')
            labels = label_images([PurePosixPath(member.name).name for member in members], plan.val_labels, kit)
            expected['val'] = Counter(labels.values())
            classes['val'] = {wnid: [] for wnid in sorted(expected['val'])}
            for member in members:
                classes['val'][labels[PurePosixPath(member.name).name]].append(member)
            where, known = plan.val_labels or 'The labels of the devkit', set(expected['train'])
        else:
            classes['train'] = {PurePosixPath(member.name).stem: member for member in members}
            where, known = paths['train'], set(expected['train'] or expected.get('val') or found.get('val', {}))
        _require_classes(where, set(classes[split]), edition, known)
        others = sorted(set(found[split]) - set(classes[split]))
        if others:
            raise DataError(
                f'{plan.target / split}: has folders of other data ({list_names(others)}): move them away, {AGAIN}.')
    for split in splits:
        wrong = [f'{wnid} {found[split][wnid]} instead of {images}' for wnid, images in sorted(expected[split].items())
                 if found[split].get(wnid, images) != images]
        if wrong:
            raise DataError(
                f'{plan.target / split}: has other numbers of images than the archive ({list_names(wrong)}): remove '
                f'these folders, {AGAIN}.')
    jobs = [Job(paths[split], plan.target / split / wnid, members) for split in splits
            for wnid, members in classes[split].items() if wnid not in found[split]]
    needed_bytes, free = 1.02 * sum(job.size for job in jobs) + 64e6, shutil.disk_usage(plan.target).free
    if jobs and free < needed_bytes:  # 2 % for the last blocks of the files
        raise DataError(
            f'{plan.target}: {needed_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free: make room or choose '
            f'another folder.')
    for split in splits if plan.checksums else ():
        verify_checksum(paths[split], getattr(edition, split))
    if jobs:
        extract_classes(jobs, plan.workers)
    result = {split: count_images(plan.target / split) for split in splits}
    for split, images in result.items():
        _require_counts(plan, split, images, expected[split])
    return result


def _open_members(path: Path, pattern: re.Pattern) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(path, 'r:') as tar:
            return list_members(tar, pattern, path)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f'{path}: is damaged or incomplete ({error}): {SOURCE} again, {AGAIN}.') from None


def _require_classes(where: Path | str, wnids: set[str], edition: Edition, known: set[str]) -> None:
    missing, extra = sorted(known - wnids), sorted(wnids - known) if known else []
    if len(wnids) != edition.classes or missing or extra:
        names = f': missing {list_names(missing) or "none"}; unexpected {list_names(extra) or "none"}' if known else ''
        raise DataError(
            f'{where}: {len(wnids):,} of {edition.classes:,} classes{names}. Take the files of one edition; {SOURCE}.')


def _require_counts(plan: Plan, split: str, found: Mapping[str, int], expected: Mapping[str, int]) -> None:
    wanted = plan.edition.images(split)
    if len(found) != plan.edition.classes or sum(found.values()) != wanted:
        differ = [f'{wnid} {found.get(wnid, 0)} instead of {images}' for wnid, images in sorted(expected.items())
                  if found.get(wnid, 0) != images]
        differ = f'differing: {list_names(differ)}' if differ else 'the devkit archive is needed to list them'
        raise DataError(
            f'{plan.target / split}: has {len(found):,} classes with {sum(found.values()):,} images, not '
            f'{plan.edition.classes:,} with {wanted:,}; {differ}. Check the archive; remove these folders, {AGAIN}.')


def _parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='extract_ILSVRC.sh',
        description='Extract ImageNet (ILSVRC 2012) from its archives; resumes after an interruption.')
    parser.add_argument('archives', nargs='?', type=Path, help='folder of the archives, which are only read')
    parser.add_argument('target', nargs='?', type=Path, help='folder that gets train/ and val/')
    parser.add_argument('--folder', type=Path, default=Path(), help='default of ARCHIVES and TARGET')
    parser.add_argument('--only', choices=SPLITS, help='one split only')
    parser.add_argument('--val-labels', type=Path, help='labels of the validation images, where there is no devkit')
    parser.add_argument('--workers', type=number(int, 1), default=min(8, os.cpu_count() or 1), help='classes at a time')
    parser.add_argument('--skip-checksums', action='store_true', help='do not compare the MD5 of the archives')
    flags = parser.parse_intermixed_args(argv)
    if flags.only == 'train' and flags.val_labels is not None:
        parser.error('--val-labels has no effect with --only train: remove one of them')
    return flags


def main(argv: Sequence[str] | None = None, edition: Edition = ILSVRC2012) -> int:
    """Run the command and return its exit code; `edition` says what the archives should be."""
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
