"""What a device can do at best, measured: bytes and operations per second, and the cost of launching an operation."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..measure.timing import time_block

__all__ = ['DTYPES', 'DeviceRates', 'allow_tf32', 'measure_rates']

DTYPES = dict(float32=torch.float32, tf32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
COPY_MIB = dict(cuda=1024, cpu=128)
PRODUCT_SIDES = dict(cuda=(4096, 8192), cpu=(256, 512, 1024))
CACHED_MIB = (1, 4, 16)


@dataclass(frozen=True)
class DeviceRates:
    """Rates of a device for one dtype.

    Attributes:
        bandwidth: Bytes per second, reading and writing both counted, of a copy larger than the caches.
        cached: The same of the best of some copies small enough for a cache.
        matmul: Operations per second of a large product, two for each multiply-add.
        vector: The same in float32 without TF32: what the vector units do.
        launch: Seconds that an operation on one element takes.
        how: A line on how they were found.
    """
    bandwidth: float
    cached: float
    matmul: float
    vector: float
    launch: float
    how: str = 'given'


@contextmanager
def allow_tf32(allow: bool) -> Iterator[None]:
    """Whether GPUs may round float32 to 10 bits of mantissa in products and convolutions, inside of the context."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _best(run: Callable[[], Any], device: torch.device, count: int) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    run()
    return min(time_block(run, count, device))


def _measure_copy(device: torch.device, mib: int, count: int) -> float:
    source = torch.ones(mib << 18, device=device)  # float32
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device, count)


def _measure_product(device: torch.device, dtype: torch.dtype, side: int, count: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side ** 3 / _best(lambda: torch.mm(a, b, out=out), device, count)


def _measure_products(device: torch.device, dtype: torch.dtype, sides: Sequence[int], count: int) -> float:
    return max(_measure_product(device, dtype, side, count) for side in sides)


def _measure_launch(device: torch.device, operations: int = 1000) -> float:
    x = torch.zeros(1, device=device)

    def run() -> None:
        for _ in range(operations):
            x.add_(1)
    return _best(run, device, 3) / operations


def measure_rates(
        device: torch.device, dtype: str = 'float32', copy_mib: int | None = None,
        sides: Sequence[int] | None = None, count: int = 10,
) -> DeviceRates:
    """Measure a device with the threads it has now; the best of `count` runs of each, for a bound.

    Args:
        dtype: Of `DTYPES`.
        copy_mib: Size of the large copy, MiB; by default 1024 on a GPU, else 128.
        sides: Of the matrices that are multiplied; by default up to 8192 on a GPU, else up to 1024.
    """
    copy_mib = copy_mib or COPY_MIB.get(device.type, COPY_MIB['cpu'])
    sides = sides or PRODUCT_SIDES.get(device.type, PRODUCT_SIDES['cpu'])
    bandwidth = _measure_copy(device, copy_mib, count)
    cached = max([bandwidth, *(_measure_copy(device, mib, count) for mib in CACHED_MIB)])
    with allow_tf32(dtype == 'tf32'):
        matmul = _measure_products(device, DTYPES[dtype], sides, count)
    with allow_tf32(False):
        vector = _measure_products(device, torch.float32, sides, count)
    return DeviceRates(
        bandwidth, cached, matmul, vector, _measure_launch(device),
        f'measured here, the best of {count} runs: a copy of {copy_mib} MiB, copies of {min(CACHED_MIB)} to '
        f'{max(CACHED_MIB)} MiB, products of square matrices of {min(sides)} to {max(sides)} in {dtype} and in float32')
