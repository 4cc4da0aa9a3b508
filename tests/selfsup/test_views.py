"""Views: operations, order, probabilities and strengths are the published ones, and each image has its own seed."""
import random

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from photos import FRUIT
from PIL import Image, ImageFilter
from published import golden
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import pil_to_tensor

from caretrans.errors import ConfigError
from caretrans.seeds import seed_sample
from caretrans.selfsup.views import GaussianBlur, TwoViews, ViewSettings, build_view


def find_steps(view, kind):
    return next(step for step in view.transforms if isinstance(step, kind))


@pytest.fixture
def fixed(monkeypatch):
    """The reference's choices instead of random ones; `apply(kinds)` says which steps happen."""
    arrays = golden('views')
    box = [int(x) for x in arrays['crop_box_top_left_height_width']]
    order, factors = torch.from_numpy(arrays['jitter_order']), [float(x) for x in arrays['jitter_factors']]
    monkeypatch.setattr(T.RandomResizedCrop, 'get_params', staticmethod(lambda *_: box))
    monkeypatch.setattr(T.ColorJitter, 'get_params', staticmethod(lambda *_: (order, *factors)))
    monkeypatch.setattr(random, 'uniform', lambda low, high: 1.2)
    return arrays


def choose(view, kinds):
    """Let these steps of a view happen and no others."""
    for step in view.transforms:
        inner = step.transforms[0] if isinstance(step, T.RandomApply) else step
        if hasattr(step, 'p'):
            step.p = float(type(inner) in kinds)
    return view


def prepare(image):
    x = pil_to_tensor(image) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (x - mean) / std


@pytest.mark.parametrize('chain, second, kinds', [
    ('chain_view1', False, (T.ColorJitter, GaussianBlur, T.RandomHorizontalFlip)),
    ('chain_view2', True, (
        T.ColorJitter, GaussianBlur, T.RandomGrayscale, T.RandomHorizontalFlip, T.RandomSolarize)),
    ('chain_view2_color', True, (T.ColorJitter, T.RandomSolarize))])
def test_chains_are_the_published_ones(chain, second, kinds, fixed):
    view = choose(build_view(32, ViewSettings(), second), kinds)
    found = prepare(view(Image.fromarray(fixed['image']))).numpy()
    print(f'{chain}: {np.abs(found - fixed[chain]).max():.1e}')
    assert np.abs(found - fixed[chain]).max() < 1e-6  # the reference is float32


def test_operations_are_the_published_ones(fixed):
    image, view = Image.fromarray(fixed['image']), build_view(32, ViewSettings(), True)
    for name in ('0.1', '0.7', '2.0'):
        assert np.array_equal(np.asarray(image.filter(ImageFilter.GaussianBlur(float(name)))), fixed[f'blur_{name}'])
    always = choose(build_view(32, ViewSettings(), True), (T.RandomGrayscale, T.RandomSolarize))
    assert np.array_equal(np.asarray(find_steps(always, T.RandomSolarize)(image)), fixed['solarize'])
    assert np.array_equal(np.asarray(find_steps(always, T.RandomGrayscale)(image)), fixed['gray'])
    assert np.array_equal(np.asarray(find_steps(view, T.RandomApply).transforms[0](image)), fixed['jitter'])
    assert np.array_equal(np.asarray(find_steps(view, T.RandomResizedCrop)(image)), fixed['crop_32'])


def test_strengths_and_probabilities_are_the_published_ones():
    for second, blur, solarize in ((False, 1, 0), (True, .1, .2)):
        crop, jitter, blurred, gray, flip, inverted = build_view(224, ViewSettings(), second).transforms
        assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (.08, 1), (3 / 4, 4 / 3))
        assert crop.interpolation == T.InterpolationMode.BILINEAR
        inner = jitter.transforms[0]
        assert jitter.p == .8 and inner.brightness == inner.contrast == (.6, 1.4)
        assert inner.saturation == (.8, 1.2) and inner.hue == (-.1, .1)
        assert blurred.p == blur and blurred.transforms[0].radius == (.1, 2)
        assert (gray.p, flip.p, inverted.p, inverted.threshold) == (.2, .5, solarize, 128)


def test_the_second_view_has_the_second_probabilities():
    settings = ViewSettings(jitter_prob=0., blur_prob=(0., 0.), grayscale_prob=0., solarize_prob=(0., 1.))
    first, second = TwoViews(16, settings)(Image.new('RGB', (20, 20), 'white'))
    assert first.min() == 255 and second.max() == 0


def test_views_differ_and_depend_on_the_seed_alone():
    data = next((FRUIT / 'train' / 'orange').glob('*.jpg')).read_bytes()
    transform = TwoViews(48)

    def draw(seed):
        seed_sample(seed)
        return transform(data)

    first = draw(5)
    assert first.shape == (2, 3, 48, 48) and first.dtype == torch.uint8
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, draw(6)) and torch.equal(first, draw(5))


@pytest.mark.parametrize('settings, message', [
    (dict(scale=(1, .2)), 'scale is 1 0.2 but must be two positive numbers, smaller first'),
    (dict(blur_radius=(0, 1)), 'blur_radius is 0 1'),
    (dict(hue=.6), 'hue is 0.6 but must be at most 0.5')])
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ViewSettings(**settings)
