"""Measured peak rates of a device: bytes and operations per second, and the cost of launching an operation."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..measure.timing import time_block

__all__ = ['DTYPES', 'DeviceRates', 'allow_tf32', 'measure_rates']

DTYPES = dict(float32=torch.float32, tf32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
COPY_MIB = dict(cuda=1024)
MATMUL_SIDES = dict(cuda=(4096, 8192))
CACHED_MIB = (1, 4, 16)
LAUNCHES = 1000


@dataclass(frozen=True)
class DeviceRates:
    """Rates of a device for one dtype.

    Attributes:
        bandwidth: Bytes per second, read and written together, of a copy larger than the caches.
        cached: The same, of the best of some copies small enough for a cache.
        matmul: Operations per second of a large matmul, two for each multiply-add.
        vector: The same in float32 without TF32, the rate of the vector units.
        launch: Seconds that an operation on one element takes.
        how: A line on how they were measured.
    """
    bandwidth: float
    cached: float
    matmul: float
    vector: float
    launch: float
    how: str = 'given'


@contextmanager
def allow_tf32(allow: bool) -> Iterator[None]:
    """Let GPUs round float32 to 10 bits of mantissa in matmuls and convolutions inside the context, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def measure_rates(
        device: torch.device, dtype: str = 'float32', copy_mib: int | None = None,
        sides: Sequence[int] | None = None, count: int = 10) -> DeviceRates:
    """Measure a device with its current number of threads; each rate is the best of `count` runs.

    Args:
        dtype: One of `DTYPES`.
        copy_mib: Size of the large copy, MiB; by default 1024 on a GPU, else 128.
        sides: Sides of the matrices to multiply; by default up to 8192 on a GPU, else up to 1024.
    """
    def best(run: Callable[[], Any]) -> float:
        run()  # to warm up
        return min(time_block(run, count, device))

    def copy(mib: int) -> float:
        source = torch.ones(mib << 18, device=device)  # float32
        target = torch.empty_like(source)
        return 2 * source.nbytes / best(lambda: target.copy_(source))

    def multiply(side: int, dtype: torch.dtype) -> float:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * side ** 3 / best(lambda: torch.mm(a, b, out=out))

    def launch() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    copy_mib = copy_mib or COPY_MIB.get(device.type, 128)
    sides = sides or MATMUL_SIDES.get(device.type, (256, 512, 1024))
    x = torch.zeros(1, device=device)
    bandwidth = copy(copy_mib)
    with allow_tf32(dtype == 'tf32'):
        matmul = max(multiply(side, DTYPES[dtype]) for side in sides)
    with allow_tf32(False):
        vector = max(multiply(side, torch.float32) for side in sides)
    return DeviceRates(
        bandwidth, max(bandwidth, *map(copy, CACHED_MIB)), matmul, vector, best(launch) / LAUNCHES,
        f'measured here, the best of {count} runs: a copy of {copy_mib} MiB, copies of {min(CACHED_MIB)} to '
        f'{max(CACHED_MIB)} MiB, matmuls of square matrices of {min(sides)} to {max(sides)} in {dtype} and in float32')
