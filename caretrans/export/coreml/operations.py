"""Operations of Core ML in PyTorch, under the names and parameters of ML Programs; layers of networks use them too.

Source: Model Intermediate Language, coremltools.converters.mil.mil.ops.defs. Defaults are those of the documentation;
numbers may be tensors without dimensions.
"""
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

__all__ = ['OPERATIONS']


def _pad_axes(x: torch.Tensor, pad: Sequence[int], value: float = 0.) -> torch.Tensor:
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
    padding, zeros = _find_padding(pad_type, pad, kernel, strides), [0] * len(kernel)
    if padding[::2] != padding[1::2]:
        x, padding = _pad_axes(x, padding), zeros * 2
    return torch.convolution(x, weight, bias, strides, padding[::2], dilations, False, zeros, groups)


def matmul(x, y, transpose_x=False, transpose_y=False, bias=None):
    y = (x.transpose(-2, -1) if transpose_x else x) @ (y.transpose(-2, -1) if transpose_y else y)
    return y if bias is None else y + bias


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
    padded = _pad_axes(x, _find_padding(pad_type, pad, kernel_sizes, strides), -float('inf'))
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


def reshape(x, shape):
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])


def expand_dims(x, axes):
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


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
    return _pad_axes(x, pad, float(constant_val))


def _scale_sides(x, *factors):
    if any(factor != int(factor) for factor in factors):
        raise ValueError(f'upsampling by {factors} is not modelled.')
    return [side * int(factor) for side, factor in zip(x.shape[-2:], factors, strict=True)]


def upsample_nearest_neighbor(x, scale_factor_height=1, scale_factor_width=1):
    return F.interpolate(x, _scale_sides(x, scale_factor_height, scale_factor_width), mode='nearest')


def upsample_bilinear(x, scale_factor_height=1, scale_factor_width=1, align_corners=True, half_pixel_centers=None):
    if half_pixel_centers not in (None, not align_corners):
        raise ValueError(f'half_pixel_centers={half_pixel_centers}, align_corners={align_corners} is not modelled.')
    sides = _scale_sides(x, scale_factor_height, scale_factor_width)
    return F.interpolate(x, sides, mode='bilinear', align_corners=bool(align_corners))


def cast(x, dtype):
    wanted = {'fp16': torch.float32, 'fp32': torch.float32, 'int32': torch.int32, 'bool': torch.bool}[dtype]
    return x.to(wanted, copy=True)


OPERATIONS: dict[str, Callable] = {
    'abs': lambda x: x.abs(),
    'add': lambda x, y: x + y,
    'avg_pool': avg_pool,
    'batch_norm': batch_norm,
    'cast': cast,
    'clip': lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
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
    'leaky_relu': lambda x, alpha: F.leaky_relu(x, float(alpha)),
    'less': lambda x, y: torch.lt(x, y),
    'less_equal': lambda x, y: torch.le(x, y),
    'linear': lambda x, weight, bias=None: F.linear(x, weight, bias),
    'linear_activation': lambda x, alpha, beta=0.: alpha * x + beta,
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
    'reshape': reshape,
    'rsqrt': lambda x, epsilon=0.: (x + epsilon).rsqrt(),
    'select': lambda cond, a, b: torch.where(cond.bool(), a, b),
    'sigmoid': lambda x: x.sigmoid(),
    'sigmoid_hard': lambda x, alpha=0.2, beta=0.5: (x * alpha + beta).clamp(0, 1),
    'silu': lambda x: F.silu(x),
    'slice_by_index': slice_by_index,
    'softmax': lambda x, axis: x.softmax(dim=axis),
    'split': split,
    'sqrt': lambda x: x.sqrt(),
    'square': lambda x: x.square(),
    'squeeze': lambda x, axes=None: x.squeeze() if axes is None else x.squeeze(tuple(axes)),
    'sub': lambda x, y: x - y,
    'tanh': lambda x: x.tanh(),
    'transpose': lambda x, perm: x.permute(perm),
    'upsample_bilinear': upsample_bilinear,
    'upsample_nearest_neighbor': upsample_nearest_neighbor,
}
