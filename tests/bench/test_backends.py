"""Every backend computes what the original network computes; setups that cannot work are refused, or not timed."""
import copy
import re

import pytest
import timm
import torch
import torch._inductor.config
import torch.nn as nn

from caretrans.bench import backends, setups
from caretrans.bench.backends import (
    TOLERANCES, Network, Runner, WrongOutputError, check_output, measure_deviation, measure_error, prepare)
from caretrans.bench.setups import Setup, check_setup, list_dtypes
from caretrans.errors import ConfigError
from caretrans.measure.sample_network import load_sample_images, randomize

pytestmark = pytest.mark.slow

CPU, CUDA, MPS = torch.device('cpu'), torch.device('cuda'), torch.device('mps')
SIZE = (64, 96)


def make_network(name='care_s0', batch=2, **kwargs):
    model = timm.create_model(name, **kwargs).eval()
    images = load_sample_images(model, SIZE, 8)
    return Network(randomize(model, images), images[:batch], calibration=images)


@pytest.fixture(scope='module')
def networks():
    """The smallest networks that have every kind of block, built when they are needed."""
    built, kwargs = {}, {'care_s0': dict(depths=(1, 1, 1, 2)), 'casvit_xs': dict(depths=(1, 1, 1, 1)),
                         'mlla_t': dict(depths=(1, 1, 1, 1), width=32)}

    def get(name):
        if name not in built:
            built[name] = make_network(name, **kwargs[name])
        return built[name]
    return get


@pytest.fixture(autouse=True)
def quick_compiler():
    """Without optimisation of the code around the kernels, which takes a quarter of the time."""
    with torch._inductor.config.patch({'aot_inductor.compile_wrapper_opt_level': 'O0'}):
        yield


@pytest.fixture
def network(networks):
    return networks('care_s0')


# Right ----------------------------------------------------------------------------------------------------------------

COMMON = [
    Setup('eager'), Setup('fused', layout='channels_last'), Setup('fused', 'bfloat16', 'channels_last'),
    Setup('compile', layout='channels_last'), Setup('onnxruntime'), Setup('openvino'), Setup('onnxruntime', 'int8'),
    Setup('openvino', 'int8')]
MORE = [
    Setup('eager', layout='channels_last'), Setup('eager', 'bfloat16'), Setup('eager', 'float16'), Setup('fused'),
    Setup('openvino', threads=2)]


@pytest.mark.parametrize('name, setup', [
    *(('care_s0', setup) for setup in COMMON + MORE),
    *(('casvit_xs', setup) for setup in COMMON if setup.backend != 'compile'),  # its blocks are simpler than the others
    *(('mlla_t', setup) for setup in COMMON)], ids=str)
def test_every_backend_agrees_with_the_network(networks, name, setup):
    network = networks(name)
    check_setup(setup)
    runner = prepare(network, setup)
    assert check_output(network, runner, setup.dtype) <= TOLERANCES[setup.dtype]
    logits = runner.read(runner.run())
    assert logits.shape == (2, 1000) and logits.dtype == torch.float64
    assert torch.equal(logits, runner.read(runner.run())), 'a second run gives the same'


def test_openvino_computes_in_the_requested_format(network, monkeypatch):
    """Its own choice on CPUs with bfloat16 is bfloat16. It starts once: a second start would kill the process at the
    next signal."""
    import openvino
    prepare(network, Setup('openvino'))
    monkeypatch.setattr(openvino, 'Core', lambda: pytest.fail('OpenVINO was started again'))
    errors = {}
    for dtype in sorted({'float32', 'bfloat16'} & set(list_dtypes('openvino', CPU))):
        runner = prepare(network, Setup('openvino', dtype))
        errors[dtype] = measure_error(runner.read(runner.run()), network.expected)
    assert errors['float32'] < 1e-5 and errors.get('bfloat16', 1.) > 1e-3


@pytest.mark.parametrize('name', ['fastvit_t8', 'mobileone_s0', 'mobilenetv2_100'])
def test_models_of_timm_are_reparameterized_and_randomized_weights_keep_values_small(name):
    network = make_network(name, batch=4)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (network.model, network.fused))
    assert after < before or name == 'mobilenetv2_100'
    for setup in (Setup('eager'), Setup('fused'), Setup('fused', 'bfloat16')):
        assert check_output(network, prepare(network, setup), setup.dtype) <= TOLERANCES[setup.dtype]
    if name != 'mobilenetv2_100':
        assert_values_stay_small_and_images_matter(network)


def assert_values_stay_small_and_images_matter(network):
    largest = []
    for module in network.model.modules():
        module.register_forward_hook(
            lambda module, args, out: largest.append(out.abs().max().item()) if torch.is_tensor(out) else None)
    with torch.no_grad():
        logits = network.model(network.images)
    assert 1 < max(largest) < 300 and 0.3 < logits.abs().max() < 60
    assert (logits[0] - logits[1]).abs().max() > 0.05


def test_randomized_care_keeps_values_small():
    assert_values_stay_small_and_images_matter(make_network('care_s0', batch=4))


@pytest.mark.parametrize('name', ['casvit_xs', 'casvit_t', 'mlla_t', 'mlla_s', 'care_s0'])
def test_no_part_of_a_randomized_network_drowns_the_others(name):
    """No output grows from block to block, not even for images outside the statistics: float32 has 7 digits, and a
    branch must be visible beside what it is added to."""
    network, sizes = make_network(name), []
    noise = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    images = torch.cat([load_sample_images(network.model, SIZE, 32), noise])
    for block in [module for name, module in network.model.named_modules() if re.search(r'blocks\.\d+$', name)]:
        block.register_forward_hook(lambda module, args, out: sizes.append(out.abs().max().item()))
    with torch.no_grad():
        network.model(images)
    assert len(sizes) == sum(len(stage.blocks) for stage in network.model.stages) and max(sizes) < 1000


def test_randomized_weights_are_the_same_each_time_and_leave_the_model_in_evaluation_mode():
    first, second = (make_network(depths=(1, 1, 1, 1)).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(
        first.state_dict().values(), second.state_dict().values(), strict=True))
    norms = [module for module in first.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(module.training for module in first.modules()) and {norm.momentum for norm in norms} == {0.1}


def test_a_runner_and_the_measurement_of_rounding_use_copies(network):
    before = copy.deepcopy(network.model.state_dict())
    prepare(network, Setup('eager', 'bfloat16', 'channels_last')).run()
    assert network.measure_rounding(torch.float16) < network.measure_rounding(torch.bfloat16) / 4
    assert all(torch.equal(before[key], value) for key, value in network.model.state_dict().items())
    assert network.model.stem.conv.weight.is_contiguous()
    assert not any(module._forward_hooks for module in network.model.modules())


def test_memory_is_that_of_weights_and_images(network):
    held = {dtype: prepare(network, Setup('eager', dtype)).held for dtype in ('float32', 'bfloat16')}
    weights = sum(t.numel() for t in [*network.model.parameters(), *network.model.buffers()])
    assert held['float32'] == pytest.approx(4 * (weights + network.images.numel()), rel=0.01)
    assert held['bfloat16'] == pytest.approx(held['float32'] / 2, rel=0.01)
    assert prepare(network, Setup('openvino')).held is None


def test_up_to_eight_images_of_a_batch_are_checked(network):
    assert network.checked == [0, 1]
    many = network.with_images(network.images.repeat(10, 1, 1, 1))
    assert len(many.checked) == 8 and many.checked[0] == 0 and many.checked[-1] == 19
    half = network.with_images(network.images[:1])
    assert half.fused is network.fused and torch.allclose(half.expected, network.expected[[0]])


# Wrong ----------------------------------------------------------------------------------------------------------------

def test_every_missing_bias_of_the_fused_network_is_caught(network):
    """The largest rounding error that passes is far below the smallest mistake."""
    layers = [module for module in network.fused.modules()
              if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None]
    assert len(layers) > 20
    for layer in layers:
        bias = layer.bias.data
        layer.bias.data = torch.zeros_like(bias)
        runner = Runner(lambda: network.fused(network.images).detach(), lambda logits: logits, network.images)
        try:
            with pytest.raises(WrongOutputError, match='differ from float64'):
                check_output(network, runner, 'float32')
        finally:
            layer.bias.data = bias


def break_network(network, change):
    """The network with a changed fused form."""
    fused = copy.deepcopy(network.fused)
    change(fused)
    return Network(network.model, network.images, fused, network.calibration)


def swap_local_convolutions(fused):
    """Swap the 3x3 and the 7x7 convolution of the last block with a mixer."""
    local = [module for name, module in fused.named_modules() if name.endswith('.local')][-1]
    local.weight.data = local.weight.data.roll(len(local.weight) // 2, 0)


def drop_bias_of_expansion(fused):
    expansion = [module for name, module in fused.named_modules() if name.startswith('stages') and '.expand' in name][0]
    expansion.bias.data.zero_()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('change', [swap_local_convolutions, drop_bias_of_expansion])
def test_a_broken_fused_network_is_caught_in_low_precision(network, change, dtype):
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


def test_a_wrong_last_image_and_logits_that_are_not_finite_are_caught(network):
    def run():
        logits = network.model(network.images).detach()
        logits[-1] = logits[0]
        return logits

    with pytest.raises(WrongOutputError):
        check_output(network, Runner(run, lambda logits: logits, network.images), 'float32')
    runner = Runner(lambda: torch.full((2, 1000), float('nan')), lambda logits: logits, network.images)
    with pytest.raises(WrongOutputError, match='the logits of 2 of 2 images are not finite: not timed'):
        check_output(network, runner, 'int8')


# Refused --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('setup, message', [
    (Setup('cudagraph'), '--backend cudagraph with --device cpu: .*use --device cuda'),
    (Setup('eager', 'tf32'), '--dtype tf32 with --backend eager and --device cpu: .* float32, bfloat16, float16'),
    (Setup('eager', 'int8'), '--dtype int8 with --backend eager'),
    (Setup('onnxruntime', 'bfloat16'), '--dtype bfloat16 with --backend onnxruntime .* float32, int8'),
    (Setup('openvino', device=CUDA), '--backend openvino with --device cuda: .*use --device cpu'),
    (Setup('compile', device=MPS), '--backend compile with --device mps: .*use --backend fused'),
    (Setup('onnxruntime', device=MPS), 'no provider for mps: use --device cpu'),
    (Setup('eager', kernels='triton'), '--kernels triton with --backend eager'),
    (Setup('fused', kernels='triton'), '--kernels triton with --device cpu')])
def test_invalid_setups_are_refused(setup, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_setup(setup)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('missing, setup, message', [
    ('openvino', Setup('openvino'), 'pip install openvino'), ('onnxruntime', Setup('onnxruntime'), 'onnxruntime'),
    ('onnxscript', Setup('onnxruntime'), 'onnxscript'), ('nncf', Setup('openvino', 'int8'), 'install nncf')])
def test_a_missing_package_is_named(monkeypatch, missing, setup, message):
    find = setups.importlib.util.find_spec
    monkeypatch.setattr(setups.importlib.util, 'find_spec', lambda name: None if name == missing else find(name))
    with pytest.raises(ConfigError, match=message):
        check_setup(setup)


def test_compiling_without_a_compiler_and_int8_without_images_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(setups.shutil, 'which', lambda name: None)
    with pytest.raises(ConfigError, match='install g'):
        check_setup(Setup('compile'))
    monkeypatch.setattr(setups, 'SAMPLE_IMAGES', tmp_path / 'none')
    with pytest.raises(ConfigError, match='calibrated on the bundled images'):
        check_setup(Setup('openvino', 'int8'))
