"""Ways to make the same training step: layout, precision, compiler, kernels; the speed changes, not the mathematics."""
import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, FrozenSet, Iterator, Tuple

import torch
import torch.nn as nn

from .config import ConfigError
from .device_rates import allow_tf32

__all__ = ['PUBLISHED', 'Way', 'list_ways', 'parse_way', 'training_precision']

CHANGES = ('tf32', 'channels_last', 'bf16', 'fp16', 'compile', 'kernels')
PUBLISHED = 'published'
ON_GPU = ('tf32', 'kernels', 'fp16')


@dataclass(frozen=True)
class Way:
    """What is changed of the published way, float32 in eager mode and NCHW: a set of `CHANGES`."""
    changes: FrozenSet[str] = frozenset()

    @property
    def name(self) -> str:
        return '+'.join(change for change in CHANGES if change in self.changes) or PUBLISHED

    @property
    def settings(self) -> Dict[str, Any]:
        """Of a `TrainConfig`; the kernels have none."""
        amp = next(iter(self.changes & {'bf16', 'fp16'}), 'off')
        return dict(amp=amp, **{name: name in self.changes for name in ('tf32', 'channels_last', 'compile')})

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if 'channels_last' in self.changes else torch.contiguous_format

    @property
    def dtype(self) -> str:
        """Of the products, as records name it."""
        names = {'bf16': 'bfloat16', 'fp16': 'float16', 'tf32': 'tf32'}
        return next((names[change] for change in names if change in self.changes), 'float32')

    def put_kernels(self, model: nn.Module) -> nn.Module:
        """Swap in the Triton kernels, if this way has them.

        Raises:
            ConfigError: Not one of them runs in this network.
        """
        if 'kernels' in self.changes:
            from .kernels import use_kernels  # Triton is not everywhere
            placements = use_kernels(model)
            if not any(placement.runs == 'triton' for placement in placements):
                reason = placements[0].reason if placements else f'{type(model).__name__} has no part for them'
                raise ConfigError(f'{self.name}: no kernel runs here, {reason}: leave kernels out.')
        return model


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
    if 'kernels' in changes and importlib.util.find_spec('triton') is None:
        raise ConfigError(f'{name!r}: the kernels need the package triton, which is not installed.')
    return Way(changes)


def list_ways(device: torch.device) -> Tuple[str, ...]:
    """The published way, each change by itself, and those that go together."""
    alone = ('channels_last', 'bf16', 'compile')
    if device.type != 'cuda':
        return (PUBLISHED, *alone, 'channels_last+compile', 'channels_last+bf16+compile')
    kernels = ('kernels',) if importlib.util.find_spec('triton') is not None else ()
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
