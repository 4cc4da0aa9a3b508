"""Files of CAS-ViT and MLLA load as their authors save them; errors about missing files name their origin."""
import argparse
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from checkpoints import (
    TINY, error_of, layout_of, make_tiny, publish_model, same, save_casvit, save_hollow)

from caretrans.checkpoint import (
    convert_checkpoint, create_from_checkpoint, load_checkpoint, read_checkpoint, save_checkpoint)
from caretrans.checkpoint.preparation import list_sources
from caretrans.config import TrainConfig
from caretrans.errors import ConfigError
from caretrans.evaluation import load_for_evaluation
from caretrans.training.losses import build_teacher

# Files as the authors save them ---------------------------------------------------------------------------------------

@pytest.fixture
def cfg_node(monkeypatch):
    """A class that pickles like a yacs configuration; its module is removed from `sys.modules` after the test."""
    class CfgNode(dict):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.__dict__.update(
                __immutable__=True, __deprecated_keys__=set(), __renamed_keys__={'OLD': 'NEW'}, __new_allowed__=False)

        def __getattr__(self, name):
            if name not in self:
                raise AttributeError(name)
            return self[name]

        def __setattr__(self, name, value):
            raise AttributeError('immutable')

    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    module = types.ModuleType('yacs.config')
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    yield CfgNode


def forget_yacs(monkeypatch):
    for name in ('yacs', 'yacs.config'):
        monkeypatch.delitem(sys.modules, name)


def save_mlla(path, CfgNode, model, ema, legacy=False):
    """A file like those that the training code of MLLA saves."""
    parameters = [torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].sum().backward()
    optimizer.step()
    config = CfgNode(
        BASE=[''], DATA=CfgNode(IMG_SIZE=224, INTERPOLATION='bicubic'), AMP=True, EVAL=(CfgNode(CROP=True), None),
        MODEL=CfgNode(TYPE='mlla', NAME='mlla_t', DROP_PATH_RATE=0.2, MLLA=CfgNode(DEPTHS=[2, 4, 8, 4])))
    tables = model.compute_entries(224, 224)
    ema = OrderedDict((f'module.{key}', value) for key, value in {**publish_model(ema), **tables}.items())
    torch.save(dict(
        model=OrderedDict({**publish_model(model), **tables}), optimizer=optimizer.state_dict(),
        lr_scheduler=dict(base_values=[1e-3], t_in_epochs=False, metric=None), max_accuracy=np.float64(83.5),
        max_accuracy_e=np.float32(83.25), epoch=np.int64(299), config=config, state_dict_ema=ema,
    ), path, _use_new_zipfile_serialization=not legacy)
    return optimizer


@pytest.mark.parametrize('legacy', [False, True])
def test_training_file_of_mlla_loads_with_all_its_entries(tmp_path, cfg_node, monkeypatch, legacy):
    path, model, ema = tmp_path / 'max_ema_acc.pth', make_tiny(1, 'mlla_t'), make_tiny(2, 'mlla_t')
    optimizer = save_mlla(path, cfg_node, model, ema, legacy)
    forget_yacs(monkeypatch)
    loaded, checkpoint = create_from_checkpoint(path, 'mlla_t', **TINY['mlla_t'])
    assert 'yacs' not in sys.modules and 'yacs.config' not in sys.modules
    assert (checkpoint.entry, checkpoint.entries) == ('state_dict_ema', ('model',))
    assert same(loaded.state_dict(), ema.state_dict())
    load_checkpoint(loaded, path, 'model')
    assert same(loaded.state_dict(), model.state_dict())
    meta = checkpoint.meta
    config = meta['config']
    assert config == dict(
        BASE=[''], DATA=dict(IMG_SIZE=224, INTERPOLATION='bicubic'), AMP=True, EVAL=(dict(CROP=True), None),
        MODEL=dict(TYPE='mlla', NAME='mlla_t', DROP_PATH_RATE=0.2, MLLA=dict(DEPTHS=[2, 4, 8, 4])))
    assert {type(config), type(config['DATA']), type(config['MODEL']['MLLA']), type(config['EVAL'][0])} == {dict}
    assert (meta['max_accuracy'], meta['max_accuracy_e'], meta['epoch']) == (83.5, 83.25, 299)
    assert [type(meta[key]) for key in ('max_accuracy', 'max_accuracy_e', 'epoch')] == [float, float, int]
    optimizer.load_state_dict(meta['optimizer'])


@pytest.mark.filterwarnings('ignore:.*to a meta parameter')
def test_training_file_of_mlla_converts_to_a_file_for_plain_timm(tmp_path, cfg_node, monkeypatch):
    model = timm.create_model('mlla_t', num_classes=7)
    save_mlla(tmp_path / 'MLLA_T.pth', cfg_node, model, model)
    forget_yacs(monkeypatch)
    overlay = dict(num_classes=7)
    with pytest.raises(RuntimeError, match=r'MLLA_T.pth is no checkpoint that opens .* convert .*MLLA_T.pth'):
        timm.create_model('mlla_t', pretrained=True, num_classes=7,
                          pretrained_cfg_overlay=dict(overlay, file=tmp_path / 'MLLA_T.pth'))
    convert_checkpoint(tmp_path / 'MLLA_T.pth', tmp_path / 'mlla_t.pth.tar', 'caretrans')
    loaded = timm.create_model('mlla_t', pretrained=True, num_classes=7,
                               pretrained_cfg_overlay=dict(overlay, file=tmp_path / 'mlla_t.pth.tar'))
    assert same(loaded.state_dict(), model.state_dict())
    contents = torch.load(tmp_path / 'mlla_t.pth.tar')
    assert contents['config']['MODEL']['NAME'] == 'mlla_t' and contents['max_accuracy'] == 83.5


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'float16', 'int64', 'int32', 'uint8', 'bool'])
@pytest.mark.parametrize('core', ['core', '_core'])
def test_numpy_scalars_become_numbers(tmp_path, dtype, core):
    scalar, path = np.dtype(dtype).type(1), tmp_path / 'x.pth'
    torch.save(dict(weight=torch.ones(1), best=scalar), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b'cnumpy._core.multiarray\nscalar' in content or b'cnumpy.core.multiarray\nscalar' in content
    for written in (b'cnumpy._core.m', b'cnumpy.core.m'):
        content = content.replace(written, f'cnumpy.{core}.m'.encode())
    path.write_bytes(content)
    best = read_checkpoint(path).meta['best']
    assert best == 1 and type(best) is type(scalar.item())


@pytest.mark.parametrize('value, named', [
    (np.datetime64('2024-01-01'), 'numpy.dtype(M8)'), (np.array([{}], dtype=object), 'numpy.dtype(O8)'),
    (np.zeros(1, dtype=[('a', 'f4')]), 'numpy.dtype(V4)'), (np.ma.array([1.]), 'numpy.ma')])
def test_other_numpy_values_are_refused_by_name(tmp_path, value, named):
    torch.save(dict(weight=torch.ones(1), best=value), tmp_path / 'x.pth')
    message = error_of(read_checkpoint, tmp_path / 'x.pth')
    assert 'wants to run code when opened' in message and named in message


def test_other_yacs_classes_are_refused(tmp_path, cfg_node):
    class Other(cfg_node):
        pass

    Other.__module__, Other.__qualname__ = 'yacs.config', 'Other'
    sys.modules['yacs.config'].Other = Other
    torch.save(dict(weight=torch.ones(1), config=Other(a=1)), tmp_path / 'x.pth')
    assert '(yacs.config.Other)' in error_of(read_checkpoint, tmp_path / 'x.pth')


def test_reading_restores_the_safe_globals(tmp_path, cfg_node, monkeypatch):
    save_mlla(tmp_path / 'x.pth', cfg_node, make_tiny(1, 'mlla_t'), make_tiny(2, 'mlla_t'))
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(tmp_path / 'x.pth')
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match='yacs.config.CfgNode|numpy'):
        torch.load(tmp_path / 'x.pth', weights_only=True)


@pytest.mark.parametrize('distilled', [False, True])
def test_training_file_of_cas_vit_loads_with_all_its_entries(tmp_path, distilled):
    model, ema = (make_tiny(seed, 'casvit_xs', distilled=distilled) for seed in (1, 2))
    path = save_casvit(tmp_path / 'x.pth', model, ema)
    loaded, checkpoint = create_from_checkpoint(path, **TINY['casvit_xs'])
    assert (loaded.pretrained_cfg['architecture'], loaded.distilled, checkpoint.entry) == (
        'casvit_xs', distilled, 'model_ema')
    assert same(loaded.state_dict(), ema.state_dict())
    loaded, checkpoint = create_from_checkpoint(path, entry='model', **TINY['casvit_xs'])
    assert same(loaded.state_dict(), model.state_dict())
    assert checkpoint.meta['args'] == dict(model='rcvit_xs', input_size=224, lr=6e-3, output_dir=None)
    assert checkpoint.meta['epoch'] == 299


# Names ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stated', ['rcvit_xs', 'casvit_xs', 'rcvit_xs.r384_in1k'])
@pytest.mark.parametrize('asked', [None, 'rcvit_xs', 'casvit_xs', 'rcvit_xs.in1k', 'casvit_xs.in1k'])
def test_alias_is_the_same_model(tmp_path, stated, asked):
    path = save_casvit(tmp_path / 'x.pth', make_tiny(1, 'casvit_xs'), stated=stated)
    model, _ = create_from_checkpoint(path, asked, **TINY['casvit_xs'])
    assert model.pretrained_cfg['architecture'] == 'casvit_xs'
    for other in ('casvit_s', 'rcvit_s'):
        message = error_of(create_from_checkpoint, path, other)
        assert f'is a checkpoint of casvit_xs, not {other}: take casvit_xs' in message


@pytest.mark.parametrize('alias, name', [('rcvit_t', 'casvit_t'), ('mila_s', 'mlla_s')])
def test_file_with_an_alias_converts(tmp_path, alias, name):
    path = save_hollow(tmp_path / 'x.pth', layout_of(name), args=argparse.Namespace(model=alias))
    assert convert_checkpoint(path, tmp_path / 'y.pth', 'caretrans').startswith(f'{name}, 1000 classes: ')
    assert torch.load(tmp_path / 'y.pth')['arch'] == name


@pytest.mark.parametrize('asked', ['casvit_xs.r384_in1k', 'rcvit_xs.r384_in1k'])
def test_tag_sets_the_image_settings(tmp_path, asked):
    path = save_casvit(tmp_path / 'x.pth', timm.create_model('casvit_xs'))
    _, _, config = load_for_evaluation(path, asked)
    assert (config.input_size, config.crop_mode, config.crop_pct) == ((3, 384, 384), 'squash', 1.0)
    _, _, config = load_for_evaluation(path)
    assert (config.input_size, config.crop_mode, config.crop_pct) == ((3, 224, 224), 'center', 0.875)


@pytest.mark.parametrize('side, asked, flags, expected, source', [
    (384, None, {}, (384, 'squash', 1.), 'checkpoint'),
    (384, 'rcvit_xs', {}, (384, 'squash', 1.), 'checkpoint'),
    (512, None, {}, (512, 'squash', 1.), 'checkpoint'),
    (256, None, {}, (256, 'center', .875), 'checkpoint'),
    (384, 'casvit_xs.in1k', {}, (224, 'center', .875), 'model'),
    (384, None, dict(img_size=224), (224, 'center', .875), 'flag'),
    (384, None, dict(img_size=448), (448, 'squash', 1.), 'flag'),
    (384, None, dict(crop_mode='center', crop_pct=.9), (384, 'center', .9), 'checkpoint'),
    ('384', None, {}, (224, 'center', .875), 'model'),
])
def test_image_size_in_a_cas_vit_file_is_used(tmp_path, side, asked, flags, expected, source):
    path = save_casvit(tmp_path / 'x.pth', timm.create_model('casvit_xs', device='meta').to_empty(device='cpu'),
                       side=side)
    for file in (path, tmp_path / 'y.safetensors'):
        model, loaded, config = load_for_evaluation(file, asked, **flags)
        assert (config.size[0], config.crop_mode, config.crop_pct) == expected
        assert list_sources(model, loaded, asked, **flags)['img_size'] == source
        convert_checkpoint(path, tmp_path / 'y.safetensors', 'caretrans', overwrite=True)


def test_stored_eval_config_takes_precedence_over_training_arguments(tmp_path):
    args = dict(model='rcvit_xs', input_size=384)
    save_checkpoint(tmp_path / 'x.pth', timm.create_model('casvit_xs'), arch='casvit_xs', args=args,
                    eval_config=dict(input_size=[3, 64, 64], crop_pct=.9))
    _, _, config = load_for_evaluation(tmp_path / 'x.pth')
    assert (config.input_size, config.crop_mode, config.crop_pct) == ((3, 64, 64), 'center', .9)


@pytest.mark.parametrize('flags, hinted', [
    (dict(img_size=384), True), (dict(img_size=352), False), (dict(img_size=384, crop_mode='squash'), False)])
def test_large_image_size_without_crop_settings_logs_a_hint(tmp_path, caplog, flags, hinted):
    save_checkpoint(tmp_path / 'x.pth', timm.create_model('casvit_xs'), arch='casvit_xs')
    with caplog.at_level('INFO', 'caretrans'):
        load_for_evaluation(tmp_path / 'x.pth', **flags)
    assert ('--model casvit_xs.r384_in1k, or --crop-mode squash' in caplog.text) == hinted


def test_unknown_tag_is_refused(tmp_path):
    path = save_casvit(tmp_path / 'x.pth', make_tiny(1, 'casvit_xs'))
    message = error_of(create_from_checkpoint, path, 'rcvit_xs.r512_in1k')
    assert 'rcvit_xs.r512_in1k: Invalid pretrained tag (r512_in1k) for casvit_xs: omit or correct the tag' in message


# Pretrained weights ---------------------------------------------------------------------------------------------------

PAGES = dict(casvit='https://github.com/Tianfang-Zhang/CAS-ViT', mlla='https://github.com/LeapLabTHU/MLLA')


@pytest.mark.parametrize('name', ['casvit_xs', 'rcvit_t', 'casvit_m.r384_in1k', 'mlla_t', 'mila_b'])
@pytest.mark.parametrize('changed', [{}, dict(num_classes=14), dict(features_only=True), dict(distilled=True)])
def test_pretrained_error_names_the_origin_and_the_remedy(name, changed):
    page = PAGES['casvit' if 'vit' in name else 'mlla']
    with pytest.raises(RuntimeError, match=r'^No weights for (casvit|mlla)_\w+: timm cannot fetch from') as caught:
        timm.create_model(name, pretrained=True, **changed)
    assert f'by hand, by the links on {page}, and pass pretrained_cfg_overlay=dict(file="FILE").' in str(caught.value)


def test_missing_pretrained_file_is_named():
    with pytest.raises(RuntimeError, match=r'No weights for casvit_xs: .*nowhere\.pth.*by the links on https'):
        timm.create_model('casvit_xs', pretrained=True, pretrained_cfg_overlay=dict(file='nowhere.pth'))


@pytest.mark.parametrize('heads', [1, 2])
def test_pretrained_loads_a_local_file(tmp_path, heads):
    source = timm.create_model('casvit_xs', distilled=heads == 2)
    path = save_casvit(tmp_path / 'x.pth', source)
    overlay = dict(file=path)
    model = timm.create_model('rcvit_xs', pretrained=True, pretrained_cfg_overlay=overlay, distilled=heads == 2)
    assert same(model.state_dict(), source.state_dict())
    other = timm.create_model(
        'casvit_xs', pretrained=True, pretrained_cfg_overlay=overlay, distilled=heads == 1, num_classes=3)
    assert same(other.stages.state_dict(), source.stages.state_dict()) and other.head.weight.std() < 0.03
    with pytest.raises(RuntimeError, match='head_dist.weight'):
        timm.create_model('casvit_xs', pretrained=True, pretrained_cfg_overlay=overlay, distilled=heads == 1)


@pytest.mark.parametrize('name', ['casvit_xs', 'mila_t'])
def test_teacher_without_a_file_names_its_origin(name):
    with pytest.raises(ConfigError, match='--teacher-checkpoint') as caught:
        build_teacher(TrainConfig(teacher=name), 1000)
    assert PAGES['casvit' if 'vit' in name else 'mlla'] in str(caught.value)


def test_cas_vit_teacher_loads_its_file(tmp_path):
    path = save_casvit(tmp_path / 'x.pth', timm.create_model('casvit_xs', num_classes=3))
    teacher = build_teacher(TrainConfig(teacher='casvit_xs', teacher_checkpoint=str(path)), 3)
    assert teacher.num_classes == 3 and not teacher.distilled
