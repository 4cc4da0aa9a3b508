"""Small Core ML programs, one operation each, beside the same in PyTorch."""
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types


logging.getLogger('coremltools').setLevel(logging.ERROR)

SHAPE = (1, 6, 5, 7)
Case = tuple[Callable, Callable]


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_program(operation: Callable, target: Any = ct.target.iOS17, half: bool = False) -> Any:
    """A program of one operation on (1, 6, 5, 7), its values in one row; without any pass that would change it."""
    @mb.program(
        input_specs=[mb.TensorSpec(SHAPE, dtype=types.fp16 if half else types.fp32)], opset_version=target)
    def program(x):
        y = operation(x)
        return mb.reshape(x=y, shape=(1, int(np.prod(y.shape))), name='row')
    return program


def save_operation(operation: Callable, path: Path, target: Any = ct.target.iOS17, half: bool = False) -> Path:
    """One operation as a package or network, by the suffix of the path."""
    if path.suffix == '.mlmodel':
        model = ct.convert(build_program(operation, ct.target.iOS15), convert_to='neuralnetwork')
    else:
        model = ct.convert(
            build_program(operation, target, half), convert_to='mlprogram', minimum_deployment_target=target,
            compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY)
    model.save(str(path))
    return path


def save_cases(cases: dict[str, Case], path: Path) -> Path:
    """All cases in one program: the values of one after those of the other."""
    def operation(x):
        rows = [mb.reshape(x=y, shape=(1, int(np.prod(y.shape)))) for y in [case(x) for case, _ in cases.values()]]
        return mb.concat(values=rows, axis=1)
    return save_operation(operation, path)


def split_cases(cases: dict[str, Case], row: torch.Tensor, x: torch.Tensor) -> dict[str, tuple]:
    """{case: (values of the program, values of PyTorch)}, both flat."""
    expected = {name: in_torch(x).flatten() for name, (_, in_torch) in cases.items()}
    found = row[0].split([len(y) for y in expected.values()])
    return {name: (part, expected[name]) for name, part in zip(cases, found, strict=True)}


def compress_operation(operation: Callable, path: Path, target: Any, compress: Callable) -> Path:
    """One operation in float32 as a package, its weights compressed by a function of models."""
    model = ct.convert(
        build_program(operation, target), convert_to='mlprogram', minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT32)
    compress(model).save(str(path))
    return path


def edit(path: Path, change: Callable) -> None:
    """Change a file on disk: `change` takes its specification and its operations or layers."""
    spec = ct.models.utils.load_spec(str(path))
    if path.suffix == '.mlmodel':
        change(spec, getattr(spec, spec.WhichOneof('Type')).layers)
        path.write_bytes(spec.SerializeToString())
    else:
        block, = spec.mlProgram.functions['main'].block_specializations.values()
        change(spec, block.operations)
        (path / 'Data' / 'com.apple.CoreML' / 'model.mlmodel').write_bytes(spec.SerializeToString())


def _conv(weight_shape: tuple[int, ...], torch_padding: list[int], bias: bool = True, **parameters: Any) -> Case:
    """`torch_padding` as F.pad takes it."""
    weight, shift = values(*weight_shape, seed=1), values(weight_shape[0], seed=2) if bias else None
    known = dict(parameters, weight=weight.numpy(), **({'bias': shift.numpy()} if bias else {}))

    def in_torch(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(
            F.pad(x, torch_padding), weight, shift, parameters.get('strides', 1), 0, parameters.get('dilations', 1),
            parameters.get('groups', 1))
    return lambda x: mb.conv(x=x, **known), in_torch


def _norm_weights(count: int) -> dict[str, torch.Tensor]:
    return dict(mean=values(count, seed=1), variance=values(count, seed=2).square() + .1,
                gamma=values(count, seed=3), beta=values(count, seed=4))


_NORM = _norm_weights(6)
_ROW = values(7, seed=5)
_MATRIX = values(1, 6, 7, 4, seed=6)

# {name: (the operation, the same in PyTorch)}; both formats have them.
CASES: dict[str, Case] = {
    'conv 3x3, custom padding of four sizes': _conv(
        (4, 6, 3, 3), [3, 0, 1, 2], pad_type='custom', pad=[1, 2, 3, 0]),
    'conv with strides and groups': _conv((6, 2, 2, 3), [0, 0, 0, 0], strides=[2, 1], groups=3, pad_type='valid'),
    'conv depth-wise 5x5, symmetric padding': _conv(
        (6, 1, 5, 5), [2, 2, 2, 2], pad_type='custom', pad=[2, 2, 2, 2], groups=6),
    'conv dilated, no bias': _conv((3, 6, 2, 2), [0, 0, 0, 0], bias=False, dilations=[2, 3], pad_type='valid'),
    'conv 3x5, same padding': _conv((4, 6, 3, 5), [2, 2, 1, 1], pad_type='same'),
    'linear': (
        lambda x: mb.linear(x=mb.reshape(x=x, shape=(30, 7)), weight=values(4, 7, seed=1).numpy(),
                            bias=values(4, seed=2).numpy()),
        lambda x: F.linear(x.reshape(30, 7), values(4, 7, seed=1), values(4, seed=2))),
    'matmul, plain': (lambda x: mb.matmul(x=x, y=_MATRIX.numpy()), lambda x: x @ _MATRIX),
    'matmul, first transposed': (
        lambda x: mb.matmul(x=mb.abs(x=x), y=x, transpose_x=True), lambda x: x.abs().transpose(-2, -1) @ x),
    'matmul, second transposed': (
        lambda x: mb.matmul(x=mb.abs(x=x), y=x, transpose_y=True), lambda x: x.abs() @ x.transpose(-2, -1)),
    'batch_norm': (
        lambda x: mb.batch_norm(x=x, epsilon=np.float32(.5), **{key: v.numpy() for key, v in _NORM.items()}),
        lambda x: F.batch_norm(x, _NORM['mean'], _NORM['variance'], _NORM['gamma'], _NORM['beta'], eps=.5)),
    'layer_norm of the last axis': (
        lambda x: mb.layer_norm(x=mb.reshape(x=x, shape=(30, 7)), axes=[-1], gamma=_ROW.numpy(),
                                beta=2 * _ROW.numpy(), epsilon=np.float32(.1)),
        lambda x: F.layer_norm(x.reshape(30, 7), (7,), _ROW, 2 * _ROW, .1)),
    'layer_norm without weights, of two axes': (
        lambda x: mb.layer_norm(x=x, axes=[2, 3], epsilon=np.float32(.1)),
        lambda x: F.layer_norm(x, (5, 7), eps=.1)),
    'gelu, exact': (lambda x: mb.gelu(x=x, mode='EXACT'), F.gelu),
    'gelu, tanh': (lambda x: mb.gelu(x=x, mode='TANH_APPROXIMATION'), lambda x: F.gelu(x, approximate='tanh')),
    'gelu, sigmoid': (lambda x: mb.gelu(x=x, mode='SIGMOID_APPROXIMATION'), lambda x: x * (1.702 * x).sigmoid()),
    'softmax of the last axis': (lambda x: mb.softmax(x=x, axis=-1), lambda x: x.softmax(dim=-1)),
    'softmax of channels': (lambda x: mb.softmax(x=x, axis=1), lambda x: x.softmax(dim=1)),
    'softmax of a negative axis': (lambda x: mb.softmax(x=x, axis=-2), lambda x: x.softmax(dim=2)),
    'add, broadcast': (lambda x: mb.add(x=x, y=_ROW.numpy()), lambda x: x + _ROW),
    'sub': (lambda x: mb.sub(x=mb.exp(x=x), y=x), lambda x: x.exp() - x),
    'mul by a number': (lambda x: mb.mul(x=x, y=np.float32(3)), lambda x: x * 3),
    'real_div': (lambda x: mb.real_div(x=x, y=mb.exp(x=x)), lambda x: x / x.exp()),
    'maximum': (lambda x: mb.maximum(x=x, y=_ROW.numpy()), lambda x: torch.maximum(x, _ROW)),
    'minimum': (lambda x: mb.minimum(x=x, y=_ROW.numpy()), lambda x: torch.minimum(x, _ROW)),
    'clip': (lambda x: mb.clip(x=x, alpha=np.float32(-.5), beta=np.float32(.25)), lambda x: x.clamp(-.5, .25)),
    'log': (lambda x: mb.log(x=mb.exp(x=x)), lambda x: x.exp().log()),
    'inverse with its silent epsilon': (lambda x: mb.inverse(x=mb.exp(x=x)), lambda x: 1 / (x.exp() + 1e-4)),
    'inverse with an epsilon': (
        lambda x: mb.inverse(x=mb.exp(x=x), epsilon=np.float32(.5)), lambda x: 1 / (x.exp() + .5)),
    'rsqrt with an epsilon': (
        lambda x: mb.rsqrt(x=mb.exp(x=x), epsilon=np.float32(.5)), lambda x: (x.exp() + .5).rsqrt()),
    'sqrt': (lambda x: mb.sqrt(x=mb.exp(x=x)), lambda x: x.exp().sqrt()),
    'relu': (lambda x: mb.relu(x=x), torch.relu),
    'sigmoid': (lambda x: mb.sigmoid(x=x), torch.sigmoid),
    'sigmoid_hard': (
        lambda x: mb.sigmoid_hard(x=x, alpha=np.float32(.3), beta=np.float32(.4)),
        lambda x: (x * .3 + .4).clamp(0, 1)),
    'tanh': (lambda x: mb.tanh(x=x), torch.tanh),
    'erf': (lambda x: mb.erf(x=x), torch.erf),
    'leaky_relu': (lambda x: mb.leaky_relu(x=x, alpha=np.float32(.2)), lambda x: F.leaky_relu(x, .2)),
    'linear_activation': (
        lambda x: mb.linear_activation(x=x, alpha=np.float32(2), beta=np.float32(3)), lambda x: 2 * x + 3),
    'elu': (lambda x: mb.elu(x=x, alpha=np.float32(.7)), lambda x: F.elu(x, .7)),
    'less and select': (
        lambda x: mb.select(cond=mb.less(x=x, y=np.float32(.1)), a=mb.exp(x=x), b=x),
        lambda x: torch.where(x < .1, x.exp(), x)),
    'greater and select': (
        lambda x: mb.select(cond=mb.greater(x=x, y=np.float32(.1)), a=mb.exp(x=x), b=x),
        lambda x: torch.where(x > .1, x.exp(), x)),
    'concat': (lambda x: mb.concat(values=[x, mb.exp(x=x)], axis=-2), lambda x: torch.cat([x, x.exp()], dim=2)),
    'concat of channels': (lambda x: mb.concat(values=[mb.exp(x=x), x], axis=1), lambda x: torch.cat([x.exp(), x], 1)),
    'concat, interleaved': (
        lambda x: mb.concat(values=[x, mb.exp(x=x)], axis=1, interleave=True),
        lambda x: torch.stack([x, x.exp()], dim=2).flatten(1, 2)),
    'split by sizes': (
        lambda x: mb.concat(values=mb.split(x=x, split_sizes=[1, 3, 2], axis=1)[::-1], axis=1),
        lambda x: torch.cat(x.split([1, 3, 2], dim=1)[::-1], dim=1)),
    'split in equal parts': (
        lambda x: mb.concat(values=mb.split(x=x, num_splits=3, axis=-3)[::-1], axis=1),
        lambda x: torch.cat(x.chunk(3, dim=1)[::-1], dim=1)),
    'reshape': (lambda x: mb.softmax(x=mb.reshape(x=x, shape=(2, -1, 5)), axis=1),
                lambda x: x.reshape(2, 21, 5).softmax(dim=1)),
    'transpose': (lambda x: mb.transpose(x=x, perm=[0, 2, 3, 1]), lambda x: x.permute(0, 2, 3, 1)),
    'transpose by negative axes': (lambda x: mb.transpose(x=x, perm=[0, 1, -1, -2]), lambda x: x.transpose(2, 3)),
    'expand_dims': (lambda x: mb.softmax(x=mb.expand_dims(x=mb.squeeze(x=x, axes=[0]), axes=[-1, 1]), axis=2),
                    lambda x: x[0][:, None, :, :, None].softmax(dim=2)),
    'squeeze': (lambda x: mb.softmax(x=mb.squeeze(x=x, axes=[0]), axis=0), lambda x: x[0].softmax(dim=0)),
    'slice_by_index': (
        lambda x: mb.slice_by_index(x=x, begin=[0, 1, -4, 0], end=[1, 5, -1, 7], stride=[1, 2, 1, 3],
                                    end_mask=[True, False, False, True]),
        lambda x: x[:, 1:5:2, -4:-1, ::3]),
    'reduce_mean, axes kept': (lambda x: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True),
                               lambda x: x.mean(dim=(2, 3), keepdim=True)),
    'reduce_mean of a negative axis': (lambda x: mb.softmax(x=mb.reduce_mean(x=x, axes=[-2], keep_dims=False), axis=1),
                                       lambda x: x.mean(dim=2).softmax(dim=1)),
    'reduce_sum': (lambda x: mb.reduce_sum(x=x, axes=[1], keep_dims=False), lambda x: x.sum(dim=1)),
    'reduce_max': (lambda x: mb.reduce_max(x=x, axes=[-1], keep_dims=True), lambda x: x.amax(dim=3, keepdim=True)),
    'reduce_min': (lambda x: mb.reduce_min(x=x, axes=[-1], keep_dims=True), lambda x: x.amin(dim=3, keepdim=True)),
    'reduce_log_sum_exp': (lambda x: mb.reduce_log_sum_exp(x=x, axes=[-1], keep_dims=True),
                           lambda x: x.logsumexp(dim=3, keepdim=True)),
}

# Of ML Programs alone.
PROGRAM_CASES: dict[str, Case] = {
    'batch_norm without weights': (
        lambda x: mb.batch_norm(x=x, mean=_NORM['mean'].numpy(), variance=_NORM['variance'].numpy()),
        lambda x: F.batch_norm(x, _NORM['mean'], _NORM['variance'], eps=1e-5)),
    'log with an epsilon': (
        lambda x: mb.log(x=mb.exp(x=x), epsilon=np.float32(.5)), lambda x: (x.exp() + .5).log()),
    'pow': (lambda x: mb.pow(x=mb.exp(x=x), y=np.float32(1.5)), lambda x: x.exp() ** 1.5),
    'square and identity': (lambda x: mb.identity(x=mb.square(x=x)), torch.square),
    'silu': (lambda x: mb.silu(x=x), F.silu),
    'relu6': (lambda x: mb.relu6(x=mb.exp(x=x)), lambda x: x.exp().clamp(max=6)),
    'less_equal and select': (
        lambda x: mb.select(cond=mb.less_equal(x=x, y=x), a=mb.exp(x=x), b=x), torch.exp),
    'greater_equal and select': (
        lambda x: mb.select(cond=mb.greater_equal(x=x, y=x), a=mb.exp(x=x), b=x), torch.exp),
    'equal and select': (lambda x: mb.select(cond=mb.equal(x=x, y=mb.abs(x=x)), a=mb.exp(x=x), b=x),
                         lambda x: torch.where(x == x.abs(), x.exp(), x)),
    'cast to float16 and back': (
        lambda x: mb.cast(x=mb.cast(x=x, dtype='fp16'), dtype='fp32'), lambda x: x.half().float()),
    'pad': (lambda x: mb.pad(x=x, pad=[1, 2, 0, 3], mode='constant', constant_val=np.float32(2)),
            lambda x: F.pad(x, [0, 3, 1, 2], value=2.)),
    'upsample_nearest_neighbor': (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode='nearest')),
    'upsample_bilinear': (
        lambda x: mb.upsample_bilinear(
            x=x, scale_factor_height=np.float32(2), scale_factor_width=np.float32(2), align_corners=False,
            half_pixel_centers=True),
        lambda x: F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)),
    'upsample_bilinear, corners aligned': (
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=2),
        lambda x: F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=True)),
    'avg_pool': (
        lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 1], pad_type='custom', pad=[1, 1, 1, 1],
                              exclude_padding_from_average=True),
        lambda x: F.avg_pool2d(x, 3, [2, 1], 1, count_include_pad=False)),
    'avg_pool, padding counted': (
        lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 1], pad_type='custom', pad=[1, 1, 1, 1]),
        lambda x: F.avg_pool2d(x, 3, [2, 1], 1)),
    'max_pool': (
        lambda x: mb.max_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type='custom', pad=[1, 1, 0, 1]),
        lambda x: F.max_pool2d(F.pad(x, [0, 1, 1, 1], value=-float('inf')), 3, 2)),
    'squeeze of all and slice with an index': (
        lambda x: mb.slice_by_index(x=mb.squeeze(x=x), begin=[2, 0, 0], end=[0, 0, 4],
                                    begin_mask=[False, True, True], end_mask=[False, True, False],
                                    squeeze_mask=[True, False, False]),
        lambda x: x[0, 2, :, :4]),
}
