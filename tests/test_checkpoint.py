"""One loader takes every checkpoint people bring, strictly; what cannot be loaded is one clear line."""
import argparse
import itertools
import json
import logging
import os
import pickle
import resource
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg
from timm.models import load_checkpoint as timm_load_checkpoint
from timm.models import load_state_dict as timm_load_state_dict
from timm.utils import CheckpointSaver, ModelEmaV3

from caretrans.checkpoint import (
    CheckpointError,
    convert_checkpoint,
    create_from_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from caretrans.models.backbone import build_backbone
from caretrans.models.care import CareTransformer
from caretrans.models.published_keys import rename_keys
from reference import published_layout, published_state_dict
from registered import CARE, MODELS

TINY = dict(depths=(1, 1, 1, 1), slice_chs=(4, 4, 8, 8), ratios=((1, 1),) * 4, num_heads=(0, 0, 1, 1))


def make_tiny(seed=0, num_classes=5, **kwargs):
    """A care_s0 of 20 thousand parameters, every tensor of it random."""
    model = timm.create_model('care_s0', num_classes=num_classes, **{**TINY, **kwargs})
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + seed + 1
             for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def publish(state_dict):
    """The weights under published keys."""
    return rename_keys(state_dict, CareTransformer.published_keys, to_published=True)


def same(a, b):
    """Whether two state dicts have the same keys and values."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def hollow(state_dict):
    """Zeros of the same shapes that take no room in a file."""
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state_dict.items()}


def hollow_checkpoint(path, name, published=True, **kwargs):
    """A file of the keys and shapes of the model `name`."""
    model = timm.create_model(name, device='meta', **kwargs)
    state_dict = hollow(model.state_dict())
    torch.save(rename_keys(state_dict, model.published_keys, to_published=True) if published else state_dict, path)
    return path


def error_of(function, *args, **kwargs):
    """The line of the CheckpointError that a call raises; the first argument that is a file must be named first."""
    with pytest.raises(CheckpointError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert '\n' not in message and message.endswith('.')
    assert message.startswith(next(str(arg) for arg in args if isinstance(arg, Path)) + ': ')
    return message


# Reading --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', '_orig_mod.module.', 'module._orig_mod.module.'])
@pytest.mark.parametrize('wrapper', ['', 'state_dict', 'model', 'state_dict_ema', 'model_ema'])
@pytest.mark.parametrize('published', [False, True])
def test_every_wrapper_prefix_and_layout_loads(tmp_path, wrapper, prefix, published):
    expected, path = make_tiny(1).state_dict(), tmp_path / 'x.pth.tar'
    keys = {prefix + key: value for key, value in (publish(expected) if published else expected).items()}
    torch.save({wrapper: keys, 'epoch': 3} if wrapper else keys, path, _use_new_zipfile_serialization=not published)
    model = make_tiny(2)
    checkpoint = load_checkpoint(model, path)
    assert same(model.state_dict(), expected)
    assert (checkpoint.path, checkpoint.entry, checkpoint.entries) == (path, wrapper, ())
    assert checkpoint.meta == ({'epoch': 3} if wrapper else {})


@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_safetensors_load_with_their_metadata(tmp_path, prefix, published):
    expected, path = make_tiny(1).state_dict(), tmp_path / 'x.safetensors'
    keys = {prefix + key: value for key, value in (publish(expected) if published else expected).items()}
    save_file(keys, path, metadata=dict(arch='care_s0', class_names='["a", "b"]', note='plain words'))
    model = make_tiny(2)
    checkpoint = load_checkpoint(model, path)
    assert same(model.state_dict(), expected)
    assert checkpoint.meta == dict(arch='care_s0', class_names=['a', 'b'], note='plain words')


def test_content_decides_how_a_file_is_read_not_its_name(tmp_path):
    expected = make_tiny(1).state_dict()
    save_file(expected, tmp_path / 'a.pth.tar')
    for name in ('b.safetensors', 'b.bin', 'b'):
        torch.save(expected, tmp_path / name)
    for path in tmp_path.iterdir():
        assert same(read_checkpoint(path).state_dict, expected)


def test_the_entry_taken_is_the_one_timm_takes(tmp_path):
    names = ('state_dict', 'model', 'state_dict_ema', 'model_ema')
    for i, taken in enumerate(itertools.chain.from_iterable(itertools.combinations(names, n) for n in (1, 2, 3, 4))):
        path = tmp_path / f'{i}.pth'
        torch.save({name: {'weight': torch.tensor(float(names.index(name)))} for name in taken}, path)
        checkpoint = read_checkpoint(path)
        assert checkpoint.state_dict == timm_load_state_dict(path)
        assert {checkpoint.entry, *checkpoint.entries} == set(taken)


def test_an_entry_can_be_named_and_is_logged_with_the_others(tmp_path, caplog):
    first, second, path = make_tiny(1).state_dict(), make_tiny(2).state_dict(), tmp_path / 'x.pth'
    torch.save({'state_dict': first, 'state_dict_ema': second, 'optimizer': {'state': {}}}, path)
    model = make_tiny(3)
    with caplog.at_level(logging.INFO):
        checkpoint = load_checkpoint(model, path, entry='state_dict')
    assert same(model.state_dict(), first)
    assert (checkpoint.entry, checkpoint.entries) == ('state_dict', ('state_dict_ema',))
    assert f'Loaded care_s0 from {path}, entry state_dict (not state_dict_ema)' in caplog.messages
    message = error_of(read_checkpoint, path, entry='model')
    assert "'model' holds no weights" in message and "'state_dict' or 'state_dict_ema'" in message
    torch.save(first, path)
    assert same(read_checkpoint(path, entry='').state_dict, first)
    assert "choose entry=''" in error_of(read_checkpoint, path, entry='model')


def test_an_entry_of_an_unusual_name_must_be_named(tmp_path):
    expected, path = make_tiny(1).state_dict(), tmp_path / 'x.pth'
    torch.save({'net': expected, 'threshold': torch.tensor(0.5)}, path)
    assert "no entry of a usual name holds weights: choose entry='net'" in error_of(read_checkpoint, path)
    assert same(read_checkpoint(path, entry='net').state_dict, expected)


def test_an_empty_wrapper_is_passed_over(tmp_path):
    expected, path = make_tiny(1).state_dict(), tmp_path / 'x.pth'
    torch.save({'state_dict': expected, 'state_dict_ema': None, 'model_ema': {}}, path)
    assert read_checkpoint(path).entry == 'state_dict'


def test_what_is_not_weights_is_kept(tmp_path):
    path, state = tmp_path / 'x.pth', {'state': {0: {'exp_avg': torch.ones(2)}}, 'param_groups': [{'lr': 0.1}]}
    rng = {'torch': torch.get_rng_state()}
    torch.save(dict(model=make_tiny().state_dict(), optimizer=state, rng=rng, epoch=7, metric=81.5), path)
    meta = read_checkpoint(path).meta
    assert (meta['epoch'], meta['metric'], meta['optimizer']['param_groups']) == (7, 81.5, [{'lr': 0.1}])
    assert torch.equal(meta['rng']['torch'], rng['torch'])


def test_training_checkpoints_of_timm_are_read(tmp_path):
    model, optimizer = make_tiny(1), torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    ema = ModelEmaV3(make_tiny(2))
    args = argparse.Namespace(model='care_s0', num_classes=None, lr=0.1)
    saver = CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(4, 77.)
    checkpoint = load_checkpoint(make_tiny(3), tmp_path / 'last.pth.tar')
    assert (checkpoint.entry, checkpoint.entries) == ('state_dict_ema', ('state_dict',))
    assert same(checkpoint.state_dict, ema.module.state_dict())
    assert (checkpoint.meta['arch'], checkpoint.meta['epoch'], checkpoint.meta['args']['lr']) == ('care_s0', 4, 0.1)


@pytest.mark.parametrize('file_dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_weights_take_the_dtype_of_the_model(tmp_path, dtype, file_dtype):
    source, path = make_tiny(1).to(file_dtype), tmp_path / 'x.pth'
    torch.save(source.state_dict(), path)
    model = make_tiny(2).to(dtype)
    load_checkpoint(model, path)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert same(model.state_dict(), source.to(dtype).state_dict())


def test_parallel_and_compiled_models_are_loaded_and_saved_like_plain_ones(tmp_path):
    expected, path = make_tiny(1), tmp_path / 'x.pth'
    for i, wrap in enumerate((nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m)))):
        save_checkpoint(path, wrap(make_tiny(1)), arch='care_s0', ema=wrap(make_tiny(4)))
        assert same(torch.load(path)['state_dict'], expected.state_dict())
        assert same(torch.load(path)['state_dict_ema'], make_tiny(4).state_dict())
        model = make_tiny(2 + i)
        load_checkpoint(wrap(model), path, entry='state_dict')
        assert same(model.state_dict(), expected.state_dict())


# Files that are no checkpoints ----------------------------------------------------------------------------------------

class MakesFolder:
    """Pickles into a call of os.mkdir."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize('save', [
    torch.save,
    lambda contents, path: torch.save(contents, path, _use_new_zipfile_serialization=False),
    lambda contents, path: path.write_bytes(pickle.dumps(contents, protocol=2)),
], ids=['zip', 'legacy', 'pickle'])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, save):
    path, folder = tmp_path / 'x.pth.tar', tmp_path / 'made'
    save({'args': MakesFolder(folder), 'state_dict': {'weight': torch.ones(2)}}, path)
    message = error_of(read_checkpoint, path)
    assert 'wants to run code' in message and f'({os.mkdir.__module__}.mkdir)' in message
    assert not folder.exists()
    with suppress(RuntimeError), open(path, 'rb') as file:  # a bare pickle is no file of torch.save, but too late
        torch.load(file, weights_only=False)
    assert folder.exists(), 'the code was live'


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_of_any_protocol_is_not_run(tmp_path, protocol):
    path, folder = tmp_path / 'x.pth.tar', tmp_path / 'made'
    path.write_bytes(pickle.dumps({'args': MakesFolder(folder)}, protocol))
    error_of(read_checkpoint, path)
    assert not folder.exists()
    pickle.loads(path.read_bytes())
    assert folder.exists(), 'the code was live'


def test_other_classes_in_a_pickle_are_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / 'module.pth')
    assert '(torch.nn.modules.linear.Linear)' in error_of(read_checkpoint, tmp_path / 'module.pth')
    torch.save({'model': {'w': torch.ones(1)}, 'best': np.float64(1)}, tmp_path / 'numpy.pth')
    assert 'multiarray.scalar)' in error_of(read_checkpoint, tmp_path / 'numpy.pth')


NOT_WEIGHTS = {
    'empty': (b'', 'is empty (0 bytes)'),
    'html': (b'\n <!DOCTYPE html>\n<html><body>Quota exceeded</body></html>', 'is a web page'),
    'xml': (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', 'is a web page'),
    'lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 29468011\n', 'is a Git-LFS pointer'),
    'text': (b'Not found\n', "neither a file of torch.save nor safetensors (it begins with b'Not foun')"),
    'gzip': (b'\x1f\x8b\x08\x00' + bytes(40), 'unpack or download it again'),
    'nonsense': (b'\x80\x02' + bytes(40), 'is truncated or damaged'),
}


@pytest.mark.parametrize('kind', NOT_WEIGHTS)
@pytest.mark.parametrize('name', ['x.pth.tar', 'x.safetensors'])
def test_files_that_are_no_checkpoints_say_what_they_are(tmp_path, name, kind):
    content, expected = NOT_WEIGHTS[kind]
    path = tmp_path / name
    path.write_bytes(content)
    if name == 'x.safetensors' and kind in ('text', 'gzip'):
        expected = 'is truncated or damaged'
    assert expected in error_of(read_checkpoint, path)


def test_missing_files_and_folders_say_so(tmp_path):
    assert 'no such file' in error_of(read_checkpoint, tmp_path / 'none.pth')
    assert 'no such file' in error_of(load_checkpoint, make_tiny(), tmp_path / 'none' / 'none.pth')
    assert 'is a folder' in error_of(create_from_checkpoint, tmp_path)
    (tmp_path / 'file').touch()
    assert 'cannot be read (Not a directory)' in error_of(read_checkpoint, tmp_path / 'file' / 'x.pth')


@pytest.mark.parametrize('save', [
    torch.save,
    lambda contents, path: torch.save(contents, path, _use_new_zipfile_serialization=False),
    save_file,
], ids=['zip', 'legacy', 'safetensors'])
def test_truncated_files_say_so_wherever_they_end(tmp_path, save):
    path = tmp_path / ('x.safetensors' if save is save_file else 'x.pth.tar')
    save(make_tiny().state_dict(), path)
    content = path.read_bytes()
    for end in {2, 5, 9, 40, 300, *(len(content) * i // 40 for i in range(1, 40)), len(content) - 1}:
        path.write_bytes(content[:end])
        assert 'is truncated' in error_of(read_checkpoint, path)


def test_archives_of_other_things_say_what_is_in_them(tmp_path):
    torch.save({'weight': torch.ones(2)}, tmp_path / 'CARETrans_S0.pth.tar')
    with zipfile.ZipFile(tmp_path / 'drive.pth.tar', 'w') as archive:
        archive.write(tmp_path / 'CARETrans_S0.pth.tar', 'CARETrans_S0.pth.tar')
    assert 'zip archive of CARETrans_S0.pth.tar: unpack' in error_of(read_checkpoint, tmp_path / 'drive.pth.tar')
    with zipfile.ZipFile(tmp_path / 'script.pt', 'w') as archive:
        archive.writestr('net/data.pkl', '')
        archive.writestr('net/constants.pkl', '')
    assert 'is a TorchScript program' in error_of(read_checkpoint, tmp_path / 'script.pt')


@pytest.mark.parametrize('contents, expected', [
    ({'epoch': 3, 'args': {'lr': 0.1}}, 'holds no weights, only epoch, args'),
    ({'state_dict': {}}, 'holds no weights, only state_dict'),
    ({'counts': torch.arange(3)}, 'holds no weights, only counts'),
    ({}, 'holds no weights: take'),
    ([torch.ones(2)], 'holds a list'),
    (torch.ones(2), 'holds a Tensor'),
])
def test_files_without_weights_say_what_they_hold(tmp_path, contents, expected):
    torch.save(contents, tmp_path / 'x.pth')
    assert expected in error_of(read_checkpoint, tmp_path / 'x.pth')


def test_the_same_weight_twice_is_refused(tmp_path):
    state_dict, path = make_tiny().state_dict(), tmp_path / 'x.pth'
    torch.save({**state_dict, 'module.stem.conv.bias': torch.ones(16)}, path)
    assert 'both with and without module.' in error_of(load_checkpoint, make_tiny(), path)
    torch.save({**state_dict, 'stem.0.bias': torch.ones(16)}, path)
    assert 'under published keys and ours' in error_of(load_checkpoint, make_tiny(), path)


# Weights that do not fit ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('published', [False, True])
def test_every_missing_unexpected_and_misshaped_key_is_named_as_in_the_file(tmp_path, published):
    state_dict, path = make_tiny().state_dict(), tmp_path / 'x.pth'
    state_dict = publish(state_dict) if published else state_dict
    keys = list(state_dict)
    missing, misshaped = keys[3:-8:12], keys[5:-8:12]
    assert len(missing) > 10 and len(misshaped) > 10
    for key in missing:
        del state_dict[key]
    shapes = {key: tuple(state_dict[key].shape) for key in misshaped}
    state_dict.update({key: torch.zeros(7, 7) for key in misshaped})
    state_dict.update({f'extra.{i}': torch.zeros(1) for i in range(12)})
    torch.save({'model': {f'module.{key}': value for key, value in state_dict.items()}}, path)
    model = make_tiny(2)
    message = error_of(load_checkpoint, model, path)
    assert f'{len(missing)} missing: {", ".join(missing)}; ' in message
    assert f'12 unexpected: {", ".join(f"extra.{i}" for i in range(12))}; ' in message
    details = ', '.join(f'{key} (is (7, 7), should be {shapes[key]})' for key in misshaped)
    assert f'{len(misshaped)} misshaped: {details}: take another' in message
    assert same(model.state_dict(), make_tiny(2).state_dict()), 'nothing may be loaded in part'


@pytest.mark.parametrize('name', MODELS)
def test_a_checkpoint_of_another_model_is_called_by_its_name(tmp_path, name):
    path = hollow_checkpoint(tmp_path / 'x.pth', name, num_classes=7)
    other = MODELS[MODELS.index(name) - 1]
    model = timm.create_model(other, device='meta', num_classes=14)
    message = error_of(load_checkpoint, model, path)
    assert f'is a checkpoint of {name}, not {other}: take {name}' in message
    assert message == error_of(load_checkpoint, model, path, new_heads=True)


def test_a_damaged_checkpoint_of_another_model_is_still_called_by_its_name(tmp_path):
    path = hollow_checkpoint(tmp_path / 'x.pth', 'care_s1')
    state_dict = torch.load(path)
    del state_dict['stem.0.bias']
    torch.save(state_dict, path)
    assert 'care_s1, not care_s0' in error_of(load_checkpoint, timm.create_model('care_s0', device='meta'), path)
    assert '1 missing: stem.0.bias: ' in error_of(load_checkpoint, timm.create_model('care_s1', device='meta'), path)


def test_models_added_later_are_recognised(tmp_path, monkeypatch):
    def care_later(pretrained=False, **kwargs):
        return build_backbone(CareTransformer, 'care_later', pretrained, **{**TINY, **kwargs})

    care_later.__module__ = 'caretrans.models.later'
    path = tmp_path / 'x.pth'
    torch.save(make_tiny(num_classes=1000).state_dict(), path)
    assert 'fit none of ours' in error_of(create_from_checkpoint, path)
    monkeypatch.setitem(timm.models._registry._model_entrypoints, 'care_later', care_later)
    model, _ = create_from_checkpoint(path)
    assert model.pretrained_cfg['architecture'] == 'care_later'
    message = error_of(load_checkpoint, timm.create_model('care_s0', device='meta'), path)
    assert 'is a checkpoint of care_later, not care_s0' in message


def test_a_plain_checkpoint_in_a_changed_model_says_so(tmp_path):
    path = hollow_checkpoint(tmp_path / 'x.pth', 'care_s0')
    for changed in (dict(ablation='no_inter1'), dict(features_only=True)):
        model = timm.create_model('care_s0', **changed)
        assert 'care_s0 as it is by default, not of one changed' in error_of(load_checkpoint, model, path)


def test_other_image_channels_are_named(tmp_path):
    path = hollow_checkpoint(tmp_path / 'x.pth', 'care_s0')
    for num_classes in (1000, 14):
        model = timm.create_model('care_s0', device='meta', in_chans=1, num_classes=num_classes)
        message = error_of(load_checkpoint, model, path)
        assert 'misshaped: stem.0.weight (is (32, 3, 4, 4), should be (32, 1, 4, 4))' in message


def test_weights_of_something_else_name_all_keys(tmp_path):
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / 'x.pth')
    message = error_of(load_checkpoint, make_tiny(), tmp_path / 'x.pth')
    assert '2 unexpected: weight, bias: ' in message and all(key in message for key in make_tiny().state_dict())


@pytest.mark.parametrize('published', [False, True])
def test_other_classes_need_new_heads_which_stay_fresh(tmp_path, published, caplog):
    source, path = make_tiny(1, num_classes=9).state_dict(), tmp_path / 'x.pth'
    torch.save(publish(source) if published else source, path)
    model = make_tiny(2)
    message = error_of(load_checkpoint, model, path)
    assert 'has heads of 9 classes, care_s0 of 5' in message and '(new_heads=True, --new-heads)' in message
    assert same(model.state_dict(), make_tiny(2).state_dict())
    with caplog.at_level(logging.INFO):
        load_checkpoint(model, path, new_heads=True)
    heads = {key for key in source if key.startswith(('head.', 'head_dist.'))}
    assert len(heads) == 8  # norm and fc of both
    expected = {key: (make_tiny(2).state_dict() if key in heads else source)[key] for key in source}
    assert same(model.state_dict(), expected)
    assert 'The heads of care_s0 are fresh: train them' in caplog.messages


def test_new_heads_stay_fresh_for_equal_classes_too(tmp_path):
    torch.save(make_tiny(1).state_dict(), tmp_path / 'x.pth')
    model = make_tiny(2)
    load_checkpoint(model, tmp_path / 'x.pth', new_heads=True)
    assert torch.equal(model.head.fc.weight, make_tiny(2).head.fc.weight)
    assert torch.equal(model.stem.conv.weight, make_tiny(1).stem.conv.weight)


def test_new_heads_leave_the_rest_strict(tmp_path):
    state_dict, path = make_tiny(1, num_classes=9).state_dict(), tmp_path / 'x.pth'
    del state_dict['stem.conv.bias']
    torch.save(state_dict, path)
    message = error_of(load_checkpoint, make_tiny(), path, new_heads=True)
    assert '1 missing: stem.conv.bias: take' in message


def test_files_and_models_without_heads_need_new_heads_too(tmp_path):
    with_heads, without = tmp_path / 'with.pth', tmp_path / 'without.pth'
    torch.save(make_tiny(1).state_dict(), with_heads)
    torch.save(make_tiny(1, num_classes=0).state_dict(), without)
    assert 'heads of 0 classes, care_s0 of 5' in error_of(load_checkpoint, make_tiny(), without)
    assert 'heads of 5 classes, care_s0 of 0' in error_of(load_checkpoint, make_tiny(num_classes=0), with_heads)
    for file, num_classes in ((without, 5), (with_heads, 0), (without, 0)):
        model = make_tiny(2, num_classes=num_classes)
        load_checkpoint(model, file, new_heads=True)
        assert same(model.stages.state_dict(), make_tiny(1).stages.state_dict())


def test_a_missing_head_is_named(tmp_path):
    state_dict = {key: value for key, value in publish(make_tiny().state_dict()).items() if 'dist_head' not in key}
    torch.save(state_dict, tmp_path / 'x.pth')
    message = error_of(load_checkpoint, make_tiny(), tmp_path / 'x.pth')
    assert '4 missing: dist_head.norm.weight, dist_head.norm.bias, dist_head.fc.weight, dist_head.fc.bias: ' in message


# Models made from files -----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def published_file(tmp_path_factory):
    """A published checkpoint of care_s0."""
    path = tmp_path_factory.mktemp('published') / 'CARETrans_S0.pth.tar'
    torch.save(published_state_dict('care_s0'), path)
    return path


def test_a_published_file_makes_its_model(published_file, caplog):
    with caplog.at_level(logging.INFO):
        model, checkpoint = create_from_checkpoint(published_file)
    assert (model.pretrained_cfg['architecture'], model.num_classes, model.in_chans) == ('care_s0', 1000, 3)
    assert same(publish(model.state_dict()), published_state_dict('care_s0')) and checkpoint.entry == ''
    assert f'{published_file} does not say of which model it is; its weights have the shapes of care_s0' in \
        caplog.messages


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('published', [False, True])
@pytest.mark.filterwarnings('ignore:.*to a meta parameter')
def test_every_model_is_recognised_by_its_shapes(tmp_path, name, published):
    path = hollow_checkpoint(tmp_path / 'x.pth', name, published, num_classes=14, in_chans=1)
    model, _ = create_from_checkpoint(path, device='meta')
    assert (model.pretrained_cfg['architecture'], model.num_classes, model.in_chans) == (name, 14, 1)


def test_a_file_without_heads_makes_a_model_without_heads(tmp_path):
    model, _ = create_from_checkpoint(hollow_checkpoint(tmp_path / 'x.pth', 'care_s1', num_classes=0))
    assert (model.pretrained_cfg['architecture'], model.num_classes) == ('care_s1', 0)


@pytest.mark.parametrize('meta', [
    dict(arch='care_s0'), dict(arch='care_s0.in1k'), dict(args=argparse.Namespace(model='care_s0'))])
def test_the_model_and_its_arguments_are_those_that_the_file_states(tmp_path, meta):
    source, path = make_tiny(1, num_classes=3, in_chans=2, ablation='no_inter1'), tmp_path / 'x.pth'
    torch.save(dict(model=source.state_dict(), model_args=dict(TINY, ablation='no_inter1'), **meta), path)
    for name in (None, 'care_s0', 'care_s0.in1k'):
        model, _ = create_from_checkpoint(path, name, drop_path_rate=0.5, dtype=torch.float64)
        assert same(model.state_dict(), source.double().state_dict())
        assert model.stages[3].blocks[0].drop_path.drop_prob == 0.5
    assert 'is a checkpoint of care_s0, not care_s1: take care_s0' in error_of(create_from_checkpoint, path, 'care_s1')


def test_a_name_that_the_file_states_but_nobody_knows_is_passed_over(tmp_path):
    path = hollow_checkpoint(tmp_path / 'x.pth', 'care_s1')
    torch.save(dict(model=torch.load(path), arch='CARETrans_S1'), path)
    assert create_from_checkpoint(path)[0].pretrained_cfg['architecture'] == 'care_s1'


def test_a_wrong_or_unknown_model_name_is_refused(tmp_path):
    path = hollow_checkpoint(tmp_path / 'x.pth', 'care_s1')
    assert 'is a checkpoint of care_s1, not care_s0' in error_of(create_from_checkpoint, path, 'care_s0')
    assert "no model 'care_s9'" in error_of(create_from_checkpoint, path, 'care_s9')
    torch.save(nn.Linear(2, 3).state_dict(), path)
    message = error_of(create_from_checkpoint, path)
    assert 'does not say of which model it is, and its weights fit none of ours: name the model' in message


def test_other_models_of_timm_load_when_named(tmp_path):
    path = hollow_checkpoint(tmp_path / 'x.pth', 'care_s1')
    torch.save(timm.create_model('resnet10t', num_classes=4).state_dict(), path)
    assert create_from_checkpoint(path, 'resnet10t')[0].num_classes == 4


def test_a_model_for_other_classes_is_made_with_new_heads(tmp_path):
    path = tmp_path / 'x.pth'
    save_checkpoint(path, make_tiny(1), arch='care_s0', model_args=TINY)
    assert 'heads of 5 classes, care_s0 of 7' in error_of(create_from_checkpoint, path, num_classes=7)
    model, _ = create_from_checkpoint(path, num_classes=7, new_heads=True)
    assert model.num_classes == 7 and torch.equal(model.stem.conv.weight, make_tiny(1).stem.conv.weight)


# Writing --------------------------------------------------------------------------------------------------------------

def test_what_is_saved_comes_back(tmp_path):
    path, names = tmp_path / 'last.pth.tar', ['a', 'b', 'c', 'd', 'e']
    optimizer = torch.optim.AdamW(make_tiny(1).parameters())
    save_checkpoint(
        path, make_tiny(1), arch='care_s0', ema=ModelEmaV3(make_tiny(2)), class_names=names, epoch=3,
        model_args=TINY, metrics=dict(top1=81.5, top5=None), optimizer=optimizer.state_dict())
    model, checkpoint = create_from_checkpoint(path)
    assert same(model.state_dict(), make_tiny(2).state_dict())
    assert same(read_checkpoint(path, 'state_dict').state_dict, make_tiny(1).state_dict())
    meta = checkpoint.meta
    assert (meta['arch'], meta['num_classes'], meta['class_names'], meta['epoch']) == ('care_s0', 5, names, 3)
    assert (meta['metrics'], meta['model_args']) == (dict(top1=81.5, top5=None), TINY)
    optimizer.load_state_dict(meta['optimizer'])
    save_checkpoint(path, make_tiny(3), arch='care_s0')
    assert set(torch.load(path)) == {'arch', 'num_classes', 'version', 'state_dict'}


def test_what_is_saved_opens_in_plain_timm(tmp_path):
    path = tmp_path / 'last.pth.tar'
    save_checkpoint(path, make_tiny(1), arch='care_s0', epoch=3)
    for model in (make_tiny(2), timm.create_model('care_s0', num_classes=5, checkpoint_path=path, **TINY)):
        timm_load_checkpoint(model, path)
        assert same(model.state_dict(), make_tiny(1).state_dict())
    model = make_tiny(2)
    assert timm.models.resume_checkpoint(model, path) == 3  # epochs are finished
    assert same(model.state_dict(), make_tiny(1).state_dict())
    save_checkpoint(path, make_tiny(1), arch='care_s0', ema=make_tiny(4))
    timm_load_checkpoint(model, path)
    assert same(model.state_dict(), make_tiny(4).state_dict())


@pytest.mark.parametrize('rest, named', [
    (dict(metric=np.float64(1)), 'metric is a numpy.float64'),
    (dict(config=dict(lrs=[0.1, np.float32(1)])), r'config.lrs\[1\] is a numpy.float32'),
    (dict(config=dict(output=Path('x'))), 'config.output is a pathlib'),
    (dict(args=argparse.Namespace()), 'args is a argparse.Namespace'),
    (dict(steps={(1, 2): 3}), r'steps has the key \(1, 2\)'),
])
def test_what_could_not_be_read_back_is_not_written(tmp_path, rest, named):
    with pytest.raises(TypeError, match=named):
        save_checkpoint(tmp_path / 'x.pth', make_tiny(), arch='care_s0', **rest)
    assert not list(tmp_path.iterdir())


def test_wrong_class_names_and_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match='2 class names for a model of 5 classes'):
        save_checkpoint(tmp_path / 'x.pth', make_tiny(), arch='care_s0', class_names=['a', 'b'])
    path = tmp_path / 'x.safetensors'
    assert 'let it end in .pth or .pth.tar' in error_of(save_checkpoint, path, make_tiny(), arch='care_s0')
    assert not list(tmp_path.iterdir())


def fail(error):
    def call(*args, **kwargs):
        raise error
    return call


@pytest.mark.parametrize('function, error, expected', [
    ('os.fsync', OSError(28, 'No space left on device'), CheckpointError),
    ('os.replace', PermissionError(13, 'Permission denied'), CheckpointError),
    ('os.fsync', KeyboardInterrupt(), KeyboardInterrupt),
    ('torch.save', MemoryError(), MemoryError),
])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, error, expected):
    path = tmp_path / 'last.pth.tar'
    save_checkpoint(path, make_tiny(1), arch='care_s0', epoch=1)
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(expected) as caught:
        patch.setattr(function, fail(error))
        save_checkpoint(path, make_tiny(2), arch='care_s0', epoch=2)
    if expected is CheckpointError:
        assert str(caught.value).startswith(f'{path}: could not be written ({error.strerror}): make room for 0.')
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_a_disk_that_takes_no_more_is_a_clear_error(tmp_path):
    path = tmp_path / 'last.pth.tar'
    save_checkpoint(path, make_tiny(1), arch='care_s0', epoch=1)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a real write that stops half way
    try:
        message = error_of(save_checkpoint, path, make_tiny(2), arch='care_s0')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'could not be written (File too large)' in message and 'a file that was there is unchanged' in message
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_folders_that_cannot_be_written_to_are_clear_errors(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'folder.pth').mkdir()
    for path, reason in (
            (tmp_path / 'none' / 'x.pth', 'No such file or directory'), (tmp_path / 'file' / 'x.pth', 'Not a directory'),
            (tmp_path / 'folder.pth', 'Is a directory')):
        assert f'could not be written ({reason})' in error_of(save_checkpoint, path, make_tiny(), arch='care_s0')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'folder.pth']


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr('os.fsync', lambda f: (calls.append(os.path.isdir(f'/dev/fd/{f}')), fsync(f)))
    monkeypatch.setattr('os.replace', lambda a, b: (calls.append((Path(a).parent, b)), replace(a, b)))
    save_checkpoint(tmp_path / 'x.pth', make_tiny(), arch='care_s0')
    assert calls == [False, (tmp_path, tmp_path / 'x.pth'), True]  # file, rename, folder


# Converting -----------------------------------------------------------------------------------------------------------

def test_a_published_file_converts_to_ours_and_back_without_a_change(tmp_path, published_file):
    ours, back = tmp_path / 'ours.pth.tar', tmp_path / 'back.pth'
    summary = convert_checkpoint(published_file, ours, 'caretrans')
    assert summary == \
        f'care_s0, 1000 classes: 567 tensors from {published_file} to {ours} in the caretrans layout'
    contents = torch.load(ours)
    assert {key: contents[key] for key in ('arch', 'num_classes', 'version')} == \
        dict(arch='care_s0', num_classes=1000, version=1)
    assert list(contents['state_dict']) == list(timm.create_model('care_s0', device='meta').state_dict())
    assert 'entry state_dict, to' in convert_checkpoint(ours, back, 'published')
    expected, converted = published_state_dict('care_s0'), torch.load(back)
    assert same(converted, expected) and list(converted) == list(expected)


@pytest.mark.parametrize('name', CARE)
def test_the_published_layout_has_the_official_keys_in_the_official_order(tmp_path, name):
    source, target = hollow_checkpoint(tmp_path / 'a.pth', name, published=False), tmp_path / 'b.pth'
    convert_checkpoint(source, target, 'published')
    written = {key: list(value.shape) for key, value in torch.load(target).items()}
    assert written == published_layout(name) and list(written) == list(published_layout(name))


@pytest.mark.parametrize('endings', [*itertools.product(('.pth.tar', '.safetensors'), repeat=2)])
@pytest.mark.parametrize('layout', ['published', 'caretrans'])
def test_formats_convert_into_each_other(tmp_path, endings, layout):
    source, middle, target = tmp_path / 'a.pth', tmp_path / f'b{endings[0]}', tmp_path / f'c{endings[1]}'
    facts = dict(class_names=list('abcde'), model_args=dict(TINY), note='words', epoch=2)
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


def test_the_entry_to_convert_can_be_named(tmp_path):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    save_checkpoint(source, make_tiny(1), arch='care_s0', ema=make_tiny(2), model_args=TINY)
    for entry, seed in ((None, 2), ('state_dict', 1)):
        convert_checkpoint(source, target, 'published', entry, overwrite=True)
        assert same(torch.load(target), publish(make_tiny(seed).state_dict()))


def test_a_conversion_overwrites_only_when_asked(tmp_path):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    save_checkpoint(source, make_tiny(1), arch='care_s0', model_args=TINY)
    target.write_text('precious')
    with pytest.raises(CheckpointError, match='b.pth: is there already'):
        convert_checkpoint(source, target, 'published')
    assert target.read_text() == 'precious'
    with pytest.raises(CheckpointError, match='a.pth: is there already'):
        convert_checkpoint(source, source, 'published')
    convert_checkpoint(source, source, 'published', overwrite=True)
    assert same(torch.load(source), publish(make_tiny(1).state_dict()))


def test_a_conversion_refuses_what_it_cannot_do(tmp_path):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    state_dict = make_tiny().state_dict()
    torch.save(dict(model=state_dict, arch='care_s0', model_args=TINY), source)
    with pytest.raises(ValueError, match="layout must be published or caretrans, not 'timm'"):
        convert_checkpoint(source, target, 'timm')
    with pytest.raises(CheckpointError, match='b.onnx: let the name end in .pth'):
        convert_checkpoint(source, tmp_path / 'b.onnx', 'published')
    assert 'no such file' in error_of(convert_checkpoint, tmp_path / 'none.pth', target, 'published')
    torch.save(dict(model=timm.create_model('resnet10t').state_dict(), arch='resnet10t'), source)
    assert 'resnet10t, which is none of ours' in error_of(convert_checkpoint, source, target, 'caretrans')
    del state_dict['stem.conv.bias']
    torch.save(dict(model=state_dict, arch='care_s0', model_args=TINY), source)
    assert '1 missing: stem.conv.bias: ' in error_of(convert_checkpoint, source, target, 'published')
    assert not target.exists()


def test_heads_are_what_the_configuration_of_each_model_says():
    for name in MODELS:
        model = timm.create_model(name, device='meta')
        for classifier in get_pretrained_cfg(name).classifier:
            assert model.get_submodule(classifier).weight.shape[0] == 1000
