"""Heads, tables of positions and layouts of CAS-ViT and MLLA: checkpoints load strictly and convert back and forth."""

import numpy as np
import pytest
import timm
import torch
from checkpoints import (
    CAS_VITS, TINY, each_peer, each_tiny, error_of, hollow, layout_of, make_tiny, publish_model, same, save_hollow)
from reference import published_layout, published_state_dict
from safetensors.torch import load_file

from caretrans.__main__ import main
from caretrans.checkpoint import convert_checkpoint, create_from_checkpoint, load_checkpoint, save_checkpoint
from caretrans.models.published_keys import rename_keys

pytestmark = pytest.mark.slow

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
def test_models_with_one_or_two_heads_are_recognised(tmp_path, name, heads, published):
    layout = layout_of(name, heads)
    if not published:
        layout = rename_keys(layout, timm.create_model(name, device='meta').published_keys)
    model, _ = create_from_checkpoint(save_hollow(tmp_path / 'x.pth', layout), device='meta')
    assert (model.pretrained_cfg['architecture'], model.distilled) == (name, heads == 2)
    classifier = model.pretrained_cfg['classifier']
    assert classifier == (('head', 'head_dist') if heads == 2 else 'head')


@each_tiny
@pytest.mark.parametrize('heads', [1, 2])
def test_wrong_number_of_heads_is_refused_with_the_remedy(tmp_path, name, heads):
    path, distilled = tmp_path / 'x.pth', heads == 2
    source = make_tiny(1, name, distilled=distilled)
    torch.save(dict(model=publish_model(source)), path)
    model = make_tiny(2, name, distilled=not distilled)
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
def test_other_classes_and_number_of_heads_need_new_heads(tmp_path, name):
    torch.save(publish_model(make_tiny(1, name, distilled=True)), tmp_path / 'x.pth')
    model = make_tiny(2, name, num_classes=3)
    assert 'has heads of 5 classes' in error_of(load_checkpoint, model, tmp_path / 'x.pth')
    load_checkpoint(model, tmp_path / 'x.pth', new_heads=True)
    assert torch.equal(model.head.weight, make_tiny(2, name, num_classes=3).head.weight)


@each_tiny
@pytest.mark.parametrize('distilled', [False, True])
def test_saved_checkpoint_is_read_back_with_its_heads(tmp_path, name, distilled):
    model = make_tiny(1, name, distilled=distilled)
    args = dict(distilled=True) if distilled else {}
    save_checkpoint(tmp_path / 'last.pth.tar', model, arch=name, model_args={**TINY[name], **args})
    loaded, _ = create_from_checkpoint(tmp_path / 'last.pth.tar')
    assert loaded.distilled == distilled and same(loaded.state_dict(), model.state_dict())


def test_damaged_second_head_is_named_key_by_key(tmp_path):
    state_dict = publish_model(make_tiny(name='casvit_xs', distilled=True))
    del state_dict['dist_head.bias']
    torch.save(state_dict, tmp_path / 'x.pth')
    message = error_of(load_checkpoint, make_tiny(name='casvit_xs', distilled=True), tmp_path / 'x.pth')
    assert 'does not fit casvit_xs: 1 missing: dist_head.bias: ' in message


# Tables of rotations --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('side', [224, 288, 512])
def test_files_of_any_image_size_load_without_their_rotations(tmp_path, side, caplog):
    source = make_tiny(1, 'mlla_t')
    tables = source.compute_entries(side, side)
    torch.save(dict(model={f'module.{key}': value for key, value in {**publish_model(source), **tables}.items()}),
               tmp_path / 'x.pth')
    for model in (make_tiny(2, 'mlla_t'), create_from_checkpoint(tmp_path / 'x.pth', 'mlla_t', **TINY['mlla_t'])[0]):
        load_checkpoint(model, tmp_path / 'x.pth')
        assert same(model.state_dict(), source.state_dict())


def test_rotations_do_not_hide_missing_keys(tmp_path):
    source = make_tiny(1, 'mlla_t')
    state_dict = {**publish_model(source), **source.compute_entries(224, 224)}
    state_dict['layers.0.blocks.0.attn.rope.other'] = torch.ones(1)
    del state_dict['layers.1.blocks.0.attn.qk.bias']
    torch.save(state_dict, tmp_path / 'x.pth')
    message = error_of(load_checkpoint, make_tiny(2, 'mlla_t'), tmp_path / 'x.pth')
    assert '1 missing: layers.1.blocks.0.attn.qk.bias; 1 unexpected: layers.0.blocks.0.attn.rope.other: take' in message


@pytest.mark.parametrize('file_with', ['pretrained', 'checkpoint_path', 'features_only'])
def test_loaders_of_timm_drop_rotations(tmp_path, file_with):
    source, path = timm.create_model('mlla_t'), tmp_path / 'x.pth'
    torch.save({**publish_model(source), **source.compute_entries(256, 256)}, path)
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
def test_published_layout_has_the_official_keys_in_order(tmp_path, name, heads):
    """The tables of MLLA follow `lepe`, since their official position is not known."""
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


def test_rotations_have_the_size_of_the_evaluation(tmp_path):
    ours, published = tmp_path / 'a.pth', tmp_path / 'b.pth'
    key = 'layers.1.blocks.1.attn.rope.rotations'
    settings = dict(input_size=[3, 320, 320], crop_pct=1.0, crop_mode='squash', interpolation='bicubic')
    save_checkpoint(ours, make_tiny(1, 'mlla_t'), arch='mlla_t', eval_config=settings,
                    model_args=TINY['mlla_t'])
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
    torch.save(dict(model={**publish_model(source), **tables}), tmp_path / 'a.pth')
    convert_checkpoint(tmp_path / 'a.pth', tmp_path / 'b.safetensors', 'published')
    written = load_file(tmp_path / 'b.safetensors')
    assert same(written, {**publish_model(source), **tables})


# The layout of mmpretrain ---------------------------------------------------------------------------------------------

def mmpretrain_key(key):
    """A published key in the mmpretrain layout, by applying the rules of the converter in order."""
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
def test_mmpretrain_layout_equals_its_converter_key_for_key(tmp_path, name):
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
    assert same(publish_model(model), expected)
    model = timm.create_model('rcvit_xs')
    load_checkpoint(model, path)
    assert same(publish_model(model), expected)
    with_other_heads = timm.create_model('casvit_xs', num_classes=3, distilled=True)
    load_checkpoint(with_other_heads, path, new_heads=True)
    assert same(with_other_heads.stages.state_dict(), model.stages.state_dict())
    assert 'is a checkpoint of casvit_xs, not mlla_t' in error_of(
        load_checkpoint, timm.create_model('mlla_t', device='meta'), path)


def test_keys_that_do_not_fit_are_named_as_in_mmpretrain(tmp_path, published_file):
    convert_checkpoint(published_file, tmp_path / 'mm.pth', 'mmpretrain')
    state_dict = torch.load(tmp_path / 'mm.pth')['state_dict']
    missing = 'backbone.stages.2.1.attn.oper_k.0.block.0.bn.running_var'
    del state_dict[missing]
    state_dict['backbone.extra'] = torch.ones(1)
    torch.save(state_dict, tmp_path / 'x.pth')
    message = error_of(load_checkpoint, timm.create_model('casvit_xs'), tmp_path / 'x.pth')
    assert f'1 missing: {missing}; 1 unexpected: backbone.extra: ' in message


def test_models_without_mmpretrain_layout_are_refused(tmp_path):
    target = tmp_path / 'y.pth'
    path = save_hollow(tmp_path / 'x.pth', layout_of('casvit_s', 2))
    assert 'has two heads, and the layout of mmpretrain has a place for one: take --to published' in error_of(
        convert_checkpoint, path, target, 'mmpretrain')
    for name in ('mlla_t', 'care_s0'):
        layout = published_layout(name)
        assert f'{name}, and only CAS-ViT has a layout of mmpretrain: take --to published' in error_of(
            convert_checkpoint, save_hollow(path, layout), target, 'mmpretrain')
    assert not target.exists()
