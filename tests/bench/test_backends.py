"""Every way to run a network computes what the network computes; what cannot is refused at the door, or not timed."""
import copy
import re

import pytest
import timm
import torch
import torch.nn as nn

from caretrans.bench import backends
from caretrans.bench.backends import (
    TOLERANCES, Network, Runner, Setup, WrongOutputError, check_output, check_setup, measure_deviation, measure_error,
    prepare)
from caretrans.errors import ConfigError
from caretrans.measure.sample_network import randomize, load_sample_images

CPU, CUDA = torch.device('cpu'), torch.device('cuda')
SIZE = (64, 96)


def make_network(name='care_s0', batch=2, **kwargs):
    model = timm.create_model(name, **kwargs).eval()
    photographs = load_sample_images(model, SIZE, 8)
    return Network(randomize(model, photographs), photographs[:batch], photographs=photographs)


@pytest.fixture(scope='module')
def network():
    """Two blocks in each early stage, and the last one, which is another."""
    return make_network(depths=(1, 1, 2, 2))


# Right ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('setup', [
    Setup('eager'), Setup('eager', layout='channels_last'), Setup('eager', 'bfloat16'), Setup('eager', 'float16'),
    Setup('fused'), Setup('fused', layout='channels_last'), Setup('fused', 'bfloat16', 'channels_last'),
    Setup('compile', layout='channels_last'), Setup('onnxruntime'), Setup('openvino'), Setup('openvino', threads=2),
    Setup('onnxruntime', 'int8'), Setup('openvino', 'int8')], ids=str)
def test_every_backend_computes_what_the_network_computes(network, setup):
    check_setup(setup)
    runner = prepare(network, setup)
    assert check_output(network, runner, setup.dtype) <= TOLERANCES[setup.dtype]
    logits = runner.read(runner.run())
    assert logits.shape == (2, 1000) and logits.dtype == torch.float64
    assert torch.equal(logits, runner.read(runner.run())), 'again the same'


def test_openvino_computes_in_the_format_that_was_asked_for(network):
    """Its own choice on processors with bfloat16 is bfloat16."""
    errors = {}
    for dtype in sorted({'float32', 'bfloat16'} & set(backends.list_dtypes('openvino', CPU))):
        runner = prepare(network, Setup('openvino', dtype))
        errors[dtype] = measure_error(runner.read(runner.run()), network.expected)
    assert errors['float32'] < 1e-5 and errors.get('bfloat16', 1.) > 1e-3


@pytest.mark.parametrize('name', ['fastvit_t8', 'mobileone_s0', 'mobilenetv2_100'])
def test_other_models_are_rewritten_as_their_authors_do(name):
    network = make_network(name)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (network.model, network.fused))
    assert after < before or name == 'mobilenetv2_100'
    for setup in (Setup('eager'), Setup('fused'), Setup('fused', 'bfloat16')):
        assert check_output(network, prepare(network, setup), setup.dtype) <= TOLERANCES[setup.dtype]


@pytest.mark.parametrize('name, kwargs', [
    ('casvit_xs', dict(depths=(1, 1, 2, 1))), ('mlla_t', dict(depths=(1, 1, 2, 1), width=32))])
@pytest.mark.parametrize('setup', [
    Setup('eager'), Setup('fused', layout='channels_last'), Setup('fused', 'bfloat16', 'channels_last'),
    Setup('compile', layout='channels_last'), Setup('onnxruntime'), Setup('openvino'), Setup('onnxruntime', 'int8'),
    Setup('openvino', 'int8')], ids=str)
def test_every_backend_computes_what_the_comparison_systems_compute(name, kwargs, setup):
    network = make_network(name, **kwargs)
    assert check_output(network, prepare(network, setup), setup.dtype) <= TOLERANCES[setup.dtype]


@pytest.mark.parametrize('name', ['casvit_xs', 'casvit_t', 'mlla_t', 'mlla_s', 'care_s0'])
def test_no_part_of_a_lively_network_drowns_the_others(name):
    """Nothing grows with the blocks, of images that the statistics have not seen either: float32 has 7 digits, and a
    branch must be seen beside what it is added to."""
    network, sizes = make_network(name), []
    noise = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    images = torch.cat([load_sample_images(network.model, SIZE, 32), noise])
    for block in [module for name, module in network.model.named_modules() if re.search(r'blocks\.\d+$', name)]:
        block.register_forward_hook(lambda module, args, out: sizes.append(out.abs().max().item()))
    with torch.no_grad():
        network.model(images)
    assert len(sizes) == sum(len(stage.blocks) for stage in network.model.stages) and max(sizes) < 1000


def test_what_runs_is_a_copy(network):
    before = copy.deepcopy(network.model.state_dict())
    prepare(network, Setup('eager', 'bfloat16', 'channels_last')).run()
    assert all(torch.equal(before[key], value) for key, value in network.model.state_dict().items())
    assert network.model.stem.conv.weight.is_contiguous()


def test_memory_is_that_of_weights_and_images(network):
    held = {dtype: prepare(network, Setup('eager', dtype)).held for dtype in ('float32', 'bfloat16')}
    weights = sum(t.numel() for t in [*network.model.parameters(), *network.model.buffers()])
    assert held['float32'] == pytest.approx(4 * (weights + network.images.numel()), rel=0.01)
    assert held['bfloat16'] == pytest.approx(held['float32'] / 2, rel=0.01)
    assert prepare(network, Setup('openvino')).held is None


def test_half_of_a_batch_keeps_the_rewrite(network):
    half = network.halve()
    assert len(half.images) == 1 and half.fused is network.fused
    assert torch.allclose(half.expected, network.expected[[0]])


# Wrong ----------------------------------------------------------------------------------------------------------------

def test_every_dropped_bias_of_the_rewritten_network_is_caught(network):
    """The largest rounding error that passes is far below the smallest mistake."""
    layers = [name for name, module in network.fused.named_modules()
              if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None]
    assert len(layers) > 20
    for name in layers:
        broken = copy.deepcopy(network.fused)
        broken.get_submodule(name).bias.data.zero_()
        wrong = Network(network.model, network.images, broken)
        with pytest.raises(WrongOutputError, match='differ from float64'):
            check_output(wrong, prepare(wrong, Setup('fused')), 'float32')
            pytest.fail(f'{name} without its bias passes')


def break_network(network, change):
    """The network with a changed rewrite."""
    fused = copy.deepcopy(network.fused)
    change(fused)
    return Network(network.model, network.images, fused, network.photographs)


def swap_local_convolutions(fused):
    """Of the last block with a mixer: the 3x3 convolution on the channels of the 7x7 one, and the other way round."""
    local = [module for name, module in fused.named_modules() if name.endswith('.local')][-1]
    local.weight.data = local.weight.data.roll(len(local.weight) // 2, 0)


def lose_bias_of_expansion(fused):
    expansion = [module for name, module in fused.named_modules() if name.startswith('stages') and '.expand' in name][0]
    expansion.bias.data.zero_()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('change', [swap_local_convolutions, lose_bias_of_expansion])
def test_a_broken_rewrite_is_caught_in_low_precision(network, change, dtype):
    wrong = break_network(network, change)
    with pytest.raises(WrongOutputError, match='the logits differ from float64 by'):
        check_output(wrong, prepare(wrong, Setup('fused', dtype)), dtype)


def test_permuted_classes_are_caught_in_int8(network):
    def permute(fused):
        head = [module for module in fused.modules() if isinstance(module, nn.Linear)][-1]
        head.weight.data, head.bias.data = head.weight.data.roll(1, 0), head.bias.data.roll(1, 0)

    wrong = break_network(network, permute)
    logits = wrong.fused(wrong.images).detach()
    with pytest.raises(WrongOutputError):
        check_output(wrong, Runner(lambda: logits, lambda logits: logits, wrong.images), 'int8')
    # Half of the largest logit is allowed, and half of the norm.
    assert measure_deviation(logits, wrong.expected) > 2 * backends.INT8_TOLERANCE


def test_up_to_eight_images_of_a_batch_are_checked_and_the_network_stays(network):
    assert network.checked == [0, 1]
    many = Network(network.model, network.images.repeat(10, 1, 1, 1), network.fused)
    assert len(many.checked) == 8 and many.checked[0] == 0 and many.checked[-1] == 19
    before = copy.deepcopy(network.model.state_dict())
    assert network.measure_rounding(torch.float16) < network.measure_rounding(torch.bfloat16) / 4
    assert all(torch.equal(before[key], value) for key, value in network.model.state_dict().items())
    assert not any(module._forward_hooks for module in network.model.modules())


def test_a_wrong_image_at_the_end_of_the_batch_is_caught(network):
    def run():
        logits = network.model(network.images).detach()
        logits[-1] = logits[0]
        return logits

    with pytest.raises(WrongOutputError):
        check_output(network, Runner(run, lambda logits: logits, network.images), 'float32')


def test_logits_that_are_not_finite_are_caught(network):
    runner = Runner(lambda: torch.full((2, 1000), float('nan')), lambda logits: logits, network.images)
    with pytest.raises(WrongOutputError, match='by inf'):
        check_output(network, runner, 'int8')


# Refused --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('setup, message', [
    (Setup('cudagraph'), '--backend cudagraph with --device cpu: .*take --device cuda'),
    (Setup('eager', 'tf32'), '--dtype tf32 with --backend eager and --device cpu: it has float32, bfloat16, float16'),
    (Setup('eager', 'int8'), '--dtype int8 with --backend eager'),
    (Setup('onnxruntime', 'bfloat16'), '--dtype bfloat16 with --backend onnxruntime .* it has float32, int8 there'),
    (Setup('openvino', device=CUDA), '--backend openvino with --device cuda: .*take --device cpu'),
    (Setup('compile', device=torch.device('mps')), '--backend compile with --device mps: .*take --backend fused'),
    (Setup('onnxruntime', device=torch.device('mps')), 'no provider for mps: take --device cpu'),
])
def test_what_cannot_be_combined_is_refused(setup, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_setup(setup)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('missing, setup, message', [
    ('openvino', Setup('openvino'), 'pip install openvino'), ('onnxruntime', Setup('onnxruntime'), 'onnxruntime'),
    ('onnxscript', Setup('onnxruntime'), 'onnxscript'), ('nncf', Setup('openvino', 'int8'), 'install nncf')])
def test_a_backend_that_is_not_installed_says_which_package(monkeypatch, missing, setup, message):
    find = backends.importlib.util.find_spec
    monkeypatch.setattr(backends.importlib.util, 'find_spec', lambda name: None if name == missing else find(name))
    with pytest.raises(ConfigError, match=message):
        check_setup(setup)


def test_compiling_without_a_compiler_and_int8_without_photographs_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(backends.shutil, 'which', lambda name: None)
    with pytest.raises(ConfigError, match='install g'):
        check_setup(Setup('compile'))
    monkeypatch.setattr(backends, 'SAMPLE_IMAGES', tmp_path / 'none')
    with pytest.raises(ConfigError, match='calibrated on photographs'):
        check_setup(Setup('openvino', 'int8'))


# Lively weights -------------------------------------------------------------------------------------------------------

def test_lively_weights_are_the_same_each_time_and_leave_the_model_in_evaluation_mode():
    first, second = (make_network(depths=(1, 1, 1, 1)).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(
        first.state_dict().values(), second.state_dict().values(), strict=True))
    norms = [module for module in first.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(module.training for module in first.modules()) and {norm.momentum for norm in norms} == {0.1}


@pytest.mark.parametrize('name', ['care_s0', 'fastvit_t8', 'mobileone_s0'])
def test_under_lively_weights_values_stay_small_and_images_matter(name):
    network = make_network(name, batch=4)
    largest = []
    for module in network.model.modules():
        module.register_forward_hook(
            lambda module, args, out: largest.append(out.abs().max().item()) if torch.is_tensor(out) else None)
    with torch.no_grad():
        logits = network.model(network.images)
    assert 1 < max(largest) < 300 and 0.3 < logits.abs().max() < 60
    assert (logits[0] - logits[1]).abs().max() > 0.05


def test_openvino_is_started_once_for_it_leaves_no_stack_for_signals_behind(network, monkeypatch):
    import openvino
    prepare(network, Setup('openvino'))
    monkeypatch.setattr(openvino, 'Core', lambda: pytest.fail('OpenVINO was started again'))
    assert backends.list_dtypes('openvino', CPU) and prepare(network, Setup('openvino')).run().shape == (2, 1000)
