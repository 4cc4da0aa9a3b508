"""Two views of an image for pre-training, from one decoding: crops with their own colours, blur and flips.

The operations, their order, their probabilities and strengths are the published ones by default. All are Pillow's and
torchvision's, on images: other filters differ by a few levels.
"""
import random
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torchvision.transforms import (
    ColorJitter, Compose, RandomApply, RandomGrayscale, RandomHorizontalFlip, RandomResizedCrop, RandomSolarize)
from torchvision.transforms.functional import pil_to_tensor

from ..data.decode import open_image
from ..errors import ConfigError

__all__ = ['GaussianBlur', 'TwoViews', 'ViewSettings', 'build_view']

THRESHOLD = 128  # from which solarizing inverts a value


@dataclass(frozen=True)
class ViewSettings:
    """The strengths and probabilities of both views.

    Attributes:
        scale, ratio: Smallest and largest area, as a share of the image, and aspect ratio of the crops.
        brightness, contrast, saturation, hue: Largest changes, in an order that is drawn, with `jitter_prob`.
        blur_prob, solarize_prob: Of view 1 and of view 2.
        blur_radius: Smallest and largest, in pixels of the crop.
        grayscale_prob, hflip: Of either view.
    """
    scale: tuple[float, float] = (.08, 1.)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = .4
    contrast: float = .4
    saturation: float = .2
    hue: float = .1
    jitter_prob: float = .8
    blur_prob: tuple[float, float] = (1., .1)
    blur_radius: tuple[float, float] = (.1, 2.)
    grayscale_prob: float = .2
    hflip: float = .5
    solarize_prob: tuple[float, float] = (0., .2)

    def __post_init__(self) -> None:
        for name in ('scale', 'ratio', 'blur_radius'):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f'{name} is {low:g} {high:g} but must be two positive numbers, smaller first.')
        if self.hue > .5:
            raise ConfigError(f'hue is {self.hue:g} but must be at most 0.5, half a turn.')


class GaussianBlur:
    """Pillow's Gaussian blur, with a radius that is drawn for each image."""

    def __init__(self, radius: tuple[float, float]) -> None:
        self.radius = radius

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.radius)))


def build_view(size: int, settings: ViewSettings, second: bool) -> Compose:
    """The operations of view 1 or view 2 on an image of 8-bit RGB, in order.

    Args:
        size: Side of the crop in pixels.
    """
    s = settings
    jitter = ColorJitter(s.brightness, s.contrast, s.saturation, s.hue)
    return Compose([
        RandomResizedCrop(size, s.scale, s.ratio), RandomApply([jitter], s.jitter_prob),
        RandomApply([GaussianBlur(s.blur_radius)], s.blur_prob[second]), RandomGrayscale(s.grayscale_prob),
        RandomHorizontalFlip(s.hflip), RandomSolarize(THRESHOLD, s.solarize_prob[second])])


class TwoViews:
    """Both views of an image, from its bytes: (2, 3, size, size) uint8.

    Random numbers come from the generators of Python and PyTorch, which `caretrans.seeds.seed_sample` seeds.

    Args:
        orientation: 'exif' or 'ignore', see `caretrans.data.decode.open_image`.
    """

    def __init__(self, size: int, settings: ViewSettings | None = None, orientation: str = 'exif') -> None:
        settings = settings or ViewSettings()
        self.views = [build_view(size, settings, second) for second in (False, True)]
        self.orientation = orientation

    def __call__(self, source: bytes | Image.Image) -> torch.Tensor:
        """The views; one of UNREADABLE is raised for what Pillow cannot decode."""
        image = open_image(source, self.orientation)
        return torch.stack([pil_to_tensor(view(image)) for view in self.views])
