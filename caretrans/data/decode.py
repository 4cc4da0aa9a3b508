"""Decoding for training: timm's random crop, taken from a JPEG by libjpeg-turbo and resized by PyTorch's uint8 kernels.

The random numbers, the crop and the interpolation are timm's. The pixels are Pillow's to within rounding, and where a
large image is decoded at a reduced scale to within what that scale keeps; docs/training.md has both
measured, and the time. Whatever is not a plain JPEG, or makes libjpeg-turbo complain, goes through Pillow exactly as in
timm.
"""
import io
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import (
    MaybePILToTensor, RandomResizedCropAndInterpolation, interp_mode_to_str, str_to_pil_interp)
from torchvision.transforms import ColorJitter, Compose, RandomHorizontalFlip
from torchvision.transforms.functional import pil_to_tensor, resized_crop

__all__ = ['CropTransform', 'UNREADABLE', 'choose_reduction', 'decode_crop', 'open_image', 'read_jpeg_size']

UNREADABLE = (OSError, SyntaxError, EOFError, Image.DecompressionBombError)  # how files and Pillow's decoders fail
FAST_COLOURS = ('YCbCr', 'Gray')  # of JPEGs that libjpeg-turbo makes RGB with the same values as Pillow

Box = tuple[int, int, int, int]  # top, left, height, width


def open_image(source: bytes | Image.Image) -> Image.Image:
    """The whole image as RGB, by Pillow; one of UNREADABLE is raised where that fails."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
        return image.convert('RGB')
    except (MemoryError, *UNREADABLE):
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise OSError(f'{type(error).__name__}: {error}') from error


def read_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that `decode_crop` takes, None for anything else."""
    if data[:2] != b'\xff\xd8':
        return None
    import simplejpeg  # of the extra `train`; `require` has checked it

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    small = Image.MAX_IMAGE_PIXELS is None or height * width <= Image.MAX_IMAGE_PIXELS
    return (height, width) if colours in FAST_COLOURS and small else None


def choose_reduction(box: Box, size: tuple[int, int]) -> int:
    """The greatest of 8, 4, 2, 1 by which the crop can be reduced before it is smaller than what it is resized to."""
    return next(
        (r for r in (8, 4, 2) if box[2] >= r * size[0] and box[3] >= r * size[1]), 1)


def decode_crop(
        data: bytes, image_size: tuple[int, int], box: Box, size: tuple[int, int], interpolation: str,
) -> torch.Tensor:
    """A crop of a JPEG, resized with antialiasing.

    Args:
        data: A JPEG for which `read_jpeg_size` gave `image_size`.
        box: The crop, in pixels of the whole image.
        size: (height, width) of the result.
        interpolation: 'bilinear' or 'bicubic'.
    Returns:
        (3, *size) uint8, channels last in memory.
    Raises:
        ValueError: Damaged, even where a decoder could continue.
    """
    import simplejpeg

    r = choose_reduction(box, size)
    height, width = ((side + r - 1) // r for side in image_size)
    pixels = simplejpeg.decode_jpeg(data, 'RGB', min_height=height, min_width=width, min_factor=r, strict=True)
    if pixels.shape[:2] != (height, width):
        raise ValueError(f'decoded to {pixels.shape[:2]}, not to {height, width}')
    if r > 1:
        return _resize_part(pixels, [edge / r for edge in box], size, interpolation)
    top, left, height, width = box
    crop = torch.from_numpy(pixels)[None, top:top + height, left:left + width].permute(0, 3, 1, 2)
    return F.interpolate(crop, size, mode=interpolation, antialias=True)[0]  # channels last, so fast


def _resize_part(
        pixels: np.ndarray, box: Sequence[float], size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """The same by Pillow, which takes edges between pixels."""
    (top, left), (bottom, right) = box[:2], (min(box[i] + box[i + 2], pixels.shape[i]) for i in (0, 1))
    row, column = int(top), int(left)
    image = Image.fromarray(pixels[row:math.ceil(bottom), column:math.ceil(right)])
    image = image.resize(
        size[::-1], str_to_pil_interp(interpolation), box=(left - column, top - row, right - column, bottom - row))
    return pil_to_tensor(image)


def _takes_tensors(step: Any) -> bool:
    """Whether a step of a transform does the same to a tensor as to an image; timm's jitter of strength 0 does."""
    if isinstance(step, ColorJitter):
        return step.brightness is step.contrast is step.saturation is step.hue is None
    return isinstance(step, (RandomHorizontalFlip, MaybePILToTensor))


class CropTransform:
    """timm's training transform, fast for the bytes of a JPEG; draws the numbers that timm's would.

    Args:
        transform: Of `timm.data.create_transform(..., is_training=True, use_prefetcher=True)`.
    """

    def __init__(self, transform: Compose) -> None:
        self.crop, *rest = transform.transforms
        if not isinstance(self.crop, RandomResizedCropAndInterpolation):
            raise TypeError(f'The transform begins with {self.crop}, not with a random resized crop.')
        self.rest = Compose(rest)
        self.stays_tensor = all(map(_takes_tensors, rest))

    def draw(self, height: int, width: int) -> tuple[Box, Any]:
        """The crop of an image of this size, and the interpolation."""
        image = torch.empty((1, height, width), device='meta')  # timm asks it for its size
        box = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        choices = self.crop.interpolation
        return box, random.choice(choices) if isinstance(choices, (tuple, list)) else choices

    def __call__(self, source: bytes | Image.Image) -> torch.Tensor:
        """(3, H, W) uint8; one of UNREADABLE is raised for what Pillow cannot decode."""
        jpeg_size = None if isinstance(source, Image.Image) else read_jpeg_size(source)
        image = open_image(source) if jpeg_size is None else None
        box, interpolation = self.draw(*(jpeg_size or (image.height, image.width)))
        if jpeg_size is not None:
            try:
                crop = decode_crop(source, jpeg_size, box, self.crop.size, interp_mode_to_str(interpolation))
            except ValueError:  # Pillow decides whether it is fit for use
                image = open_image(source)
            else:
                if not self.stays_tensor:
                    crop = Image.fromarray(crop.permute(1, 2, 0).numpy())
                return self.rest(crop)
        return self.rest(resized_crop(image, *box, self.crop.size, interpolation))
