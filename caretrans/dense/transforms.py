"""Augmentation of images together with their boxes and masks, by torchvision's transforms v2.

Images stay uint8, boxes are in pixels, masks and label maps are resized by nearest neighbour. All random numbers come
from PyTorch's generator on the CPU, which `seed_sample` seeds.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..errors import ConfigError
from .masks import IGNORE

__all__ = ['DenseAugment', 'Target', 'build_transform']

Target = dict[str, torch.Tensor] | torch.Tensor  # objects, or a label map (H, W) uint8

MOST_OF_ONE_CLASS, CROP_TRIES = .75, 10  # of a segmenter's crop, as mmseg
DETR_SIZES, DETR_CROPS = (400, 500, 600), (384, 600)  # short sides before the crop; least and greatest side of it


@dataclass(frozen=True)
class DenseAugment:
    """Augmentation of a detector or segmenter, in this order.

    Attributes:
        detr_crop: Half of the time, resize the image to a short side of 400, 500 or 600 pixels and take a random crop
            with sides of 384 to 600 pixels first, as DETR and MLLA.
        min_sizes: Short sides in pixels, of which one is drawn for each image.
        max_size: Greatest long side in pixels; a longer image becomes smaller than its `min_size`.
        scale: Range of a random factor on both sizes; (1, 1) for none.
        crop_size: Side of a random crop in pixels, 0 for none. An image with a smaller side keeps that side. At most
            75 % of the labels of a segmenter's crop have one class, if ten tries find such a crop.
        hflip, vflip: Probabilities of a horizontal and a vertical flip.
        photometric: Random brightness, contrast, saturation and hue.
    Raises:
        ConfigError: A value cannot be used.
    """
    min_sizes: tuple[int, ...]
    max_size: int
    scale: tuple[float, float] = (1., 1.)
    crop_size: int = 0
    hflip: float = .5
    vflip: float = 0.
    photometric: bool = False
    detr_crop: bool = False

    def __post_init__(self) -> None:
        wrong = {
            'min_sizes, one or more above 0': not self.min_sizes or min(self.min_sizes) < 1,
            'max_size, not below the smallest of min_sizes': self.max_size < min(self.min_sizes, default=0),
            'scale, two factors above 0, smaller first': len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1],
            'crop_size, 0 or more': self.crop_size < 0,
            'hflip, from 0 to 1': not 0 <= self.hflip <= 1, 'vflip, from 0 to 1': not 0 <= self.vflip <= 1}
        for rule, broken in wrong.items():
            if broken:
                name, _, expected = rule.partition(', ')
                raise ConfigError(f'{name} of the augmentation is {getattr(self, name)!r}: it must be {expected}.')


def build_transform(augment: DenseAugment) -> Callable[[torch.Tensor, Target], tuple[torch.Tensor, Target]]:
    """A function of an image (3, H, W) uint8 and its target that returns both augmented.

    A target is a label map (H, W) uint8, or a dict of `boxes` (N, 4) float32, x0 y0 x1 y1, `labels` (N,) int64 and
    perhaps `masks` (N, H, W) uint8. Objects whose box becomes narrower or lower than a pixel are dropped.
    """
    resize = _Resize(augment.min_sizes, augment.max_size, augment.scale)
    steps: list[Any] = []
    if augment.detr_crop:
        steps.append(v2.RandomApply([_Resize(DETR_SIZES), _RandomCrop(*DETR_CROPS)], p=.5))
    steps.append(resize)
    if augment.crop_size:
        steps.append(_RandomCrop(augment.crop_size, augment.crop_size))
    steps += [v2.RandomHorizontalFlip(augment.hflip), v2.RandomVerticalFlip(augment.vflip)]
    if augment.photometric:
        steps.append(_Distort())
    return _DenseTransform(v2.Compose(steps))


class _DenseTransform:
    """Steps of transforms v2 for plain tensors."""

    def __init__(self, steps: Callable) -> None:
        self.steps = steps
        self.sanitize = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)])

    def __call__(self, image: torch.Tensor, target: Target) -> tuple[torch.Tensor, Target]:
        inputs = tv_tensors.Image(image), _wrap(target, image.shape[-2:])
        outputs = self.steps(*inputs)
        if isinstance(target, dict):
            outputs = self.sanitize(*outputs)
        return tuple(_unwrap(output) for output in outputs)


def _wrap(target: Target, size: torch.Size) -> Any:
    if not isinstance(target, dict):
        return tv_tensors.Mask(target)
    boxes = tv_tensors.BoundingBoxes(target['boxes'], format='XYXY', canvas_size=tuple(size))
    masks = dict(masks=tv_tensors.Mask(target['masks'])) if 'masks' in target else {}
    return dict(target, boxes=boxes, **masks)


def _unwrap(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unwrap(entry) for key, entry in value.items()}
    return value.as_subclass(torch.Tensor).contiguous()


def _draw(low: int, high: int) -> int:
    """A random number from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))


class _Resize(v2.Transform):
    """Resize to a random short side, within a long side, with the rounding of mmdet and mmseg.

    Without antialiasing, as the models resize in evaluation.
    """

    def __init__(
            self, min_sizes: tuple[int, ...], max_size: int | None = None, scale: tuple[float, float] = (1., 1.),
    ) -> None:
        super().__init__()
        self.min_sizes, self.max_size, self.scale = min_sizes, max_size, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        ratio = self.min_sizes[_draw(0, len(self.min_sizes) - 1)] / min(height, width)
        if self.max_size is not None:
            ratio = min(ratio, self.max_size / max(height, width))
        ratio *= float(torch.empty(()).uniform_(*self.scale))
        return dict(size=[max(int(side * ratio + .5), 1) for side in (height, width)])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, params['size'], antialias=False)


class _RandomCrop(v2.Transform):
    """A random crop whose sides are drawn from `least` to `most` pixels, within the image.

    Of a label map, the first of eleven crops in which no class has more than 75 % of the labels, or the last.
    """

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def _draw_crop(self, size: tuple[int, int]) -> dict[str, int]:
        height, width = (_draw(min(side, self.least), min(side, self.most)) for side in size)
        return dict(top=_draw(0, size[0] - height), left=_draw(0, size[1] - width), height=height, width=width)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = v2.query_size(flat_inputs)
        crop = self._draw_crop(size)
        label_map = next((x for x in flat_inputs if isinstance(x, tv_tensors.Mask) and x.ndim == 2), None)
        for _ in range(CROP_TRIES if label_map is not None and max(size) > self.most else 0):
            if _is_mixed(F.crop(label_map, **crop)):
                break
            crop = self._draw_crop(size)
        return crop

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


def _is_mixed(label_map: torch.Tensor) -> bool:
    """Whether a label map has two classes or more, and none has nearly all pixels that are not ignored."""
    counts = torch.bincount(label_map.flatten().as_subclass(torch.Tensor), minlength=IGNORE + 1)[:IGNORE]
    return bool(counts.max() < MOST_OF_ONE_CLASS * counts.sum())


class _Distort(v2.RandomPhotometricDistort):
    """torchvision's photometric distortion in the ranges of mmseg, which does not swap channels.

    Departure: brightness is multiplied, mmseg adds up to 32 of 255.
    """

    def __init__(self) -> None:
        super().__init__(brightness=(.75, 1.25), contrast=(.5, 1.5), saturation=(.5, 1.5), hue=(-.1, .1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return dict(super().make_params(flat_inputs), channel_permutation=None)
