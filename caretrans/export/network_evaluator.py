"""Read a saved Core ML neural network (`.mlmodel`, the older format) and evaluate it layer by layer in PyTorch.

Layers are computed as the specification of the format documents them (NeuralNetwork.proto of coremltools). The format
does not say in which precision a device computes; phones take float16, for weights and for what layers hand on.
"""
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ExportError
from .evaluation import Evaluator, Findings, ImageInput, Mode, Step, Weight

__all__ = ['LAYERS', 'decode_weights', 'read_network']

RESHAPING = ('flatten', 'flattenTo2D', 'permute', 'rankPreservingReshape', 'reshape', 'reshapeStatic', 'transpose')
MOVES = (*RESHAPING, 'concat', 'concatND', 'expandDims', 'sliceStatic', 'splitND', 'squeeze', 'whereBroadcastable')
CONSTANTS = ('loadConstant', 'loadConstantND')
Decode = Callable[[Any, Sequence[int]], torch.Tensor]
Layer = Callable[..., Any]


# Weights --------------------------------------------------------------------------------------------------------------

def _dequantise(weights: Any, shape: Sequence[int]) -> np.ndarray:
    """Numbers of 1 to 8 bits, the highest bit first, each a place in a table or scale * number + bias by channel."""
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
        ValueError: There are not as many as the layer needs, or they are of a kind that is not known.
    """
    if len(weights.floatValue):
        values = np.array(weights.floatValue, np.float32)
    elif weights.float16Value:
        values = np.frombuffer(weights.float16Value, np.float16).astype(np.float32)
    elif weights.rawValue and weights.quantization.numberOfBits:
        values = _dequantise(weights, shape)
    else:
        raise ValueError(f'there are no weights of {tuple(shape)} that can be decoded.')
    if values.size != np.prod(shape):
        raise ValueError(f'there are {values.size} weights where {tuple(shape)} are needed.')
    return torch.from_numpy(values.reshape(tuple(shape)))


# Layers: each makes a function of tensors from the parameters of a layer ----------------------------------------------

def convolution(params: Any, decode: Decode) -> Layer:
    if params.isDeconvolution:
        raise ValueError('a deconvolution is not modelled.')
    groups, kernel = params.nGroups or 1, list(params.kernelSize) or [3, 3]
    weight = decode(params.weights, [params.outputChannels, params.kernelChannels, *kernel])
    bias = decode(params.bias, [params.outputChannels]) if params.hasBias else None
    stride, dilation = list(params.stride) or [1, 1], list(params.dilationFactor) or [1, 1]
    edges = _find_padding(params, kernel, stride, dilation)
    padding = [edge[0] for edge in edges]
    symmetric = all(before == after for before, after in edges)

    def compute(x: torch.Tensor) -> torch.Tensor:
        if symmetric:
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return F.conv2d(F.pad(x, [*edges[1], *edges[0]]), weight, bias, stride, 0, dilation, groups)
    return compute


def _find_padding(params: Any, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
                  ) -> list[tuple[int, int]]:
    """(before, after) of height and width."""
    if params.WhichOneof('ConvolutionPaddingType') == 'valid':
        edges = [(edge.startEdgeSize, edge.endEdgeSize) for edge in params.valid.paddingAmounts.borderAmounts]
        return edges or [(0, 0), (0, 0)]
    if any(step != 1 for step in stride):
        raise ValueError(f"padding 'same' with strides {list(stride)} is not modelled.")
    totals = [(size - 1) * step for size, step in zip(kernel, dilation, strict=True)]
    top_heavy = params.same.asymmetryMode == params.same.TOP_LEFT_HEAVY
    return [((total + top_heavy) // 2, (total + 1 - top_heavy) // 2) for total in totals]


def pooling(params: Any, decode: Decode) -> Layer:
    kind = params.PoolingType.Name(params.type)
    if not params.globalPooling or kind == 'L2':
        raise ValueError(f'{kind} pooling by windows, or of squares, is not modelled.')
    if kind == 'MAX':
        return lambda x: x.amax(dim=(-2, -1), keepdim=True)
    return lambda x: x.mean(dim=(-2, -1), keepdim=True)


ACTIVATIONS: dict[str, Callable[[Any], Layer]] = {
    'ELU': lambda params: lambda x: F.elu(x, params.alpha),
    'ReLU': lambda params: lambda x: x.relu(),
    'leakyReLU': lambda params: lambda x: F.leaky_relu(x, params.alpha),
    'linear': lambda params: lambda x: params.alpha * x + params.beta,
    'sigmoid': lambda params: lambda x: x.sigmoid(),
    'sigmoidHard': lambda params: lambda x: (params.alpha * x + params.beta).clamp(0, 1),
    'tanh': lambda params: lambda x: x.tanh(),
}


def activation(params: Any, decode: Decode) -> Layer:
    kind = params.WhichOneof('NonlinearityType')
    if kind not in ACTIVATIONS:
        raise ValueError(f'an activation {kind!r} is not modelled.')
    return ACTIVATIONS[kind](getattr(params, kind))


def inner_product(params: Any, decode: Decode) -> Layer:
    weight = decode(params.weights, [params.outputChannels, params.inputChannels])
    bias = decode(params.bias, [params.outputChannels]) if params.hasBias else None
    return lambda x: F.linear(x, weight, bias)


def batched_matmul(params: Any, decode: Decode) -> Layer:
    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.transpose(-2, -1) if params.transposeA else a) @ (b.transpose(-2, -1) if params.transposeB else b)
    if not params.weightMatrixFirstDimension:
        return multiply
    rows, columns = params.weightMatrixFirstDimension, params.weightMatrixSecondDimension
    weight = decode(params.weights, [columns, rows]).t()  # stored transposed
    bias = decode(params.bias, [columns]) if params.hasBias else None
    return lambda x: multiply(x, weight) if bias is None else multiply(x, weight) + bias


def batchnorm(params: Any, decode: Decode) -> Layer:
    if params.computeMeanVar or params.instanceNormalization:
        raise ValueError('a normalisation by statistics of the image is not modelled.')
    mean, variance, gamma, beta = (
        decode(getattr(params, name), [params.channels]) for name in ('mean', 'variance', 'gamma', 'beta'))
    return lambda x: F.batch_norm(x, mean, variance, gamma, beta, False, 0., params.epsilon or 1e-5)


def mvn(params: Any, decode: Decode) -> Layer:
    axes = [-3, -2, -1] if params.acrossChannels else [-2, -1]

    def compute(x: torch.Tensor) -> torch.Tensor:
        y = x - x.mean(dim=axes, keepdim=True)
        if params.normalizeVariance:
            y = y * (y.square().mean(dim=axes, keepdim=True) + (params.epsilon or 1e-5)).rsqrt()
        return y
    return compute


def scale(params: Any, decode: Decode) -> Layer:
    factor = decode(params.scale, list(params.shapeScale))
    bias = decode(params.bias, list(params.shapeBias)) if params.hasBias else 0.
    return lambda x: x * factor + bias


def layer_normalization(params: Any, decode: Decode) -> Layer:
    shape = list(params.normalizedShape)
    gamma, beta = decode(params.gamma, shape), decode(params.beta, shape)
    return lambda x: F.layer_norm(x, shape, gamma, beta, params.eps or 1e-5)


UNARY: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    'SQRT': lambda x, params: x.sqrt(),
    'RSQRT': lambda x, params: (x + (params.epsilon or 1e-6)).rsqrt(),
    'INVERSE': lambda x, params: 1 / (x + (params.epsilon or 1e-6)),
    'POWER': lambda x, params: x ** params.alpha,
    'EXP': lambda x, params: x.exp(),
    'LOG': lambda x, params: x.log(),
    'ABS': lambda x, params: x.abs(),
    'THRESHOLD': lambda x, params: x.clamp(min=params.alpha),
}


def unary(params: Any, decode: Decode) -> Layer:
    kind = params.Operation.Name(params.type)
    if kind == 'LOG' and params.epsilon > 1e-6:
        raise ValueError(f'a logarithm with an epsilon of {params.epsilon:g}, which the format does not define.')
    function = UNARY[kind]
    return lambda x: function(x * (params.scale or 1.) + params.shift, params)


def _make_elementwise(combine: Callable[[torch.Tensor, Any], torch.Tensor], neutral: float | None = None):
    """A layer of two or more inputs; of one, with the number `alpha` of the layer, where it has one."""
    def make(params: Any, decode: Decode) -> Layer:
        def compute(*tensors: torch.Tensor) -> torch.Tensor:
            if len(tensors) == 1 and neutral is not None:
                return combine(tensors[0], params.alpha)
            result = tensors[0]
            for x in tensors[1:]:
                result = combine(result, x)
            return result
        return compute
    return make


def _make_reduction(reduce: Callable) -> Callable[[Any, Decode], Layer]:
    def make(params: Any, decode: Decode) -> Layer:
        axes = list(params.axes)
        return lambda x: reduce(x, dim=list(range(x.dim())) if params.reduceAll else axes, keepdim=params.keepDims)
    return make


def gelu(params: Any, decode: Decode) -> Layer:
    mode = params.GeluMode.Name(params.mode)
    if mode == 'SIGMOID_APPROXIMATION':
        return lambda x: x * (1.702 * x).sigmoid()
    return lambda x: F.gelu(x, approximate='tanh' if mode == 'TANH_APPROXIMATION' else 'none')


def concat_nd(params: Any, decode: Decode) -> Layer:
    if params.interleave:
        raise ValueError('interleaving is not modelled.')
    return lambda *tensors: torch.cat(tensors, dim=params.axis)


def concat(params: Any, decode: Decode) -> Layer:
    return lambda *tensors: torch.cat(tensors, dim=-5 if params.sequenceConcat else -3)


def split_nd(params: Any, decode: Decode) -> Layer:
    sizes = list(params.splitSizes)
    return lambda x: x.split(sizes, dim=params.axis) if sizes else x.tensor_split(params.numSplits, dim=params.axis)


def expand_dims(params: Any, decode: Decode) -> Layer:
    def compute(x: torch.Tensor) -> torch.Tensor:
        rank = x.dim() + len(params.axes)
        for axis in sorted(axis % rank for axis in params.axes):
            x = x.unsqueeze(axis)
        return x
    return compute


def squeeze(params: Any, decode: Decode) -> Layer:
    return lambda x: x.squeeze() if params.squeezeAll else x.squeeze(tuple(params.axes))


def slice_static(params: Any, decode: Decode) -> Layer:
    keys = list(zip(params.beginIds, params.beginMasks, params.endIds, params.endMasks, params.strides, strict=True))
    if any(params.squeezeMasks) or any(step < 1 for step in params.strides):
        raise ValueError('this slice is not modelled.')
    return lambda x: x[tuple(
        slice(None if open_begin else begin, None if open_end else end, step)
        for begin, open_begin, end, open_end, step in keys)]


def reshape_preserving_rank(params: Any, decode: Decode) -> Layer:
    return lambda x: x.reshape([
        size if wanted == 0 else wanted for size, wanted in zip(x.shape, params.targetShape, strict=True)])


LAYERS: dict[str, Callable[[Any, Decode], Layer]] = {
    'activation': activation,
    'add': _make_elementwise(torch.add, neutral=0.),
    'addBroadcastable': _make_elementwise(torch.add),
    'batchedMatmul': batched_matmul,
    'batchnorm': batchnorm,
    'clip': lambda params, decode: lambda x: x.clamp(params.minVal, params.maxVal),
    'concat': concat,
    'concatND': concat_nd,
    'convolution': convolution,
    'divideBroadcastable': _make_elementwise(torch.div),
    'expandDims': expand_dims,
    'flattenTo2D': lambda params, decode: lambda x: x.flatten(params.axis).flatten(0, params.axis - 1),
    'gelu': gelu,
    'greaterThan': _make_elementwise(torch.gt, neutral=0.),
    'innerProduct': inner_product,
    'layerNormalization': layer_normalization,
    'lessThan': _make_elementwise(torch.lt, neutral=0.),
    'maxBroadcastable': _make_elementwise(torch.maximum),
    'minBroadcastable': _make_elementwise(torch.minimum),
    'multiply': _make_elementwise(torch.mul, neutral=1.),
    'multiplyBroadcastable': _make_elementwise(torch.mul),
    'mvn': mvn,
    'pooling': pooling,
    'rankPreservingReshape': reshape_preserving_rank,
    'reduceLogSumExp': _make_reduction(torch.logsumexp),
    'reduceMax': _make_reduction(torch.amax),
    'reduceMean': _make_reduction(torch.mean),
    'reduceMin': _make_reduction(torch.amin),
    'reduceSum': _make_reduction(torch.sum),
    'reshapeStatic': lambda params, decode: lambda x: x.reshape(list(params.targetShape)),
    'scale': scale,
    'sliceStatic': slice_static,
    'softmax': lambda params, decode: lambda x: x.softmax(dim=-3),
    'softmaxND': lambda params, decode: lambda x: x.softmax(dim=params.axis),
    'splitND': split_nd,
    'squeeze': squeeze,
    'subtractBroadcastable': _make_elementwise(torch.sub),
    'transpose': lambda params, decode: lambda x: x.permute(list(params.axes)),
    'unary': unary,
    'whereBroadcastable': lambda params, decode: lambda cond, a, b: torch.where(cond.bool(), a, b),
}


# The file -------------------------------------------------------------------------------------------------------------

def _load(path: Path) -> Any:
    from coremltools.models.utils import load_spec
    try:
        spec = load_spec(str(path))
    except Exception as error:  # of protobuf, of the reader of files
        line = (str(error).splitlines() or [''])[0]
        raise ExportError(f'{path} is damaged ({type(error).__name__}: {line}). Export it again.') from error
    if spec.WhichOneof('Type') not in ('neuralNetwork', 'neuralNetworkClassifier'):
        raise ExportError(f'{path} holds no neural network: it is empty or of another kind. Export it again.')
    return spec


class _Reader:
    """Turns the layers of a network into steps."""

    def __init__(self, path: Path, half: bool) -> None:
        self.path, self.half = path, half
        self.findings = Findings()
        self.constants: dict[str, Weight] = {}
        self.steps: list[Step] = []

    def decode(self, source: str, weights: Any, shape: Sequence[int]) -> Weight:
        weight = Weight(decode_weights(weights, shape), self.half)
        if self.half:
            self.findings.record_weight(f'weights of {source}', weight)
        return weight

    def read(self, layer: Any) -> None:
        kind = layer.WhichOneof('layer')
        params, source = getattr(layer, kind), f'{layer.name} ({kind})'
        if kind not in LAYERS and kind not in CONSTANTS:
            raise ExportError(
                f'{self.path}: {layer.name} is a layer {kind!r}, which the evaluation does not know. Export without '
                'it, or add it to caretrans/export/network_evaluator.py.')
        try:
            if kind in CONSTANTS:
                self.constants[layer.output[0]] = self.decode(source, params.data, list(params.shape))
                return
            make = self.bind(source, kind, params)
        except ValueError as error:
            raise ExportError(f'{self.path}: {source}: {error} Export it again.') from error
        shapes = [[size if size > 0 else -1 for size in tensor.dimValue] or None for tensor in layer.outputTensor]
        self.steps.append(Step(
            layer.name, kind, make, {'values': list(layer.input)}, list(layer.output),
            shapes or [None] * len(layer.output), self.half, kind in MOVES))

    def bind(self, source: str, kind: str, params: Any) -> Callable[[Mode], Layer]:
        """Decode the weights of a layer, once, and make it of them for each mode.

        Raises:
            ValueError: The layer is not modelled, or its weights do not fit.
        """
        weights: list[Weight] = []

        def decode_first(values: Any, shape: Sequence[int]) -> torch.Tensor:
            weights.append(self.decode(source, values, shape))
            return weights[-1].stored

        def make(mode: Mode) -> Layer:
            following = iter(weights)  # a layer asks for its weights in the same order each time
            compute = LAYERS[kind](params, lambda values, shape: next(following).take(mode))
            return lambda values: compute(*values)

        LAYERS[kind](params, decode_first)
        return make


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
    """Read a neural network that was saved, for evaluation on any system.

    Args:
        path: A file `.mlmodel` with a neural network or classifier of one input of images and one output (B, classes).
        half: Whether weights and what layers give are rounded to float16, as on phones; the processor of a Mac and
            phones told to use theirs alone compute in float32.
    Raises:
        ExportError: The file is damaged, does not fit together, or has a layer that is not known here.
    """
    path = Path(path)
    spec = _load(path)
    network = getattr(spec, spec.WhichOneof('Type'))
    image_input = _read_input(path, spec, network, half)
    reader = _Reader(path, half)
    for layer in network.layers:
        reader.read(layer)
    labels, outputs = None, [feature.name for feature in spec.description.output]
    if spec.WhichOneof('Type') == 'neuralNetworkClassifier':
        labels = [str(label) for label in getattr(network, network.WhichOneof('ClassLabels')).vector]
        outputs = [network.labelProbabilityLayerName or network.layers[-1].output[0]]
    if len(outputs) != 1:
        raise ExportError(f'{path} has the outputs {", ".join(outputs)}; one can be evaluated.')
    return Evaluator(
        str(path), reader.steps, reader.constants, image_input, outputs[0], labels, RESHAPING, reader.findings)
