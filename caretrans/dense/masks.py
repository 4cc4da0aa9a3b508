"""Images and masks of classes, in the layout of ADE20K or in folders beside each other."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ..data.decode import describe_error, open_image
from ..data.folders import is_image
from ..errors import DataError, list_names
from ..text import read_text

__all__ = ['IGNORE', 'MaskData', 'has_masks', 'read_masks']

IGNORE = 255
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

    def load(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An image (3, H, W) uint8, and its classes (H, W) uint8; palette images are read as indices.

        Raises:
            DataError: One cannot be read, their sizes differ, or a value is no class.
        """
        path, mask_path = self.images[index], self.masks[index]
        try:
            data = path.read_bytes()
            with Image.open(mask_path) as file:
                mask = np.array(file)
            images = [open_image(data, orientation) for orientation in ('ignore', 'exif')]
        except Exception as error:
            raise DataError(f'{path} or {mask_path} cannot be read ({describe_error(error)}): remove both.') from None
        image = next((image for image in images if image.size == mask.shape[1::-1]), None)
        if mask.ndim != 2 or mask.dtype == bool or image is None:
            raise DataError(
                f'{mask_path} is {" x ".join(map(str, mask.shape))} of {mask.dtype}, its image is {images[0].height} x '
                f'{images[0].width}: a mask has one number per pixel.')
        if self.reduce_zero_label:
            mask = np.where((mask == 0) | (mask == self.ignore), self.ignore + 1, mask) - 1
        wrong = np.unique(mask[(mask >= self.num_classes) & (mask != self.ignore)])
        if len(wrong):
            raise DataError(f'{mask_path} has the values {list_names(wrong.tolist())}, classes are 0 to '
                            f'{self.num_classes - 1} and {self.ignore} is ignored: correct the mask.')
        return pil_to_tensor(image), torch.from_numpy(mask.astype(np.uint8))


def _find_folders(root: str | Path, split: str) -> tuple[Path, Path] | None:
    """The folders of images and masks of a split."""
    places = [(Path(root) / images.format(split=name), Path(root) / masks.format(split=name))
              for images, masks in LAYOUTS for name in (split, ADE20K.get(split, split))]
    return next((place for place in places if place[0].is_dir() and place[1].is_dir()), None)


def has_masks(root: str | Path, split: str) -> bool:
    """Whether a folder has images and masks where `read_masks` looks for them."""
    return _find_folders(root, split) is not None


def read_masks(root: str | Path, split: str, num_classes: int, reduce_zero_label: bool | None = None) -> MaskData:
    """List the images and masks of a split.

    Args:
        root: A folder in the layout of ADE20K (`images/training`, `annotations/training`), or with `train/` and
            `train_masks/`, or `train/images/` and `train/masks/`. A mask is a PNG with the name of its image.
        num_classes: Of the model.
        reduce_zero_label: See `MaskData`; by default only for the layout of ADE20K with 150 classes.
    Raises:
        DataError: There is no such split, or an image has no mask.
    """
    root = Path(root)
    folders = _find_folders(root, split)
    if folders is None:
        expected = [f'{images.format(split=split)} and {masks.format(split=split)}' for images, masks in LAYOUTS]
        raise DataError(f'{root} has no images and masks of {split}: expected {list_names(expected)}.')
    images = sorted(path for path in folders[0].iterdir() if is_image(path.name) and not path.name.startswith('.'))
    masks = [folders[1] / f'{path.stem}.png' for path in images]
    missing = [path.name for path, mask in zip(images, masks, strict=True) if not mask.is_file()]
    if missing or not images:
        raise DataError(f'{folders[1]} lacks the masks of {len(missing)} images of {folders[0]}: '
                        f'{list_names(missing, 3)}.' if missing else f'{folders[0]} has no images.')
    names = root / 'classes.txt'
    classes = [line.strip() for line in read_text(names, DataError).splitlines() if line.strip()] \
        if names.is_file() else []
    if reduce_zero_label is None:
        reduce_zero_label = folders[1].parent.name == 'annotations' and num_classes == 150
    notes = [f'{folders[1]}: 0 is no class (as in ADE20K); 1 is the first class'] if reduce_zero_label else []
    return MaskData(images, masks, num_classes, classes, reduce_zero_label, notes)
