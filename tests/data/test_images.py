"""One decoder for training, validation, prediction, shards and exports: orientation, depth, thin and damaged images."""
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from photos import FRUIT, copy_images
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision.transforms.functional import pil_to_tensor

from caretrans.__main__ import main as caretrans
from caretrans.checkpoint import save_checkpoint
from caretrans.checkpoint.preparation import Preparation, list_sources
from caretrans.config import TrainConfig, read_recipe
from caretrans.data import EvalTransform, open_dataset
from caretrans.data.decode import UNREADABLE, CropTransform, open_image
from caretrans.data.loaders import build_eval_loader, build_train_loader
from caretrans.data.samples import load_images
from caretrans.data.shards import write_shards
from caretrans.errors import DataError
from caretrans.evaluation import (
    EvalConfig, EvalResult, describe_result, evaluate_checkpoint, load_for_evaluation, predict_images)
from caretrans.export.config import ExportConfig
from caretrans.export.source import load_cases, load_source
from caretrans.measure.sample_network import load_sample_images
from caretrans.seeds import seed_sample
from caretrans.training.folder import choose_orientation

SIZE = 32
PREPARATION = Preparation((3, SIZE, SIZE), 'bilinear', crop_pct=1.)


def encode(image: Image.Image, kind: str = 'JPEG', orientation: int | None = None, **options) -> bytes:
    file = io.BytesIO()
    if orientation is not None:
        options['exif'] = Image.Exif()
        options['exif'][0x0112] = orientation
    image.save(file, kind, **options)
    return file.getvalue()


def make_image(width: int = 90, height: int = 60) -> Image.Image:
    """No axis, corner or rotation of it looks like another."""
    fruit = Image.open(sorted(FRUIT.glob('val/*/*.jpg'))[7]).convert('RGB').resize((width, height))
    fruit.paste((255, 0, 0), (0, 0, width // 3, height // 4))
    fruit.paste((0, 0, 255), (width - width // 5, 0, width, height // 2))
    return fruit


def distance(some, others) -> float:
    """Mean absolute difference of pixels, of 255."""
    return (torch.as_tensor(some).float() - torch.as_tensor(others).float()).abs().mean().item()


# Orientation ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'MPO'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_that_of_pillow(kind, orientation):
    data = encode(make_image(), kind, orientation)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')
    assert open_image(data, 'exif').size == expected.size
    assert np.array_equal(open_image(data, 'exif'), expected)
    assert np.array_equal(open_image(data, 'ignore'), Image.open(io.BytesIO(data)).convert('RGB'))


@pytest.mark.parametrize('size', [(90, 60), (1200, 800)])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_fast_crops_are_those_of_the_upright_image(size, orientation):
    """libjpeg-turbo's crop of the stored image against Pillow's of the upright one, full and at a reduced scale."""
    data = encode(make_image(*size), orientation=orientation, quality=95)
    plain = create_transform((3, SIZE, SIZE), is_training=True, use_prefetcher=True, interpolation='bilinear')
    fast, stored = CropTransform(plain, 'exif'), CropTransform(plain, 'ignore')
    upright = open_image(data, 'exif')
    others = []
    for seed in range(12):
        crops = []
        for transform, source in ((fast, data), (fast, upright), (stored, data)):
            seed_sample(seed)
            crops.append(transform(source))
        assert distance(*crops[:2]) < (1.5 if size[0] < 100 else 3.5)
        others.append(distance(crops[0], crops[2]))
    assert max(others) > 8 or orientation == 1


@pytest.mark.parametrize('value', [0, 9, 255, 'text', b'\0'])
def test_damaged_exif_data_do_not_cost_the_image(value):
    data = encode(make_image(), orientation=6)
    if isinstance(value, int):
        data = encode(make_image(), orientation=value)
    else:  # the value of the tag
        place = data.index(b'Exif\0\0') + 6
        data = data[:place] + (b'\xff' * 8 if value == 'text' else b'MM\0*\xff\xff\xff\xff') + data[place + 8:]
    assert np.array_equal(open_image(data, 'exif'), open_image(data, 'ignore'))
    transform = create_transform((3, SIZE, SIZE), is_training=True, use_prefetcher=True)
    assert CropTransform(transform, 'exif')(data).shape == (3, SIZE, SIZE)


@pytest.fixture
def rotated(tmp_path) -> Path:
    """Images of two classes that are stored sideways, as phones do, with the orientation that a viewer needs."""
    root = copy_images(tmp_path / 'data', per_class=6)
    for number, path in enumerate(sorted(root.glob('*/*/*.jpg'))):
        image = Image.open(path).convert('RGB')
        orientation = (3, 6, 8)[number % 3]
        turned = image.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90,
                                  8: Image.Transpose.ROTATE_270}[orientation])
        path.write_bytes(encode(turned, orientation=orientation, quality=95))
    return root


def save(path: Path, **settings) -> str:
    torch.manual_seed(0)
    model = timm.create_model('care_s0', num_classes=2, depths=(1, 1, 1, 1))
    torch.nn.init.normal_(model.head.fc.weight, std=1.)
    settings = {'input_size': [3, SIZE, SIZE], 'interpolation': 'bilinear', 'crop_pct': 1., **settings}
    save_checkpoint(path, model, arch='care_s0', class_names=['kaiser', 'orange'], eval_config=settings,
                    model_args=dict(depths=[1, 1, 1, 1]))
    return str(path)


@pytest.mark.parametrize('orientation', ['exif', 'ignore'])
def test_every_part_of_the_project_rotates_or_none(rotated, tmp_path, orientation):
    """Validation, prediction, shards, exports and benchmarks see the same pixels."""
    preparation = replace(PREPARATION, orientation=orientation)
    dataset = open_dataset(rotated, 'val')
    paths = [path for path, _ in dataset.reader.samples]
    transform = EvalTransform(preparation)
    expected = torch.stack([transform(
        ImageOps.exif_transpose(Image.open(path)) if orientation == 'exif' else Image.open(path).convert('RGB'))
        for path in paths])

    batches = torch.cat([images for images, _ in build_eval_loader(dataset, preparation, 4, 0).run()])
    torch.testing.assert_close(batches, expected, atol=1e-5, rtol=1e-5)
    write_shards(str(rotated), str(tmp_path / 'shards'))
    shards = [images for images, _ in build_eval_loader(
        open_dataset(tmp_path / 'shards', 'val'), preparation, 1, 0).run()]
    assert sorted(image.sum().item() for image in shards) == pytest.approx(
        sorted(image.sum().item() for image in expected), abs=0.05)

    checkpoint = save(tmp_path / 'model.pth.tar', orientation=orientation)
    model = load_for_evaluation(checkpoint)[0]
    with torch.inference_mode():
        probabilities = model(expected).softmax(dim=-1)
    for found, row in zip(predict_images(checkpoint, [str(rotated / 'val')]), probabilities, strict=True):
        assert found.probabilities == pytest.approx(sorted(row.tolist(), reverse=True), rel=1e-4)

    source = load_source(ExportConfig(checkpoint=checkpoint))
    cases = load_cases(source, (SIZE, SIZE), str(rotated))
    torch.testing.assert_close(source.normalise(cases.pixels), expected, atol=1e-5, rtol=1e-5)
    chosen = load_sample_images(model, (SIZE, SIZE), 12, rotated, preparation)
    train = open_dataset(rotated, 'train')
    assert torch.equal(chosen, load_images(train, range(12), transform)[0])
    other = EvalTransform(replace(preparation, orientation='ignore' if orientation == 'exif' else 'exif'))
    assert distance(load_images(dataset, range(12), other)[0], expected) > 0.2


def test_training_rotates_unless_told_otherwise(rotated):
    assert TrainConfig().orientation == 'exif'
    config = TrainConfig(img_size=SIZE, batch_size=4, workers=0, auto_augment='', hflip=0., scale=[1., 1.])

    def load(orientation: str) -> torch.Tensor:
        loader = build_train_loader(open_dataset(rotated, 'train', is_training=True), config,
                                    replace(PREPARATION, orientation=orientation), config.split_steps(1))
        return next(loader.run(0)).images
    upright, stored = load('exif'), load('ignore')
    for path in rotated.glob('train/*/*.jpg'):  # the same files, stored upright
        path.write_bytes(encode(open_image(path.read_bytes(), 'exif'), quality=95))
    assert distance(upright, load('ignore')) < 0.1 < 0.4 < distance(upright, stored)


def test_checkpoints_keep_the_orientation(rotated, tmp_path, caplog, capsys):
    """A file of an older version was trained without rotating, and is used so; a flag overrides it."""
    old, new = save(tmp_path / 'old.pth.tar'), save(tmp_path / 'new.pth.tar', orientation='exif')
    assert load_for_evaluation(new)[2].orientation == 'exif'
    caplog.set_level('INFO')
    model, loaded, preparation = load_for_evaluation(old)
    assert preparation.orientation == 'ignore' and '--orientation exif rotates them' in caplog.text
    assert load_for_evaluation(old, orientation='exif')[2].orientation == 'exif'
    assert list_sources(model, loaded, orientation='exif')['orientation'] == 'flag'

    def score(checkpoint: str, **options) -> EvalResult:
        return evaluate_checkpoint(EvalConfig(checkpoint, data=str(rotated), workers=0, **options))
    assert score(old, orientation='exif').loss == pytest.approx(score(new).loss, rel=1e-6)
    assert abs(score(old).loss - score(new).loss) > 1e-3
    assert 'orientation exif (checkpoint)' in '\n'.join(describe_result(score(new)))
    assert score(new).eval_config['orientation'] == 'exif'

    def predict(*flags: str) -> list[float]:
        image = sorted((rotated / 'val').glob('*/*.jpg'))[1]
        assert caretrans(['predict', '--json', '--device', 'cpu', str(image), '--checkpoint', *flags]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])['probabilities']
    assert predict(new) == pytest.approx(predict(old, '--orientation', 'exif'), rel=1e-6)
    assert abs(predict(new)[0] - predict(new, '--orientation', 'ignore')[0]) > 1e-4


def test_runs_of_older_versions_resume_without_rotating(tmp_path, caplog):
    """Their config.yaml lacks the orientation; another recipe must not change in the middle of a run."""
    caplog.set_level('INFO')
    for settings, orientation, said in (({}, 'ignore', True), (dict(orientation='exif'), 'exif', False)):
        (tmp_path / 'config.yaml').write_text(yaml.safe_dump(dict(model='care_s0', **settings)), encoding='utf-8')
        caplog.clear()
        assert choose_orientation(tmp_path, TrainConfig(orientation='exif')) == orientation
        assert ('begun by an older version' in caplog.text) == said


def test_orientation_in_xmp_data_counts_as_in_exif_data():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(make_image(), xmp=xmp)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')
    assert expected.size == (60, 90) and np.array_equal(open_image(data, 'exif'), expected)
    transform = CropTransform(create_transform(
        (3, SIZE, SIZE), is_training=True, use_prefetcher=True, interpolation='bilinear'), 'exif')
    crops = []
    for source in (data, open_image(data, 'exif')):
        seed_sample(0)
        crops.append(transform(source))
    assert distance(*crops) < 1.5


def test_published_weights_and_imagenet_recipes_ignore_the_orientation(tmp_path):
    """As their authors did."""
    model = timm.create_model('casvit_xs')
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    assert load_for_evaluation(tmp_path / 'bare.pth')[2].orientation == 'ignore'
    for recipe, orientation in (
            ('care_s0_imagenet', 'ignore'), ('care_s2_imagenet', 'ignore'), ('casvit_m_384_finetune', 'ignore'),
            ('mlla_b_imagenet', 'ignore'), ('care_s0_finetune', 'exif'), ('care_s0_fruit14', 'exif'),
            ('cifar10', 'exif')):
        assert TrainConfig(**read_recipe(recipe)).orientation == orientation
    with pytest.raises(DataError, match="orientation is 'upright', choose from exif, ignore"):
        replace(PREPARATION, orientation='upright')


# Depth and colours ----------------------------------------------------------------------------------------------------

GREY = make_image().convert('L')
DEEP = np.asarray(GREY).astype(np.uint16) * 257


def encode_tiff(values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values), 'TIFF')


def encode_inverted() -> bytes:
    """A TIFF whose tag 262 says that 0 is white, as some X-rays have it."""
    data = encode_tiff(65535 - DEEP)
    entry = (262).to_bytes(2, 'little') + b'\3\0\1\0\0\0'
    assert data.count(entry + b'\1\0') == 1
    return data.replace(entry + b'\1\0', entry + b'\0\0')


DEEP_FILES = {
    'PNG': lambda: encode(Image.fromarray(DEEP), 'PNG'),
    'TIFF, little-endian': lambda: encode_tiff(DEEP),
    'TIFF, big-endian': lambda: encode(Image.frombytes('I;16B', GREY.size, DEEP.astype('>u2').tobytes()), 'TIFF'),
    'TIFF, 0 is white': encode_inverted,
    'JPEG 2000': lambda: encode(Image.fromarray(DEEP), 'JPEG2000'),
    'PGM': lambda: b'P5 %d %d 65535\n' % GREY.size + DEEP.astype('>u2').tobytes(),
    'PGM of 12 bits': lambda: b'P5 %d %d 4095\n' % GREY.size + np.round(
        DEEP / 65535 * 4095).astype('>u2').tobytes(),
}


@pytest.mark.parametrize('kind', DEEP_FILES)
def test_images_of_16_bits_are_scaled_to_8(kind):
    """Pillow's own conversion clips at 255, which makes them white."""
    data = DEEP_FILES[kind]()
    assert Image.open(io.BytesIO(data)).mode in ('I', 'I;16', 'I;16B', 'I;16L')
    assert np.array_equal(open_image(data), GREY.convert('RGB'))
    assert EvalTransform(PREPARATION, as_uint8=True)(data).float().std() > 20


def test_values_between_two_levels_are_rounded():
    values = np.array([[0, 128, 129, 385, 386, 32767, 32768, 65535 - 129, 65535 - 128, 65535]], dtype=np.uint16)
    found = np.asarray(open_image(encode(Image.fromarray(values), 'PNG')))[0, :, 0]
    assert found.tolist() == [round(value / 257) for value in values[0].tolist()]


@pytest.mark.parametrize('values, mode', [
    (np.asarray(GREY).astype(np.float32) / 255, 'F'), (np.asarray(GREY).astype(np.int32) * 1000, 'I'),
    (np.asarray(GREY).astype(np.int16), 'I')])
def test_values_of_unknown_range_are_refused_by_name(tmp_path, values, mode):
    """In floating point, and in integers of 32 bits or with a sign, nobody knows which value is white."""
    if values.dtype == np.int16:
        data = bytearray(encode_tiff(values.astype(np.uint16)))
        image = Image.open(io.BytesIO(bytes(data)))
        image.save(tmp_path / 'x.tif', tiffinfo={339: 2})
        data = (tmp_path / 'x.tif').read_bytes()
    else:
        data = encode_tiff(values)
    if Image.open(io.BytesIO(data)).mode != mode:
        pytest.skip('this Pillow writes no such file')
    with pytest.raises(OSError, match='black and white are not known: save it with 8 or 16 bits'):
        open_image(data)
    root = copy_images(tmp_path / 'data', per_class=2)
    path = root / 'val' / 'kaiser' / 'scan.tif'
    path.write_bytes(data)
    dataset = open_dataset(root, 'val')
    loader = build_eval_loader(dataset, PREPARATION, 8, 0)
    assert sum(len(images) for images, _ in loader.run()) == 4
    (name, reason), = loader.unreadable
    assert name == str(path) and f'mode {mode}' in reason
    with pytest.raises(DataError, match=f'{path} cannot be read as an image .*not known'):
        load_images(dataset, range(5), EvalTransform(PREPARATION))
    failed, = predict_images(save(tmp_path / 'model.pth.tar'), [str(path)])
    assert f'mode {mode}' in failed.error


def test_reason_is_given_where_no_image_can_be_read(tmp_path):
    root = copy_images(tmp_path / 'data', per_class=2)
    for path in list(root.glob('val/*/*.jpg')):
        path.with_suffix('.tif').write_bytes(encode_tiff(np.zeros((4, 4), dtype=np.float32)))
        path.unlink()
    with pytest.raises(DataError, match=r'None of 4 images could be read, the first is .*\.tif: .*mode F'):
        evaluate_checkpoint(EvalConfig(save(tmp_path / 'model.pth.tar'), data=str(root), workers=0))


def make_transparent_palette() -> bytes:
    return encode(make_image().quantize(16), 'PNG', transparency=3)


OTHERS = {
    'palette': lambda: encode(make_image().convert('P'), 'PNG'), 'transparent palette': make_transparent_palette,
    'RGBA': lambda: encode(make_image().convert('RGBA'), 'PNG'),
    'LA': lambda: encode(make_image().convert('LA'), 'PNG'),
    'bilevel': lambda: encode(make_image().convert('1'), 'PNG'), 'CMYK': lambda: encode(make_image().convert('CMYK')),
    'grey': lambda: encode(GREY), '48 bits': lambda: b'P6 1 1 65535\n' + bytes([0, 0, 128, 0, 255, 255]),
    'GIF': lambda: encode(make_image(), 'GIF')}


@pytest.mark.parametrize('kind', OTHERS)
def test_other_modes_are_converted_as_by_pillow(kind):
    data = OTHERS[kind]()
    assert np.array_equal(open_image(data), Image.open(io.BytesIO(data)).convert('RGB'))


# Thin, tiny and damaged images ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
@pytest.mark.parametrize('size', [(1, 1), (1, 2), (2, 1), (1, 400), (400, 1), (3, 5000), (1, 60000)])
def test_thin_images_are_cropped_to_a_pixel_at_least(kind, size):
    """timm rounds such crops to 0 pixels, which no resizing takes."""
    data = encode(make_image(400, 400).resize(size), kind)
    transform = create_transform((3, SIZE, SIZE), is_training=True, use_prefetcher=True)
    for orientation in ('exif', 'ignore'):
        ours = CropTransform(transform, orientation)
        for seed in range(40):
            seed_sample(seed)
            (top, left, height, width), _ = ours.draw(size[1], size[0])
            assert 0 <= top < top + height <= size[1] and 0 <= left < left + width <= size[0]
            seed_sample(seed)
            assert ours(data).shape == (3, SIZE, SIZE)
    for mode in ('center', 'squash', 'border'):
        assert EvalTransform(replace(PREPARATION, crop_mode=mode), as_uint8=True)(data).shape == (3, SIZE, SIZE)


def test_middle_of_a_thin_image_is_prepared_as_by_timm():
    """Beyond an aspect of 100 only the middle is resized, not an image of many gigabytes."""
    image = make_image(400, 400).resize((2, 1000))
    plain = create_transform((3, SIZE, SIZE), interpolation='bilinear', crop_pct=1., use_prefetcher=True)
    assert distance(EvalTransform(PREPARATION, as_uint8=True)(image), plain(image)) < 1.


class Confused(Exception):
    """What no decoder should raise."""


@pytest.mark.parametrize('workers', [0, 1])
def test_an_unexpected_error_names_the_image_in_one_line(tmp_path, monkeypatch, workers):
    root = copy_images(tmp_path, per_class=4)

    def fail(self, source):
        raise Confused('no idea\nat all')
    monkeypatch.setattr(CropTransform, '__call__', fail)
    config = TrainConfig(img_size=SIZE, batch_size=4, workers=workers, auto_augment='')
    loader = build_train_loader(open_dataset(root, 'train'), config, PREPARATION, config.split_steps(1))
    with pytest.raises(DataError) as error:
        list(loader.run(0))
    assert str(root / 'train') in str(error.value) and str(error.value).endswith('.jpg: Confused: no idea at all.')
    assert '\n' not in str(error.value)


def damage(data: bytes) -> dict[str, bytes]:
    png = encode(make_image(), 'PNG')
    broken = bytearray(png)
    broken[16:20] = b'\0\0\0\0'  # width 0
    chunk = bytearray(png)
    chunk[37:41] = b'ID\xffT'  # a chunk name that Pillow refuses by a SyntaxError
    return {
        'empty.jpg': b'', 'html.jpg': b'<html>not found</html>', 'cut.jpg': data[:-200], 'zeros.png': b'\0' * 500,
        'cut.png': png[:-300], 'width.png': bytes(broken), 'chunk.png': bytes(chunk),
        'huge.ppm': b'P6 100000 100000 255\n', 'cut.tif': encode(make_image(), 'TIFF')[:300],
        'cut.gif': encode(make_image(), 'GIF')[:60], 'head.webp': encode(make_image(), 'WEBP')[:40],
        'cut.avif': encode(make_image(), 'AVIF')[:200], 'head.jp2': encode(make_image(), 'JPEG2000')[:90],
        'text.xpm': b'/* XPM */ nothing', 'cut.psd': b'8BPS\0\1' + b'\0' * 20,
        'bad.ico': b'\0\0\1\0\1\0' + b'\xff' * 16}


def test_one_damaged_file_does_not_end_prediction(tmp_path, capsys):
    folder = tmp_path / 'images'
    folder.mkdir()
    whole = encode(make_image())
    for name, data in {'a.jpg': whole, **damage(whole), 'z.jpg': whole}.items():
        (folder / name).write_bytes(data)
    command = ['predict', '--json', '--device', 'cpu', '--checkpoint', save(tmp_path / 'model.pth.tar'), str(folder)]
    assert caretrans(command) == 1
    rows = {Path(row['image']).name: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert len(rows) == 2 + len(damage(whole))
    assert {name for name, row in rows.items() if 'error' not in row} == {'a.jpg', 'z.jpg'}


@pytest.mark.parametrize('name', damage(encode(make_image())))
def test_damaged_files_are_unreadable_and_nothing_else(name):
    with pytest.raises(UNREADABLE):
        EvalTransform(PREPARATION)(damage(encode(make_image()))[name])


def test_pixels_of_an_ordinary_image_are_those_of_timm():
    image = make_image()
    plain = create_transform((3, SIZE, SIZE), interpolation='bilinear', crop_pct=1., use_prefetcher=True)
    expected = torch.as_tensor(plain(image))
    assert torch.equal(EvalTransform(PREPARATION, as_uint8=True)(encode(image, 'PNG')), expected)
    assert torch.equal(pil_to_tensor(open_image(encode(image, 'PNG'), 'exif')), pil_to_tensor(image))
