"""Profile of a forward pass: its time by part of the network and by kind of module, measured by hooks.

    profile = profile_call(lambda: model(images), images.device, model)
    print(describe_profile(profile))

Hooks note when the modules begin and end. The time of a module is its own, without that of the modules inside it; what
runs between modules (sums, concatenations, pooling by functions) counts as 'rest' of the part around it. On a GPU the
times are measured with CUDA events, which include the gaps between kernels while the GPU waits for launches.
"""
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from ..kernels.modules import KernelModule
from ..measure.counts import ATTENTION, DEPTHWISE, LINEAR, OTHER_CONV, OUTSIDE, POINTWISE, list_parts
from ..measure.tables import format_table
from ..measure.timing import synchronise, time_block
from .record import Record

__all__ = ['KINDS', 'Profile', 'describe_profile', 'find_attention', 'list_profile', 'profile_call']

MIXER, REST = 'mixer', 'rest'
KINDS = (  # a mixer that runs as one kernel is a kind of its own
    POINTWISE, DEPTHWISE, OTHER_CONV, ATTENTION, LINEAR, MIXER, 'activation', 'normalisation', REST)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
ACTIVATIONS = ('torch.nn.modules.activation', 'timm.layers.activations')  # modules that define them
Cell = tuple[str, str]  # part of the network, kind of module
Owner = tuple[str, str, str]  # part, kind, name of a module


@dataclass(frozen=True)
class Profile:
    """Milliseconds per call, medians over the runs.

    Attributes:
        cells: {(part of the network, kind of `KINDS`): milliseconds}.
        modules: {(part, kind, name of a module): milliseconds of its own}.
        total_ms: Time of a whole call, without hooks.
        profiled_ms: The same with hooks; the difference is what the hooks cost.
        runs: Calls that were profiled.
    """
    cells: dict[Cell, float]
    modules: dict[Owner, float]
    total_ms: float
    profiled_ms: float
    runs: int

    @property
    def busy_ms(self) -> float:
        """The sum of the cells."""
        return sum(self.cells.values())

    def sum_by(self, place: int) -> dict[str, float]:
        """Milliseconds by part (0) or by kind (1)."""
        sums: dict[str, float] = defaultdict(float)
        for cell, ms in self.cells.items():
            sums[cell[place]] += ms
        return dict(sums)


# Kinds ----------------------------------------------------------------------------------------------------------------

def find_attention(model: nn.Module) -> list[str]:
    """The names of the modules whose class is an attention, of this package or of timm: LinearAttention, LiteMLA ..."""
    return [name for name, module in model.named_modules()
            if re.search(r'(Attention|Attn|MLA)(\dd)?$', type(module).__name__)]


def _name_kind(module: nn.Module) -> str | None:
    """Kind of a module; None if it only contains others."""
    if isinstance(module, KernelModule):
        return module.part
    if isinstance(module, nn.Conv2d):
        if module.groups == module.in_channels > 1:
            return DEPTHWISE
        return POINTWISE if module.kernel_size == (1, 1) and module.groups == 1 else OTHER_CONV
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, NORMS):
        return 'normalisation'
    return 'activation' if type(module).__module__ in ACTIVATIONS else None


def _list_owners(model: nn.Module) -> dict[str, Owner]:
    """Modules to time, by name: parts of the network, and all modules with a kind."""
    parts, attention, owners = list_parts(model), set(find_attention(model)), {}
    for name, module in model.named_modules():
        part = next((part for part in parts if f'{name}.'.startswith(f'{part}.')), OUTSIDE)
        kind = ATTENTION if name in attention else _name_kind(module)
        if name in parts or kind:
            owners[name] = part, kind or REST, name
    return owners


# Measurement ----------------------------------------------------------------------------------------------------------

class _Clock:
    """Marks the time whenever another module begins to run, or runs again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[Any, Owner]] = []
        self.stack: list[Owner] = [(OUTSIDE, REST, '')]

    def mark(self) -> None:
        if self.device.type == 'cuda':
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            synchronise(self.device)
            now = time.perf_counter()
        self.marks.append((now, self.stack[-1]))

    @contextmanager
    def attached(self, model: nn.Module | None) -> Iterator[None]:
        """Hooks in the modules of a network."""
        handles: list[Any] = []
        for name, owner in (_list_owners(model) if model is not None else {}).items():
            def enter(*_: Any, owner: Owner = owner) -> None:
                self.stack.append(owner)
                self.mark()

            def leave(*_: Any) -> None:
                self.stack.pop()
                self.mark()

            module = model.get_submodule(name)
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sum_up(self) -> Counter:
        """Milliseconds of each owner."""
        synchronise(self.device)
        sums: Counter = Counter()
        for (start, owner), (end, _) in zip(self.marks, self.marks[1:], strict=False):
            sums[owner] += start.elapsed_time(end) if self.device.type == 'cuda' else 1e3 * (end - start)
        return sums


def profile_call(
        call: Callable[[], Any], device: torch.device, model: nn.Module | None = None, runs: int = 10,
        warmup: int = 3) -> Profile:
    """Profile anything that runs a network.

    Args:
        call: Runs it once; it is called `warmup` + 3 * `runs` times.
        model: The network in it. Without it (a compiled network or a CUDA graph calls no modules) all time is 'rest'
            of `measure.OUTSIDE`.
        runs: Calls with hooks, and as many without before and after.
    Raises:
        ValueError: `runs` is below 1.
    """
    if runs < 1:
        raise ValueError(f'runs={runs} must be at least 1.')
    time_block(call, warmup, device)
    plain = time_block(call, runs, device)
    sums: list[Counter] = []
    for _ in range(runs):
        clock = _Clock(device)
        with clock.attached(model):
            clock.mark()
            call()
            clock.mark()
        sums.append(clock.sum_up())
    plain += time_block(call, runs, device)
    modules = {owner: statistics.median(run[owner] for run in sums) for owner in sums[0]}
    cells: dict[Cell, list[Owner]] = defaultdict(list)
    for owner in modules:
        cells[owner[:2]].append(owner)
    return Profile(
        {cell: statistics.median(sum(run[owner] for owner in owners) for run in sums)
         for cell, owners in cells.items()},
        modules, 1e3 * statistics.median(plain), statistics.median(sum(run.values()) for run in sums), runs)


# Records and text -----------------------------------------------------------------------------------------------------

def list_profile(profile: Profile, setup: Record) -> list[Record]:
    """A record for each cell.

    Args:
        setup: Model, backend, device and images of the call; its other fields are replaced.
    """
    return [replace(
        setup, bench='profile', part=part, kind=kind, ms=ms, share=ms / profile.busy_ms, total_ms=profile.total_ms,
        profiled_ms=profile.profiled_ms, runs=profile.runs) for (part, kind), ms in profile.cells.items()]


def describe_profile(profile: Profile, top: int = 10) -> str:
    """A table of kinds by parts, the time of a whole call, and the `top` modules that take longest."""
    by_part, by_kind = profile.sum_by(0), profile.sum_by(1)
    rows = [[kind, *(f'{profile.cells.get((part, kind), 0.):.3f}' for part in by_part), f'{by_kind[kind]:.3f}',
             f'{by_kind[kind] / profile.busy_ms:.1%}'] for kind in KINDS if kind in by_kind]
    rows.append(['all', *(f'{ms:.3f}' for ms in [*by_part.values(), profile.busy_ms]), ''])
    overhead = profile.profiled_ms / profile.total_ms - 1
    longest = sorted(profile.modules, key=lambda owner: -profile.modules[owner])[:top]
    return '\n'.join([
        *format_table(['ms per call', *by_part, 'all', 'share'], rows), '',
        f'A call takes {profile.total_ms:.3f} ms, {profile.profiled_ms:.3f} ms with the hooks of the profiler '
        f'({overhead:+.0%}; medians of {2 * profile.runs} and {profile.runs} runs). The cells are as profiled.', '',
        'The longest modules, ms per call without the modules inside:',
        *(f'{profile.modules[owner]:9.3f}  {owner[1]:15}  {owner[2] or owner[0]}' for owner in longest)])
