"""Shared parts of the Triton kernels: the device they run on, the type of their sums, and their tuning."""
import math
import os
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = [
    'INTERPRETED', 'accumulation_types', 'empty_map', 'is_channels_last', 'matrix_product', 'on_its_device',
    'strides_in_units', 'tuned']

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # Triton's interpreter: the kernels run on the CPU, slowly


def accumulation_types(x: torch.Tensor) -> dict[str, Any]:
    """The arguments ACC and PRECISION of a kernel that computes with `x`: sums are float32, or float64 for float64.

    Matrix products of float32 numbers are TF32 products only where that is lost in the rounding of a bfloat16 result
    (11 bits against 8). Else they keep float32's precision: three TF32 products where tensor cores take them.
    """
    if x.dtype == torch.float64:
        return dict(ACC=tl.float64, PRECISION='ieee')
    if not x.is_cuda or torch.version.hip:
        return dict(ACC=tl.float32, PRECISION='ieee')
    return dict(ACC=tl.float32, PRECISION='tf32' if x.dtype == torch.bfloat16 else 'tf32x3')


@triton.jit
def matrix_product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    if ACC == tl.float64:  # which tl.dot takes in newer releases only
        product = tl.sum(a[:, :, None].to(ACC) * b[None, :, :].to(ACC), 1)
    else:
        product = tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)
    return product


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the channels of the map `x` (B, C, H, W), perhaps a slice of another map, lie next to each other."""
    return x.stride(1) == 1


def strides_in_units(*maps: torch.Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """(unit, strides of each map): the strides of samples, rows and columns are given in this unit.

    The compiler loads 16 bytes at a time where it knows that addresses are multiples of them; of a number that it is
    passed it knows whether 16 divides it, but channels come in eights too. Eights in channels-last memory, else ones.
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


def tuned(configs: list[triton.Config], key: list[str], fitting: Callable[..., list[triton.Config]]):
    """`triton.autotune` over `configs`, once per process and per value of the arguments `key`.

    Only for kernels that sum each output in one order whatever the tile, so that results do not depend on the choice.
    Of the configs `fitting(configs, arguments)` are tried; the interpreter, which has nothing to time, takes the first.
    """
    if INTERPRETED:
        return triton.heuristics({name: partial(_get, value) for name, value in configs[0].kwargs.items()})

    def prune(configs: list[triton.Config], named_args, **kwargs) -> list[triton.Config]:
        return fitting(configs, named_args)

    return triton.autotune(configs, key=key, prune_configs_by=dict(early_config_prune=prune))


def _get(value: int, arguments: dict[str, Any]) -> int:
    return value
