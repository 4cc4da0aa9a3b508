"""Read a saved ML Program (`.mlpackage`) and evaluate it operation by operation in PyTorch.

The file is read by coremltools, which also decodes compressed weights and fills in the parameters that a file leaves
to their defaults, such as the epsilon of 1e-4 in `inverse`. Operations are computed here, as coremltools documents them
(Model Intermediate Language, coremltools.converters.mil.mil.ops.defs).
"""
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ExportError
from .evaluation import Evaluator, Findings, ImageInput, Mode, Step, Weight

__all__ = ['OPERATIONS', 'read_ml_program']

RESHAPING = ('reshape', 'transpose')
MOVES = ('abs', 'clip', 'concat', 'expand_dims', 'identity', 'maximum', 'minimum', 'pad', 'relu', 'reshape', 'select',
         'slice_by_index', 'split', 'squeeze', 'transpose')  # of inputs in float16 they make numbers of float16
Number = torch.Tensor | float


# Operations -----------------------------------------------------------------------------------------------------------

def _pad_before(x: torch.Tensor, pad: Sequence[int], value: float = 0.) -> torch.Tensor:
    """Pad the last axes; `pad` is (before, after) of each, the first of them first."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=value) if any(pad) else x


def _find_padding(pad_type: str, pad: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> list[int]:
    if pad_type == 'valid':
        return [0] * 2 * len(kernel)
    if pad_type == 'custom':
        return list(pad)
    if any(size % 2 == 0 for size in kernel) or any(stride != 1 for stride in strides):
        raise ValueError(f'padding {pad_type!r} of kernel {list(kernel)} with strides {list(strides)} is not modelled.')
    return [size // 2 for size in kernel for _ in range(2)]


def conv(x, weight, bias=None, strides=(), pad_type='valid', pad=(), dilations=(), groups=1):
    kernel = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations, strict=True)]
    padding = _find_padding(pad_type, pad, kernel, strides)
    if padding[::2] == padding[1::2]:
        return torch.convolution(
            x, weight, bias, strides, padding[::2], dilations, False, [0] * len(kernel), groups)
    return torch.convolution(
        _pad_before(x, padding), weight, bias, strides, [0] * len(kernel), dilations, False, [0] * len(kernel), groups)


def linear(x, weight, bias=None):
    return F.linear(x, weight, bias)


def matmul(x, y, transpose_x=False, transpose_y=False):
    return (x.transpose(-2, -1) if transpose_x else x) @ (y.transpose(-2, -1) if transpose_y else y)


def batch_norm(x, mean, variance, gamma=None, beta=None, epsilon=1e-5):
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0., float(epsilon))


def layer_norm(x, axes, gamma=None, beta=None, epsilon=1e-5):
    axes = [axis % x.dim() for axis in axes]
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    centred = x - x.mean(dim=axes, keepdim=True)
    y = centred * (centred.square().mean(dim=axes, keepdim=True) + epsilon).rsqrt()
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def gelu(x, mode='EXACT'):
    if mode == 'SIGMOID_APPROXIMATION':
        return x * (1.702 * x).sigmoid()
    return F.gelu(x, approximate={'EXACT': 'none', 'TANH_APPROXIMATION': 'tanh'}[mode])


def avg_pool(x, kernel_sizes, strides, pad_type, pad=(), exclude_padding_from_average=False, ceil_mode=False):
    padding = _find_padding(pad_type, pad, kernel_sizes, strides)
    if padding[::2] != padding[1::2] or len(kernel_sizes) != 2:
        raise ValueError(f'padding {padding} of an average over {kernel_sizes} is not modelled.')
    return F.avg_pool2d(x, kernel_sizes, strides, padding[::2], ceil_mode, not exclude_padding_from_average)


def max_pool(x, kernel_sizes, strides, pad_type, pad=(), ceil_mode=False):
    padded = _pad_before(x, _find_padding(pad_type, pad, kernel_sizes, strides), -float('inf'))
    return F.max_pool2d(padded, kernel_sizes, strides, ceil_mode=ceil_mode)


def _make_reduction(reduce: Callable) -> Callable:
    def operation(x, axes=None, keep_dims=False):
        return reduce(x, dim=list(range(x.dim())) if axes is None else axes, keepdim=keep_dims)
    return operation


def concat(values, axis, interleave=False):
    if not interleave:
        return torch.cat(values, dim=axis)
    axis %= values[0].dim()
    return torch.stack(values, dim=axis + 1).flatten(axis, axis + 1)


def split(x, axis, num_splits=None, split_sizes=None):
    return x.tensor_split(num_splits, dim=axis) if split_sizes is None else x.split(split_sizes, dim=axis)


def expand_dims(x, axes):
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x, axes=None):
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def slice_by_index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    rank = x.dim()
    stride, no = stride or [1] * rank, [False] * rank
    begin_mask, end_mask, squeeze_mask = begin_mask or no, end_mask or no, squeeze_mask or no
    if any(step < 1 for step in stride):
        raise ValueError(f'a stride of {stride} is not modelled.')
    return x[tuple(
        begin[i] if squeeze_mask[i] else
        slice(None if begin_mask[i] else begin[i], None if end_mask[i] else end[i], stride[i]) for i in range(rank))]


def pad(x, pad, mode='constant', constant_val=0.):
    if mode != 'constant':
        raise ValueError(f'padding by {mode!r} is not modelled.')
    return _pad_before(x, pad, float(constant_val))


def cast(x, dtype):
    wanted = {'fp16': torch.float32, 'fp32': torch.float32, 'int32': torch.int32, 'bool': torch.bool}[dtype]
    return x.to(wanted, copy=True)


def clip(x, alpha, beta):
    return x.clamp(float(alpha), float(beta))


def sigmoid_hard(x, alpha=0.2, beta=0.5):
    return (x * alpha + beta).clamp(0, 1)


OPERATIONS: dict[str, Callable] = {
    'abs': lambda x: x.abs(),
    'add': lambda x, y: x + y,
    'avg_pool': avg_pool,
    'batch_norm': batch_norm,
    'cast': cast,
    'clip': clip,
    'concat': concat,
    'conv': conv,
    'elu': lambda x, alpha: F.elu(x, float(alpha)),
    'equal': lambda x, y: torch.eq(x, y),
    'erf': lambda x: x.erf(),
    'exp': lambda x: x.exp(),
    'expand_dims': expand_dims,
    'gelu': gelu,
    'greater': lambda x, y: torch.gt(x, y),
    'greater_equal': lambda x, y: torch.ge(x, y),
    'identity': lambda x: x,
    'inverse': lambda x, epsilon=1e-4: 1 / (x + epsilon),
    'layer_norm': layer_norm,
    'less': lambda x, y: torch.lt(x, y),
    'less_equal': lambda x, y: torch.le(x, y),
    'linear': linear,
    'log': lambda x, epsilon=0.: (x + epsilon).log(),
    'matmul': matmul,
    'max_pool': max_pool,
    'maximum': lambda x, y: torch.maximum(x, y),
    'minimum': lambda x, y: torch.minimum(x, y),
    'mul': lambda x, y: x * y,
    'pad': pad,
    'pow': lambda x, y: x ** y,
    'real_div': lambda x, y: x / y,
    'reduce_log_sum_exp': _make_reduction(torch.logsumexp),
    'reduce_max': _make_reduction(torch.amax),
    'reduce_mean': _make_reduction(torch.mean),
    'reduce_min': _make_reduction(torch.amin),
    'reduce_sum': _make_reduction(torch.sum),
    'relu': lambda x: x.relu(),
    'relu6': lambda x: x.clamp(0, 6),
    'reshape': lambda x, shape: x.reshape(shape),
    'rsqrt': lambda x, epsilon=0.: (x + epsilon).rsqrt(),
    'select': lambda cond, a, b: torch.where(cond, a, b),
    'sigmoid': lambda x: x.sigmoid(),
    'sigmoid_hard': sigmoid_hard,
    'silu': lambda x: F.silu(x),
    'slice_by_index': slice_by_index,
    'softmax': lambda x, axis: x.softmax(dim=axis),
    'split': split,
    'sqrt': lambda x: x.sqrt(),
    'square': lambda x: x.square(),
    'squeeze': squeeze,
    'sub': lambda x, y: x - y,
    'tanh': lambda x: x.tanh(),
    'transpose': lambda x, perm: x.permute(perm),
}


# The file -------------------------------------------------------------------------------------------------------------

def _load(path: Path) -> tuple[Any, Any]:
    """Specification and program of a package."""
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.models.utils import load_spec
    weights = path / 'Data' / 'com.apple.CoreML' / 'weights'
    try:
        spec = load_spec(str(path))
        if spec.WhichOneof('Type') != 'mlProgram':
            raise ExportError(
                f'{path} holds no ML Program: its model file is empty or of another kind. Export it again.')
        return spec, load(spec, spec.specificationVersion, str(weights))
    except ExportError:
        raise
    except Exception as error:  # of protobuf, of the reader of packages, of the reader of programs
        line = (str(error).splitlines() or [''])[0]
        raise ExportError(
            f'{path} is damaged or incomplete ({type(error).__name__}: {line}). Export it again, or copy the whole '
            'folder.') from error


def _decode(value: Any, half: bool) -> Any:
    """A constant as operations take it: float arrays as weights, all else as numbers, lists and strings."""
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind == 'f':
        return Weight(torch.from_numpy(np.array(value, dtype=np.float32)), half)
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


class _Reader:
    """Turns the operations of a program into steps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.findings = Findings()
        self.decoded: dict[str, Any] = {}
        self.constants: dict[str, Weight] = {}
        self.steps: list[Step] = []

    def is_constant(self, var: Any) -> bool:
        return var.op is not None and (var.op.op_type == 'const' or var.op.op_type.startswith('constexpr_'))

    def decode(self, var: Any) -> Any:
        if var.name not in self.decoded:
            value = var.val if var.op.op_type == 'const' else var.op.materialized_val_inference()
            self.decoded[var.name] = _decode(value, _is_half(var))
        return self.decoded[var.name]

    def read(self, op: Any) -> None:
        if op.op_type not in OPERATIONS:
            raise ExportError(
                f'{self.path}: {op.name} is an operation {op.op_type!r}, which the evaluation does not know. Export '
                'without it, or add it to caretrans/export/mil_evaluator.py.')
        fixed: dict[str, Any] = {}
        inputs: dict[str, Any] = {}
        for key, var in op.inputs.items():
            if isinstance(var, (list, tuple)):
                inputs[key] = [item.name for item in var]
                self.constants.update({item.name: self.decode(item) for item in var if self.is_constant(item)})
            elif var is not None and self.is_constant(var):
                fixed[key] = self.decode(var)
                if isinstance(fixed[key], Weight) and fixed[key].stored.dim():
                    self.findings.record_weight(f'{key} of {op.name} ({op.op_type})', fixed[key])
            elif var is not None:
                inputs[key] = var.name
        self.steps.append(Step(
            op.name, op.op_type, _bind(OPERATIONS[op.op_type], fixed), inputs, [var.name for var in op.outputs],
            [_get_shape(var) for var in op.outputs], _is_half(op.outputs[0]), op.op_type in MOVES))


def _bind(operation: Callable, fixed: dict[str, Any]) -> Callable[[Mode], Callable]:
    def make(mode: Mode) -> Callable:
        return partial(operation, **{
            key: value.take(mode) if isinstance(value, Weight) else value for key, value in fixed.items()})
    return make


def _is_half(var: Any) -> bool:
    return var.dtype.__name__ == 'fp16'


def _get_shape(var: Any) -> list[int] | None:
    return [size if isinstance(size, (int, np.integer)) else -1 for size in var.shape]


def _read_input(path: Path, spec: Any, function: Any) -> ImageInput:
    features = {feature.name: feature.type for feature in spec.description.input}
    if len(function.inputs) != 1:
        raise ExportError(f'{path} has {len(function.inputs)} inputs; one, of images, can be evaluated.')
    (name, var), = function.inputs.items()
    if name not in features:
        raise ExportError(f'{path}: its program takes {name}, its description has {", ".join(features)}.')
    shape = _get_shape(var)
    if len(shape) != 4 or -1 in shape:
        raise ExportError(
            f'{path}: its input {name} is {tuple(shape)}; images of a fixed (B, C, H, W) can be evaluated.')
    image = features[name].imageType if features[name].WhichOneof('Type') == 'imageType' else None
    if image is not None and (image.height, image.width) != tuple(shape[2:]):
        raise ExportError(
            f'{path}: its description says {image.height} x {image.width} pixels, its program takes {tuple(shape)}.')
    reverse = image is not None and image.colorSpace == image.ColorSpace.Value('BGR')
    return ImageInput(name, tuple(shape), _is_half(var), reverse)


def read_ml_program(path: str | Path) -> Evaluator:
    """Read a package that was saved, for evaluation on any system.

    Variables that the file declares as float16 are rounded to it after every operation, float32 ones are not.

    Args:
        path: A folder `.mlpackage` with an ML Program of one function, one input of images (B, C, H, W) and one output
            (B, classes), or a classifier.
    Raises:
        ExportError: The package is damaged, does not fit together, or has an operation that is not known here.
    """
    path = Path(path)
    spec, program = _load(path)
    if list(program.functions) != ['main']:
        raise ExportError(f'{path} has the functions {", ".join(program.functions)}; only `main` can be evaluated.')
    function = program.functions['main']
    image_input = _read_input(path, spec, function)
    reader = _Reader(path)
    outputs, labels = [var.name for var in function.outputs], None
    for op in function.operations:
        if op.op_type == 'classify':
            outputs, labels = [op.probabilities.name], [str(label) for label in op.classes.val]
        elif op.op_type != 'const' and not op.op_type.startswith('constexpr_'):
            reader.read(op)
    if len(outputs) != 1:
        raise ExportError(f'{path} has the outputs {", ".join(outputs)}; one can be evaluated.')
    return Evaluator(
        str(path), reader.steps, reader.constants, image_input, outputs[0], labels, RESHAPING, reader.findings)
