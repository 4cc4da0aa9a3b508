"""Decoding of images: one function for training, validation, prediction, shards, exports and benchmarks.

Training takes timm's random crop from a JPEG by libjpeg-turbo and resizes it by PyTorch's uint8 kernels. The random
numbers, the crop and the interpolation are timm's. The pixels are Pillow's to within rounding, and where a large image
is decoded at a reduced scale to within what that scale keeps; docs/training.md has both measured, and the time.
Whatever is not a plain JPEG, or makes libjpeg-turbo complain, goes through Pillow.
"""
import io
import math
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from timm.data import create_transform
from timm.data.transforms import (
    MaybePILToTensor, RandomResizedCropAndInterpolation, interp_mode_to_str, str_to_pil_interp)
from torchvision.transforms import ColorJitter, Compose, RandomHorizontalFlip
from torchvision.transforms.functional import center_crop, pil_to_tensor, resized_crop

from ..checkpoint.preparation import Preparation

__all__ = [
    'UNREADABLE', 'CropTransform', 'EvalTransform', 'choose_reduction', 'decode_crop', 'describe_error', 'open_image',
    'read_jpeg_size', 'read_orientation']

UNREADABLE = (OSError, SyntaxError, EOFError, Image.DecompressionBombError)  # how files and Pillow's decoders fail
FAST_COLOURS = ('YCbCr', 'Gray')  # of JPEGs that libjpeg-turbo makes RGB with the same values as Pillow
KNOWN_RANGE = ('PNG', 'PPM')  # formats whose mode I is 16 bits
TIFF_BITS, TIFF_COLOURS = 258, 262  # tags
MAX_ASPECT = 100  # beyond, only the middle of an image is resized: its ends would fill the memory and be cut off

Box = tuple[int, int, int, int]  # top, left, height, width


def describe_error(error: BaseException) -> str:
    """Type and text of an error in one line, without the addresses of objects."""
    text = ' '.join(re.sub(' ?<_io[.][^>]*>', '', str(error)).split())
    return f'{type(error).__name__}: {text}'


# Whole images ---------------------------------------------------------------------------------------------------------

# EXIF orientation: the upright image is the stored one, rows and columns swapped or not, then the rows reversed or not
# (top to bottom), then the columns (left to right).
ORIENTATIONS = {
    1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
    5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False)}
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, a key of `ORIENTATIONS`; 1, upright, if there is none or the EXIF data are damaged."""
    try:
        number = image.getexif().get(ExifTags.Base.Orientation, 1)
        return number if number in ORIENTATIONS else 1
    except Exception:  # damaged EXIF data raise nearly anything, and the image may be sound
        return 1


def _reduce_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of 12 or 16 bits scaled to 8 bits, where Pillow would clip them at 255; other images as they are.

    Raises:
        OSError: 32-bit integers or floating point, whose black and white are not known.
    """
    if image.mode == 'F' or image.mode == 'I' and image.format not in KNOWN_RANGE:
        kind = 'floating-point values' if image.mode == 'F' else 'values of 32 bits or with a sign'
        raise OSError(f'{kind} (mode {image.mode}), whose black and white are not known: save it with 8 or 16 bits')
    if not image.mode.startswith('I'):
        return image
    tags = getattr(image, 'tag_v2', {})
    white = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
    values = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white
    return Image.fromarray((255 - values if tags.get(TIFF_COLOURS) == 0 else values).astype(np.uint8))  # 0: inverted


def open_image(source: bytes | Image.Image, orientation: str = 'ignore') -> Image.Image:
    """The whole image as RGB of 8 bits, by Pillow.

    Args:
        orientation: 'exif' or 'ignore', see `Preparation`. Pillow itself rotates TIFF files in both cases.
    Raises:
        OSError, SyntaxError, EOFError, Image.DecompressionBombError: It cannot be decoded.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
        image.load()
        transposition = TRANSPOSITIONS.get(read_orientation(image)) if orientation == 'exif' else None
        image = _reduce_to_8_bits(image).convert('RGB')
        if transposition is not None:
            image = image.transpose(transposition)
            for kind in ('exif', 'xmp', 'XML:com.adobe.xmp'):  # else it would be rotated again where it is opened again
                image.info.pop(kind, None)
        return image
    except (MemoryError, *UNREADABLE):
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise OSError(f'{type(error).__name__}: {error}') from error


class EvalTransform:
    """timm's evaluation transform, for the bytes of an image or an image.

    In channel order 'bgr' blue comes first and meets the first of the means and standard deviations, which stay as they
    are.

    Args:
        preparation: Of the network.
        as_uint8: Return pixels, to be normalised on the device, instead of normalised float32.
    """

    def __init__(self, preparation: Preparation, as_uint8: bool = False) -> None:
        self.preparation = preparation
        # A border around an image so thin that it is resized to 0 pixels would be all of it.
        self.most_aspect = dict(squash=math.inf, border=min(preparation.size)).get(preparation.crop_mode, MAX_ASPECT)
        self.transform = create_transform(
            preparation.input_size, is_training=False, use_prefetcher=as_uint8, mean=preparation.mean,
            std=preparation.std, interpolation=preparation.interpolation, crop_pct=preparation.crop_pct,
            crop_mode=preparation.crop_mode)

    def __call__(self, source: bytes | Image.Image) -> torch.Tensor:
        """(C, H, W); one of UNREADABLE is raised for what Pillow cannot decode."""
        image = open_image(source, self.preparation.orientation)
        longest = self.most_aspect * min(image.size)
        if max(image.size) > longest:
            image = center_crop(image, [min(side, longest) for side in image.size[::-1]])
        if self.preparation.channel_order == 'bgr':
            image = Image.merge('RGB', image.split()[::-1])
        return torch.as_tensor(self.transform(image))


# Random crops ---------------------------------------------------------------------------------------------------------

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


def _read_jpeg_orientation(data: bytes) -> int:
    if b'Exif\0' not in data and b'Orientation' not in data:  # neither EXIF data nor XMP
        return 1
    try:
        return read_orientation(Image.open(io.BytesIO(data)))
    except Exception:  # `open_image` would fail too, or libjpeg-turbo complains and it decides
        return 1


def choose_reduction(box: Box, size: tuple[int, int]) -> int:
    """The greatest of 8, 4, 2, 1 by which the crop can be reduced before it is smaller than what it is resized to."""
    return next(
        (r for r in (8, 4, 2) if box[2] >= r * size[0] and box[3] >= r * size[1]), 1)


def decode_crop(
        data: bytes, image_size: tuple[int, int], box: Box, size: tuple[int, int], interpolation: str,
        orientation: int = 1,
) -> torch.Tensor:
    """A crop of a JPEG, resized with antialiasing.

    Args:
        data: A JPEG for which `read_jpeg_size` gave `image_size`.
        box: The crop, in pixels of the whole upright image.
        size: (height, width) of the result.
        interpolation: 'bilinear' or 'bicubic'.
        orientation: The EXIF orientation; the image is rotated upright.
    Returns:
        (3, *size) uint8.
    Raises:
        ValueError: Damaged, even where a decoder could continue.
    """
    if orientation == 1:
        return _decode_stored(data, image_size, box, size, interpolation)
    swapped, *reversed_axes = ORIENTATIONS[orientation]
    if swapped:
        box, size = (box[1], box[0], box[3], box[2]), size[::-1]
        reversed_axes = reversed_axes[::-1]
    starts = [side - start - length if is_reversed else start for side, start, length, is_reversed in zip(
        image_size, box[:2], box[2:], reversed_axes, strict=True)]
    crop = _decode_stored(data, image_size, (*starts, *box[2:]), size, interpolation)
    crop = crop.flip([axis + 1 for axis in (0, 1) if reversed_axes[axis]])
    return crop.transpose(1, 2) if swapped else crop


def _decode_stored(
        data: bytes, image_size: tuple[int, int], box: Box, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """A crop of a JPEG in its stored orientation."""
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
        orientation: 'exif' or 'ignore', see `Preparation`.
    """

    def __init__(self, transform: Compose, orientation: str = 'ignore') -> None:
        self.crop, *rest = transform.transforms
        if not isinstance(self.crop, RandomResizedCropAndInterpolation):
            raise TypeError(f'The transform begins with {self.crop}, not with a random resized crop.')
        self.rest = Compose(rest)
        self.stays_tensor = all(map(_takes_tensors, rest))
        self.orientation = orientation

    def draw(self, height: int, width: int) -> tuple[Box, Any]:
        """The crop of an image of this size, and the interpolation; a crop that timm rounds to 0 pixels gets 1."""
        image = torch.empty((1, height, width), device='meta')  # timm asks it for its size
        top, left, *sides = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        rows, columns = (max(side, 1) for side in sides)
        choices = self.crop.interpolation
        return (min(top, height - rows), min(left, width - columns), rows, columns), \
            random.choice(choices) if isinstance(choices, (tuple, list)) else choices

    def __call__(self, source: bytes | Image.Image) -> torch.Tensor:
        """(3, H, W) uint8; one of UNREADABLE is raised for what Pillow cannot decode."""
        stored = None if isinstance(source, Image.Image) else read_jpeg_size(source)
        if stored is None:
            image = open_image(source, self.orientation)
            box, interpolation = self.draw(image.height, image.width)
            return self.rest(resized_crop(image, *box, self.crop.size, interpolation))
        turn = _read_jpeg_orientation(source) if self.orientation == 'exif' else 1
        box, interpolation = self.draw(*(stored[::-1] if ORIENTATIONS[turn][0] else stored))
        try:
            crop = decode_crop(source, stored, box, self.crop.size, interp_mode_to_str(interpolation), turn)
        except ValueError:  # Pillow decides whether it is fit for use
            image = open_image(source, self.orientation)
            return self.rest(resized_crop(image, *box, self.crop.size, interpolation))
        if not self.stays_tensor:
            crop = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
        return self.rest(crop)
