"""What is in a folder of data: images, objects, classes, and odd things with what will be done about each."""
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from ..data.folders import FolderReader
from ..errors import DataError
from .coco import has_coco, read_coco
from .masks import IGNORE, has_masks, read_masks

__all__ = ['describe_data']


def describe_data(root: str | Path, split: str) -> Iterator[str]:
    """Lines about a split: annotations in the format of COCO, images with masks, or class folders.

    Raises:
        DataError: It is none of these, or cannot be used; names the file.
    """
    root, found = Path(root), False
    if has_coco(root, split):
        found = True
        yield from read_coco(root, split).describe()
    if has_masks(root, split):
        found = True
        yield from _describe_masks(root, split)
    if not found and (root / split).is_dir():
        found = True
        yield from _describe_classes(root / split)
    if not found:
        raise DataError(f'{root} has no {split}: neither annotations in the format of COCO, nor images and masks, nor '
                        f'folders {split}/CLASS with images.')


def _describe_masks(root: Path, split: str) -> Iterator[str]:
    """Sizes are checked and values counted in every mask."""
    data = read_masks(root, split, num_classes=IGNORE, reduce_zero_label=False)
    pixels, images = torch.zeros(IGNORE + 1, dtype=torch.int64), Counter()
    for i in range(len(data)):
        counts = torch.bincount(data.load(i)[1].flatten(), minlength=IGNORE + 1)
        pixels += counts
        images.update(counts.nonzero()[:, 0].tolist())
    yield f'{data.masks[0].parent}: {len(data)} images with masks, {len(images)} values'
    for value, count in sorted(images.items()):
        name = 'ignored' if value == IGNORE else data.classes[value] if value < len(data.classes) else 'a class'
        share = 100 * pixels[value].item() / pixels.sum().item()
        yield f'  {value} ({name}): {share:.2f} % of the pixels, in {count} images'


def _describe_classes(folder: Path) -> Iterator[str]:
    data = FolderReader(folder)
    counts = Counter(label for _, label in data.samples)
    yield f'{folder}: {len(data)} images, {len(data.class_to_idx)} classes'
    yield from (f'  {name}: {counts[label]} images' for name, label in data.class_to_idx.items())
    yield from data.notes
