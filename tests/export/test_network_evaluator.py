"""Core ML networks of the older format, read back from disk and evaluated layer by layer, compute what PyTorch does."""
import coremltools
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_ml_programs import CASES, SHAPE, save_cases, split_cases, values
from coremltools.models import datatypes
from coremltools.models.neural_network import NeuralNetworkBuilder
from coremltools.models.neural_network.quantization_utils import quantize_weights

from caretrans.errors import ExportError
from caretrans.export.coreml.network import decode_weights, read_network

FLOAT32 = 2e-6  # of the largest value


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= FLOAT32 * expected.abs().max()


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    """All operations in one network: {case: (values, values of PyTorch, values of runs with rounding)}."""
    path, x = save_cases(CASES, tmp_path_factory.mktemp('layers') / 'a.mlmodel'), values(*SHAPE)
    rounded = read_network(path)
    others = [split_cases(CASES, run(x), x) for run in (rounded.run, rounded.run_exact, rounded.run_flushed)]
    exact = split_cases(CASES, read_network(path, half=False).run(x), x)
    return {name: (*exact[name], [other[name][0] for other in others]) for name in CASES}


@pytest.mark.parametrize('name', CASES)
def test_a_layer_equals_the_operation_of_pytorch(name, compared):
    found, expected, others = compared[name]
    assert_close(found, expected)
    for other in others:
        assert (other - found).abs().max() <= 1e-2 * found.abs().max()


def save_layers(path, add_layers, input_shape=SHAPE):
    """A network that the builder of coremltools makes; the last layer gives 'y', which becomes one row."""
    builder = NeuralNetworkBuilder(
        [('x', datatypes.Array(*input_shape))], [('row', None)], disable_rank5_shape_mapping=True)
    add_layers(builder)
    builder.add_reshape_static('row', 'y', 'row', (1, -1))
    coremltools.models.utils.save_spec(builder.spec, str(path))
    return path


WEIGHT, BIAS = values(3, 6, 2, 4, seed=1), values(3, seed=2)


def conv_builder(**border):
    return lambda builder: builder.add_convolution(
        'conv', 6, 3, 2, 4, 1, 1, groups=1, W=WEIGHT.permute(2, 3, 1, 0).numpy(), b=BIAS.numpy(), has_bias=True,
        input_name='x', output_name='y', **border)


LAYER_CASES = {
    'convolution, same, heavier below and to the right': (
        conv_builder(border_mode='same'), lambda x: F.conv2d(F.pad(x, [1, 2, 0, 1]), WEIGHT, BIAS)),
    'convolution, same, heavier above and to the left': (
        conv_builder(border_mode='same', same_padding_asymmetry_mode='TOP_LEFT_HEAVY'),
        lambda x: F.conv2d(F.pad(x, [2, 1, 1, 0]), WEIGHT, BIAS)),
    'convolution, four paddings': (
        conv_builder(border_mode='valid', padding_top=1, padding_bottom=0, padding_left=2, padding_right=3),
        lambda x: F.conv2d(F.pad(x, [2, 3, 1, 0]), WEIGHT, BIAS)),
    'mean of each channel': (
        lambda b: b.add_pooling('p', 0, 0, 1, 1, 'AVERAGE', 'VALID', 'x', 'y', is_global=True),
        lambda x: x.mean(dim=(2, 3))),
    'largest of each channel': (
        lambda b: b.add_pooling('p', 0, 0, 1, 1, 'MAX', 'VALID', 'x', 'y', is_global=True),
        lambda x: x.amax(dim=(2, 3))),
    'mvn across channels': (
        lambda b: b.add_mvn('m', 'x', 'y', across_channels=True, epsilon=.5),
        lambda x: (x - x.mean()) / (x.var(correction=0) + .5).sqrt()),
    'mvn of means alone': (
        lambda b: b.add_mvn('m', 'x', 'y', across_channels=False, normalize_variance=False),
        lambda x: x - x.mean(dim=(2, 3), keepdim=True)),
    'layerNormalization': (
        lambda b: b.add_layer_normalization(
            'l', 'x', 'y', [5, 7], values(5, 7, seed=1).numpy(), values(5, 7, seed=2).numpy(), .5),
        lambda x: F.layer_norm(x, (5, 7), values(5, 7, seed=1), values(5, 7, seed=2), .5)),
    'scale by channel, no bias': (
        lambda b: b.add_scale('s', values(6, 1, 1, seed=1).numpy(), None, False, 'x', 'y', [6, 1, 1]),
        lambda x: x * values(6, 1, 1, seed=1)),
    'addition of a number': (
        lambda b: b.add_elementwise('e', ['x'], 'y', 'ADD', alpha=.7), lambda x: x + .7),
    'multiplication of three': (
        lambda b: b.add_elementwise('e', ['x', 'x', 'x'], 'y', 'MULTIPLY'), lambda x: x ** 3),
    'multiplication with a constant': (
        lambda b: (b.add_load_constant_nd('c', 'c', values(7, seed=1).numpy(), (7,)),
                   b.add_multiply_broadcastable('e', ['x', 'c'], 'y')),
        lambda x: x * values(7, seed=1)),
    'matrix product with weights': (
        lambda b: b.add_batched_mat_mul('m', ['x'], 'y', weight_matrix_rows=7, weight_matrix_columns=3,
                                        W=values(7, 3, seed=1).numpy(), bias=values(3, seed=2).numpy()),
        lambda x: x @ values(7, 3, seed=1) + values(3, seed=2)),
    'unary power of a scaled and shifted value': (
        lambda b: b.add_unary('u', 'x', 'y', 'power', alpha=2., shift=.5, scale=3.), lambda x: (3 * x + .5) ** 2),
    'unary threshold': (lambda b: b.add_unary('u', 'x', 'y', 'threshold', alpha=.2), lambda x: x.clamp(min=.2)),
    'inverse with the epsilon that the builder writes': (
        lambda b: b.add_unary('u', 'x', 'y', 'inverse'), lambda x: 1 / (x + 1e-4)),
    'reshape that keeps the rank': (
        lambda b: (b.add_rank_preserving_reshape('r', 'x', 'r', [1, 0, -1, 1]), b.add_softmax_nd('s', 'r', 'y', 2)),
        lambda x: x.reshape(1, 6, 35).softmax(dim=2)),
    'flattenTo2D': (
        lambda b: (b.add_flatten_to_2d('f', 'x', 'f', 2), b.add_softmax_nd('s', 'f', 'y', 0)),
        lambda x: x.reshape(6, 35).softmax(dim=0)),
    'concat along width': (
        lambda b: (b.add_unary('u', 'x', 'u', 'exp'), b.add_concat_nd('c', ['x', 'u'], 'y', axis=-1)),
        lambda x: torch.cat([x, x.exp()], dim=-1)),
}


@pytest.mark.parametrize('name', LAYER_CASES)
def test_a_layer_of_the_builder_equals_pytorch(name, tmp_path):
    add_layers, expected = LAYER_CASES[name]
    x = values(*SHAPE)
    found = read_network(save_layers(tmp_path / 'a.mlmodel', add_layers), half=False).run(x)
    assert_close(found, expected(x).reshape(1, -1))


def test_half_rounds_weights_and_layer_outputs(tmp_path):
    x = values(*SHAPE)
    path = save_layers(tmp_path / 'a.mlmodel', lambda b: (
        b.add_unary('u', 'x', 'u', 'exp'), b.add_scale('s', values(7, seed=1).numpy(), None, False, 'u', 'y', [7])))
    rounded = x.half().float().exp().half().float() * values(7, seed=1).half().float()
    wanted = rounded.half().float().reshape(1, -1)
    assert torch.equal(read_network(path).run(x), wanted)
    assert not torch.equal(read_network(path, half=False).run(x), wanted)


def test_an_exact_run_takes_weights_as_the_file_has_them(tmp_path):
    x, weight, bias = values(*SHAPE), values(9, 7, seed=1), values(9, seed=2)
    path = save_layers(tmp_path / 'a.mlmodel', lambda b: (
        b.add_inner_product('l', weight.numpy(), bias.numpy(), 7, 9, True, 'x', 'l'),
        b.add_unary('u', 'l', 'y', 'exp')))
    full = read_network(path)
    quantize_weights(coremltools.models.MLModel(str(path)), 16).save(str(path))
    half = read_network(path)
    assert_close(full.run_exact(x), F.linear(x, weight, bias).exp().reshape(1, -1))
    assert_close(half.run_exact(x), F.linear(x, weight.half().float(), bias.half().float()).exp().reshape(1, -1))
    assert torch.equal(full.run(x), half.run(x)) and not torch.equal(half.run(x), half.run_exact(x))


def test_subnormal_numbers_and_weights_are_flushed_where_asked(tmp_path):
    path = save_layers(tmp_path / 'a.mlmodel', lambda b: (
        b.add_scale('s', np.array([1e-5, 1], np.float32)[[0, 0, 0, 1, 1, 1, 1]], None, False, 'x', 's', [7]),
        b.add_load_constant_nd('c', 'c', np.full(7, 2e-5, np.float32), (7,)),
        b.add_add_broadcastable('a', ['s', 'c'], 'y')))
    program, x = read_network(path), torch.ones(SHAPE)
    lines = program.findings.describe()
    assert lines == ['weights of c (loadConstantND): 7 of 7 values are subnormal in float16 (100.00%)',
                     'weights of s (scale): 3 of 7 values are subnormal in float16 (42.86%)']
    flushed = program.run_flushed(x).reshape(6, 5, 7)
    assert bool((flushed[..., :3] == 0).all()) and bool((flushed[..., 3:] == 1).all())
    assert program.findings.describe() == lines
    assert bool((program.run(x) > 0).all())
    assert program.findings.describe()[0] == 'largest magnitude: 1 of 65504 in s (scale)'


def test_weights_that_become_0_by_rounding_are_found(tmp_path):
    path = save_layers(tmp_path / 'a.mlmodel', lambda b: b.add_scale(
        's', np.full(7, 1e-9, np.float32), None, False, 'x', 'y', [7]))
    assert read_network(path).findings.describe() == [
        'weights of s (scale): 7 of 7 values underflow to 0 in float16 (100.00%)']
    assert bool((read_network(path).run_exact(torch.ones(SHAPE)) > 0).all())


def test_logits_are_the_input_of_the_last_softmax(tmp_path):
    program = read_network(save_layers(tmp_path / 'a.mlmodel', lambda b: (
        b.add_unary('u', 'x', 'u', 'exp'), b.add_softmax_nd('s', 'u', 'y', 3)), (1, 1, 1, 7))).to_program()
    x = values(1, 1, 1, 7)
    rounded, logits = program.run(x), program.get_logits()
    assert torch.equal(logits, x.half().float().exp().half().float().reshape(1, 7))
    assert torch.equal(rounded, logits.softmax(dim=-1).half().float())
    assert_close(program.run_exact(x), program.get_logits().softmax(dim=-1))
    assert_close(program.get_logits(), x.exp().reshape(1, 7))
    linear_layer(tmp_path / 'b.mlmodel')
    assert read_network(tmp_path / 'b.mlmodel').to_program().get_logits is None


def linear_layer(path):
    weight, bias = values(9, 7, seed=1), values(9, seed=2)
    save_layers(path, lambda b: b.add_inner_product('l', weight.numpy(), bias.numpy(), 7, 9, True, 'x', 'y'))
    return weight, bias


@pytest.mark.parametrize('bits, mode', [
    (16, 'linear'), (8, 'linear'), (5, 'linear'), (8, 'linear_lut'), (4, 'linear_lut')])
def test_weights_of_few_bits_are_decoded(bits, mode, tmp_path):
    weight, bias = linear_layer(tmp_path / 'a.mlmodel')
    spec = quantize_weights(coremltools.models.MLModel(str(tmp_path / 'a.mlmodel')), bits, mode).get_spec()
    layer = spec.neuralNetwork.layers[0].innerProduct
    assert not layer.weights.floatValue
    step = 2. ** -9 if bits == 16 else (weight.max() - weight.min()) / (2 ** bits - 1)
    assert (decode_weights(layer.weights, (9, 7)) - weight).abs().max() <= step / 2 * 1.01
    assert (decode_weights(layer.bias, (9,)) - bias).abs().max() <= step / 2 * 1.01


def test_weights_that_do_not_fill_their_layer_are_refused(tmp_path):
    linear_layer(tmp_path / 'a.mlmodel')
    spec = coremltools.models.utils.load_spec(str(tmp_path / 'a.mlmodel'))
    del spec.neuralNetwork.layers[0].innerProduct.weights.floatValue[-1:]
    coremltools.models.utils.save_spec(spec, str(tmp_path / 'b.mlmodel'))
    with pytest.raises(ExportError, match=r'l \(innerProduct\): there are 62 weights where \(9, 7\) are needed'):
        read_network(tmp_path / 'b.mlmodel')


def test_pixels_are_scaled_shifted_and_put_in_order(tmp_path):
    path = save_layers(tmp_path / 'a.mlmodel', lambda b: (
        b.set_pre_processing_parameters(image_input_names=['x'], is_bgr=True, red_bias=1., green_bias=2., blue_bias=3.,
                                        image_scale=.5, image_format='NCHW'),
        b.add_unary('u', 'x', 'y', 'abs')), (1, 3, 5, 7))
    x = values(1, 3, 5, 7)
    wanted = (x * .5 + torch.tensor([1., 2., 3.])[:, None, None]).flip(1).abs()
    assert_close(read_network(path, half=False).run(x), wanted.reshape(1, -1))


@pytest.mark.parametrize('add_layers, message', [
    (lambda b: b.add_round('odd', 'x', 'y'), "odd is a layer 'round', which the evaluator does not know"),
    (lambda b: b.add_unary('u', 'x', 'y', 'log', epsilon=.5), 'a logarithm with an epsilon of 0.5'),
    (lambda b: b.add_unary('u', 'missing', 'y', 'exp'), r'u \(unary\) takes missing, which does not exist'),
    (lambda b: b.add_softmax_nd('s', 'x', 'y', 7), r's \(softmaxND\) cannot be computed')])
def test_a_layer_that_cannot_be_evaluated_is_named(add_layers, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        read_network(save_layers(tmp_path / 'a.mlmodel', add_layers))


def test_a_truncated_or_missing_file_is_named_with_the_remedy(tmp_path):
    path = tmp_path / 'a.mlmodel'
    linear_layer(path)
    content = path.read_bytes()
    for share in 0, .5, .99:
        path.write_bytes(content[:int(share * len(content))])
        with pytest.raises(ExportError, match=r'a.mlmodel cannot be read .* export it again'):
            read_network(path)
    with pytest.raises(ExportError, match='none.mlmodel cannot be read'):
        read_network(tmp_path / 'none.mlmodel')
