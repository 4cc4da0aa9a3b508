"""Comparisons of the kernels of caretrans.kernels with slow and obvious versions in float64, on any device."""
import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
from definitions import random_rotation

from caretrans.kernels import use_kernels
from caretrans.models.attention import linear_attention
from caretrans.models.care import DecoupledMixer

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# (B, h, d, e, N): heads of the network, odd and unequal widths, one position, more than a tile, wide heads
HEADS = [(2, 2, 16, 16, 49), (1, 2, 32, 32, 65), (1, 3, 24, 8, 30), (2, 1, 5, 40, 33), (1, 1, 16, 16, 1),
         (1, 1, 64, 128, 20)]
ATTENTIONS = [(shape, rotated) for rotated in (False, True) for shape in HEADS if not rotated or shape[2] % 2 == 0]
# (B, widths of the slices, num_heads, H, W): strips or attention; maps smaller than the kernels, long, odd
MIXERS = [
    (2, (8, 8), 0, 4, 5), (1, (6, 3), 0, 1, 2), (1, (9, 10), 0, 2, 14), (2, (8, 8), 2, 3, 4), (1, (5, 3), 1, 1, 1)]


def slice_of(chs: int, offset: int, shape: Sequence[int], channels_last: bool, dtype: torch.dtype, device: str):
    """A random map (B, chs, H, W) that is a slice of a wider one, as a block's parts are."""
    B, H, W = shape
    x = torch.randn(B, chs + offset + 3, H, W, device=device, dtype=dtype)
    return x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)[:, offset:offset + chs]


def error_of(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to the largest value of the expected tensor if that is above 1."""
    errors = [
        ((a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1)).item()
        for a, e in zip(actual, expected, strict=True)]
    return max(errors) if all(error == error for error in errors) else float('nan')


def run(function: Callable, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The output of the function and the gradients of its inputs, for a fixed gradient of the output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device).sin() * 3
    return [output, *torch.autograd.grad(output, inputs, grad.reshape(output.shape).to(output.dtype))]


def rotation_of(
        shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False, device: str = 'cpu') -> torch.Tensor:
    """A random rotation for heads of this shape, positions or channels next to each other, at least float32."""
    _, h, d, _, N = shape
    rotate = random_rotation(h, d, N).to(device, torch.promote_types(dtype, torch.float32))
    return rotate.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0) if channels_last else rotate


def run_with_parameters(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of the module and the gradients of its input and of all its parameters, as `run` has them."""
    names = [name for name, _ in module.named_parameters()]

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    return run(call, (x, *module.parameters()))


def check_attention(
        attend: Callable, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False, scale: float = 1.,
        device: str = 'cpu', rotated: bool = False) -> None:
    """`attend` (q, k, v, rotate=) with strided inputs, forward and backward, in the layout and dtype of the values.

    Channels last: as tokens (B, N, C) lie too.
    """
    B, h, d, e, N = shape
    qk = slice_of(2 * h * d, 2, (B, 1, N), channels_last, dtype, device) * scale
    q, k = (x.reshape(B, h, d, N) for x in qk.chunk(2, dim=1))
    v = slice_of(h * e, 8, (B, 1, N), channels_last, dtype, device).reshape(B, h, e, N)
    rotate: torch.Tensor | None = rotation_of(shape, dtype, channels_last, device) if rotated else None
    actual = run(partial(attend, rotate=rotate), (q, k, v))
    assert actual[0].dtype == v.dtype
    assert N == 1 or actual[0].stride(3) == (h * e if channels_last else 1)
    error = error_of(actual, run(partial(linear_attention, rotate=rotate), [x.double() for x in (q, k, v)]))
    assert error <= TOLERANCES[dtype], f'off by {error:.1e}'


def make_mixer(widths: tuple[int, int], num_heads: int, dtype: torch.dtype, device: str) -> DecoupledMixer:
    mixer = DecoupledMixer(*widths, num_heads).to(device, dtype)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer


def check_mixer(
        shape: tuple, dtype: torch.dtype, channels_last: bool = False, device: str = 'cpu',
        spoil: Callable = lambda mixer: None) -> None:
    """A mixer with kernels inside and a strided input: output, gradients of the input and of all parameters.

    `spoil` may break the one with kernels.
    """
    B, widths, num_heads, H, W = shape
    mixer = make_mixer(widths, num_heads, dtype, device)
    reference = copy.deepcopy(mixer).double()
    assert [placement.runs for placement in use_kernels(mixer, parts=['mixer'])].count('triton') == 1
    spoil(mixer)
    x = slice_of(widths[0] + 2 * widths[1], 5, (B, H, W), channels_last, dtype, device)
    actual, expected = run_with_parameters(mixer, x), run_with_parameters(reference, x.double())
    assert actual[0].dtype == dtype and actual[0].is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    error = error_of(actual, expected)
    assert error <= TOLERANCES[dtype], f'off by {error:.1e}'
