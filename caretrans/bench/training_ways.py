"""Ways to make the same training step: layout, precision, compiler, kernels; the speed changes, not the mathematics."""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..kernels import why_unavailable
from .device_rates import allow_tf32

__all__ = ['PUBLISHED', 'Way', 'list_ways', 'parse_way', 'training_precision']

CHANGES = ('tf32', 'channels_last', 'bf16', 'fp16', 'compile', 'kernels')
PUBLISHED = 'published'
ON_GPU = ('tf32', 'fp16')


@dataclass(frozen=True)
class Way:
    """What is changed of the published way, float32 in eager mode and NCHW: a set of `CHANGES`."""
    changes: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return '+'.join(change for change in CHANGES if change in self.changes) or PUBLISHED

    @property
    def settings(self) -> dict[str, Any]:
        """Of a `TrainConfig`."""
        amp = next(iter(self.changes & {'bf16', 'fp16'}), 'off')
        switches = ('tf32', 'channels_last', 'compile', 'kernels')
        return dict(amp=amp, **{name: name in self.changes for name in switches})

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if 'channels_last' in self.changes else torch.contiguous_format

    @property
    def dtype(self) -> str:
        """Of the products, as records name it."""
        names = {'bf16': 'bfloat16', 'fp16': 'float16', 'tf32': 'tf32'}
        return next((names[change] for change in names if change in self.changes), 'float32')


def parse_way(name: str, device: torch.device) -> Way:
    """The way of a name: 'published', or changes joined by '+', e.g. 'channels_last+bf16+compile'.

    Raises:
        ConfigError: An unknown change, two precisions, or one that this device does not have.
    """
    changes = frozenset() if name == PUBLISHED else frozenset(name.split('+'))
    unknown = changes - set(CHANGES)
    if unknown:
        raise ConfigError(
            f'No way of training {name!r}: take {PUBLISHED}, or some of {", ".join(CHANGES)} joined by +.')
    if {'bf16', 'fp16'} <= changes:
        raise ConfigError(f'{name!r} has two precisions: take bf16 or fp16.')
    absent = [change for change in ON_GPU if change in changes]
    if device.type != 'cuda' and absent:
        raise ConfigError(f'{name!r}: {", ".join(absent)} needs a GPU, the device is {device}: leave it out.')
    reason = why_unavailable(device) if 'kernels' in changes else ''
    if reason:
        raise ConfigError(f'{name!r}: {reason}: leave kernels out.')
    return Way(changes)


def list_ways(device: torch.device) -> tuple[str, ...]:
    """The published way, each change by itself, and those that go together."""
    alone = ('channels_last', 'bf16', 'compile')
    if device.type != 'cuda':
        return (PUBLISHED, *alone, 'channels_last+compile', 'channels_last+bf16+compile')
    kernels = () if why_unavailable(device) else ('kernels',)
    together = ('channels_last+bf16', 'channels_last+bf16+compile')
    most = (f'{way}+{change}' for way in together for change in kernels)
    return (PUBLISHED, 'tf32', *alone, *kernels, *together, *most)


@contextmanager
def training_precision(way: Way) -> Iterator[None]:
    """TF32 as the way has it, and cuDNN's choice of the fastest convolutions, which training takes in every way."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with allow_tf32('tf32' in way.changes):
            yield
    finally:
        torch.backends.cudnn.benchmark = before
