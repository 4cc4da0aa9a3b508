"""Image settings for evaluation: crop modes and channel orders."""
import json
import sys
from dataclasses import replace

import pytest
import timm
import torch
from photos import FRUIT
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor
from validate import main as validate

from caretrans.__main__ import main as caretrans
from caretrans.checkpoint import convert_checkpoint, save_checkpoint
from caretrans.checkpoint.preparation import list_sources, resolve_eval_config
from caretrans.config import TrainConfig
from caretrans.data import EvalTransform
from caretrans.errors import CheckpointError, ConfigError, DataError
from caretrans.evaluation import EvalConfig, describe_result, evaluate_checkpoint, load_for_evaluation, predict_images
from caretrans.export.config import ExportConfig
from caretrans.export.source import load_source

CLASSES = sorted(path.name for path in (FRUIT / 'val').iterdir())
IMAGE = sorted((FRUIT / 'val').glob('*/*.jpg'))[0]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('care_s0', num_classes=len(CLASSES))
    nn.init.normal_(model.head.fc.weight, std=1.)
    return model


def save(path, model: nn.Module, **eval_config) -> str:
    save_checkpoint(path, model, arch='care_s0', class_names=CLASSES, eval_config={
        'input_size': [3, 32, 32], 'crop_pct': 1., **eval_config})
    return str(path)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp('model') / 'model.pth.tar', make_model(), mean=MEAN, std=STD)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> str:
    """Twelve bundled images of each class."""
    folder = tmp_path_factory.mktemp('data')
    for name in CLASSES:
        (folder / 'val' / name).mkdir(parents=True)
        for image in sorted((FRUIT / 'val' / name).glob('*.jpg'))[:12]:
            (folder / 'val' / name / image.name).symlink_to(image.resolve())
    return str(folder)


def make_wide() -> Image.Image:
    """200 x 100 pixels: a red column at the left, a blue one at the right, green between."""
    image = Image.new('RGB', (200, 100), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 20, 100))
    image.paste((0, 0, 255), (180, 0, 200, 100))
    return image


def prepare(image: Image.Image, **settings) -> torch.Tensor:
    config = resolve_eval_config(timm.create_model('care_s0'), **{**dict(img_size=40, crop_pct=1.), **settings})
    return EvalTransform(config, as_uint8=True)(image)


# Crop modes -----------------------------------------------------------------------------------------------------------

def test_squash_sees_the_whole_image():
    pixels = prepare(make_wide(), crop_mode='squash')
    assert torch.equal(pixels, pil_to_tensor(make_wide().resize((40, 40), Image.Resampling.BICUBIC)))
    assert (pixels[0, :, 0] > 250).all() and (pixels[2, :, -1] > 250).all()


@pytest.mark.parametrize('name', ['care_s0', 'casvit_xs.r384_in1k'])
def test_squash_sees_the_whole_image_without_a_crop_pct(name):
    config = resolve_eval_config(timm.create_model(name), img_size=40, crop_mode='squash')
    pixels = EvalTransform(config, as_uint8=True)(make_wide())
    assert torch.equal(pixels, prepare(make_wide(), crop_mode='squash'))


@pytest.mark.parametrize('stored, flags, crop_pct, source', [
    (dict(crop_pct=.9), {}, .9, 'checkpoint'),
    (dict(crop_pct=.9), dict(crop_mode='squash'), 1., 'flag'),
    (dict(crop_pct=.9), dict(crop_mode='squash', crop_pct=.8), .8, 'flag'),
    (dict(crop_pct=.9, crop_mode='squash'), dict(crop_mode='squash'), .9, 'checkpoint'),
    (dict(crop_pct=.9, crop_mode='squash'), {}, .9, 'checkpoint'),
])
def test_squash_flag_drops_the_crop_pct_of_the_file(tmp_path, stored, flags, crop_pct, source):
    file = save(tmp_path / 'x.pth.tar', make_model(), **stored)
    model, loaded, config = load_for_evaluation(file, **flags)
    assert (config.crop_pct, list_sources(model, loaded, **flags)['crop_pct']) == (crop_pct, source)


def test_default_crop_mode_is_center():
    pixels = prepare(make_wide())
    assert (pixels[1] == 255).all() and (pixels[[0, 2]] == 0).all()
    assert torch.equal(pixels, prepare(make_wide(), crop_mode='center'))


def test_border_pads_the_whole_image_with_the_mean_colour():
    pixels = prepare(make_wide(), crop_mode='border', mean=MEAN)
    assert (pixels[:, :10] == torch.tensor([102, 128, 153]).view(3, 1, 1)).all()
    assert (pixels[0, 10:30, 0] > 250).all() and (pixels[2, 10:30, -1] > 250).all()


def test_crop_mode_is_read_from_flag_and_checkpoint_and_printed(
        tmp_path, checkpoint, data, monkeypatch, capsys):
    squashed = save(tmp_path / 'squashed.pth.tar', make_model(), crop_mode='squash', mean=MEAN, std=STD)
    flags = ['--workers', '0', '--device', 'cpu']
    lines = []
    for command in ([squashed], [checkpoint, '--crop-mode', 'squash'], [checkpoint]):
        monkeypatch.setattr(sys, 'argv', ['validate.py', command[0], data, *command[1:], *flags])
        assert validate() == 0
        lines.append([line.split('   loss')[0] for line in capsys.readouterr().out.splitlines()[-2:]])
    (first, score), (second, same), (third, other) = lines
    assert first.endswith('crop_pct 1.0 (checkpoint), crop_mode squash (checkpoint)')
    assert second.endswith('crop_pct 1.0 (flag), crop_mode squash (flag)')
    assert third.endswith('crop_pct 1.0 (checkpoint)') and score == same != other


def test_training_refuses_unknown_crop_modes():
    with pytest.raises(ConfigError, match="crop_mode is 'middle', choose from center, squash, border"):
        TrainConfig(crop_mode='middle')


# Channel order --------------------------------------------------------------------------------------------------------

def test_bgr_reverses_only_the_channels_of_the_pixels():
    image = Image.open(IMAGE).convert('RGB')
    for crop_mode in ('center', 'squash'):
        rgb, bgr = (prepare(image, crop_mode=crop_mode, channel_order=order) for order in ('rgb', 'bgr'))
        assert torch.equal(bgr, rgb.flip(0)) and not torch.equal(bgr, rgb)
    config = resolve_eval_config(timm.create_model('care_s0'), img_size=40, mean=MEAN, std=STD, channel_order='bgr')
    bgr, (mean, std) = prepare(image, crop_pct=0.875).flip(0), (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(EvalTransform(config)(image), (bgr / 255 - mean) / std)


def swap_inputs(model: nn.Module) -> nn.Module:
    """Make the model compute for BGR images what it computed for RGB images."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert first.in_channels == 3
    with torch.no_grad():
        first.weight.copy_(first.weight.flip(1))
    return model


def test_network_with_swapped_inputs_has_the_same_predictions_in_bgr(checkpoint, data, tmp_path):
    """Mean and standard deviation are swapped too: channel_order reverses only the pixels."""
    swapped = save(tmp_path / 'swapped.pth.tar', swap_inputs(make_model()), mean=MEAN[::-1], std=STD[::-1])
    options = dict(data=data, workers=0)
    expected = evaluate_checkpoint(EvalConfig(checkpoint, **options))
    bgr = evaluate_checkpoint(EvalConfig(swapped, channel_order='bgr', **options))
    rgb = evaluate_checkpoint(EvalConfig(swapped, **options))
    assert bgr.top1 == expected.top1 != rgb.top1 and bgr.images == 12 * len(CLASSES)
    assert bgr.loss == pytest.approx(expected.loss, rel=1e-5) != rgb.loss
    assert 'crop_pct 1.0 (checkpoint), channel_order bgr (flag)' in '\n'.join(describe_result(bgr))
    assert 'channel_order' not in '\n'.join(describe_result(rgb))

    said, = predict_images(checkpoint, [str(IMAGE)])
    same, = predict_images(swapped, [str(IMAGE)], channel_order='bgr')
    other, = predict_images(swapped, [str(IMAGE)])
    assert said.classes == same.classes != other.classes
    assert said.probabilities == pytest.approx(same.probabilities, rel=1e-4)


def test_default_channel_order_is_that_of_the_checkpoint(checkpoint, tmp_path, capsys):
    file = save(tmp_path / 'bgr.pth.tar', make_model(), mean=MEAN, std=STD, channel_order='bgr')

    Image.open(IMAGE).resize((200, 100)).save(tmp_path / 'wide.png')

    def predict(*flags) -> dict:
        command = ['predict', '--json', '--device', 'cpu', str(tmp_path / 'wide.png')]
        assert caretrans([*command, '--checkpoint', *flags]) == 0
        return json.loads(capsys.readouterr().out)
    assert predict(file) == predict(checkpoint, '--channel-order', 'bgr')
    assert predict(file, '--channel-order', 'rgb') == predict(checkpoint) != predict(file)
    assert predict(file, '--crop-mode', 'squash') != predict(file)


def test_unknown_channel_order_is_refused(tmp_path):
    with pytest.raises(DataError, match="channel_order is 'grb', choose from rgb, bgr"):
        prepare(make_wide(), channel_order='grb')


def test_exports_of_a_bgr_checkpoint_are_refused(tmp_path):
    """Exports are described and verified for RGB images."""
    file = save(tmp_path / 'bgr.pth.tar', make_model(), mean=MEAN, std=STD, channel_order='bgr')
    with pytest.raises(CheckpointError, match='channel order bgr, exports need RGB: .python -m caretrans convert'):
        load_source(ExportConfig(checkpoint=file))


@pytest.mark.parametrize('stored', [True, False])
def test_bgr_network_converts_to_rgb_with_the_same_predictions(tmp_path, stored):
    order = dict(channel_order='bgr')
    source = save(tmp_path / 'bgr.pth.tar', make_model(), mean=MEAN, std=STD, **(order if stored else {}))
    target = str(tmp_path / 'rgb.safetensors')
    convert_checkpoint(source, target, 'caretrans', **({} if stored else order))
    (bgr, _, bgr_config), (rgb, _, rgb_config) = (
        load_for_evaluation(source, **order), load_for_evaluation(target))
    assert (rgb_config.mean, rgb_config.std, rgb_config.channel_order) == (tuple(MEAN[::-1]), tuple(STD[::-1]), 'rgb')
    image = Image.open(IMAGE).convert('RGB').crop((0, 0, 200, 100))
    with torch.inference_mode():
        expected, found = (model.double()(EvalTransform(config)(image)[None].double())
                           for model, config in ((bgr, bgr_config), (rgb, rgb_config)))
        wrong = rgb(EvalTransform(replace(bgr_config, channel_order='rgb'))(image)[None].double())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(wrong, expected, rtol=1e-3)
    assert load_source(ExportConfig(checkpoint=target)).eval_config == rgb_config
    published = convert_checkpoint(target, tmp_path / 'x.pth', 'published')
    assert published.endswith(
        f', and mean {MEAN[::-1]}, for which there is no flag, and std {STD[::-1]}, for which there is no flag')
