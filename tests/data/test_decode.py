"""Random crops of JPEGs while they are decoded: timm's crops, Pillow's pixels, the same files refused."""
import io
import random

import numpy as np
import pytest
import torch
from photos import FRUIT
from PIL import Image, ImageOps
from timm.data import create_transform

from caretrans.data.decode import UNREADABLE, CropTransform, choose_reduction, open_image, read_jpeg_size
from caretrans.seeds import seed_sample

SAMPLE_IMAGES = sorted(FRUIT.glob('val/*/*.jpg'))[::60]


def create(size: int = 64, **options):
    options = {'interpolation': 'random', 'color_jitter': 0., **options}
    return create_transform((3, size, size), is_training=True, use_prefetcher=True, **options)


def encode(image: Image.Image, kind: str = 'JPEG', **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sample_image(width: int, height: int, number: int = 0) -> Image.Image:
    """Four images side by side, scaled to this size."""
    tiles = [Image.open(SAMPLE_IMAGES[(number + i) % len(SAMPLE_IMAGES)]).convert('RGB') for i in range(4)]
    image = Image.new('RGB', (256, 256))
    for i, tile in enumerate(tiles):
        image.paste(ImageOps.fit(tile, (128, 128)), (i % 2 * 128, i // 2 * 128))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def difference(data: bytes, seeds=range(20), **options) -> torch.Tensor:
    """Differences between the pixels of timm's transform and ours, for each seed."""
    theirs, ours = create(**options), CropTransform(create(**options))
    differences = []
    for seed in seeds:
        seed_sample(seed)
        wanted = theirs(open_image(data))
        seed_sample(seed)
        differences.append((ours(data).int() - wanted.int()).abs())
    return torch.stack(differences)


def test_the_crop_and_the_interpolation_are_those_of_timm(monkeypatch):
    taken = []
    monkeypatch.setattr('timm.data.transforms.F.resized_crop', lambda image, *arguments: taken.append(arguments))
    theirs = create().transforms[0]
    ours = CropTransform(create())
    for seed in range(500):
        height, width = (random.Random(seed).randint(1, 900) for _ in range(2))
        seed_sample(seed)
        theirs(Image.new('1', (width, height)))
        after = random.random(), torch.rand(1).item()
        seed_sample(seed)
        box, interpolation = ours.draw(height, width)
        assert taken[-1] == (*box, (64, 64), interpolation)
        assert after == (random.random(), torch.rand(1).item())  # as many numbers drawn


def test_the_crops_have_the_distribution_that_they_should():
    """Area uniform, log aspect uniform where the image allows, and the place uniform: mean and spread of each."""
    crop, boxes = CropTransform(create()), []
    for seed in range(4000):
        seed_sample(seed)
        boxes.append(crop.draw(1000, 1000)[0])
    top, left, height, width = np.array(boxes, dtype=float).T
    whole = height * width / 1e6 < 0.7  # beyond, crops that do not fit are drawn again
    area, aspect = (height * width / 1e6)[whole], np.log(width / height)[whole]
    for values, least, most in (
            (area, 0.08, 0.7), (aspect, np.log(3 / 4), np.log(4 / 3)), (top / (1000 - height + 1e-9), 0, 1),
            (left / (1000 - width + 1e-9), 0, 1)):
        assert values.mean() == pytest.approx((least + most) / 2, abs=0.025 * (most - least))
        assert values.std() == pytest.approx((most - least) / 12 ** 0.5, rel=0.04)


@pytest.mark.parametrize('options', [{}, {'subsampling': 0}, {'progressive': True}, {'quality': 40}])
def test_pixels_of_a_jpeg_are_those_of_timm_to_within_rounding(options):
    apart = difference(encode(sample_image(150, 120), **options))
    assert apart.max() <= 2 and apart.float().mean() < 0.01


def test_a_large_jpeg_is_decoded_at_a_reduced_scale_and_looks_the_same():
    assert [choose_reduction((0, 0, h, w), (64, 64)) for h, w in ((127, 500), (128, 500), (300, 256), (600, 512))] \
        == [1, 2, 4, 8]
    apart = difference(encode(sample_image(1200, 900)), interpolation='bilinear')
    assert 0 < apart.float().mean() < 2.5  # of 255, at edges sharper than those of real images


@pytest.mark.parametrize('axis', [0, 1])
def test_the_crop_at_a_reduced_scale_is_where_it_should_be(axis):
    """The mean of a ramp tells where it was cropped: 5 pixels a level along one axis."""
    ramp = np.linspace(20, 230, 1024).round().astype(np.uint8)
    image = np.tile(ramp, (1024, 1))
    data = encode(Image.fromarray(image if axis else image.T), quality=100)
    theirs = create(interpolation='bilinear', hflip=0.)
    ours, reductions = CropTransform(theirs), set()
    for seed in range(60):
        seed_sample(seed)
        reductions.add(choose_reduction(ours.draw(1024, 1024)[0], (64, 64)))
        seed_sample(seed)
        wanted = theirs(open_image(data)).float().mean()
        seed_sample(seed)
        assert abs(ours(data).float().mean() - wanted) < 0.4  # levels; edges rounded at 1/8 would be up to 0.8 off
    assert reductions == {4, 8}


@pytest.mark.parametrize('policy', [None, 'rand-m9-mstd0.5-inc1', 'augmix-m5'])
def test_augmentation_after_the_crop_is_that_of_timm(policy):
    """Exactly, given the same crop: here a grey image, of which every crop is the same in both."""
    image = Image.new('RGB', (100, 80), (90, 140, 200))
    assert difference(encode(image, quality=100), seeds=range(60), auto_augment=policy).max() == 0
    assert difference(encode(image, quality=100), seeds=range(20), color_jitter=0.4).max() == 0


def convert_16_bit(image):
    return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)


OTHERS = {
    'RGBA PNG': lambda i: encode(i.convert('RGBA'), 'PNG'),
    'palette PNG': lambda i: encode(i.convert('P'), 'PNG'),
    'PNG of 16 bits': lambda i: encode(convert_16_bit(i), 'PNG'),
    'bilevel PNG': lambda i: encode(i.convert('1'), 'PNG'),
    'WebP': lambda i: encode(i, 'WEBP'),
    'GIF': lambda i: encode(i, 'GIF'),
    'CMYK JPEG': lambda i: encode(i.convert('CMYK')),
    'RGB JPEG': lambda i: encode(i, keep_rgb=True),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_other_images_go_through_pillow_exactly_as_in_timm(kind):
    data = OTHERS[kind](sample_image(150, 120))
    assert read_jpeg_size(data) is None
    assert difference(data).max() == 0


def test_grey_and_rotated_jpegs_come_out_as_in_timm():
    assert difference(encode(sample_image(150, 120).convert('L'))).max() <= 2
    rotated = Image.Exif()
    rotated[0x0112] = 6  # a viewer would turn it by 90 degrees, timm does not
    data = encode(sample_image(150, 120), exif=rotated)
    assert read_jpeg_size(data) == (120, 150) and difference(data).max() <= 2


def outcome(transform, data):
    seed_sample(0)
    try:
        return transform(data).int()
    except UNREADABLE as error:
        return type(error)


def test_damaged_files_are_refused_where_timm_refuses_them_and_else_look_the_same():
    whole = encode(sample_image(150, 120))
    damaged = [whole[:length] for length in range(0, len(whole), 211)] + [whole[:-1], whole[:-2], whole[:-3], b'']
    for seed in range(40):
        data = bytearray(whole)
        for place in random.Random(seed).sample(range(2, len(data)), 3):
            data[place] ^= 1 << seed % 8
        damaged.append(bytes(data))
    damaged += [whole + b'trailing', b'<html>not found</html>']
    theirs = create()
    ours, refused = CropTransform(create()), 0
    for data in damaged:
        wanted, got = outcome(lambda data: theirs(open_image(data)), data), outcome(ours, data)
        if isinstance(wanted, type):
            refused += 1
            assert got == wanted
        else:
            assert (got - wanted).abs().max() <= 2
    assert 40 < refused < len(damaged)


def test_an_image_that_is_too_large_is_left_to_the_guard_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(Image.DecompressionBombError):
        CropTransform(create())(encode(sample_image(150, 120)))


def test_a_transform_without_a_random_crop_is_refused():
    with pytest.raises(TypeError, match='not with a random resized crop'):
        CropTransform(create_transform((3, 64, 64)))
