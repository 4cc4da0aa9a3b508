"""Checkpoints convert between the published layout and ours, and between formats, unchanged."""
import itertools
import json

import pytest
import timm
import torch
from checkpoints import TINY, error_of, hollow_checkpoint, make_tiny, publish, same
from reference import published_layout, published_state_dict
from registered import CARE
from safetensors.torch import load_file

from caretrans.__main__ import main
from caretrans.checkpoint import convert_checkpoint, create_from_checkpoint, save_checkpoint
from caretrans.checkpoint.preparation import list_sources
from caretrans.errors import CheckpointError
from caretrans.evaluation import load_for_evaluation


def test_published_file_converts_to_ours_and_back_unchanged(tmp_path):
    source, ours, back = tmp_path / 'CARETrans_S0.pth.tar', tmp_path / 'ours.pth.tar', tmp_path / 'back.pth'
    torch.save(published_state_dict('care_s0'), source)
    summary = convert_checkpoint(source, ours, 'caretrans')
    assert summary == f'care_s0, 1000 classes: 567 tensors from {source} to {ours} in the caretrans layout'
    contents = torch.load(ours)
    assert {key: contents[key] for key in ('arch', 'num_classes', 'version')} == \
        dict(arch='care_s0', num_classes=1000, version=1)
    assert list(contents['state_dict']) == list(timm.create_model('care_s0', device='meta').state_dict())
    assert 'entry state_dict, to' in convert_checkpoint(ours, back, 'published')
    expected, converted = published_state_dict('care_s0'), torch.load(back)
    assert same(converted, expected) and list(converted) == list(expected)


@pytest.mark.parametrize('name', CARE)
def test_published_layout_has_the_official_keys_in_order(tmp_path, name):
    source, target = hollow_checkpoint(tmp_path / 'a.pth', name, published=False), tmp_path / 'b.pth'
    convert_checkpoint(source, target, 'published')
    written = {key: list(value.shape) for key, value in torch.load(target).items()}
    assert written == published_layout(name) and list(written) == list(published_layout(name))


@pytest.mark.parametrize('endings', [*itertools.product(('.pth.tar', '.safetensors'), repeat=2)])
@pytest.mark.parametrize('layout', ['published', 'caretrans'])
def test_formats_convert_into_each_other(tmp_path, endings, layout):
    source, middle, target = tmp_path / 'a.pth', tmp_path / f'b{endings[0]}', tmp_path / f'c{endings[1]}'
    facts = dict(class_names=list('abcde'), model_args=dict(TINY['care_s0']), note='words', epoch=2)
    save_checkpoint(
        source, make_tiny(1).half(), arch='care_s0', **facts, optimizer=torch.optim.Adam(make_tiny().parameters(), 1)
        .state_dict(), moment=torch.ones(2))
    convert_checkpoint(source, middle, 'caretrans')
    convert_checkpoint(middle, target, layout)
    expected = make_tiny(1).half().state_dict()
    if layout == 'published':
        contents = load_file(target) if endings[1] == '.safetensors' else torch.load(target)
        assert same(contents, publish(expected))
        return
    model, checkpoint = create_from_checkpoint(target, dtype=torch.float16)
    assert same(model.state_dict(), expected)
    meta = json.loads(json.dumps(checkpoint.meta))  # tuples are lists in JSON
    facts = json.loads(json.dumps(dict(facts, arch='care_s0', num_classes=5)))
    assert {key: meta.get(key) for key in facts} == facts and 'moment' not in meta


def test_entry_to_convert_can_be_chosen(tmp_path):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    save_checkpoint(source, make_tiny(1), arch='care_s0', ema=make_tiny(2), model_args=TINY['care_s0'])
    for entry, seed in ((None, 2), ('state_dict', 1)):
        convert_checkpoint(source, target, 'published', entry, overwrite=True)
        assert same(torch.load(target), publish(make_tiny(seed).state_dict()))


def test_conversion_overwrites_only_on_request(tmp_path):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    save_checkpoint(source, make_tiny(1), arch='care_s0', model_args=TINY['care_s0'])
    target.write_text('precious', encoding='utf-8')
    with pytest.raises(CheckpointError, match='b.pth: already exists'):
        convert_checkpoint(source, target, 'published')
    assert target.read_text(encoding='utf-8') == 'precious'
    with pytest.raises(CheckpointError, match='a.pth: already exists'):
        convert_checkpoint(source, source, 'published')
    convert_checkpoint(source, source, 'published', overwrite=True)
    assert same(torch.load(source), publish(make_tiny(1).state_dict()))


def test_impossible_conversions_are_refused(tmp_path):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    state_dict = make_tiny().state_dict()
    torch.save(dict(model=state_dict, arch='care_s0', model_args=TINY['care_s0']), source)
    with pytest.raises(ValueError, match='a classifier has no timm layout: use published, caretrans or mmpretrain'):
        convert_checkpoint(source, target, 'timm')
    with pytest.raises(CheckpointError, match='b.onnx: let the name end in .pth'):
        convert_checkpoint(source, tmp_path / 'b.onnx', 'published')
    assert 'no such file' in error_of(convert_checkpoint, tmp_path / 'none.pth', target, 'published')
    torch.save(dict(model=timm.create_model('resnet10t').state_dict(), arch='resnet10t'), source)
    assert 'resnet10t, which is none of ours' in error_of(convert_checkpoint, source, target, 'caretrans')
    del state_dict['stem.conv.bias']
    torch.save(dict(model=state_dict, arch='care_s0', model_args=TINY['care_s0']), source)
    assert '1 missing: stem.conv.bias: ' in error_of(convert_checkpoint, source, target, 'published')
    assert not target.exists()


def test_image_settings_are_stored(tmp_path):
    source, target, back = tmp_path / 'a.pth', tmp_path / 'b.pth.tar', tmp_path / 'c.pth'
    torch.save(published_state_dict('care_s0'), source)
    flags = ['--img-size', '96', '--crop-mode', 'squash', '--interpolation', 'bilinear']
    assert main(['convert', str(source), str(target), '--to', 'caretrans', *flags]) == 0
    model, loaded, config = load_for_evaluation(target)
    assert (config.input_size, config.crop_mode, config.crop_pct) == ((3, 96, 96), 'squash', 1.)
    assert config.interpolation == 'bilinear' and loaded.meta['eval_config'] == config.to_dict()
    assert set(list_sources(model, loaded).values()) == {'checkpoint', 'model'}
    assert convert_checkpoint(target, back, 'published').endswith(
        'evaluate it with --img-size 96 --crop-pct 1.0 --interpolation bilinear --crop-mode squash')


def test_image_settings_of_a_tag_are_stored(tmp_path):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth.tar'
    torch.save(published_state_dict('rcvit_xs'), source)
    assert main(['convert', str(source), str(target), '--to', 'caretrans', '--model', 'casvit_xs.r384_in1k']) == 0
    _, loaded, config = load_for_evaluation(target)
    assert loaded.meta['arch'] == 'casvit_xs' and loaded.meta['eval_config'] == config.to_dict()
    assert (config.input_size, config.crop_mode, config.crop_pct) == ((3, 384, 384), 'squash', 1.)


@pytest.mark.parametrize('layout, name, setting', [
    ('published', 'care_s0', 'img_size'), ('mmpretrain', 'casvit_xs', 'img_size'), ('published', 'mlla_t', 'crop_pct'),
    ('published', 'casvit_xs', 'channel_order')])
def test_setting_that_the_layout_cannot_store_is_refused(tmp_path, layout, name, setting):
    source, target = hollow_checkpoint(tmp_path / 'a.pth', name, published=False), tmp_path / 'b.pth'
    values = dict(img_size=256, crop_pct=1., channel_order='bgr')
    message = error_of(convert_checkpoint, source, target, layout, **{setting: values[setting]})
    assert f'{setting} cannot be kept: the {layout} layout of {name} has no place' in message and not target.exists()


@pytest.mark.parametrize('img_size', [None, 288])
def test_suggested_flags_match_the_written_file(tmp_path, img_size):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    save_checkpoint(source, timm.create_model('mlla_t'), arch='mlla_t', eval_config=dict(input_size=[3, 256, 256]))
    summary = convert_checkpoint(source, target, 'published', img_size=img_size)
    assert summary.endswith(f'--img-size {img_size or 256} --crop-pct 0.875 --interpolation bicubic')
    side = (img_size or 256) // 4
    assert torch.load(target)['layers.0.blocks.0.attn.rope.rotations'].shape[0] == side
