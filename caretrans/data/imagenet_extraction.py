"""Class folders from tars: extracted aside, then renamed, in parallel, with a record of what was done."""
import fcntl
import io
import json
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, list_names
from ..progress import Progress
from .imagenet_archives import AGAIN, CHUNK, IMAGE, SOURCE, Member, list_members

__all__ = ['Counts', 'Job', 'Record', 'extract_classes', 'measure_split']

Counts = list[int]  # images, bytes


# What was done --------------------------------------------------------------------------------------------------------

class Record:
    """What is known of a target folder, kept in it, a JSON pair per line; it also keeps out a second run.

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
    """Extract a class aside, then give the folder its name; a folder that exists must hold the same already.

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
