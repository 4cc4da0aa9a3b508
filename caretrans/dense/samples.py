"""Training samples of detectors and segmenters: images with their boxes and masks or label maps, augmented.

A sample depends only on the `Sample` that asks for it, not on the number of workers.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..data.decode import describe_error
from ..data.samples import Item, SeededSamples
from ..errors import DataError
from .coco import CocoData, CocoImage, encode_masks
from .masks import MaskData, check_masks
from .objects import select_training
from .transforms import Target

__all__ = ['Batch', 'DetectionSamples', 'SegmentationSamples', 'collate']

Transform = Callable[[torch.Tensor, Target], tuple[torch.Tensor, Target]]


class Batch(NamedTuple):
    """Images (3, H, W) uint8 of different sizes, their targets, and (name, reason) of images that could not be read."""
    images: list[torch.Tensor]
    targets: list[Target]
    unreadable: list[tuple[str, str]]


def collate(items: Sequence[Item]) -> Batch:
    """Make a batch of items; an item without an image only has reasons."""
    kept = [item for item in items if item[0] is not None]
    return Batch([item[0] for item in kept], [item[1] for item in kept], [entry for item in items for entry in item[2]])


class DetectionSamples(SeededSamples):
    """Images and objects to train a detector on, by `Sample`.

    An item is (image (3, H, W) uint8, target, unreadable images before it). A target has `boxes` (N, 4) float32,
    x0 y0 x1 y1 in pixels, `labels` (N,) int64 from 0 in the order of `data.classes` and, if asked, `masks` (N, H, W)
    uint8 of 0 and 1; N may be 0. An unreadable image is replaced by the next one.

    Args:
        data: All of a split; what `select_training` leaves out is not among the samples.
        transform: Of `build_transform`.
        masks: Whether targets have masks.
    Attributes:
        notes: Lines on what is odd in the data and what is done about it.
    Raises:
        DataError: There is no object to train on, or masks are asked and an object has none.
    """

    def __init__(self, data: CocoData, transform: Transform, masks: bool) -> None:
        super().__init__(replace=True)
        selected = select_training(data)
        self.data = encode_masks(selected) if masks else selected
        self.transform, self.masks, self.notes = transform, masks, selected.notes
        self.labels = {number: label for label, number in enumerate(data.categories)}

    def __len__(self) -> int:
        return len(self.data.images)

    def name_image(self, index: int) -> str:
        return str(self.data.images[index].path)

    def load(self, index: int, size: int = 0) -> tuple[torch.Tensor, Target]:
        image = self.data.images[index]
        return _transform(self.transform, image.read(), self._build_target(image), image.path)

    def _build_target(self, image: CocoImage) -> Target:
        boxes = torch.tensor([entry['bbox'] for entry in image.objects], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [self.labels[entry['category_id']] for entry in image.objects]
        target = dict(boxes=boxes.float(), labels=torch.tensor(labels, dtype=torch.int64))
        if self.masks:
            target['masks'] = _decode_masks(image)
        return target


def _decode_masks(image: CocoImage) -> torch.Tensor:
    """The masks (N, H, W) uint8 of an image of `encode_masks`."""
    from faster_coco_eval.core import mask

    if not image.objects:
        return torch.zeros(0, image.height, image.width, dtype=torch.uint8)
    pixels = mask.decode([entry['segmentation'] for entry in image.objects])  # (H, W, N)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class SegmentationSamples(SeededSamples):
    """Images and label maps to train a segmenter on, by `Sample`.

    An item is (image (3, H, W) uint8, label map (H, W) uint8, unreadable images before it). Values of a label map are
    classes or `data.ignore`. An image that cannot be read, or whose mask cannot, is replaced by the next one.

    Args:
        data: All of a split.
        transform: Of `build_transform`.
    Attributes:
        notes: Lines on what is odd in the data and what is done about it.
    Raises:
        DataError: No pixel has a class, or a value is no class.
    """

    def __init__(self, data: MaskData, transform: Transform) -> None:
        super().__init__(replace=True)
        self.data, self.transform = data, transform
        self.notes = [*data.notes, *check_masks(data)]

    def __len__(self) -> int:
        return len(self.data)

    def name_image(self, index: int) -> str:
        return str(self.data.images[index])

    def load(self, index: int, size: int = 0) -> tuple[torch.Tensor, Target]:
        return _transform(self.transform, *self.data.read(index), self.data.images[index])


def _transform(transform: Transform, image: torch.Tensor, target: Target, name: object) -> tuple[torch.Tensor, Target]:
    try:
        return transform(image, target)
    except (RuntimeError, ValueError) as error:
        raise DataError(f'{name} cannot be augmented ({describe_error(error)}): remove it.') from error
