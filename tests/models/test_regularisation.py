"""Initial weights, Dropout and stochastic depth: what the parity of evaluated networks does not see."""
import pytest
import timm
import torch
import torch.nn as nn
from reference import filled_model
from registered import CARE, each_file, each_model, images, on_meta
from timm.layers import DropPath

DROPOUTS = {'care': (0, 2), 'casvit': (0, 3), 'mlla': (1, 2)}  # in the stem, in each block; a head of CARE has one
DROP_PATHS = {'care': 1, 'casvit': 2, 'mlla': 2}  # in each block but the first, whose rate is 0


def family_of(name):
    return name.split('_')[0]


def blocks_of(model):
    return [block for stage in model.stages for block in stage.blocks]


def count_calls(model, kind):
    """{name of a part of the network, or of a block: calls of modules of a kind in one pass of training}."""
    parts = {'stem': model.stem, **{f'block {i}': block for i, block in enumerate(blocks_of(model))}}
    calls, running = dict.fromkeys([*parts, 'rest'], 0), ['rest']
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda module, inputs, name=name: running.append(name))
        part.register_forward_hook(lambda module, inputs, output: running.pop() and None)

    def count(module, inputs, output):
        calls[running[-1]] += 1
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(count)
    model.train()(images(2, 3, 64, 64, device='meta'))
    return calls


# Initial weights ------------------------------------------------------------------------------------------------------

def assert_normal(modules):
    """Weights of std 0.02, cut off too far out to be seen, and biases 0."""
    weights = torch.cat([module.weight.detach().flatten() for module in modules])
    assert weights.std().item() == pytest.approx(0.02, rel=0.03) and abs(weights.mean().item()) < 1e-3
    assert (weights.abs() < 0.02).float().mean().item() == pytest.approx(0.683, abs=0.02)  # a uniform one: 0.577
    assert not any(module.bias.any() for module in modules)


def assert_as_pytorch_makes_them(convs):
    """Weights and biases uniform up to 1 / sqrt(inputs of an output)."""
    for kind in 'weight', 'bias':
        values = torch.cat([
            getattr(conv, kind).detach().flatten() * conv.weight[0].numel() ** 0.5
            for conv in convs if getattr(conv, kind) is not None])
        assert values.abs().max() <= 1 + 1e-5
        assert values.std().item() == pytest.approx(3 ** -0.5, rel=0.02) and abs(values.mean().item()) < 0.02


@each_file
def test_initial_weights_are_those_of_the_family(name):
    model = timm.create_model(name)
    model.reset_classifier(100)
    convs, linears, norms = (
        [module for module in model.modules() if isinstance(module, kind)]
        for kind in (nn.Conv2d, nn.Linear, (nn.BatchNorm2d, nn.LayerNorm)))
    assert_normal(linears)
    if name in CARE:
        assert_normal(convs)
    else:
        assert_as_pytorch_makes_them(convs)
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


# Dropout and stochastic depth -----------------------------------------------------------------------------------------

@each_model
def test_training_drops_features_where_the_family_does(name):
    model = on_meta(name, drop_rate=0.3)
    stem, block = DROPOUTS[family_of(name)]
    expected = {f'block {i}': block for i in range(len(blocks_of(model)))}
    assert count_calls(model, nn.Dropout) == dict(expected, stem=stem, rest=2 if name in CARE else 0)


@each_model
def test_training_skips_branches_where_the_family_does(name):
    model = on_meta(name, drop_path_rate=0.2)
    expected = {f'block {i}': DROP_PATHS[family_of(name)] for i in range(1, len(blocks_of(model)))}
    assert count_calls(model, DropPath) == {'stem': 0, 'block 0': 0, **expected, 'rest': 0}


@pytest.mark.parametrize('name, keep', [
    ('casvit_xs', lambda block, x: x + block.local(x)), ('mlla_t', lambda block, x: block.cpe2(block.cpe1(x)))],
    ids=['casvit_xs', 'mlla_t'])
def test_a_block_that_drops_all_it_can_keeps_its_local_convolutions(name, keep):
    stage = filled_model(name, drop_path_rate=0.1, depths=(2, 1, 1, 1)).train().stages[0]
    block, inputs = stage.blocks[1], []
    block.drop_path.drop_prob = 1.
    block.register_forward_hook(lambda module, args, output: inputs.extend([args[0], output]))
    with torch.no_grad():
        stage(images(2, 48 if name == 'casvit_xs' else 64, 8, 8))
        x, found = inputs
        torch.testing.assert_close(found, keep(block, x))
