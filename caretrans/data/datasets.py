"""Data sets: folders, tars, LMDB files and shards of ours, and those of timm's factory; refuses what cannot be used."""
import json
import logging
import os
import tarfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import URLError

from timm.data import ImageDataset, ImageNetInfo, IterableImageDataset, create_dataset
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset

from ..errors import DataError, list_names, require
from ..text import read_text
from .folders import ClassReader, FolderReader, TarReader, UnlabelledReader

__all__ = [
    'check_labels', 'describe_classes', 'find_labels', 'list_classes', 'name_image', 'open_dataset', 'open_unlabelled',
    'thin_out']

_logger = logging.getLogger(__name__)

VALIDATION = ('validation', 'valid', 'val')  # names of one split
EVALUATION = (*VALIDATION, 'test')
INFO = '_info.json'  # beside WebDataset shards, as timm reads it


def _list_synonyms(split: str) -> list[str]:
    return [split, *VALIDATION] if split in ('val', 'validation') else [split]


def _split_folder(root: Path, split: str) -> Path:
    """The folder, tar or LMDB file of a split: `root`/`split`, or `root` itself if it has the name of the split."""
    synonyms = _list_synonyms(split)
    for name in synonyms:
        for path in (root / name, root / f'{name}.tar', root / f'{name}.lmdb'):
            if path.exists():
                return path
    if root.name in synonyms:
        return root
    found = list_names(sorted(p.name for p in root.iterdir() if p.is_dir()))
    raise DataError(f'{root} has no folder {split!r}, {"but " + found if found else "and no other"}. Expected: '
                    f'{root}/{split}/CLASS/IMAGE.jpg.')


def _open_shards(root: str, split: str, **options: Any) -> IterableImageDataset:
    """A split of WebDataset shards: described by an `_info.json`, else found by timm's reader."""
    from .shard_reader import ShardReader  # webdataset is needed for shards only
    root = str(Path(root).absolute()) if Path(root).is_dir() else root  # webdataset takes 'a:b' for a protocol
    path = Path(root) / INFO
    if path.is_file():
        text = read_text(path, DataError)
        try:
            splits = json.loads(text)['splits']
            found = next((name for name in _list_synonyms(split) if name in splits), None)
            files = splits[found]['filenames'] if found else []
            missing = [file for file in files if not (path.parent / file).is_file()]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{path} does not describe shards: {type(error).__name__}: {error}.') from None
        if found is None and 'tar' not in split:
            raise DataError(f'{path} has no split {split!r}, it has {list_names(splits) or "none"}.')
        if missing:
            raise DataError(f'{root} lacks {len(missing)} shards of its {INFO}: {list_names(missing)}.')
        split = found or split
    elif Path(root).is_dir() and 'tar' not in split:
        raise DataError(f'{root} has no {INFO}: write the shards with `python -m caretrans shard SOURCE {root}`.')
    return IterableImageDataset(root, reader=ShardReader(root=root, split=split, **options))


def _open_images(path: Path, is_training: bool) -> ImageDataset:
    """The images of a folder or a tar with class folders, or of an LMDB file."""
    if path.suffix == '.lmdb' and path.is_file():
        for package in ('lmdb', 'pyarrow'):
            require(package)
        from .lmdb_reader import LmdbReader  # both packages are needed for such files only
        return ImageDataset(str(path), reader=LmdbReader(path))
    try:
        reader = FolderReader(path, is_training) if path.is_dir() else TarReader(path, is_training)
    except tarfile.TarError as error:
        raise DataError(f'{path} is neither a folder nor a complete, uncompressed tar: {error}.') from None
    for note in reader.notes:
        _logger.warning(note)
    return ImageDataset(str(path), reader=reader)


def _open(root: str, split: str, name: str, options: dict[str, Any]) -> Dataset:
    path = Path(root)
    if name.lower().startswith('hfids/'):
        raise DataError(f'{name} is a stream, which cannot resume: use hfds/{name[6:]}, which is read by index.')
    sharded = name.lower().startswith('wds/') or not name and (path / INFO).is_file()
    if not name:
        if not root or not path.exists():
            problem = f'No data at {root!r}' if root else 'No data named'
            raise DataError(f'{problem}: give a folder with {split}/CLASS/*.jpg; the bundled one is data/fruit14.')
        if path.is_file() and options['is_training']:
            raise DataError(f'{root} is one file: training needs a folder with train.tar and val.tar.')
    try:
        if sharded:
            return _open_shards(root, split, is_training=options['is_training'], seed=options['seed'])
        if not name:
            return _open_images(_split_folder(path, split) if path.is_dir() else path, options['is_training'])
        return create_dataset(name, root=root, split=split, **options)
    except DataError:
        raise
    except (RuntimeError, OSError, ImportError, AssertionError, ValueError, HTTPException) as error:
        if name.lower().startswith('torch/'):
            _explain_download(error, root, name)
        if isinstance(error, ImportError) and getattr(error, 'name', '') == 'datasets':
            raise DataError(f'{name} needs the package of Hugging Face data sets: pip install datasets') from None
        raise DataError(f'{name or root}, split {split!r}, cannot be read: {" ".join(str(error).split())}') from error


def _explain_download(error: Exception, root: str, name: str) -> None:
    """Raise a DataError about what torchvision could not download or find; return on its other errors."""
    text = ' '.join(str(error).split())
    if isinstance(error, (URLError, HTTPException, ConnectionError, TimeoutError)) or text.startswith('File not found'):
        raise DataError(
            f'{name} could not be fetched into {root} ({type(error).__name__}: {text}): try again, or put the archive '
            f'of its authors there.') from error
    if 'download=True' in text:
        raise DataError(f'{root} holds no complete copy of {name}: --dataset-download fetches it.') from error


def open_dataset(
        root: str,
        split: str,
        name: str = '',
        classes: list[str] | None = None,
        is_training: bool = False,
        download: bool = False,
        batch_size: int = 1,
        seed: int = 42,
) -> Dataset:
    """One split of a data set.

    Args:
        root: Folder of the data.
        split: 'train', 'val', or a name that the data set knows.
        name: '' for folders, tars and LMDB files of images and for shards of ours, else a name of timm's factory
            (torch/cifar10). The shards of any wds/NAME are those in `root`.
        classes: The expected classes in the order of their labels, from a checkpoint or another split.
        is_training, download, batch_size, seed: As in `timm.data.create_dataset`; every class of a folder or tar to be
            trained on must have an image.
    Raises:
        DataError: The folder, the split, images or a package are missing, or the classes differ from `classes`.
    """
    root = str(root or '')
    dataset = _open(root, split, name, dict(
        is_training=is_training, download=download, batch_size=batch_size, seed=seed))
    found = list_classes(dataset)
    if found is not None and len(found) < 2:
        raise DataError(
            f'{root} has images of one class only, {found[0]!r}: the folders directly under a split are its classes.')
    if classes is not None and found is not None and found != classes:
        missing, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        reader = getattr(dataset, 'reader', None)
        if isinstance(reader, ClassReader) and not extra and set(missing) <= set(reader.empty):
            reader.number_classes(classes)
            return dataset
        raise DataError(
            f'The classes of {root} are not those expected ({len(found)} against {len(classes)}): '
            f'missing {list_names(missing) or "none"}; unknown {list_names(extra) or "none"}.')
    return dataset


def open_unlabelled(root: str, split: str, name: str = '', **options: Any) -> tuple[Dataset, bool]:
    """A data set whose labels are not needed, and whether it has labels all the same.

    Of a folder, the images are those below `root`/`split`, or without such a folder all below `root`. They have labels
    if there is a folder for the split, and folders of two or more classes in it hold all of them.

    Args:
        options: See `open_dataset`.
    Raises:
        DataError: There are no images, or they cannot be read.
    """
    path = Path(root or '')
    if not name and not root:
        raise DataError('No data: give a folder of images, with or without folders for classes, or --dataset.')
    if not name and not path.is_dir():
        remedy = f'give {path.parent}, the folder that holds it' if path.suffix == '.lmdb' and path.is_file() else \
            'give a folder of images, with or without folders for classes'
        raise DataError(f'{root} is no folder: {remedy}.')
    if name or (path / INFO).is_file():
        return open_dataset(root, split, name, is_training=True, **options), True
    found = next((part for part in (path / synonym for synonym in _list_synonyms(split)) if part.is_dir()), None)
    if found is None and any((path / f'{synonym}{ending}').is_file() for synonym in _list_synonyms(split)
                             for ending in ('.tar', '.lmdb')):
        return open_dataset(root, split, is_training=True, **options), True
    reader = UnlabelledReader(found or path)
    inside = [image.removeprefix(reader.root).lstrip(os.sep).split(os.sep) for image in reader.images]
    if found is not None and all(len(parts) > 1 for parts in inside) and len({parts[0] for parts in inside}) > 1:
        return open_dataset(root, split, **options), True
    others = sorted(part.name for part in path.iterdir() if part.is_dir() and not part.name.startswith('.')
                    and part.name not in (*EVALUATION, *_list_synonyms(split))) if found is not None else []
    if others:
        _logger.warning(f'{root}: only the images in {found.name} are used, not those in {list_names(others, 5)}.')
    for note in reader.notes:
        _logger.warning(note)
    return ImageDataset(str(path), reader=reader), False


class _PartReader(Reader):
    """Some images of another reader."""

    def __init__(self, reader: Reader, places: Sequence[int]) -> None:
        super().__init__()
        self.reader, self.places = reader, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.reader[self.places[index]]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.reader.filename(self.places[index], basename, absolute)


def thin_out(dataset: Dataset, most: int) -> Dataset:
    """At most `most` images, evenly spaced from the first to the last, of a folder, tar or LMDB file; others as are."""
    if not isinstance(dataset, ImageDataset) or len(dataset) <= most:
        return dataset
    places = [i * (len(dataset) - 1) // max(most - 1, 1) for i in range(most)]
    return ImageDataset('', reader=_PartReader(dataset.reader, places))


def list_classes(dataset: Dataset) -> list[str] | None:
    """The names of the classes in the order of their labels; None if the data set does not name them."""
    for owner in (getattr(dataset, 'reader', None), dataset):
        index = getattr(owner, 'class_to_idx', None)
        if index:
            return sorted(index, key=index.get)
    return None


def describe_classes(classes: list[str] | None, num_classes: int) -> list[str]:
    """Readable names: descriptions for ImageNet's ids and for 1,000 unnamed classes, else the names."""
    if classes is None and num_classes != 1000:
        return [str(i) for i in range(num_classes)]
    imagenet = ImageNetInfo()
    if classes is None:
        return imagenet.label_descriptions()
    known = set(imagenet.label_names())
    return [imagenet.label_name_to_description(name) if name in known else name for name in classes]


def find_labels(dataset: Dataset) -> set[int] | None:
    """The labels that occur; None if they cannot be known without reading the images."""
    reader = getattr(dataset, 'reader', None)
    if isinstance(getattr(reader, 'samples', None), list):  # folders and tars: (path, label)
        return {int(label) for _, label in reader.samples}
    if hasattr(reader, 'iter_targets'):  # Hugging Face data sets by index
        plain = reader.label_key in reader.dataset.column_names and not (reader.remap_class or reader.target_keys)
        labels = reader.dataset.unique(reader.label_key) if plain else reader.iter_targets()
        return {-1 if label is None else int(label) for label in labels}
    for owner in (reader, dataset):  # most data sets of torchvision
        for attribute in ('targets', 'labels', '_labels'):
            labels = getattr(owner, attribute, None)
            if labels is not None:
                return {int(label) for label in labels}
    return None


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Refuse labels below 0 or above `num_classes` - 1; labels of streams are checked by the loaders.

    Raises:
        DataError: There are such labels; the message lists them.
    """
    wrong = sorted(label for label in find_labels(dataset) or () if not 0 <= label < num_classes)
    if wrong:
        raise DataError(
            f'The model has {num_classes} classes, labels 0 to {num_classes - 1}, but the data has '
            f'{list_names(wrong)}: give the number of classes with --num-classes, or other data.')


def name_image(dataset: Dataset, index: int) -> str:
    """The path of image `index`, the path of a tar and the name in it, or its number where no path is known."""
    samples = getattr(dataset, 'samples', None)
    if getattr(dataset, 'reader', None) is None and samples is not None:  # torchvision's folders: (path, label)
        return str(samples[index][0])
    try:
        name = dataset.filename(index, absolute=True)
    except (AttributeError, AssertionError, NotImplementedError, KeyError, TypeError):
        name = None
    return str(name) if name else f'image {index}'
