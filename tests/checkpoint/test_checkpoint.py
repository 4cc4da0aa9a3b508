"""One strict loader for all kinds of checkpoints."""
import argparse
import itertools
import logging

import pytest
import timm
import torch
import torch.nn as nn
from checkpoints import TINY, error_of, hollow_checkpoint, make_tiny, publish, same
from reference import published_state_dict
from registered import MODELS, each_model_some_later
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from timm.models import load_state_dict as timm_load_state_dict
from timm.utils import CheckpointSaver, ModelEmaV3

from caretrans.checkpoint import create_from_checkpoint, load_checkpoint, read_checkpoint, save_checkpoint
from caretrans.models.backbone import build_backbone
from caretrans.models.care import CareTransformer

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


def test_file_format_is_detected_by_content(tmp_path):
    expected = make_tiny(1).state_dict()
    save_file(expected, tmp_path / 'a.pth.tar')
    for name in ('b.safetensors', 'b.bin', 'b'):
        torch.save(expected, tmp_path / name)
    for path in tmp_path.iterdir():
        assert same(read_checkpoint(path).state_dict, expected)


def test_default_entry_is_that_of_timm(tmp_path):
    names = ('state_dict', 'model', 'state_dict_ema', 'model_ema')
    for i, taken in enumerate(itertools.chain.from_iterable(itertools.combinations(names, n) for n in (1, 2, 3, 4))):
        path = tmp_path / f'{i}.pth'
        torch.save({name: {'weight': torch.tensor(float(names.index(name)))} for name in taken}, path)
        checkpoint = read_checkpoint(path)
        assert checkpoint.state_dict == timm_load_state_dict(path)
        assert {checkpoint.entry, *checkpoint.entries} == set(taken)


def test_entry_can_be_chosen_and_is_logged_with_the_others(tmp_path, caplog):
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


def test_entry_with_an_unknown_name_must_be_chosen(tmp_path):
    expected, path = make_tiny(1).state_dict(), tmp_path / 'x.pth'
    torch.save({'net': expected, 'threshold': torch.tensor(0.5)}, path)
    assert "no entry of a usual name holds weights: choose entry='net'" in error_of(read_checkpoint, path)
    assert same(read_checkpoint(path, entry='net').state_dict, expected)


def test_empty_wrapper_is_skipped(tmp_path):
    expected, path = make_tiny(1).state_dict(), tmp_path / 'x.pth'
    torch.save({'state_dict': expected, 'state_dict_ema': None, 'model_ema': {}}, path)
    assert read_checkpoint(path).entry == 'state_dict'


def test_other_entries_are_kept_as_meta(tmp_path):
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
def test_weights_are_cast_to_the_dtype_of_the_model(tmp_path, dtype, file_dtype):
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


# Weights that do not fit ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('published', [False, True])
def test_every_key_that_does_not_fit_is_named_as_in_the_file(tmp_path, published):
    state_dict, path = make_tiny().state_dict(), tmp_path / 'x.pth'
    state_dict = publish(state_dict) if published else state_dict
    keys = list(state_dict)
    missing, reshaped = keys[3:-8:12], keys[5:-8:12]
    assert len(missing) > 10 and len(reshaped) > 10
    for key in missing:
        del state_dict[key]
    shapes = {key: tuple(state_dict[key].shape) for key in reshaped}
    state_dict.update({key: torch.zeros(7, 7) for key in reshaped})
    state_dict.update({f'extra.{i}': torch.zeros(1) for i in range(12)})
    torch.save({'model': {f'module.{key}': value for key, value in state_dict.items()}}, path)
    model = make_tiny(2)
    message = error_of(load_checkpoint, model, path)
    assert f'{len(missing)} missing: {", ".join(missing)}; ' in message
    assert f'12 unexpected: {", ".join(f"extra.{i}" for i in range(12))}; ' in message
    details = ', '.join(f'{key} (is (7, 7), should be {shapes[key]})' for key in reshaped)
    assert f'{len(reshaped)} of wrong shape: {details}: take another' in message
    assert same(model.state_dict(), make_tiny(2).state_dict()), 'nothing may be loaded in part'


@each_model_some_later
def test_checkpoint_of_another_model_is_identified(tmp_path, name):
    path = hollow_checkpoint(tmp_path / 'x.pth', name, num_classes=7)
    other = MODELS[MODELS.index(name) - 1]
    model = timm.create_model(other, device='meta', num_classes=14)
    message = error_of(load_checkpoint, model, path)
    assert f'is a checkpoint of {name}, not {other}: take {name}' in message
    assert message == error_of(load_checkpoint, model, path, new_heads=True)


def test_damaged_checkpoint_of_another_model_is_identified(tmp_path):
    path = hollow_checkpoint(tmp_path / 'x.pth', 'care_s1')
    state_dict = torch.load(path)
    del state_dict['stem.0.bias']
    torch.save(state_dict, path)
    assert 'care_s1, not care_s0' in error_of(load_checkpoint, timm.create_model('care_s0', device='meta'), path)
    assert '1 missing: stem.0.bias: ' in error_of(load_checkpoint, timm.create_model('care_s1', device='meta'), path)


def test_newly_registered_models_are_recognised(tmp_path, monkeypatch):
    def care_later(pretrained=False, **kwargs):
        return build_backbone(CareTransformer, 'care_later', pretrained, **{**TINY['care_s0'], **kwargs})

    care_later.__module__ = 'caretrans.models.later'
    path = tmp_path / 'x.pth'
    torch.save(make_tiny(num_classes=1000).state_dict(), path)
    assert 'fit none of ours' in error_of(create_from_checkpoint, path)
    monkeypatch.setitem(timm.models._registry._model_entrypoints, 'care_later', care_later)
    model, _ = create_from_checkpoint(path)
    assert model.pretrained_cfg['architecture'] == 'care_later'
    message = error_of(load_checkpoint, timm.create_model('care_s0', device='meta'), path)
    assert 'is a checkpoint of care_later, not care_s0' in message


def test_default_checkpoint_in_a_modified_model_is_refused(tmp_path):
    path = hollow_checkpoint(tmp_path / 'x.pth', 'care_s0')
    for changed in (dict(ablation='no_inter1'), dict(features_only=True)):
        model = timm.create_model('care_s0', **changed)
        assert 'care_s0 as it is by default, not of one changed' in error_of(load_checkpoint, model, path)


def test_wrong_image_channels_are_named(tmp_path):
    path = hollow_checkpoint(tmp_path / 'x.pth', 'care_s0')
    for num_classes in (1000, 14):
        model = timm.create_model('care_s0', device='meta', in_chans=1, num_classes=num_classes)
        message = error_of(load_checkpoint, model, path)
        assert ' of wrong shape: stem.0.weight (is (32, 3, 4, 4), should be (32, 1, 4, 4))' in message


def test_unrelated_weights_name_all_keys(tmp_path):
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


def test_new_heads_stay_fresh_for_equal_classes(tmp_path):
    torch.save(make_tiny(1).state_dict(), tmp_path / 'x.pth')
    model = make_tiny(2)
    load_checkpoint(model, tmp_path / 'x.pth', new_heads=True)
    assert torch.equal(model.head.fc.weight, make_tiny(2).head.fc.weight)
    assert torch.equal(model.stem.conv.weight, make_tiny(1).stem.conv.weight)


def test_new_heads_keep_the_body_strict(tmp_path):
    state_dict, path = make_tiny(1, num_classes=9).state_dict(), tmp_path / 'x.pth'
    del state_dict['stem.conv.bias']
    torch.save(state_dict, path)
    message = error_of(load_checkpoint, make_tiny(), path, new_heads=True)
    assert '1 missing: stem.conv.bias: take' in message


def test_files_and_models_without_heads_need_new_heads(tmp_path):
    with_heads, without = tmp_path / 'with.pth', tmp_path / 'without.pth'
    torch.save(make_tiny(1).state_dict(), with_heads)
    torch.save(make_tiny(1, num_classes=0).state_dict(), without)
    assert 'heads of 0 classes, care_s0 of 5' in error_of(load_checkpoint, make_tiny(), without)
    assert 'heads of 5 classes, care_s0 of 0' in error_of(load_checkpoint, make_tiny(num_classes=0), with_heads)
    for file, num_classes in ((without, 5), (with_heads, 0), (without, 0)):
        model = make_tiny(2, num_classes=num_classes)
        load_checkpoint(model, file, new_heads=True)
        assert same(model.stages.state_dict(), make_tiny(1).stages.state_dict())


def test_missing_head_is_named(tmp_path):
    state_dict = {key: value for key, value in publish(make_tiny().state_dict()).items() if 'dist_head' not in key}
    torch.save(state_dict, tmp_path / 'x.pth')
    message = error_of(load_checkpoint, make_tiny(), tmp_path / 'x.pth')
    assert '4 missing: dist_head.norm.weight, dist_head.norm.bias, dist_head.fc.weight, dist_head.fc.bias: ' in message


def test_heads_match_the_pretrained_cfg_of_each_model():
    for name in MODELS:
        model = timm.create_model(name, device='meta')
        classifiers = get_pretrained_cfg(name).classifier
        for classifier in [classifiers] if isinstance(classifiers, str) else classifiers:
            assert model.get_submodule(classifier).weight.shape[0] == 1000


# Models made from files -----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def published_file(tmp_path_factory):
    """A published checkpoint of care_s0."""
    path = tmp_path_factory.mktemp('published') / 'CARETrans_S0.pth.tar'
    torch.save(published_state_dict('care_s0'), path)
    return path


def test_published_file_creates_its_model(published_file, caplog):
    with caplog.at_level(logging.INFO):
        model, checkpoint = create_from_checkpoint(published_file)
    assert (model.pretrained_cfg['architecture'], model.num_classes, model.in_chans) == ('care_s0', 1000, 3)
    assert same(publish(model.state_dict()), published_state_dict('care_s0')) and checkpoint.entry == ''
    assert f'{published_file} does not say of which model it is; its weights have the shapes of care_s0' in \
        caplog.messages


@each_model_some_later
@pytest.mark.parametrize('published', [False, True])
@pytest.mark.filterwarnings('ignore:.*to a meta parameter')
def test_every_model_is_recognised_by_its_shapes(tmp_path, name, published):
    path = hollow_checkpoint(tmp_path / 'x.pth', name, published, num_classes=14, in_chans=1)
    model, _ = create_from_checkpoint(path, device='meta')
    assert (model.pretrained_cfg['architecture'], model.num_classes, model.in_chans) == (name, 14, 1)


def test_file_without_heads_creates_a_model_without_heads(tmp_path):
    model, _ = create_from_checkpoint(hollow_checkpoint(tmp_path / 'x.pth', 'care_s1', num_classes=0))
    assert (model.pretrained_cfg['architecture'], model.num_classes) == ('care_s1', 0)


@pytest.mark.parametrize('meta', [
    dict(arch='care_s0'), dict(arch='care_s0.in1k'), dict(args=argparse.Namespace(model='care_s0'))])
def test_model_and_arguments_are_read_from_the_file(tmp_path, meta):
    source, path = make_tiny(1, num_classes=3, in_chans=2, ablation='no_inter1'), tmp_path / 'x.pth'
    torch.save(dict(model=source.state_dict(), model_args=dict(TINY['care_s0'], ablation='no_inter1'), **meta), path)
    for name in (None, 'care_s0', 'care_s0.in1k'):
        model, _ = create_from_checkpoint(path, name, drop_path_rate=0.5, dtype=torch.float64)
        assert same(model.state_dict(), source.double().state_dict())
        assert model.stages[3].blocks[0].drop_path.drop_prob == 0.5
    assert 'is a checkpoint of care_s0, not care_s1: take care_s0' in error_of(create_from_checkpoint, path, 'care_s1')


def test_unknown_model_name_in_the_file_is_ignored(tmp_path):
    path = hollow_checkpoint(tmp_path / 'x.pth', 'care_s1')
    torch.save(dict(model=torch.load(path), arch='CARETrans_S1'), path)
    assert create_from_checkpoint(path)[0].pretrained_cfg['architecture'] == 'care_s1'


def test_wrong_or_unknown_model_name_is_refused(tmp_path):
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


def test_model_for_other_classes_is_created_with_new_heads(tmp_path):
    path = tmp_path / 'x.pth'
    save_checkpoint(path, make_tiny(1), arch='care_s0', model_args=TINY['care_s0'])
    assert 'heads of 5 classes, care_s0 of 7' in error_of(create_from_checkpoint, path, num_classes=7)
    model, _ = create_from_checkpoint(path, num_classes=7, new_heads=True)
    assert model.num_classes == 7 and torch.equal(model.stem.conv.weight, make_tiny(1).stem.conv.weight)
