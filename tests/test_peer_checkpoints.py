"""Published files of CAS-ViT and MLLA load as they are, and convert to every layout and back."""
import argparse
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from checkpoints import error_of, hollow, same
from reference import published_layout, published_state_dict
from safetensors.torch import load_file
from test_peer_parity import PUBLISHED_NAMES

from caretrans.__main__ import main
from caretrans.checkpoint import (
    convert_checkpoint,
    create_from_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from caretrans.config import ConfigError, TrainConfig
from caretrans.distillation import build_teacher
from caretrans.evaluation import load_for_evaluation
from caretrans.models.published_keys import rename_keys

TINY = dict(
    casvit_xs=dict(depths=(1, 1, 1, 1), widths=(8, 12, 16, 20), num_classes=5),
    mlla_t=dict(depths=(1, 2, 1, 1), width=32, num_classes=5))
CAS_VITS = [name for name in PUBLISHED_NAMES if name.startswith('casvit')]
MLLAS = [name for name in PUBLISHED_NAMES if name.startswith('mlla')]

each_peer = pytest.mark.parametrize('name', PUBLISHED_NAMES)
each_tiny = pytest.mark.parametrize('name', TINY)


def make_tiny(name, seed=0, **kwargs):
    """A small network, every tensor of it random."""
    model = timm.create_model(name, **{**TINY[name], **kwargs})
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + seed + 1
             for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def publish(model):
    return rename_keys(model.state_dict(), model.published_keys, to_published=True)


def layout_of(name, heads=1):
    """{published key: shape} with one head or two."""
    layout = {key: value for key, value in published_layout(PUBLISHED_NAMES[name]).items() if 'dist_head' not in key}
    if heads == 2:
        second = 'dist_head' if name in CAS_VITS else 'head_dist'  # which the published MLLA has not
        layout.update({f'{second}.{kind}': layout[f'head.{kind}'] for kind in ('weight', 'bias')})
    return layout


def save_hollow(path, layout, **rest):
    torch.save(dict(rest, model=hollow({key: torch.zeros(shape) for key, shape in layout.items()})), path)
    return path


def rotations_by_definition(chs, side):
    """(side, side, chs / 2, 2): theta_i = 10000^(-i / n), n = chs / 4; pair p by row * theta_p, n + p by column."""
    theta = 10000. ** (-np.arange(chs // 4) / (chs // 4))
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing='ij')
    angles = np.concatenate([rows[..., None] * theta, columns[..., None] * theta], axis=-1)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


# One head or two ------------------------------------------------------------------------------------------------------

@each_peer
@pytest.mark.parametrize('heads', [1, 2])
@pytest.mark.parametrize('published', [True, False])
@pytest.mark.filterwarnings('ignore:.*to a meta parameter')
def test_models_are_recognised_with_one_head_and_with_two(tmp_path, name, heads, published):
    layout = layout_of(name, heads)
    if not published:
        layout = rename_keys(layout, timm.create_model(name, device='meta').published_keys)
    model, _ = create_from_checkpoint(save_hollow(tmp_path / 'x.pth', layout), device='meta')
    assert (model.pretrained_cfg['architecture'], model.distilled) == (name, heads == 2)
    classifier = model.pretrained_cfg['classifier']
    assert classifier == (('head', 'head_dist') if heads == 2 else 'head')


@each_tiny
@pytest.mark.parametrize('heads', [1, 2])
def test_a_model_of_other_heads_is_refused_with_the_remedy(tmp_path, name, heads):
    path, distilled = tmp_path / 'x.pth', heads == 2
    source = make_tiny(name, 1, distilled=distilled)
    torch.save(dict(model=publish(source)), path)
    model = make_tiny(name, 2, distilled=not distilled)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = error_of(load_checkpoint, model, path)
    counts = ('two heads', 'one head') if distilled else ('one head', 'two heads')
    assert f'has {counts[0]}, {name} as it was made {counts[1]}: make the model with distilled={distilled}' in message
    assert '(new_heads=True, --new-heads)' in message
    assert same(model.state_dict(), before)
    load_checkpoint(model, path, new_heads=True)
    after = model.state_dict()
    for key, value in before.items():
        is_head = key.startswith(('head.', 'head_dist.'))
        assert torch.equal(after[key], value if is_head else source.state_dict()[key])
    model, _ = create_from_checkpoint(path, name, **TINY[name])
    assert model.distilled == distilled and same(model.state_dict(), source.state_dict())
    assert 'as it was made' in error_of(create_from_checkpoint, path, name, distilled=not distilled, **TINY[name])


@each_tiny
def test_other_classes_and_other_heads_at_once_need_new_heads(tmp_path, name):
    torch.save(publish(make_tiny(name, 1, distilled=True)), tmp_path / 'x.pth')
    model = make_tiny(name, 2, num_classes=3)
    assert 'has heads of 5 classes' in error_of(load_checkpoint, model, tmp_path / 'x.pth')
    load_checkpoint(model, tmp_path / 'x.pth', new_heads=True)
    assert torch.equal(model.head.weight, make_tiny(name, 2, num_classes=3).head.weight)


@each_tiny
@pytest.mark.parametrize('distilled', [False, True])
def test_what_training_saves_comes_back_with_its_heads(tmp_path, name, distilled):
    model = make_tiny(name, 1, distilled=distilled)
    args = {key: value for key, value in TINY[name].items() if key != 'num_classes'}
    if distilled:
        args['distilled'] = True
    save_checkpoint(tmp_path / 'last.pth.tar', model, arch=name, model_args=args)
    loaded, _ = create_from_checkpoint(tmp_path / 'last.pth.tar')
    assert loaded.distilled == distilled and same(loaded.state_dict(), model.state_dict())


def test_a_damaged_second_head_is_named_key_by_key(tmp_path):
    state_dict = publish(make_tiny('casvit_xs', distilled=True))
    del state_dict['dist_head.bias']
    torch.save(state_dict, tmp_path / 'x.pth')
    message = error_of(load_checkpoint, make_tiny('casvit_xs', distilled=True), tmp_path / 'x.pth')
    assert 'does not fit casvit_xs: 1 missing: dist_head.bias: ' in message


# Tables of rotations --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('side', [224, 288, 512])
def test_files_of_any_image_size_load_without_their_rotations(tmp_path, side, caplog):
    source = make_tiny('mlla_t', 1)
    tables = source.compute_entries(side, side)
    torch.save(dict(model={f'module.{key}': value for key, value in {**publish(source), **tables}.items()}),
               tmp_path / 'x.pth')
    for model in (make_tiny('mlla_t', 2), create_from_checkpoint(tmp_path / 'x.pth', 'mlla_t', **TINY['mlla_t'])[0]):
        load_checkpoint(model, tmp_path / 'x.pth')
        assert same(model.state_dict(), source.state_dict())


def test_rotations_do_not_hide_what_is_missing(tmp_path):
    source = make_tiny('mlla_t', 1)
    state_dict = {**publish(source), **source.compute_entries(224, 224)}
    state_dict['layers.0.blocks.0.attn.rope.other'] = torch.ones(1)
    del state_dict['layers.1.blocks.0.attn.qk.bias']
    torch.save(state_dict, tmp_path / 'x.pth')
    message = error_of(load_checkpoint, make_tiny('mlla_t', 2), tmp_path / 'x.pth')
    assert '1 missing: layers.1.blocks.0.attn.qk.bias; 1 unexpected: layers.0.blocks.0.attn.rope.other: take' in message


@pytest.mark.parametrize('file_with', ['pretrained', 'checkpoint_path', 'features_only'])
def test_the_ways_of_timm_drop_rotations_too(tmp_path, file_with):
    source, path = timm.create_model('mlla_t'), tmp_path / 'x.pth'
    torch.save({**publish(source), **source.compute_entries(256, 256)}, path)
    if file_with == 'checkpoint_path':
        model = timm.create_model('mlla_t', checkpoint_path=path)
    else:
        model = timm.create_model('mlla_t', pretrained=True, pretrained_cfg_overlay=dict(file=path),
                                  **(dict(features_only=True) if file_with == 'features_only' else {}))
    expected, found = source.state_dict(), model.state_dict()
    assert len(found) > 400 and all(torch.equal(value, expected[key.replace('stages_', 'stages.')])
                                    for key, value in found.items())


def test_rotations_equal_their_definition():
    tables = timm.create_model('mlla_t', device='meta').compute_entries(224, 224)
    assert len(tables) == 18
    for stage, (depth, chs, side) in enumerate(zip((2, 4, 8, 4), (64, 128, 256, 512), (56, 28, 14, 7), strict=True)):
        for block in range(depth):
            table = tables[f'layers.{stage}.blocks.{block}.attn.rope.rotations']
            assert table.dtype == torch.float32 and table.is_contiguous()
            np.testing.assert_allclose(table, rotations_by_definition(chs, side), rtol=0, atol=4e-6)
    assert sum(table.numel() for table in tables.values()) == pytest.approx(1.30e6, rel=0.01)


@each_peer
@pytest.mark.parametrize('heads', [1, 2])
def test_published_files_come_out_key_for_key_in_the_official_order(tmp_path, name, heads):
    """Of MLLA with the tables, inside of `attn` and after its layers."""
    layout = layout_of(name, heads)
    model = timm.create_model(name, device='meta', distilled=heads == 2)
    torch.save(dict(model=hollow(model.state_dict())), tmp_path / 'a.pth')
    convert_checkpoint(tmp_path / 'a.pth', tmp_path / 'b.pth', 'published')
    written = {key: list(value.shape) for key, value in torch.load(tmp_path / 'b.pth').items()}
    expected = {}
    for key, shape in layout.items():
        expected[key] = shape
        if key.endswith('attn.lepe.bias'):
            side = 56 >> int(key.split('.')[1])
            expected[key.replace('lepe.bias', 'rope.rotations')] = [side, side, shape[0] // 2, 2]
    assert written == expected and list(written) == list(expected)


def test_rotations_are_of_the_size_that_was_evaluated(tmp_path):
    ours, published = tmp_path / 'a.pth', tmp_path / 'b.pth'
    key = 'layers.1.blocks.1.attn.rope.rotations'
    settings = dict(input_size=[3, 320, 320], crop_pct=1.0, crop_mode='squash', interpolation='bicubic')
    save_checkpoint(ours, make_tiny('mlla_t', 1), arch='mlla_t', eval_config=settings,
                    model_args={key: value for key, value in TINY['mlla_t'].items() if key != 'num_classes'})
    summary = convert_checkpoint(ours, published, 'published')
    assert summary.endswith('evaluate it with --img-size 320 --crop-pct 1.0 --interpolation bicubic --crop-mode squash')
    assert torch.load(published)[key].shape == (40, 40, 32, 2)
    convert_checkpoint(ours, published, 'published', overwrite=True, img_size=256)
    assert torch.load(published)[key].shape == (32, 32, 32, 2)
    message = error_of(convert_checkpoint, ours, published, 'published', overwrite=True, img_size=200)
    assert 'square images of a multiple of 32 pixels, not 200 x 200: name a size (img_size, --img-size)' in message


def test_rotations_of_the_source_are_kept(tmp_path):
    source = timm.create_model('mlla_t')
    tables = {key: value + 1 for key, value in source.compute_entries(256, 256).items()}
    torch.save(dict(model={**publish(source), **tables}), tmp_path / 'a.pth')
    convert_checkpoint(tmp_path / 'a.pth', tmp_path / 'b.safetensors', 'published')
    written = load_file(tmp_path / 'b.safetensors')
    assert same(written, {**publish(source), **tables})


# Files as the authors save them ---------------------------------------------------------------------------------------

@pytest.fixture
def cfg_node(monkeypatch):
    """A class that pickles like a configuration of yacs; `sys.modules` forgets its module after the test."""
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
    """A file with all that the training of MLLA saves."""
    parameters = [torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].sum().backward()
    optimizer.step()
    config = CfgNode(
        BASE=[''], DATA=CfgNode(IMG_SIZE=224, INTERPOLATION='bicubic'), AMP=True, EVAL=(CfgNode(CROP=True), None),
        MODEL=CfgNode(TYPE='mlla', NAME='mlla_t', DROP_PATH_RATE=0.2, MLLA=CfgNode(DEPTHS=[2, 4, 8, 4])))
    tables = model.compute_entries(224, 224)
    ema = OrderedDict((f'module.{key}', value) for key, value in {**publish(ema), **tables}.items())
    torch.save(dict(
        model=OrderedDict({**publish(model), **tables}), optimizer=optimizer.state_dict(),
        lr_scheduler=dict(base_values=[1e-3], t_in_epochs=False, metric=None), max_accuracy=np.float64(83.5),
        max_accuracy_e=np.float32(83.25), epoch=np.int64(299), config=config, state_dict_ema=ema,
    ), path, _use_new_zipfile_serialization=not legacy)
    return optimizer


@pytest.mark.parametrize('legacy', [False, True])
def test_a_file_of_mlla_loads_with_all_that_is_in_it(tmp_path, cfg_node, monkeypatch, legacy):
    path, model, ema = tmp_path / 'max_ema_acc.pth', make_tiny('mlla_t', 1), make_tiny('mlla_t', 2)
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
def test_a_file_of_mlla_converts_to_one_that_plain_timm_opens(tmp_path, cfg_node, monkeypatch):
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
def test_scalars_of_any_numpy_become_numbers(tmp_path, dtype, core):
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
    (np.datetime64('2024-01-01'), 'numpy.dtype(M8)'), (np.complex64(1), 'numpy.dtype(c8)'),
    (np.str_('x'), 'numpy.dtype(U1)'), (np.ones(2), '_reconstruct')])
def test_other_values_of_numpy_are_refused_by_name(tmp_path, value, named):
    torch.save(dict(weight=torch.ones(1), best=value), tmp_path / 'x.pth')
    message = error_of(read_checkpoint, tmp_path / 'x.pth')
    assert 'wants to run code when opened' in message and named in message


def test_other_classes_of_yacs_are_refused(tmp_path, cfg_node):
    class Other(cfg_node):
        pass

    Other.__module__, Other.__qualname__ = 'yacs.config', 'Other'
    sys.modules['yacs.config'].Other = Other
    torch.save(dict(weight=torch.ones(1), config=Other(a=1)), tmp_path / 'x.pth')
    assert '(yacs.config.Other)' in error_of(read_checkpoint, tmp_path / 'x.pth')


def test_reading_leaves_nothing_allowed_behind(tmp_path, cfg_node, monkeypatch):
    save_mlla(tmp_path / 'x.pth', cfg_node, make_tiny('mlla_t', 1), make_tiny('mlla_t', 2))
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(tmp_path / 'x.pth')
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match='yacs.config.CfgNode|numpy'):
        torch.load(tmp_path / 'x.pth', weights_only=True)


def save_casvit(path, model, ema=None, stated='rcvit_xs'):
    """A file with all that the training of CAS-ViT saves."""
    args = argparse.Namespace(model=stated, input_size=224, lr=6e-3, output_dir=None)
    contents = dict(
        model=OrderedDict(publish(model)), optimizer=torch.optim.AdamW(model.parameters()).state_dict(), epoch=299,
        scaler=dict(scale=65536., growth_factor=2.), args=args)
    if ema is not None:
        contents['model_ema'] = OrderedDict((f'module.{key}', value) for key, value in publish(ema).items())
    torch.save(contents, path)
    return path


@pytest.mark.parametrize('distilled', [False, True])
def test_a_file_of_cas_vit_loads_with_all_that_is_in_it(tmp_path, distilled):
    model, ema = (make_tiny('casvit_xs', seed, distilled=distilled) for seed in (1, 2))
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
def test_an_alias_is_the_same_model(tmp_path, stated, asked):
    path = save_casvit(tmp_path / 'x.pth', make_tiny('casvit_xs', 1), stated=stated)
    model, _ = create_from_checkpoint(path, asked, **TINY['casvit_xs'])
    assert model.pretrained_cfg['architecture'] == 'casvit_xs'
    for other in ('casvit_s', 'rcvit_s'):
        message = error_of(create_from_checkpoint, path, other)
        assert f'is a checkpoint of casvit_xs, not {other}: take casvit_xs' in message


@pytest.mark.parametrize('alias, name', [('rcvit_t', 'casvit_t'), ('mila_s', 'mlla_s')])
def test_a_file_that_states_an_alias_converts(tmp_path, alias, name):
    path = save_hollow(tmp_path / 'x.pth', layout_of(name), args=argparse.Namespace(model=alias))
    assert convert_checkpoint(path, tmp_path / 'y.pth', 'caretrans').startswith(f'{name}, 1000 classes: ')
    assert torch.load(tmp_path / 'y.pth')['arch'] == name


@pytest.mark.parametrize('asked', ['casvit_xs.r384_in1k', 'rcvit_xs.r384_in1k'])
def test_a_tag_decides_how_images_are_prepared(tmp_path, asked):
    path = save_casvit(tmp_path / 'x.pth', timm.create_model('casvit_xs'))
    _, _, config = load_for_evaluation(path, asked)
    assert (config['input_size'], config['crop_mode'], config['crop_pct']) == ([3, 384, 384], 'squash', 1.0)
    _, _, config = load_for_evaluation(path)
    assert (config['input_size'], config['crop_mode'], config['crop_pct']) == ([3, 224, 224], 'center', 0.875)


def test_an_unknown_tag_is_refused(tmp_path):
    path = save_casvit(tmp_path / 'x.pth', make_tiny('casvit_xs', 1))
    message = error_of(create_from_checkpoint, path, 'rcvit_xs.r512_in1k')
    assert 'rcvit_xs.r512_in1k: Invalid pretrained tag (r512_in1k) for casvit_xs: leave the tag out' in message


# The layout of mmpretrain ---------------------------------------------------------------------------------------------

def mmpretrain_key(key):
    """A published key in the layout of mmpretrain, by the rules of the converter one after the other."""
    parts = key.split('.')
    if parts[0] == 'patch_embed':
        name = {'0': 'conv1.conv', '1': 'conv1.bn', '3': 'conv2.conv', '4': 'conv2.bn'}[parts[1]]
        return '.'.join(['backbone.downsample_layers.0', name, *parts[2:]])
    if parts[0] == 'norm':
        return '.'.join(['backbone.norm3', *parts[1:]])
    if parts[0] == 'head':
        return '.'.join(['head.fc', *parts[1:]])
    index = int(parts[1])
    if index % 2:
        return '.'.join([f'backbone.downsample_layers.{(index + 1) // 2}', *parts[2:]])
    begin, rest = f'backbone.stages.{index // 2}.{parts[2]}.', '.'.join(parts[3:])
    for old, new in {
            'local_perception.network.0.': 'local_perception.network.0.conv.',
            'local_perception.network.1.': 'local_perception.network.0.bn.',
            'local_perception.network.2.': 'local_perception.network.1.conv.',
            'local_perception.network.4.': 'local_perception.network.2.',
            **{f'attn.oper_{x}.{old}': f'attn.oper_{x}.{new}' for x in 'qk' for old, new in (
                ('0.block.0.', '0.block.0.conv.'), ('0.block.1.', '0.block.0.bn.'), ('0.block.3.', '0.block.1.conv.'),
                ('1.block.1.', '1.block.1.conv.'))}}.items():
        if rest.startswith(old):
            return begin + new + rest[len(old):]
    return begin + rest


@pytest.fixture(scope='module')
def published_file(tmp_path_factory):
    """A published file of casvit_xs with one head."""
    path = tmp_path_factory.mktemp('published') / 'rcvit_xs.pth'
    torch.save(dict(model={key: value for key, value in published_state_dict('rcvit_xs').items() if 'dist' not in key}),
               path)
    return path


@pytest.mark.parametrize('name', CAS_VITS)
def test_the_layout_of_mmpretrain_follows_its_converter_key_for_key(tmp_path, name):
    source = save_hollow(tmp_path / 'a.pth', layout_of(name))
    convert_checkpoint(source, tmp_path / 'b.pth', 'mmpretrain')
    contents = torch.load(tmp_path / 'b.pth')
    assert list(contents) == ['state_dict']
    written = {key: list(value.shape) for key, value in contents['state_dict'].items()}
    expected = {mmpretrain_key(key): shape for key, shape in layout_of(name).items()}
    assert len(expected) == len(layout_of(name))
    assert written == expected and list(written) == list(expected)


def test_round_trips_are_exact_in_values_and_order(tmp_path, published_file):
    mm, back, ours, again = (tmp_path / f'{kind}.pth' for kind in ('mm', 'back', 'ours', 'again'))
    expected = torch.load(published_file)['model']
    for arguments in ([published_file, mm, '--to', 'mmpretrain'], [mm, back, '--to', 'published'],
                      [mm, ours, '--to', 'caretrans'], [ours, again, '--to', 'mmpretrain']):
        assert main(['convert', *map(str, arguments)]) == 0
    found = torch.load(back)
    assert same(found, expected) and list(found) == list(expected)
    first, second = torch.load(mm)['state_dict'], torch.load(again)['state_dict']
    assert same(first, second) and list(first) == list(second)


@pytest.mark.parametrize('ending', ['.pth', '.safetensors'])
def test_files_of_mmpretrain_load(tmp_path, published_file, ending):
    path = tmp_path / f'mm{ending}'
    convert_checkpoint(published_file, path, 'mmpretrain')
    model, _ = create_from_checkpoint(path)
    assert (model.pretrained_cfg['architecture'], model.distilled) == ('casvit_xs', False)
    expected = torch.load(published_file)['model']
    assert same(publish(model), expected)
    model = timm.create_model('rcvit_xs')
    load_checkpoint(model, path)
    assert same(publish(model), expected)
    with_other_heads = timm.create_model('casvit_xs', num_classes=3, distilled=True)
    load_checkpoint(with_other_heads, path, new_heads=True)
    assert same(with_other_heads.stages.state_dict(), model.stages.state_dict())
    assert 'is a checkpoint of casvit_xs, not mlla_t' in error_of(
        load_checkpoint, timm.create_model('mlla_t', device='meta'), path)


def test_keys_that_do_not_fit_are_named_as_mmpretrain_does(tmp_path, published_file):
    convert_checkpoint(published_file, tmp_path / 'mm.pth', 'mmpretrain')
    state_dict = torch.load(tmp_path / 'mm.pth')['state_dict']
    missing = 'backbone.stages.2.1.attn.oper_k.0.block.0.bn.running_var'
    del state_dict[missing]
    state_dict['backbone.extra'] = torch.ones(1)
    torch.save(state_dict, tmp_path / 'x.pth')
    message = error_of(load_checkpoint, timm.create_model('casvit_xs'), tmp_path / 'x.pth')
    assert f'1 missing: {missing}; 1 unexpected: backbone.extra: ' in message


def test_what_has_no_layout_of_mmpretrain_says_so(tmp_path):
    target = tmp_path / 'y.pth'
    path = save_hollow(tmp_path / 'x.pth', layout_of('casvit_s', 2))
    assert 'has two heads, and the layout of mmpretrain has a place for one: take --to published' in error_of(
        convert_checkpoint, path, target, 'mmpretrain')
    for name in ('mlla_t', 'care_s0'):
        layout = published_layout(name)
        assert f'{name}, and only CAS-ViT has a layout of mmpretrain: take --to published' in error_of(
            convert_checkpoint, save_hollow(path, layout), target, 'mmpretrain')
    assert not target.exists()


# Weights from nowhere -------------------------------------------------------------------------------------------------

PAGES = dict(casvit='https://github.com/Tianfang-Zhang/CAS-ViT', mlla='https://github.com/LeapLabTHU/MLLA')


@pytest.mark.parametrize('name', ['casvit_xs', 'rcvit_t', 'casvit_m.r384_in1k', 'mlla_t', 'mila_b'])
@pytest.mark.parametrize('changed', [{}, dict(num_classes=14), dict(features_only=True), dict(distilled=True)])
def test_pretrained_says_where_the_file_is_and_how_to_give_it(name, changed):
    page = PAGES['casvit' if 'vit' in name else 'mlla']
    with pytest.raises(RuntimeError, match=r'^No weights for (casvit|mlla)_\w+: no program can fetch them') as caught:
        timm.create_model(name, pretrained=True, **changed)
    assert f'by hand, by the links on {page}, and pass pretrained_cfg_overlay=dict(file="FILE").' in str(caught.value)


def test_a_file_given_by_hand_that_is_not_there_is_named():
    with pytest.raises(RuntimeError, match=r'No weights for casvit_xs: .*nowhere\.pth.*by the links on https'):
        timm.create_model('casvit_xs', pretrained=True, pretrained_cfg_overlay=dict(file='nowhere.pth'))


@pytest.mark.parametrize('heads', [1, 2])
def test_pretrained_takes_a_file_given_by_hand(tmp_path, heads):
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
def test_a_teacher_without_a_file_says_where_it_is(name):
    with pytest.raises(ConfigError, match='--teacher-checkpoint') as caught:
        build_teacher(TrainConfig(teacher=name), 1000)
    assert PAGES['casvit' if 'vit' in name else 'mlla'] in str(caught.value)


def test_a_teacher_of_cas_vit_comes_from_its_file(tmp_path):
    path = save_casvit(tmp_path / 'x.pth', timm.create_model('casvit_xs', num_classes=3))
    teacher = build_teacher(TrainConfig(teacher='casvit_xs', teacher_checkpoint=str(path)), 3)
    assert teacher.num_classes == 3 and not teacher.distilled
