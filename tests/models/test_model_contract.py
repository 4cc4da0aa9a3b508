"""Interface that timm expects of a backbone, checked for every registered model."""
import copy
import io
import pickle
import re

import pytest
import timm
import torch
import torch.nn as nn
from reference import SHALLOW, shallow_model
from registered import (
    CARE, MODELS, assert_same, classifiers_of, each_care_model, each_file, each_model, images, on_meta)
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay

def modules_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_the_models_are_registered():
    assert {'care_s0', 'care_s1', 'care_s2'} == set(CARE) == set(timm.list_models('care_*'))
    assert {'casvit_xs', 'casvit_s', 'casvit_m', 'casvit_t', 'mlla_t', 'mlla_s', 'mlla_b'} == set(MODELS) - set(CARE)


@pytest.mark.parametrize('alias, name', [
    ('rcvit_xs', 'casvit_xs'), ('rcvit_s', 'casvit_s'), ('rcvit_m', 'casvit_m'), ('rcvit_t', 'casvit_t'),
    ('mila_t', 'mlla_t'), ('mila_s', 'mlla_s'), ('mila_b', 'mlla_b')])
def test_an_alias_makes_the_same_model_and_is_in_no_list_without_aliases(alias, name):
    model, other = on_meta(alias), on_meta(name)
    assert type(model) is type(other) and model.pretrained_cfg == other.pretrained_cfg
    assert [(key, value.shape) for key, value in model.state_dict().items()] == [
        (key, value.shape) for key, value in other.state_dict().items()]
    assert timm.list_models(alias) == [alias] and alias not in MODELS


# Intermediate features ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, num_features', [('care_s0', 1024), ('care_s1', 1024), ('care_s2', 1536)])
def test_num_features_are_the_channels_of_the_features(name, num_features):
    model = on_meta(name)
    assert model.num_features == model.head_hidden_size == num_features
    assert model.forward_features(images(1, 3, 224, 224, device='meta')).shape == (1, num_features, 7, 7)


@each_model
def test_feature_info_lists_modules_channels_and_reductions(name):
    model = on_meta(name)
    maps = model.forward_intermediates(images(1, 3, 96, 64, device='meta'), intermediates_only=True)
    assert len(maps) == len(model.feature_info)
    for info, features in zip(model.feature_info, maps, strict=True):
        model.get_submodule(info['module'])
        assert features.shape == (1, info['num_chs'], 96 // info['reduction'], 64 // info['reduction'])


@each_model
@pytest.mark.parametrize('out_indices', [None, (0,), (1, 3), (-1,), (0, 1, 2, 3)])
def test_features_only_returns_the_requested_maps(name, out_indices):
    kwargs = {} if out_indices is None else dict(out_indices=out_indices)
    model = on_meta(name, features_only=True, **kwargs)
    maps = model(images(1, 3, 64, 96, device='meta'))
    expected = [model.feature_info.info[i] for i in out_indices or range(len(model.feature_info.info))]
    assert [tuple(m.shape) for m in maps] == [
        (1, info['num_chs'], 64 // info['reduction'], 96 // info['reduction']) for info in expected]


@each_file
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'getter', 'hook', 'fx'])
def test_every_kind_of_features_only_returns_the_intermediates(name, feature_cls):
    model = shallow_model(name)
    extractor = timm.create_model(
        name, features_only=True, feature_cls=feature_cls, out_indices=(0, 2, 3), depths=SHALLOW).eval()
    keys = {key: re.sub(r'^(model|graph_module)\.|(?<=^stages)_', lambda m: '' if m[1] else '.', key)
            for key in extractor.state_dict()}  # wrapped as `model.`, `graph_module.`, flattened to `stages_0.`
    state = model.state_dict()
    extractor.load_state_dict({key: state[ours] for key, ours in keys.items()})
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        maps = extractor(x)
        for found, expected in zip(
                maps.values() if isinstance(maps, dict) else maps,
                model.forward_intermediates(x, indices=[0, 2, 3], intermediates_only=True), strict=True):
            assert_same(found, expected)


@each_file
def test_forward_intermediates_takes_indices(name):
    model = shallow_model(name)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, norm=True)
        assert torch.equal(final, model.forward_features(x)) and torch.equal(final, maps[-1])
        _, maps = model.forward_intermediates(x)
        assert torch.equal(final, model.norm(maps[-1]))
        for indices, expected in (2, (-2, -1)), ([0, 2], (0, 2)), ([-1], (3,)), ([1], (1,)), (1, (3,)):
            taken = model.forward_intermediates(x, indices=indices, intermediates_only=True)
            assert len(taken) == len(expected)
            assert all(torch.equal(found, maps[i]) for found, i in zip(taken, expected, strict=True))


@each_file
def test_forward_intermediates_can_stop_early(name):
    model = shallow_model(name)
    x = images(1, 3, 64, 64)
    ran = []
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *args, i=i: ran.append(i))
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
        assert ran == [0, 1] and torch.equal(final, maps[1])
        final, _ = model.forward_intermediates(x, indices=[0, 1])
        assert ran == [0, 1, 0, 1, 2, 3] and final.shape[1] == model.num_features


@each_model
def test_forward_intermediates_refuses_invalid_arguments(name):
    x = images(1, 3, 64, 64, device='meta')
    with pytest.raises((ValueError, AssertionError), match='NLC'):
        on_meta(name).forward_intermediates(x, output_fmt='NLC')
    with pytest.raises((ValueError, AssertionError, IndexError)):
        on_meta(name).forward_intermediates(x, indices=[4])


@each_file
def test_prune_intermediate_layers_keeps_the_requested_stages(name):
    model = shallow_model(name)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        maps = model.forward_intermediates(x, norm=True, intermediates_only=True)
        expected = model(x)
        for i in range(len(maps)):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([i]) == [i]
            assert len(pruned.stages) == i + 1
            assert pruned.num_features == maps[i].shape[1]
            assert torch.equal(pruned(x), maps[i])
            pruned = copy.deepcopy(model)
            pruned.prune_intermediate_layers([i], prune_norm=True)
            assert_same(pruned.norm(pruned(x)), pruned(x))
            pruned.reset_classifier(4)
            assert pruned(x).shape == (2, 4)
        kept = copy.deepcopy(model)
        kept.prune_intermediate_layers([len(maps) - 1], prune_head=False)
        assert torch.equal(kept(x), expected)


# Training aids --------------------------------------------------------------------------------------------------------

@each_model
def test_group_matcher_orders_all_parameters_by_depth(name):
    model = on_meta(name)
    names = [key for key, _ in model.named_parameters()]
    for coarse in False, True:
        layer = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(layer) == set(names)
        assert [layer[key] for key in names] == sorted(layer.values()), 'parameters are in the order of the network'
        last = max(layer.values())
        assert {key.split('.')[0] for key in names if layer[key] == 0} == {'stem'}
        assert all((layer[key] == last) == key.startswith(('norm', 'head')) for key in names)
        blocks = sum(len(stage.blocks) for stage in model.stages)
        assert last + 1 == 2 + (len(model.stages) if coarse else blocks)


@each_model
def test_weight_decay_spares_norms_biases_and_scales(name):
    model = on_meta(name)
    spared = model.no_weight_decay()
    assert spared <= {key for key, _ in model.named_parameters()}
    without, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=spared)
    assert without['weight_decay'] == 0 and all(p.ndim >= 2 for p in decayed['params'])
    assert all(p.ndim < 2 for p in without['params']) or spared


@each_file
def test_grad_checkpointing_changes_neither_outputs_nor_gradients(name):
    x = images(2, 3, 64, 64)
    results = []
    for enable in (False, True):
        model = shallow_model(name, drop_rate=0.1, drop_path_rate=0.1).train()
        model.set_grad_checkpointing(enable)
        inputs = x.clone().requires_grad_()
        torch.manual_seed(1)
        out = model(inputs)
        out.square().mean().backward()
        results.append([out, inputs.grad, *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@each_file
def test_grad_checkpointing_keeps_no_activations_of_blocks(name):
    model = shallow_model(name, depths=(2, 2, 6, 2)).train()
    kept = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        elements = 0

        def count(tensor):
            nonlocal elements
            elements += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(images(1, 3, 64, 64))
        kept.append(elements)
    assert kept[1] < kept[0] / 2


@each_model
def test_drop_rates_reach_every_layer(name):
    model = on_meta(name, drop_rate=0.3, drop_path_rate=0.2)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert {drop.p for drop in modules_of(model, nn.Dropout)} == {0.3}
    for block in blocks:
        assert modules_of(block, nn.Dropout)
    assert modules_of(model, DropPath) == [path for block in blocks[1:] for path in modules_of(block, DropPath)]
    rates = [[path.drop_prob for path in modules_of(block, DropPath)] for block in blocks]
    assert rates[0] == []
    for i, found in enumerate(rates[1:], 1):
        assert found and found == pytest.approx([0.2 * i / (len(blocks) - 1)] * len(found))
    model = on_meta(name)
    assert not modules_of(model, DropPath) and all(drop.p == 0 for drop in modules_of(model, nn.Dropout))


@each_care_model
def test_drop_rate_sits_in_both_interactions_and_both_heads(name):
    model = on_meta(name, drop_rate=0.3)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert len(modules_of(model, nn.Dropout)) == 2 * len(blocks) + 2


@pytest.mark.parametrize('name', CARE[:1])
def test_drop_path_of_the_last_care_block_zeroes_whole_samples(name):
    model = shallow_model(name, drop_path_rate=0.5).train()
    features = model.forward_features(images(16, 3, 32, 32))
    zeroed = (features == 0).flatten(1).all(dim=1)
    assert 0 < zeroed.sum() < 16
    assert (features[~zeroed] != 0).any(dim=(2, 3)).all()
    assert not (model.eval().forward_features(images(16, 3, 32, 32)) == 0).flatten(1).all(dim=1).any()


# Construction and state -----------------------------------------------------------------------------------------------

@each_model
@pytest.mark.parametrize('in_chans', [1, 5])
def test_images_may_have_any_number_of_channels(name, in_chans):
    model = on_meta(name, in_chans=in_chans)
    assert model.in_chans == in_chans
    assert model(images(1, in_chans, 64, 64, device='meta')).shape == (1, 1000)


@each_model
def test_device_and_dtype_are_constructor_arguments(name):
    model = timm.create_model(name, device='meta', dtype=torch.float64)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {'meta'}
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
    assert model(images(1, 3, 64, 64, device='meta').double()).dtype == torch.float64


@each_file
def test_dtype_argument_creates_the_same_network(name):
    model = timm.create_model(name, dtype=torch.float64, depths=SHALLOW).eval()
    assert model(images(1, 3, 64, 64).double()).dtype == torch.float64
    for (key, value), other in zip(
            model.named_parameters(), timm.create_model(name, depths=SHALLOW).parameters(), strict=True):
        if value.numel() > 300:
            found, expected = value.std().item(), other.std().item()
            assert found == pytest.approx(expected, rel=0.2, abs=1e-9), f'{key}: not initialised alike'


@each_model
def test_unknown_argument_is_refused_by_name(name):
    with pytest.raises(TypeError, match='not_an_argument'):
        on_meta(name, not_an_argument=1)


@each_model
def test_pretrained_cfg_has_evaluation_settings_and_layer_names(name):
    model = on_meta(name)
    cfg = model.pretrained_cfg
    keys = set(model.state_dict())
    classifiers = cfg['classifier'] if isinstance(cfg['classifier'], tuple) else (cfg['classifier'],)
    assert {f'{key}.weight' for key in (*classifiers, cfg['first_conv'])} <= keys
    assert [model.get_submodule(key) for key in classifiers] == list(classifiers_of(model))
    assert model.get_submodule(cfg['first_conv']).in_channels == 3
    assert (cfg['input_size'], cfg['num_classes']) == ((3, 224, 224), 1000)
    assert cfg['pool_size'] == tuple(model.forward_features(images(1, 3, 224, 224, device='meta')).shape[-2:])
    assert (cfg['mean'], cfg['std']) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@each_care_model
def test_pretrained_cfg_of_care_is_the_published_evaluation(name):
    cfg = on_meta(name).pretrained_cfg
    assert (cfg['crop_pct'], cfg['interpolation']) == (0.875, 'bicubic')
    assert (cfg['first_conv'], cfg['classifier']) == ('stem.conv', ('head.fc', 'head_dist.fc'))


@each_file
def test_copies_pickles_and_saved_states_compute_the_same(name):
    model = shallow_model(name, num_classes=6)
    x = images(1, 3, 64, 64)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = timm.create_model(name, num_classes=6, depths=SHALLOW).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded:
            assert torch.equal(other(x), model(x))
            other.load_state_dict(model.state_dict())  # and can still be loaded into


@each_file
def test_every_image_of_a_batch_is_on_its_own_in_evaluation(name):
    model = shallow_model(name)
    x = images(3, 3, 64, 64)
    with torch.no_grad():
        assert_same(model(x), torch.cat([model(image[None]) for image in x]))
        assert torch.equal(model(x), model(x))
        assert_same(model(x.contiguous(memory_format=torch.channels_last)), model(x))


# Sizes ----------------------------------------------------------------------------------------------------------------

@each_model
@pytest.mark.parametrize('height, width', [(32, 32), (33, 47), (63, 65), (64, 32), (224, 320), (101, 99)])
def test_images_of_any_size_from_32_by_32(name, height, width):
    model = on_meta(name)
    x = images(1, 3, height, width, device='meta')
    assert model(x).shape == (1, 1000)
    batch, chs, rows, columns = model.forward_features(x).shape
    assert (batch, chs) == (1, model.num_features)
    round_up = 0 if name in CARE else 31  # without padding sizes are rounded down, with padding up
    assert (rows, columns) == ((height + round_up) // 32, (width + round_up) // 32)


@each_file
@pytest.mark.parametrize('height, width', [(32, 32), (33, 47), (63, 65)])
def test_small_and_odd_images_give_finite_outputs_and_gradients(name, height, width):
    model = shallow_model(name).train()
    out = model(images(2, 3, height, width))
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@each_model
@pytest.mark.parametrize('height, width', [(31, 31), (31, 224), (224, 16), (1, 1)])
def test_smaller_images_are_refused_with_their_size(name, height, width):
    model = on_meta(name)
    x = images(1, 3, height, width, device='meta')
    for run in model, model.forward_features, model.forward_intermediates:
        with pytest.raises(ValueError, match=rf'\b{height} x {width}\b'):
            run(x)
