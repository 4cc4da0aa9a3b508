"""Images and masks of classes, in the layout of ADE20K or in folders beside each other."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ..data.decode import UNREADABLE, describe_error, open_image
from ..data.folders import list_images
from ..errors import DataError, list_names
from ..text import read_text

__all__ = ['IGNORE', 'MaskData', 'check_masks', 'has_masks', 'read_masks']

IGNORE = 255
MOST_CHECKED = 1000  # masks
LAYOUTS = (  # (images, masks) of a split, below the folder
    ('images/{split}', 'annotations/{split}'), ('{split}', '{split}_masks'), ('{split}/images', '{split}/masks'))
ADE20K = {'train': 'training', 'val': 'validation'}  # names of its splits


@dataclass(frozen=True)
class MaskData:
    """Images and the masks of their classes.

    Attributes:
        images, masks: Files, in the same order.
        num_classes: Values of masks are below it, or `ignore`.
        classes: Names, from a file `classes.txt` with a line each; empty without one.
        reduce_zero_label: 0 is no class and becomes `ignore`; 1 is the first class, as in ADE20K.
        notes: Lines on how the masks are read.
        ignore: Value of pixels that do not count.
    """
    images: list[Path]
    masks: list[Path]
    num_classes: int
    classes: list[str]
    reduce_zero_label: bool
    notes: list[str]
    ignore: int = IGNORE

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An image (3, H, W) uint8, and its label map (H, W) uint8, whose values are classes or `ignore`.

        Raises:
            OSError, SyntaxError, EOFError, Image.DecompressionBombError: One cannot be read.
            DataError: Their sizes differ, or a value is no class.
        """
        labels, data = self.read_labels(index), self.images[index].read_bytes()
        for orientation in ('exif', 'ignore'):
            image = open_image(data, orientation)
            if image.size == tuple(labels.shape[::-1]):
                return pil_to_tensor(image), labels
        raise DataError(f'{self.masks[index]} has {" x ".join(map(str, labels.shape))} pixels, its image '
                        f'{image.height} x {image.width}: a mask has one number per pixel.')

    def load(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same where every image is needed.

        Raises:
            DataError: One cannot be read, their sizes differ, or a value is no class.
        """
        try:
            return self.read(index)
        except UNREADABLE as error:
            raise DataError(f'{self.images[index]} or {self.masks[index]} cannot be read ({describe_error(error)}): '
                            f'remove both.') from None

    def read_labels(self, index: int) -> torch.Tensor:
        """The label map (H, W) uint8 of an image; palette images are read as indices. Raises the errors of `read`."""
        path = self.masks[index]
        with Image.open(path) as file:
            mask = np.array(file)
        if mask.ndim != 2 or mask.dtype.kind not in 'bui':
            raise DataError(f'{path} is {" x ".join(map(str, mask.shape))} of {mask.dtype}: a mask has one number per '
                            f'pixel, a whole one; save it as a greyscale or palette PNG.')
        mask = mask.astype(np.int32)
        if self.reduce_zero_label:
            mask = np.where((mask == 0) | (mask == self.ignore), self.ignore, mask - 1)
        wrong = np.unique(mask[((mask < 0) | (mask >= self.num_classes)) & (mask != self.ignore)])
        if len(wrong):
            raise DataError(f'{path} has the values {list_names(wrong.tolist())}, classes are 0 to '
                            f'{self.num_classes - 1} and {self.ignore} is ignored: correct the mask.')
        return torch.from_numpy(mask.astype(np.uint8))


def check_masks(data: MaskData) -> list[str]:
    """Read up to 1,000 masks, spread over the split, before any work begins.

    Returns:
        Notes: masks that cannot be read, or that all have the same class.
    Raises:
        DataError: A value is no class, or no pixel has one.
    """
    step = -(-len(data) // MOST_CHECKED)
    pixels, unreadable = torch.zeros(IGNORE + 1, dtype=torch.int64), []
    for i in range(0, len(data), step):
        try:
            pixels += torch.bincount(data.read_labels(i).flatten(), minlength=IGNORE + 1)
        except UNREADABLE:
            unreadable.append(data.masks[i].name)
    folder, found = data.masks[0].parent, pixels[:IGNORE].nonzero()[:, 0].tolist()
    if not found:
        raise DataError(f'{folder}: no pixel has a class, all are {data.ignore}, which is ignored: correct the values.')
    notes = [f'{folder}: {len(unreadable)} masks cannot be read: {list_names(unreadable, 3)}'] if unreadable else []
    if len(found) == 1 and data.num_classes > 1:
        ignored = f', {100 * pixels[data.ignore] / pixels.sum():.1f} % are {data.ignore}, which is ignored' \
            if pixels[data.ignore] else ''
        notes.append(f'{folder}: every pixel with a class has the class {found[0]}{ignored}: there is nothing to learn')
    return notes


def _find_folders(root: str | Path, split: str) -> tuple[Path, Path] | None:
    """The folders of images and masks of a split."""
    places = [(Path(root) / images.format(split=name), Path(root) / masks.format(split=name))
              for images, masks in LAYOUTS for name in (split, ADE20K.get(split, split))]
    return next((place for place in places if place[0].is_dir() and place[1].is_dir()), None)


def has_masks(root: str | Path, split: str) -> bool:
    """Whether a folder has images and masks where `read_masks` looks for them."""
    return _find_folders(root, split) is not None


def _read_classes(root: Path, with_ade20k: bool) -> list[str]:
    """The names in `classes.txt`, else if asked those of ADE20K's own table; none without either."""
    names, table = root / 'classes.txt', root / 'objectInfo150.txt'
    if names.is_file():
        return [line.strip() for line in read_text(names, DataError).splitlines() if line.strip()]
    if not with_ade20k or not table.is_file():
        return []
    rows = read_text(table, DataError).splitlines()[1:]  # 'Idx Ratio Train Val Name', synonyms after a comma
    return [row.split('\t')[-1].split(',')[0].strip() for row in rows if row.strip()]


def read_masks(
        root: str | Path, split: str, num_classes: int | None = None, reduce_zero_label: bool | None = None,
) -> MaskData:
    """List the images and masks of a split.

    Args:
        root: A folder in the layout of ADE20K (`images/training`, `annotations/training`), or with `train/` and
            `train_masks/`, or `train/images/` and `train/masks/`. A mask is a PNG with the name of its image.
        num_classes: Of the model; by default the number of names in `classes.txt`, or in ADE20K's `objectInfo150.txt`.
        reduce_zero_label: See `MaskData`; by default only for the layout of ADE20K with 150 classes.
    Raises:
        DataError: There is no such split, an image has no mask, or the number of classes is not known.
    """
    root = Path(root)
    folders = _find_folders(root, split)
    if folders is None:
        expected = [f'{images.format(split=split)} and {masks.format(split=split)}' for images, masks in LAYOUTS]
        raise DataError(f'{root} has no images and masks of {split}: expected {list_names(expected)}.')
    found = list_images(folders[0])
    images = [Path(path) for path in found.images]
    masks = [folders[1] / path.relative_to(folders[0]).with_suffix('.png') for path in images]
    missing = [path.name for path, mask in zip(images, masks, strict=True) if not mask.is_file()]
    if missing or not images:
        raise DataError(f'{folders[1]} lacks the masks of {len(missing)} images of {folders[0]}: '
                        f'{list_names(missing, 3)}.' if missing else f'{folders[0]} has no images.')
    classes = _read_classes(root, with_ade20k=num_classes is None)
    num_classes = num_classes or len(classes)
    if not num_classes:
        raise DataError(f'The classes of {root} are not known: list their names in {root / "classes.txt"}, one a line.')
    if num_classes > IGNORE:
        raise DataError(f'{root} has {num_classes} classes: masks have at most {IGNORE}, because {IGNORE} is ignored.')
    if reduce_zero_label is None:
        reduce_zero_label = folders[1].parent.name == 'annotations' and num_classes == 150
    notes = [note for note in (found.describe_skipped(),) if note]
    if reduce_zero_label:
        notes.append(f'{folders[1]}: 0 is no class (as in ADE20K); 1 is the first class')
    return MaskData(images, masks, num_classes, classes, reduce_zero_label, notes)
