"""ImageNet (ILSVRC 2012) from its archives: checked, extracted in parallel, resumed after any interruption, offline.

    python -m caretrans.data.imagenet [ARCHIVES] [TARGET]     (what `bash data/extract_ILSVRC.sh` runs)

reads ARCHIVES/ILSVRC2012_img_train.tar (one tar of JPEG images per class), ILSVRC2012_img_val.tar (images) and
ILSVRC2012_devkit_t12.tar.gz (their labels), and makes TARGET/train/CLASS/*.JPEG and TARGET/val/CLASS/*.JPEG. Archives
are only read. A class is extracted aside and then renamed, so that a class folder that exists is complete.
"""
import argparse
import dataclasses
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import number
from ..errors import DataError, list_names
from ..progress import Progress
from .imagenet_archives import (
    AGAIN, ILSVRC2012, IMAGE, INNER_TAR, SOURCE, Archive, Devkit, Edition, Member, compute_md5, find_archive,
    label_images, list_members, read_devkit, read_edition)
from .imagenet_extraction import Counts, Job, Record, extract_classes, measure_split

__all__ = ['Plan', 'main', 'prepare_imagenet']

SPLITS = ('train', 'val')


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked for.

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
            found = _measure(plan)
            pending = [split for split in found if not _is_done(plan, record, split, found[split])]
            if pending:
                found.update(_complete(dataclasses.replace(plan, splits=pending), record, found))
    except OSError as error:
        where = error.filename or plan.target
        raise DataError(f'{where}: {error.strerror}: check path, permissions and disk, {AGAIN}.') from error
    return {split: [len(folders), _count_images(folders)] for split, folders in found.items()}


def _measure(plan: Plan) -> dict[str, dict[str, Counts]]:
    return {split: measure_split(plan.target / split) for split in plan.splits}


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
    found = _measure(plan)
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


def _verify_checksum(path: Path, archive: Archive, record: 'Record') -> None:
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
        differ = f'differing: {list_names(differ)}' if differ else 'which of them differ, the devkit archive would tell'
        raise DataError(
            f'{plan.target / split}: has {len(found):,} classes with {_count_images(found):,} images, not '
            f'{plan.edition.classes:,} with {wanted:,}; {differ}. Check the archive; remove these folders, {AGAIN}.')


def _parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='extract_ILSVRC.sh',
        description='Extract ImageNet (ILSVRC 2012) from its archives; go on after an interruption.')
    parser.add_argument('archives', nargs='?', type=Path, help='folder of the archives, only read')
    parser.add_argument('target', nargs='?', type=Path, help='folder that gets train/ and val/')
    parser.add_argument('--folder', type=Path, default=Path(), help='stands in for ARCHIVES and TARGET not given')
    parser.add_argument('--only', choices=SPLITS, help='this split alone')
    parser.add_argument('--val-labels', type=Path, help='labels of the validation images, where there is no devkit')
    parser.add_argument('--workers', type=number(int, 1), default=min(8, os.cpu_count() or 1), help='classes at a time')
    parser.add_argument('--skip-checksums', action='store_true', help='do not compare the MD5 of the archives')
    parser.add_argument('--edition', type=Path, help='JSON file of another edition or a subset, see data/README.md')
    flags = parser.parse_intermixed_args(argv)
    if flags.only == 'train' and flags.val_labels is not None:
        parser.error('--val-labels says nothing of --only train: leave one of them out')
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    flags = _parse_flags(argv)
    target = flags.target or flags.folder
    if flags.skip_checksums:
        print('CHECKSUMS ARE SKIPPED: a damaged or exchanged image is not noticed, only counts are.', file=sys.stderr)
    try:
        edition = read_edition(flags.edition) if flags.edition else ILSVRC2012
        counts = prepare_imagenet(Plan(
            flags.archives or flags.folder, target, edition, (flags.only,) if flags.only else SPLITS, flags.val_labels,
            flags.workers, not flags.skip_checksums))
    except DataError as error:
        print(f'extract_ILSVRC.sh: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('extract_ILSVRC.sh: stopped; the same command goes on from here', file=sys.stderr)
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
