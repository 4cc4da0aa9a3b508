"""Reader of saved Core ML neural networks (`.mlmodel`, the older format), for the evaluator.

Each layer is read as the operation of ML Programs that computes it, as the specification of the format documents it
(NeuralNetwork.proto of coremltools). The format does not say in which precision a device computes; phones use float16,
for weights and for the outputs of layers.
"""
import inspect
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ExportError
from ..program import reading
from .evaluator import RESHAPING, Evaluator, Findings, ImageInput, Step, Weight
from .operations import OPERATIONS

__all__ = ['LAYERS', 'decode_weights', 'read_network']

MOVES = (*RESHAPING, 'concat', 'concatND', 'expandDims', 'sliceStatic', 'splitND', 'squeeze', 'whereBroadcastable')
CONSTANTS = ('loadConstant', 'loadConstantND')
Decode = Callable[[Any, Sequence[int]], Weight]  # weights and their shape
Layer = tuple[str | Callable[..., Any], dict[str, Any]]  # an operation, by its name or itself, and its parameters


# Weights --------------------------------------------------------------------------------------------------------------

def _dequantize(weights: Any, shape: Sequence[int]) -> np.ndarray:
    """Numbers of 1 to 8 bits, highest bit first: indices into a table, or scale * number + bias by channel."""
    bits, count = weights.quantization.numberOfBits, int(np.prod(shape))
    unpacked = np.unpackbits(np.frombuffer(weights.rawValue, np.uint8), count=count * bits).reshape(count, bits)
    numbers = (unpacked * 2 ** np.arange(bits)[::-1]).sum(axis=1)
    if weights.quantization.WhichOneof('QuantizationType') == 'lookupTableQuantization':
        return np.array(weights.quantization.lookupTableQuantization.floatValue, np.float32)[numbers]
    linear = weights.quantization.linearQuantization
    scale, bias = (np.array(values, np.float32)[:, None] for values in (linear.scale, linear.bias))
    return (numbers.reshape(len(scale), -1) * scale + (bias if len(bias) else 0)).astype(np.float32)


def decode_weights(weights: Any, shape: Sequence[int]) -> torch.Tensor:
    """A `WeightParams` of any kind as float32 numbers.

    Raises:
        ValueError: The number of weights does not fit the layer, or their kind is not known.
    """
    if len(weights.floatValue):
        values = np.array(weights.floatValue, np.float32)
    elif weights.float16Value:
        values = np.frombuffer(weights.float16Value, np.float16).astype(np.float32)
    elif weights.rawValue and weights.quantization.numberOfBits:
        values = _dequantize(weights, shape)
    else:
        raise ValueError(f'there are no weights of {tuple(shape)} that can be decoded.')
    if values.size != np.prod(shape):
        raise ValueError(f'there are {values.size} weights where {tuple(shape)} are needed.')
    return torch.from_numpy(values.reshape(tuple(shape)))


# Layers: parameters of a layer to an operation and its parameters -----------------------------------------------------

def _decode_bias(params: Any, decode: Decode, shape: Sequence[int]) -> dict[str, Weight]:
    return dict(bias=decode(params.bias, shape)) if params.hasBias else {}


def convolution(params: Any, decode: Decode) -> Layer:
    if params.isDeconvolution:
        raise ValueError('a deconvolution is not modelled.')
    kernel, strides = list(params.kernelSize) or [3, 3], list(params.stride) or [1, 1]
    dilations = list(params.dilationFactor) or [1, 1]
    if params.WhichOneof('ConvolutionPaddingType') == 'valid':
        pad = [size for edge in params.valid.paddingAmounts.borderAmounts
               for size in (edge.startEdgeSize, edge.endEdgeSize)] or [0] * 4
    elif any(step != 1 for step in strides):
        raise ValueError(f"padding 'same' with strides {strides} is not modelled.")
    else:
        totals = [(size - 1) * step for size, step in zip(kernel, dilations, strict=True)]
        top_heavy = params.same.asymmetryMode == params.same.TOP_LEFT_HEAVY
        pad = [size for total in totals for size in ((total + top_heavy) // 2, (total + 1 - top_heavy) // 2)]
    weight = decode(params.weights, [params.outputChannels, params.kernelChannels, *kernel])
    return 'conv', dict(
        weight=weight, strides=strides, pad_type='custom', pad=pad, dilations=dilations, groups=params.nGroups or 1,
        **_decode_bias(params, decode, [params.outputChannels]))


def pooling(params: Any, decode: Decode) -> Layer:
    kind = params.PoolingType.Name(params.type)
    if not params.globalPooling or kind == 'L2':
        raise ValueError(f'{kind} pooling by windows, or of squares, is not modelled.')
    return 'reduce_max' if kind == 'MAX' else 'reduce_mean', dict(axes=[-2, -1], keep_dims=True)


ACTIVATIONS = {  # {kind: (operation, its parameters)}
    'ELU': ('elu', ['alpha']), 'ReLU': ('relu', []), 'leakyReLU': ('leaky_relu', ['alpha']),
    'linear': ('linear_activation', ['alpha', 'beta']), 'sigmoid': ('sigmoid', []),
    'sigmoidHard': ('sigmoid_hard', ['alpha', 'beta']), 'tanh': ('tanh', [])}


def activation(params: Any, decode: Decode) -> Layer:
    kind = params.WhichOneof('NonlinearityType')
    if kind not in ACTIVATIONS:
        raise ValueError(f'an activation {kind!r} is not modelled.')
    operation, names = ACTIVATIONS[kind]
    return operation, {name: getattr(getattr(params, kind), name) for name in names}


def inner_product(params: Any, decode: Decode) -> Layer:
    weight = decode(params.weights, [params.outputChannels, params.inputChannels])
    return 'linear', dict(weight=weight, **_decode_bias(params, decode, [params.outputChannels]))


def batched_matmul(params: Any, decode: Decode) -> Layer:
    settings = dict(transpose_x=params.transposeA, transpose_y=params.transposeB)
    if params.weightMatrixFirstDimension:  # the second matrix is in the file, transposed
        columns = params.weightMatrixSecondDimension
        settings.update(
            y=decode(params.weights, [columns, params.weightMatrixFirstDimension]), transpose_y=not params.transposeB,
            **_decode_bias(params, decode, [columns]))
    return 'matmul', settings


def batchnorm(params: Any, decode: Decode) -> Layer:
    if params.computeMeanVar or params.instanceNormalization:
        raise ValueError('a normalisation by statistics of the image is not modelled.')
    weights = {name: decode(getattr(params, name), [params.channels]) for name in ('mean', 'variance', 'gamma', 'beta')}
    return 'batch_norm', dict(weights, epsilon=params.epsilon or 1e-5)


def mvn(params: Any, decode: Decode) -> Layer:
    axes = [-3, -2, -1] if params.acrossChannels else [-2, -1]
    if not params.normalizeVariance:
        return lambda x: x - x.mean(dim=axes, keepdim=True), {}
    return 'layer_norm', dict(axes=axes, epsilon=params.epsilon or 1e-5)


def scale(params: Any, decode: Decode) -> Layer:
    factor = decode(params.scale, list(params.shapeScale))
    return lambda x, factor, bias=0.: x * factor + bias, dict(
        factor=factor, **_decode_bias(params, decode, list(params.shapeBias)))


def layer_normalization(params: Any, decode: Decode) -> Layer:
    shape = list(params.normalizedShape)
    return 'layer_norm', dict(
        axes=list(range(-len(shape), 0)), gamma=decode(params.gamma, shape), beta=decode(params.beta, shape),
        epsilon=params.eps or 1e-5)


def unary(params: Any, decode: Decode) -> Layer:
    kind, epsilon = params.Operation.Name(params.type), params.epsilon or 1e-6
    if kind == 'LOG' and params.epsilon > 1e-6:
        raise ValueError(f'a logarithm with an epsilon of {params.epsilon:g}, which the format does not define.')
    operation, settings = {
        'SQRT': ('sqrt', {}), 'RSQRT': ('rsqrt', dict(epsilon=epsilon)), 'INVERSE': ('inverse', dict(epsilon=epsilon)),
        'POWER': ('pow', dict(y=params.alpha)), 'EXP': ('exp', {}), 'LOG': ('log', {}), 'ABS': ('abs', {}),
        'THRESHOLD': ('clip', dict(alpha=params.alpha, beta=float('inf')))}[kind]
    return lambda x, scale, shift, **settings: OPERATIONS[operation](x * scale + shift, **settings), dict(
        settings, scale=params.scale or 1., shift=params.shift)


def _make_elementwise(combine: Callable[[torch.Tensor, Any], torch.Tensor]) -> Callable[[Any, Decode], Layer]:
    """A layer of two or more inputs; with one, the number `alpha` of the layer is the other."""
    def compute(values: list[torch.Tensor], alpha: float) -> torch.Tensor:
        return reduce(combine, values) if len(values) > 1 else combine(values[0], alpha)
    return lambda params, decode: (compute, dict(alpha=getattr(params, 'alpha', 0.)))


def _make_reduction(operation: str) -> Callable[[Any, Decode], Layer]:
    return lambda params, decode: (
        operation, dict(axes=None if params.reduceAll else list(params.axes), keep_dims=params.keepDims))


def split_nd(params: Any, decode: Decode) -> Layer:
    return 'split', dict(
        axis=params.axis, split_sizes=list(params.splitSizes) or None, num_splits=params.numSplits or None)


def slice_static(params: Any, decode: Decode) -> Layer:
    return 'slice_by_index', dict(
        begin=params.beginIds, end=params.endIds, stride=list(params.strides), begin_mask=params.beginMasks,
        end_mask=params.endMasks, squeeze_mask=params.squeezeMasks)


LAYERS: dict[str, Callable[[Any, Decode], Layer]] = {
    'activation': activation,
    'add': _make_elementwise(torch.add),
    'addBroadcastable': _make_elementwise(torch.add),
    'batchedMatmul': batched_matmul,
    'batchnorm': batchnorm,
    'clip': lambda params, decode: ('clip', dict(alpha=params.minVal, beta=params.maxVal)),
    'concat': lambda params, decode: ('concat', dict(axis=-5 if params.sequenceConcat else -3)),
    'concatND': lambda params, decode: ('concat', dict(axis=params.axis, interleave=params.interleave)),
    'convolution': convolution,
    'divideBroadcastable': _make_elementwise(torch.div),
    'erf': lambda params, decode: ('erf', {}),
    'expandDims': lambda params, decode: ('expand_dims', dict(axes=params.axes)),
    'flattenTo2D': lambda params, decode: (lambda x: x.flatten(params.axis).flatten(0, params.axis - 1), {}),
    'gelu': lambda params, decode: ('gelu', dict(mode=params.GeluMode.Name(params.mode))),
    'greaterThan': _make_elementwise(torch.gt),
    'innerProduct': inner_product,
    'layerNormalization': layer_normalization,
    'lessThan': _make_elementwise(torch.lt),
    'maxBroadcastable': _make_elementwise(torch.maximum),
    'minBroadcastable': _make_elementwise(torch.minimum),
    'multiply': _make_elementwise(torch.mul),
    'multiplyBroadcastable': _make_elementwise(torch.mul),
    'mvn': mvn,
    'pooling': pooling,
    'rankPreservingReshape': lambda params, decode: ('reshape', dict(shape=params.targetShape)),
    'reduceLogSumExp': _make_reduction('reduce_log_sum_exp'),
    'reduceMax': _make_reduction('reduce_max'),
    'reduceMean': _make_reduction('reduce_mean'),
    'reduceMin': _make_reduction('reduce_min'),
    'reduceSum': _make_reduction('reduce_sum'),
    'reshapeStatic': lambda params, decode: ('reshape', dict(shape=params.targetShape)),
    'scale': scale,
    'sliceStatic': slice_static,
    'softmax': lambda params, decode: ('softmax', dict(axis=-3)),
    'softmaxND': lambda params, decode: ('softmax', dict(axis=params.axis)),
    'splitND': split_nd,
    'squeeze': lambda params, decode: ('squeeze', dict(axes=None if params.squeezeAll else list(params.axes))),
    'subtractBroadcastable': _make_elementwise(torch.sub),
    'transpose': lambda params, decode: ('transpose', dict(perm=list(params.axes))),
    'unary': unary,
    'whereBroadcastable': lambda params, decode: ('select', {}),
}


# The file -------------------------------------------------------------------------------------------------------------

def _name_inputs(operation: Callable, fixed: dict[str, Any], names: list[str]) -> dict[str, str | list[str]]:
    """The inputs of a layer by the parameters of the operation that are not fixed; `values` takes all."""
    keys = [key for key in inspect.signature(operation).parameters if key not in fixed]
    return {'values': names} if keys[0] == 'values' else dict(zip(keys[:len(names)], names, strict=True))


def _read_preprocessing(network: Any, name: str, reverse: bool) -> tuple[float, torch.Tensor | None]:
    """Scale and shift of the pixels of an image."""
    for item in network.preprocessing:
        if item.featureName not in ('', name):
            continue
        if item.WhichOneof('preprocessor') != 'scaler':
            raise ValueError('a mean image is not modelled.')
        shift = torch.tensor([item.scaler.redBias, item.scaler.greenBias, item.scaler.blueBias])
        return item.scaler.channelScale, shift.flip(0) if reverse else shift
    return 1., None


def _read_input(path: Path, spec: Any, network: Any, half: bool) -> ImageInput:
    if len(spec.description.input) != 1:
        raise ExportError(f'{path} has {len(spec.description.input)} inputs; one, of images, can be evaluated.')
    feature = spec.description.input[0]
    if feature.type.WhichOneof('Type') == 'imageType':
        image = feature.type.imageType
        if network.imageInputShapeMapping != 1 or image.colorSpace == image.ColorSpace.Value('GRAYSCALE'):
            raise ExportError(f'{path}: its input {feature.name} is not a colour image of rank 4. Export it again.')
        reverse = image.colorSpace == image.ColorSpace.Value('BGR')
        factor, shift = _read_preprocessing(network, feature.name, reverse)
        return ImageInput(feature.name, (1, 3, image.height, image.width), half, reverse, factor, shift)
    shape = tuple(feature.type.multiArrayType.shape)
    if network.arrayInputShapeMapping != 1 or len(shape) != 4:
        raise ExportError(f'{path}: its input {feature.name} is {shape}; images (B, C, H, W) can be evaluated.')
    return ImageInput(feature.name, shape, half)


def read_network(path: str | Path, half: bool = True) -> Evaluator:
    """Read a saved neural network, for evaluation on any system.

    Args:
        path: A file `.mlmodel` with a neural network or classifier of one input of images and one output (B, classes).
        half: Whether weights and outputs of layers are rounded to float16, as on phones; the CPU of a Mac, and phones
            told to use only theirs, compute in float32.
    Raises:
        ExportError: The file is damaged, inconsistent, or has an unknown layer.
    """
    from coremltools.models.utils import load_spec
    path = Path(path)
    with reading(path):
        spec = load_spec(str(path))
        if spec.WhichOneof('Type') not in ('neuralNetwork', 'neuralNetworkClassifier'):
            raise ValueError('it holds no neural network: it is empty or of another kind')
        network = getattr(spec, spec.WhichOneof('Type'))
        image_input = _read_input(path, spec, network, half)
    constants, findings, steps = {}, Findings(), []
    for layer in network.layers:
        kind = layer.WhichOneof('layer')
        params, source = getattr(layer, kind), f'{layer.name} ({kind})'

        def decode(weights: Any, shape: Sequence[int], source: str = source) -> Weight:
            weight = Weight(decode_weights(weights, shape), half)
            findings.record_weight(f'weights of {source}', weight)
            return weight

        if kind not in LAYERS and kind not in CONSTANTS:
            raise ExportError(
                f'{path}: {layer.name} is a layer {kind!r}, which the evaluator does not know. Export without it, or '
                'add it to caretrans/export/coreml/network.py.')
        try:
            if kind in CONSTANTS:
                constants[layer.output[0]] = decode(params.data, list(params.shape))
                continue
            operation, fixed = LAYERS[kind](params, decode)
            fixed = {key: Weight(torch.tensor(value), half) if isinstance(value, float) else value
                     for key, value in fixed.items()}
            operation = OPERATIONS[operation] if isinstance(operation, str) else operation
            inputs = _name_inputs(operation, fixed, list(layer.input))
        except ValueError as error:
            raise ExportError(f'{path}: {source}: {error} Export it again.') from error
        shapes = [[size if size > 0 else -1 for size in tensor.dimValue] or None for tensor in layer.outputTensor]
        steps.append(Step(
            layer.name, kind, operation, fixed, inputs, list(layer.output), shapes or [None] * len(layer.output), half,
            kind in MOVES))
    labels, outputs = None, [feature.name for feature in spec.description.output]
    if spec.WhichOneof('Type') == 'neuralNetworkClassifier':
        labels = [str(label) for label in getattr(network, network.WhichOneof('ClassLabels')).vector]
        outputs = [network.labelProbabilityLayerName or network.layers[-1].output[0]]
    if len(outputs) != 1:
        raise ExportError(f'{path} has the outputs {", ".join(outputs)}; one can be evaluated.')
    return Evaluator(str(path), steps, constants, image_input, outputs[0], labels, findings)
