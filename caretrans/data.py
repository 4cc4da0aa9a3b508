"""Data sets, through timm's readers: what cannot be trained on or evaluated stops here."""
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from timm.data import ImageNetInfo, create_dataset, resolve_data_config
from torch.utils.data import Dataset

from .checkpoint_file import list_names

__all__ = [
    'DataError', 'describe_classes', 'list_classes', 'name_image', 'open_dataset', 'resolve_eval_config']


class DataError(ValueError):
    """Data that cannot be trained on or evaluated; the message names the folder and the remedy."""


def _split_folder(root: Path, split: str) -> Path:
    """The folder of a split: `root`/`split`, or `root` itself where it is the split of that name already."""
    synonyms = [split, 'validation', 'valid', 'val'] if split in ('val', 'validation') else [split]
    for name in synonyms:
        for path in (root / name, root / f'{name}.tar'):
            if path.exists():
                return path
    if root.name in synonyms:
        return root
    found = list_names(sorted(p.name for p in root.iterdir() if p.is_dir())) or 'no folders'
    raise DataError(f'{root} has no folder {split!r}, it has {found}. Expected: {root}/{split}/CLASS/IMAGE.jpg.')


def open_dataset(
        root: str,
        split: str,
        name: str = '',
        classes: Optional[List[str]] = None,
        is_training: bool = False,
        download: bool = False,
        batch_size: int = 1,
        seed: int = 42,
) -> Dataset:
    """One split of a data set.

    Args:
        root: Folder of the data.
        split: 'train', 'val', or a name that the data set knows.
        name: '' for folders and tars of images in ImageNet layout, else a name of timm's factory (torch/cifar10).
        classes: The classes in the order of their labels, when a checkpoint or another split fixes it.
        is_training, download, batch_size, seed: As in `timm.data.create_dataset`.
    Raises:
        DataError: The folder, the split, images or a package are missing, or the classes are not `classes`.
    """
    options: Dict[str, Any] = dict(is_training=is_training, download=download, batch_size=batch_size, seed=seed)
    if not name:
        path = Path(root)
        if not root or not path.exists():
            problem = f'No data at {root!r}' if root else 'No data named'
            raise DataError(f'{problem}: give a folder with {split}/CLASS/*.jpg; the bundled one is data/fruit14.')
        if path.is_file() and is_training:
            raise DataError(f'{root} is one file: training needs a folder with train.tar and val.tar.')
        root = str(_split_folder(path, split)) if path.is_dir() else root
        options.update(search_split=False)
    try:
        dataset = create_dataset(name, root=root, split=split, **options)
    except (RuntimeError, OSError, ImportError, AssertionError) as error:  # how timm's readers and torchvision refuse
        if 'Found 0 images' in str(error):
            raise DataError(f'{root} has no images. Expected: {root}/CLASS/IMAGE.jpg.') from None
        raise DataError(f'{name or root}, split {split!r}, cannot be read: {" ".join(str(error).split())}') from error
    found = list_classes(dataset)
    if found is not None and len(found) < 2:
        raise DataError(f'{root} has images of one class only, {found[0]!r}: they go into one folder per class.')
    if classes is not None and found is not None and found != classes:
        missing, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        raise DataError(
            f'The classes of {root} are not those expected ({len(found)} against {len(classes)}): '
            f'missing {list_names(missing) or "none"}; unknown {list_names(extra) or "none"}.')
    return dataset


def list_classes(dataset: Dataset) -> Optional[List[str]]:
    """The names of the classes in the order of their labels, or None where the data set does not say."""
    for owner in (getattr(dataset, 'reader', None), dataset):
        for attribute in ('class_to_idx', 'class_name_to_idx'):  # timm's reader of tars has the second
            index = getattr(owner, attribute, None)
            if index:
                return sorted(index, key=index.get)
    return None


def describe_classes(classes: Optional[List[str]], num_classes: int) -> List[str]:
    """Names to show people: descriptions for ImageNet's ids and for 1,000 unnamed classes, else the names."""
    if classes is None and num_classes != 1000:
        return [str(i) for i in range(num_classes)]
    imagenet = ImageNetInfo()
    if classes is None:
        return imagenet.label_descriptions()
    known = set(imagenet.label_names())
    return [imagenet.label_name_to_description(name) if name in known else name for name in classes]


def resolve_eval_config(model: torch.nn.Module, **overrides: Any) -> Dict[str, Any]:
    """How images are made ready for evaluation: input_size, interpolation, crop_pct, mean, std.

    `overrides` (img_size, crop_pct, interpolation, ...; None is no override) go over the model's `pretrained_cfg`.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    given.setdefault('in_chans', getattr(model, 'in_chans', 3))
    if 'img_size' not in given and 'input_size' not in given:
        given['img_size'] = model.pretrained_cfg['input_size'][-1]
    config = resolve_data_config(given, pretrained_cfg=model.pretrained_cfg)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def name_image(dataset: Dataset, index: int) -> str:
    """Where image `index` is: its path, or its number where the data set knows no paths."""
    try:
        return str(dataset.filename(index, absolute=True))
    except (AttributeError, AssertionError, NotImplementedError):
        return f'image {index}'
