"""Where the time of a forward pass or of a training step goes: by part of the network and by kind of operation.

    print(describe_profile(profile_forward(timm.create_model('care_s0').eval(), torch.zeros(1, 3, 224, 224))))

The time is that of the operations themselves (self time), on the device that does the work, from PyTorch's profiler.
"""
import statistics
import time
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from ..measure.counts import OUTSIDE, list_parts
from ..measure.timing import synchronise
from .operations import (
    ATTENTION, CONVOLUTIONS, COPIES, GENERATED, KINDS, LINEAR, OURS, REST, classify_operation, find_attention)

__all__ = ['Profile', 'describe_profile', 'list_profile', 'profile_call', 'profile_forward']

MARK = 'caretrans/'  # begins the names of the scopes that the hooks open
IN_ATTENTION, RUN = f'{MARK}{ATTENTION}', f'{MARK}run'
Cell = tuple[str, str]  # part of the network, kind of operation


@dataclass(frozen=True)
class Profile:
    """Milliseconds per call.

    Attributes (medians over the runs):
        cells: {(part of the network, kind of `operations.KINDS`): milliseconds of its operations}.
        operations: {(kind, operation, shapes of its arguments): (milliseconds, calls)}.
        total_ms: Of a whole call, without the profiler.
        profiled_ms: The same under the profiler; the difference is what the profiler itself takes.
        runs: Calls that were profiled.
        device: 'cpu' or 'cuda'; there the cells are the time of kernels, and the rest of a call the GPU is idle.
    """
    cells: dict[Cell, float]
    operations: dict[tuple[str, str, str], tuple[float, float]]
    total_ms: float
    profiled_ms: float
    runs: int
    device: str

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


# Scopes ---------------------------------------------------------------------------------------------------------------

def _mark(module: nn.Module, name: str) -> list[Any]:
    """Open a scope of that name around each forward pass of a module; gives the handles of the hooks."""
    scopes: list[record_function] = []

    def enter(*_: Any) -> None:
        scopes.append(record_function(name))
        scopes[-1].__enter__()

    def leave(*_: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


@contextmanager
def _marked(model: nn.Module | None) -> Iterator[None]:
    """Scopes around the parts of a network and around its attention."""
    handles: list[Any] = []
    if model is not None:
        for name in list_parts(model):
            handles += _mark(model.get_submodule(name), MARK + name)
        for module in find_attention(model):
            handles += _mark(module, IN_ATTENTION)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Attribution ----------------------------------------------------------------------------------------------------------

def _ancestors(event: Any) -> Iterator[Any]:
    """The event and those around it, from inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _find_scope(event: Any, forward: dict[tuple[int, int], Cell]) -> Cell:
    """(Part, ATTENTION or '') in which an event ran; of the backward pass, in which its forward operation did."""
    part, attention = OUTSIDE, ''
    for outer in _ancestors(event):
        if outer.name == IN_ATTENTION:
            attention = ATTENTION
        elif outer.name.startswith(MARK) and outer.name != RUN:
            part = outer.name.removeprefix(MARK)
        elif outer.name.startswith('autograd::engine') and (outer.fwd_thread, outer.sequence_nr) in forward:
            return forward[outer.fwd_thread, outer.sequence_nr]
    return part, attention


def _find_kind(event: Any, attention: str) -> str | None:
    """The kind of the outermost operation around an event that has one; copies inside of an operation are copies."""
    kinds = [kind for outer in _ancestors(event)
             if not outer.name.startswith(MARK) and (kind := classify_operation(outer.name, outer.input_shapes or ()))]
    kind = kinds[-1] if kinds else None
    if kinds and kinds[0] == COPIES and kind in CONVOLUTIONS:
        return COPIES
    return ATTENTION if attention and kind not in (None, *CONVOLUTIONS, LINEAR, GENERATED) else kind


def _map_forward(events: Iterable[Any]) -> dict[tuple[int, int], Cell]:
    """Scopes of the forward operations by (thread, sequence number), by which autograd names them afterwards.

    Operations that save nothing for the backward pass carry the number of the next one that does: the last one counts.
    """
    forward: dict[tuple[int, int], Cell] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.fwd_thread:
            forward[event.thread, event.sequence_nr] = _find_scope(event, {})
    return forward


def _is_on_cpu(event: Any) -> bool:
    return event.device_type == DeviceType.CPU


class Cost(NamedTuple):
    """Time on the device: the event that took or launched it (None if none is known), the operation or kernel."""
    event: Any | None
    name: str
    start: float
    ms: float


def _list_costs(events: Iterable[Any], is_cuda: bool) -> Iterator[Cost]:
    """All that took time: operations on a CPU; kernels on a GPU, those that no operation launched (CUDA graphs) too."""
    if not is_cuda:
        yield from (Cost(e, e.name, e.time_range.start, e.self_cpu_time_total / 1e3) for e in events if _is_on_cpu(e))
        return
    launched: Counter = Counter()
    for event in filter(_is_on_cpu, events):
        for kernel in event.kernels:
            launched[kernel.name] += 1
            yield Cost(event, kernel.name, event.time_range.start, kernel.duration / 1e3)
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            launched[event.name] -= 1
            if launched[event.name] < 0:  # more of this name than were launched by operations
                yield Cost(None, event.name, event.time_range.start, event.time_range.elapsed_us() / 1e3)


def _sum_events(
        events: list[Any], is_cuda: bool, runs: int) -> tuple[dict[Cell, float], dict[Any, tuple[float, float]]]:
    """`Profile.cells` and `Profile.operations`: medians over the runs."""
    forward = _map_forward(events)
    starts = sorted(event.time_range.start for event in events if event.name == RUN and _is_on_cpu(event))
    cells: dict[Cell, list[float]] = defaultdict(lambda: [0.] * runs)
    operations: dict[Any, list[float]] = defaultdict(lambda: [0.] * runs)
    calls: Counter = Counter()
    for cost in _list_costs(events, is_cuda):
        run = bisect(starts, cost.start) - 1
        if run < 0 or cost.name == RUN:
            continue
        part, attention = _find_scope(cost.event, forward)
        launched_here = any(outer.name.startswith(OURS) for outer in _ancestors(cost.event))
        kind = (classify_operation(cost.name) if launched_here else None) or _find_kind(cost.event, attention)
        kind = kind or classify_operation(cost.name) or REST
        operation = kind, _name_operation(cost.name), _name_shapes(cost.event)
        cells[part, kind][run] += cost.ms
        operations[operation][run] += cost.ms
        calls[operation] += 1
    return ({cell: statistics.median(ms) for cell, ms in cells.items()},
            {operation: (statistics.median(ms), calls[operation] / runs) for operation, ms in operations.items()})


def _name_operation(name: str) -> str:
    return 'Python around the operations' if name.startswith(MARK) else name


def _name_shapes(event: Any | None) -> str:
    shapes = event.input_shapes or [] if event is not None else []
    return ', '.join('x'.join(map(str, shape)) for shape in shapes if shape)


# Measurement ----------------------------------------------------------------------------------------------------------

def _time(call: Callable[[], Any], runs: int, device: torch.device) -> list[float]:
    """Milliseconds of each call, waited for."""
    times = []
    for _ in range(runs):
        synchronise(device)
        start = time.perf_counter()
        with record_function(RUN):
            call()
            synchronise(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def profile_call(
        call: Callable[[], Any], device: torch.device, model: nn.Module | None = None, runs: int = 10,
        warmup: int = 3,
) -> Profile:
    """Profile anything that runs a network: a forward pass, or a training step.

    Args:
        call: What is profiled; it is called `warmup` + 3 * `runs` times.
        model: The network in it, for the parts; without it (a compiled network has no place for hooks) all time is
            that of `measure.OUTSIDE`.
        runs: Calls under the profiler, and as many without it before and after.
    Raises:
        ValueError: `runs` is below 1.
    """
    if runs < 1:
        raise ValueError(f'runs={runs}, it must be at least 1.')
    _time(call, warmup, device)
    plain = _time(call, runs, device)
    is_cuda = device.type == 'cuda'
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    with _marked(model):
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            profiled = _time(call, runs, device)
    plain += _time(call, runs, device)
    cells, operations = _sum_events(profiler.events(), is_cuda, runs)
    return Profile(cells, operations, statistics.median(plain), statistics.median(profiled), runs, device.type)


def profile_forward(
        model: Callable[[torch.Tensor], Any], images: torch.Tensor, runs: int = 10, warmup: int = 3) -> Profile:
    """Profile forward passes of any module, without gradients.

    A compiled module is told by kind alone, its own kernels as `generated`.

    Args:
        images: (B, C, H, W) in the dtype and the layout, and on the device, of the model.
    """
    is_plain = isinstance(model, nn.Module) and not hasattr(model, '_orig_mod')
    with torch.inference_mode():
        return profile_call(lambda: model(images), images.device, model if is_plain else None, runs, warmup)


# For people and for files ---------------------------------------------------------------------------------------------

def list_profile(profile: Profile, **facts: Any) -> list[dict[str, Any]]:
    """A flat record for each cell, with the facts of the run in each."""
    return [dict(
        facts, bench='profile', part=part, kind=kind, ms=ms, share=ms / profile.busy_ms, total_ms=profile.total_ms,
        profiled_ms=profile.profiled_ms, runs=profile.runs) for (part, kind), ms in profile.cells.items()]


def describe_profile(profile: Profile, top: int = 10) -> str:
    """A table of kinds by parts, then the `top` operations that take longest, and what to know about the figures."""
    parts = list(profile.sum_by(0))
    kinds = [kind for kind in KINDS if kind in profile.sum_by(1)]
    rows = [['ms per call', *parts, 'all', 'share']]
    for kind in kinds:
        cells = [profile.cells.get((part, kind), 0.) for part in parts]
        rows.append([kind, *(f'{ms:.3f}' for ms in [*cells, sum(cells)]), f'{sum(cells) / profile.busy_ms:.1%}'])
    rows.append(['all', *(f'{ms:.3f}' for ms in [*profile.sum_by(0).values(), profile.busy_ms]), ''])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(f'{cell:{"<" if i == 0 else ">"}{width}}' for i, (cell, width) in
                       enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    return '\n'.join([*lines, '', *_describe_totals(profile), '', *_describe_operations(profile, top)])


def _describe_totals(profile: Profile) -> Iterator[str]:
    overhead = profile.profiled_ms / profile.total_ms - 1
    yield (f'A call takes {profile.total_ms:.3f} ms, {profile.profiled_ms:.3f} ms under the profiler ({overhead:+.0%}; '
           f'medians of {2 * profile.runs} and {profile.runs} runs). The cells are as profiled.')
    if profile.device == 'cuda':
        idle = max(1 - profile.busy_ms / profile.total_ms, 0.)
        yield f'Kernels run for {profile.busy_ms:.3f} ms; {idle:.0%} of a call the GPU waits for launches.'


def _describe_operations(profile: Profile, top: int) -> Iterator[str]:
    yield 'The longest operations, ms per call, calls:'
    longest = sorted(profile.operations.items(), key=lambda item: -item[1][0])[:top]
    for (kind, name, shapes), (ms, calls) in longest:
        yield f'{ms:9.3f}  {calls:5.0f}  {kind:15}  {name[:60]}  {shapes[:60]}'.rstrip()
