"""Images and classes of folders and tars: one list of endings, one walk, one order.

A class is the first folder under a split, and the images at any depth below it belong to it. Links are followed, and
every file and folder is listed once. What is skipped is counted and named.
"""
import io
import os
import stat
import tarfile
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from PIL import Image
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from ..errors import DataError, list_names
from ..text import to_utf8

__all__ = [
    'ClassReader', 'FolderReader', 'Found', 'TarReader', 'UnlabelledReader', 'list_images', 'is_image', 'list_endings']

# Formats that Pillow opens but does not decode by itself, or that are no images
UNDECODED = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'WMF'}
SYSTEM_NAMES = {'@eaDir', '__MACOSX'}  # of network disks and of archives from a Mac
SHOWN = 3  # names of each kind that was skipped

Identities = set[tuple[int, int]]  # device and inode of files or folders


@lru_cache
def list_endings() -> frozenset[str]:
    """The endings of the files that Pillow decodes, in lower case: '.jpg' and others."""
    Image.init()
    return frozenset(
        ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - UNDECODED)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in list_endings()


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name in SYSTEM_NAMES


def _sort(names: Iterable[str]) -> list[str]:
    """Names with numbers in the order of their values, as in timm; names that differ only in case in a fixed order."""
    names = sorted(names)
    try:
        return sorted(names, key=natural_key)
    except ValueError:  # of int() for digits such as ²
        return sorted(names, key=str.lower)


NO_IMAGE, HIDDEN, OUTSIDE = 'files that are not images', 'hidden or system names', 'images outside of class folders'
AGAIN, BROKEN = 'links to what is listed already or to a folder above', 'links to nothing'


@dataclass
class Found:
    """Images and folders below `root`, and what was skipped.

    Attributes:
        images: Paths of the images, in order.
        folders: Names of the folders directly below `root`, links to folders included, in order.
        skipped: For each reason, the paths.
    """
    root: str
    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def shorten(self, path: str) -> str:
        """A path from `root` on."""
        return path.removeprefix(self.root).lstrip(f'{os.sep}:')

    def skip(self, reason: str, path: str) -> None:
        self.skipped.setdefault(reason, []).append(self.shorten(path))

    def describe_skipped(self) -> str:
        """One line about what was skipped; '' for nothing."""
        parts = []
        for reason, paths in self.skipped.items():
            endings = Counter(os.path.splitext(path)[1].lower() or 'no ending' for path in paths)
            counts = ', '.join(f'{count} {ending}' for ending, count in endings.most_common(5))
            named = f'{counts}: ' if reason == NO_IMAGE else ''
            parts.append(f'{reason}: {len(paths)} ({named}{list_names(sorted(paths), SHOWN)})')
        return f'{self.root}: skipped {"; ".join(parts)}.' if parts else ''


def list_images(root: str | Path) -> Found:
    """The images below a folder, at any depth.

    Real files and folders come first, so that of a file and a link to it the link is skipped.

    Raises:
        DataError: A folder cannot be read.
    """
    found, links = Found(str(Path(root))), deque()
    try:
        seen = {_identify(os.stat(found.root))}  # folders
        _walk(found.root, found, seen, links)
        files = {_identify(os.stat(path)) for path in found.images} if links else set()
        while links:
            _follow(links.popleft(), found, seen, files, links)
    except OSError as error:
        raise DataError(f'{error.filename or root} cannot be read: {error.strerror or error}.') from None
    found.images, found.folders = _sort(found.images), _sort(found.folders)
    return found


def _identify(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _walk(folder: str, found: Found, seen: Identities, links: deque[str]) -> None:
    """Add what is in a folder and in the real folders below it; links are only appended to `links`."""
    pending = deque([folder])
    while pending:
        path = pending.popleft()
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if _is_hidden(entry.name):
                    found.skip(HIDDEN, entry.path)
                elif entry.is_symlink():
                    links.append(entry.path)
                elif entry.is_dir():
                    if path == found.root:
                        found.folders.append(entry.name)
                    identity = _identify(os.stat(entry.path))
                    if identity not in seen:
                        seen.add(identity)
                        pending.append(entry.path)
                elif entry.is_file() and is_image(entry.name):
                    found.images.append(entry.path)
                else:
                    found.skip(NO_IMAGE, entry.path)


def _follow(link: str, found: Found, seen: Identities, files: Identities, links: deque[str]) -> None:
    """Add what a link leads to, unless it is among the `seen` folders or the `files` already."""
    if not os.path.exists(link):
        found.skip(BROKEN, link)
        return
    target = os.stat(link)
    if stat.S_ISDIR(target.st_mode):
        if os.path.dirname(link) == found.root:
            found.folders.append(os.path.basename(link))
        if _identify(target) in seen or _contains(link, found.root):
            found.skip(AGAIN, link)
        else:
            before = len(found.images)
            seen.add(_identify(target))
            _walk(link, found, seen, links)
            files.update(_identify(os.stat(path)) for path in found.images[before:])
    elif not stat.S_ISREG(target.st_mode) or not is_image(link):
        found.skip(NO_IMAGE, link)
    elif _identify(target) in files:
        found.skip(AGAIN, link)
    else:
        files.add(_identify(target))
        found.images.append(link)


def _contains(folder: str, path: str) -> bool:
    folder, path = os.path.realpath(folder), os.path.realpath(path)
    return os.path.commonpath([folder, path]) == folder


# Readers --------------------------------------------------------------------------------------------------------------

class ClassReader(Reader):
    """Images in class folders, for timm's `ImageDataset`.

    Args:
        found: The images.
        names: For each image, the parts of its name from its class on.
        is_training: Refuse a class without images.
    Attributes:
        samples: (path, label) of each image.
        class_to_idx: Label of each class that has images.
        empty: Names of class folders without images.
        notes: Lines about what was skipped and about classes without images.
    Raises:
        DataError: There are no images in class folders, or a class has none and is to be trained on.
    """

    def __init__(self, found: Found, names: Iterable[Sequence[str]], is_training: bool) -> None:
        super().__init__()
        self.root = found.root
        classes = {image: parts[0] for image, parts in zip(found.images, names, strict=True) if len(parts) > 1}
        for image in found.images if len(classes) < len(found.images) else ():
            if image not in classes:
                found.skip(OUTSIDE, image)
        skipped, used = found.describe_skipped(), set(classes.values())
        if not used:
            raise DataError(f'{self.root} has no images in class folders. Expected: {self.root}/CLASS/IMAGE.jpg. '
                            f'{skipped}'.strip())
        self.empty = [name for name in found.folders if name not in used]
        problem = f'{self.root}: class folders without images: {list_names(self.empty)}.'
        if self.empty and is_training:
            raise DataError(f'{problem} Add images, or remove the folders. {skipped}'.strip())
        self.notes = [note for note in (skipped, problem if self.empty else '') if note]
        self.class_to_idx = {name: label for label, name in enumerate(_sort(used))}
        self.samples = [(image, self.class_to_idx[name]) for image, name in classes.items()]

    def number_classes(self, classes: Sequence[str]) -> None:
        """Label the classes in the given order, which may include folders without images."""
        names, self.class_to_idx = list(self.class_to_idx), {name: label for label, name in enumerate(classes)}
        self.samples = [(path, self.class_to_idx[names[label]]) for path, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else path.removeprefix(self.root)[1:]


class UnlabelledReader(Reader):
    """All images below a folder, at any depth, without labels (-1), for timm's `ImageDataset`.

    Attributes:
        notes: Lines about what was skipped.
    Raises:
        DataError: There are no images.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__()
        found = list_images(root)
        self.root, self.images = found.root, found.images
        skipped = found.describe_skipped()
        if not self.images:
            raise DataError(f'No images in {root}. {skipped}'.strip())
        self.notes = [skipped] if skipped else []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return open(self.images[index], 'rb'), -1

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.images[index]
        return os.path.basename(path) if basename else path if absolute else path.removeprefix(self.root)[1:]


class FolderReader(ClassReader):
    """Images of a folder with class folders."""

    def __init__(self, root: str | Path, is_training: bool = False) -> None:
        found = list_images(root)
        found.folders = [to_utf8(name) for name in found.folders]
        names = (to_utf8(found.shorten(path)).split(os.sep) for path in found.images)
        super().__init__(found, names, is_training)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open(path, 'rb'), label


class TarReader(ClassReader):
    """Images of the class folders in a tar, or of the tars in it, one per class; members are read where they lie.

    The path of an image is that of the tar, ':', the name of an inner tar and ':' if there is one, and its own name.
    """

    def __init__(self, root: str | Path, is_training: bool = False) -> None:
        found, self.places = Found(str(root)), {}  # path: parts of the name, begin, size
        with open(root, 'rb') as file:
            self._list(file, found, f'{root}:', (), os.path.getsize(root))
        found.images = _sort(self.places)
        names = [self.places[path][0] for path in found.images]
        while len({name[0] for name in names}) == 1 and any(len(name) > 2 for name in names):
            names = [name[1:] for name in names]  # one folder around all classes
        super().__init__(found, names, is_training)

    def _list(self, file: BinaryIO, found: Found, prefix: str, folders: tuple[str, ...], end: int) -> None:
        """Add the images of the tar that begins at the position of `file`, and those of the tars in it."""
        inner = []
        with tarfile.open(fileobj=file, mode='r:', encoding='utf-8') as tar:
            for member in tar:
                if member.offset >= end:  # the next member of the outer tar
                    break
                path, parts = prefix + member.name, (*folders, *PurePosixPath(member.name).parts)
                if member.isdir():
                    continue
                if any(map(_is_hidden, parts)):
                    found.skip(HIDDEN, path)
                elif not member.isreg() or member.issparse():
                    found.skip('links and special files', path)
                elif member.name.lower().endswith('.tar') and not folders:
                    inner.append((member, (*parts[:-1], parts[-1][:-len('.tar')])))
                elif not is_image(member.name):
                    found.skip(NO_IMAGE, path)
                else:
                    self.places[path] = parts, member.offset_data, member.size
        for member, parts in inner:
            file.seek(member.offset_data)
            self._list(file, found, f'{prefix}{member.name}:', parts, member.offset_data + member.size)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        _, offset, size = self.places[path]
        with open(self.root, 'rb') as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), label
