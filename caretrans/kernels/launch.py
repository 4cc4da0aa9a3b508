"""Shared parts of the Triton kernels: the device they run on, the type of their sums, and their tuning."""
import math
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = [
    'INTERPRETED', 'accumulation_types', 'empty_map', 'is_channels_last', 'matmul', 'on_its_device', 'strides_in_units',
    'tuned']

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # Triton's interpreter: the kernels run on the CPU, slowly


def accumulation_types(x: torch.Tensor) -> dict[str, Any]:
    """The arguments ACC and PRECISION of a kernel that computes with `x`: sums are float32, or float64 for float64.

    Matmuls of float32 numbers use TF32 only where its error is lost in the rounding of a bfloat16 result (11 bits and
    8). Otherwise they keep float32's precision, with three TF32 matmuls on tensor cores.
    """
    if x.dtype == torch.float64:
        return dict(ACC=tl.float64, PRECISION='ieee')
    if not x.is_cuda or torch.version.hip:
        return dict(ACC=tl.float32, PRECISION='ieee')
    return dict(ACC=tl.float32, PRECISION='tf32' if x.dtype == torch.bfloat16 else 'tf32x3')


@triton.jit
def matmul(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    if ACC == tl.float64:  # which tl.dot supports only in newer releases
        out = tl.sum(a[:, :, None].to(ACC) * b[None, :, :].to(ACC), 1)
    else:
        out = tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)
    return out


def is_channels_last(x: torch.Tensor) -> bool:
    """True if the channels of the map `x` (B, C, H, W), which may be a slice of another, are adjacent in memory."""
    return x.stride(1) == 1


def strides_in_units(*maps: torch.Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """(unit, strides of each map): the strides of samples, rows and columns are given in this unit.

    The compiler loads 16 bytes at a time if it knows that addresses are multiples of 16 bytes. It only knows whether an
    argument is a multiple of 16, but channels may be multiples of 8: so units are 8 in channels-last memory, else 1.
    """
    steps = [(x.stride(0), x.stride(2), x.stride(3)) for x in maps]
    unit = math.gcd(8, *(step for steps_of_map in steps for step in steps_of_map))
    if not all(is_channels_last(x) for x in maps):
        unit = 1
    return unit, [(b // unit, x.stride(1), h // unit, w // unit) for x, (b, h, w) in zip(maps, steps, strict=True)]


def empty_map(like: torch.Tensor, chs: int) -> torch.Tensor:
    """An uninitialised dense map (B, chs, H, W) with the layout, device and dtype of the map `like`, maybe a slice."""
    return torch.empty(
        (like.shape[0], chs, *like.shape[2:]), dtype=like.dtype, device=like.device,
        memory_format=torch.channels_last if is_channels_last(like) else torch.contiguous_format)


def on_its_device(function: Callable) -> Callable:
    """Let `function` launch on the GPU of its first argument, which need not be the current one."""
    @wraps(function)
    def launch(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(x):
            return function(x, *args, **kwargs)
    return launch


def tuned(configs: list[triton.Config], key: list[str], fit: Callable[..., list[triton.Config]]):
    """`triton.autotune` over `configs`, once per process and per value of the arguments `key`.

    Only for kernels that sum each output in the same order for any tile, so that results do not depend on the choice.
    It tries the configs that `fit(configs, arguments, **kwargs)` returns; the interpreter uses the first.
    """
    if INTERPRETED:
        return triton.heuristics({
            name: lambda _, value=value: value for name, value in configs[0].kwargs.items()})
    return triton.autotune(configs, key=key, prune_configs_by=dict(early_config_prune=fit))
