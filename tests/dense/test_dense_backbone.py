"""Dense backbones: maps of the published ones, weights of classification files, norms, levels and sizes."""
import logging

import numpy as np
import pytest
import timm
import torch
from golden import difference, filled, golden, map_error
from reference import SHALLOW, filled_input

from caretrans.checkpoint import CheckpointError, save_checkpoint
from caretrans.dense import create_dense_backbone
from caretrans.errors import ConfigError


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """{model: file of a published backbone with norms}."""
    folder, files = tmp_path_factory.mktemp('dense'), {}
    for name, source in (('casvit_xs', 'rcvit_xs_fork_feat'), ('mlla_t', 'mlla_t_fork_feat')):
        files[name] = folder / f'{name}.pth'
        torch.save(dict(state_dict=filled(source)), files[name])
    return files


@pytest.mark.parametrize('name, reference, size, pad_to, bound', [
    ('casvit_xs', 'rcvit_xs_fork_feat', (2, 3, 160, 224), 32, 1e-12),
    ('casvit_xs', 'rcvit_xs_fork_feat', (1, 3, 100, 132), 1, 1e-12),
    ('mlla_t', 'mlla_t_fork_feat', (2, 3, 160, 224), 32, 1e-6)])  # the reference has a position code in float32
@torch.no_grad()
def test_maps_are_those_of_the_published_backbone(name, reference, size, pad_to, bound, published):
    norm = {'casvit_xs': 'batch', 'mlla_t': 'layer'}[name]
    model = create_dense_backbone(name, published[name], norm=norm, pad_to=pad_to).double().eval()
    arrays = golden(f'{reference}_{size[2]}x{size[3]}')
    errors = [map_error(arrays, f'out{i}', y) for i, y in enumerate(model(filled_input(size).double()))]
    print(f'{name} at {size[2:]}: {max(errors):.1e}')
    assert len(errors) == 4 and max(errors) < bound


def test_a_training_step_of_the_published_backbone(published):
    arrays = golden('rcvit_xs_fork_feat_train')
    model = create_dense_backbone('casvit_xs', published['casvit_xs'], norm='batch').double().train()
    bn = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert bn and not any(module.training for module in bn) and all(module.weight.requires_grad for module in bn)
    x = filled_input((2, 3, 96, 128), 'train').double().requires_grad_()
    loss = sum((y * filled_input(y.shape, f'target{i}').double()).mean() for i, y in enumerate(model(x)))
    loss.backward()
    assert abs(loss.item() - arrays['loss']) < 1e-12
    assert difference(x.grad[..., ::16, ::16], arrays['input_grad']) < 1e-12
    norms = sorted(p.grad.norm().item() for p in model.parameters())
    assert np.abs(np.array(norms) / np.sort(arrays['grad_norms']) - 1).max() < 1e-8


@pytest.mark.parametrize('name', ['care_s0', 'casvit_xs', 'mlla_t', 'resnet18'])
@torch.no_grad()
def test_a_classification_file_fills_the_backbone(name, tmp_path, caplog):
    args = {} if name == 'resnet18' else dict(depths=SHALLOW)
    model = timm.create_model(name, num_classes=5, **args).eval()
    save_checkpoint(tmp_path / 'x.pth', model, arch=name, **dict(model_args=args) if args else {})
    with caplog.at_level(logging.INFO, 'caretrans'):
        backbone = create_dense_backbone(name, tmp_path / 'x.pth', norm='none', last_map='expanded').eval()
    assert 'the backbone does not use' in caplog.text and ('heads' in caplog.text or 'fc.weight' in caplog.text)
    x = torch.randn(1, 3, 96, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)[-4:]
    for y, wanted in zip(backbone(x), expected, strict=True):
        assert torch.equal(y, wanted)
    with pytest.raises(CheckpointError, match='is a checkpoint of'):
        create_dense_backbone('care_s1' if name == 'care_s0' else 'care_s0', tmp_path / 'x.pth')


def test_batch_norm_is_frozen_for_pretrained_weights_only(published):
    def modes(model):
        return {module.training for module in model.train().modules() if isinstance(module, torch.nn.BatchNorm2d)}

    assert modes(create_dense_backbone('casvit_xs')) == {True}
    assert modes(create_dense_backbone('casvit_xs', published['casvit_xs'], norm='batch')) == {False}
    assert modes(create_dense_backbone('casvit_xs', published['casvit_xs'], norm='batch', frozen_bn=False)) == {True}


@pytest.mark.parametrize('last_map, channels', [('expanded', 1024), ('residual', 256)])
def test_both_last_maps_of_care(last_map, channels):
    model = create_dense_backbone('care_s0', last_map=last_map, drop_path_rate=.5).train()
    assert model.last_map == last_map and create_dense_backbone('care_s0').last_map == 'residual'
    assert model.channels == (32, 64, 128, channels)
    torch.manual_seed(0)
    maps = model(torch.randn(8, 3, 32, 32))
    assert (maps[-1].abs().amax((1, 2, 3)) > 0).all()  # the drop path of the last block would zero whole samples
    loss = sum(y.square().sum() for y in maps)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('levels', [(0, 1, 2, 3), (1, 2, 3), (2,)])
@torch.no_grad()
def test_maps_of_any_size_are_cropped_to_it(levels):
    model = create_dense_backbone('care_s0', out_indices=levels, depths=SHALLOW).eval()
    maps = model(torch.randn(1, 3, 101, 33))
    assert [tuple(y.shape[-2:]) for y in maps] == [(-(-101 // s), -(-33 // s)) for s in model.strides]
    assert len(model.network.stages) == max(levels) + 1 and len(model.norms) == len(levels)


@pytest.mark.parametrize('name, options, message', [
    ('casvit_xs', dict(last_map='residual'), 'only CARE has'),
    ('resnet18', dict(last_map='residual'), 'only CARE has'),
    ('vit_tiny_patch16_224', {}, 'maps at strides 16'),
    ('no_such_model', {}, "no model 'no_such_model'"),
    ('care_s0', dict(out_indices=(3, 1)), r'out_indices of care_s0 is \(3, 1\)'),
    ('care_s0', dict(out_indices=(0, 4)), r'out_indices of care_s0 is \(0, 4\)'),
    ('care_s0', dict(norm='group'), "norm is 'group'")])
def test_what_cannot_be_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        create_dense_backbone(name, **options)
