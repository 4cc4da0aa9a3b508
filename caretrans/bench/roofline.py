"""Roofline of a forward pass: the least time that its layers need for the bytes they move and the operations they do.

    trace = trace_layers(model, (224, 224), batch=64, dtype=torch.bfloat16)
    seconds = bound_time(trace.layers, measure_rates(torch.device('cuda'), 'bfloat16'))

A layer takes at least max(bytes / bandwidth, operations / peak), as in Williams et al. 2009
(doi:10.1145/1498765.1498785), with inputs, weights and outputs moved once. Layers are convolutions, linear layers and
the cores of attention modules. Everything between them (normalisation, activations, sums, residuals with their second
input, splits, concatenations, pooling) is assumed to be fused into them and costs nothing.

A multiply-add counts as two operations. Depth-wise convolutions are bounded by the float32 rate of the vector units,
all other layers by the rate of matmuls.
"""
import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.utils.module_tracker import ModuleTracker

from ..measure.counts import ATTENTION, DEPTHWISE, KINDS, OperationTracer
from ..measure.tables import format_table
from .device_rates import DeviceRates
from .profile import Profile, find_attention

__all__ = ['Bound', 'Layer', 'Trace', 'bound_layer', 'bound_time', 'describe_roofline', 'list_bounds', 'trace_layers']

Span = tuple[int, int, int]  # of a storage: its identity, the first element, the number of elements


@dataclass(frozen=True)
class Layer:
    """Bytes and operations of a layer.

    Attributes:
        part: Part of the network.
        kind: One of `measure.KINDS`.
        bytes: Size of its inputs, weights and outputs.
        flops, vector_flops: Operations of matmuls, and of the vector units.
    """
    part: str
    kind: str
    bytes: int
    flops: int
    vector_flops: int = 0


@dataclass(frozen=True)
class Trace:
    """The layers of a forward pass in order, and the number of operations that eager mode launches for it."""
    layers: list[Layer]
    launches: int


# Trace ----------------------------------------------------------------------------------------------------------------

@dataclass
class _Operation:
    """One operation of eager mode; `group` is its attention module if it belongs to the core of one."""
    part: str
    kind: str | None
    group: str | None
    reads: dict[Span, int]  # span of memory: bytes
    writes: dict[Span, int]
    flops: int


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _spans(values: Any) -> dict[Span, int]:
    return {(t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t.numel() * t.element_size()
            for t in _tensors(values) if t.numel()}


class _Tracer(OperationTracer):
    """Collects every operation but views, which move nothing."""

    def __init__(self, model: nn.Module, tracker: ModuleTracker) -> None:
        super().__init__(model, tracker)
        self.attention = [f'{type(model).__name__}.{name}' for name in find_attention(model)]
        self.operations: list[_Operation] = []
        self.alive: list[Any] = []  # so that no storage takes the identity of another

    def trace(self, func: Any, inputs: list[Any], out: Any, part: str, kind: str | None, flops: int) -> None:
        self.alive.append((inputs, out))
        reads, writes = _spans(inputs), _spans(out)
        is_view = not func._schema.is_mutable and {span[0] for span in writes} <= {span[0] for span in reads}
        if writes and not is_view:
            group = next((name for name in self.attention if name in self.tracker.parents), None)
            self.operations.append(_Operation(
                part, kind, group if kind in (None, ATTENTION) else None, reads, writes, flops))


def trace_layers(
        model: nn.Module, size: tuple[int, int], batch: int = 1, dtype: torch.dtype = torch.float32) -> Trace:
    """Trace a forward pass in evaluation mode without running it.

    Args:
        model: Any module of images (B, C, H, W); a copy without values is traced.
        size: Height and width of the images.
        batch: Number of images.
        dtype: Number format of weights and maps.
    """
    model = copy.deepcopy(model).to('meta', dtype).eval()
    images = torch.empty(batch, getattr(model, 'in_chans', 3), *size, device='meta', dtype=dtype)
    with torch.no_grad(), ModuleTracker() as tracker, _Tracer(model, tracker) as tracer:
        outputs = {storage for storage, *_ in _spans(model(images))}
    groups: dict[str | int, list[_Operation]] = {}  # the operations of each layer, a core of attention being one
    producer: dict[int, str | int] = {}
    readers: dict[int, set[str | int]] = defaultdict(set)
    for number, operation in enumerate(tracer.operations):
        key = number if operation.group is None else operation.group
        groups.setdefault(key, []).append(operation)
        for storage, *_ in operation.reads:
            readers[storage].add(key)
        for storage, *_ in operation.writes:
            producer.setdefault(storage, key)
    layers = []
    for key, members in groups.items():
        kind = ATTENTION if members[0].group else members[0].kind
        if kind is None:
            continue
        reads = {span: size for op in members for span, size in op.reads.items() if producer.get(span[0]) != key}
        writes = {span: size for op in members for span, size in op.writes.items()
                  if span[0] in outputs or producer[span[0]] != key or readers[span[0]] - {key}}
        flops = sum(op.flops for op in members)
        vector = flops if kind == DEPTHWISE else 0
        layers.append(Layer(
            members[0].part, kind, sum(reads.values()) + sum(writes.values()), flops - vector, vector))
    return Trace(layers, len(tracer.operations))


# Time -----------------------------------------------------------------------------------------------------------------

def bound_layer(layer: Layer, rates: DeviceRates, bandwidth: float | None = None) -> tuple[float, str]:
    """The least seconds of a layer, and what limits it, 'bytes' or 'operations'.

    Args:
        bandwidth: Instead of that of `rates`.
    """
    moving = layer.bytes / (bandwidth or rates.bandwidth)
    working = layer.flops / rates.matmul + layer.vector_flops / rates.vector
    return max((moving, 'bytes'), (working, 'operations'))


def bound_time(layers: Iterable[Layer], rates: DeviceRates, bandwidth: float | None = None) -> float:
    """The least seconds of layers that run one after the other; `bandwidth` instead of that of `rates`."""
    return sum(bound_layer(layer, rates, bandwidth)[0] for layer in layers)


@dataclass(frozen=True)
class Bound:
    """The roofline of all layers of one kind in one part of the network.

    Attributes:
        layers: Their number.
        bytes, flops: Sums over the layers.
        ms: The least milliseconds.
        limit: Cause of most of this time, 'bytes' or 'operations'.
    """
    part: str
    kind: str
    layers: int
    bytes: int
    flops: int
    ms: float
    limit: str


def list_bounds(layers: Sequence[Layer], rates: DeviceRates) -> list[Bound]:
    """A `Bound` for each part and kind."""
    groups: dict[tuple[str, str], list[Layer]] = defaultdict(list)
    for layer in layers:
        groups[layer.part, layer.kind].append(layer)
    bounds = []
    for (part, kind), members in groups.items():
        seconds = [bound_layer(layer, rates) for layer in members]
        total, by_bytes = sum(s for s, _ in seconds), sum(s for s, limit in seconds if limit == 'bytes')
        bounds.append(Bound(
            part, kind, len(members), sum(m.bytes for m in members), sum(m.flops + m.vector_flops for m in members),
            1e3 * total, 'bytes' if by_bytes >= total / 2 else 'operations'))
    return bounds


# Text -----------------------------------------------------------------------------------------------------------------

def describe_roofline(
        trace: Trace, rates: DeviceRates, profile: Profile | None = None, measured_ms: float | None = None) -> str:
    """The rates, a table of parts and kinds, their sum, and the limits of the roofline.

    Args:
        trace: Layers in the dtype of `rates`.
        profile: Profile of the same network, for the time of each row.
        measured_ms: The fastest forward pass measured, to compare with the sum; by default that of the profile.
    """
    if measured_ms is None and profile is not None:
        measured_ms = profile.total_ms
    layers, bounds, cells = trace.layers, list_bounds(trace.layers, rates), profile.cells if profile else {}
    bound, cached = (1e3 * bound_time(layers, rates, bandwidth) for bandwidth in (None, rates.cached))
    rows = []
    for b in bounds:
        ms = cells.get((b.part, b.kind))
        rows.append([
            b.part, b.kind, b.layers, f'{b.bytes / 1e6:.2f}', f'{b.flops / 1e9:.3f}', f'{b.ms:.4f}',
            f'{b.ms / bound:.1%}', b.limit, *([None, None] if ms is None else [f'{ms:.4f}', f'{ms / b.ms:.1f}'])])
    header = ['part', 'kind', 'layers', 'MB', 'G oper.', 'roofline ms', 'share', 'by', 'measured ms', 'ratio']
    small = sum(bound_layer(layer, rates)[0] < rates.launch for layer in layers)
    lines = [
        f'Rates, {rates.how}: {rates.bandwidth / 1e9:.1f} GB/s ({rates.cached / 1e9:.1f} GB/s in cache), '
        f'{rates.matmul / 1e12:.3f} T operations/s of matmuls, {rates.vector / 1e12:.3f} of vector units; '
        f'{1e6 * rates.launch:.1f} us to launch an operation.', '',
        *format_table(header, rows), '',
        f'roofline: {bound:.4f} ms for {len(layers)} layers and {sum(layer.bytes for layer in layers) / 1e6:.1f} MB '
        f'({cached:.4f} ms if everything were in cache)' + ('' if measured_ms is None else (
            f'; measured {measured_ms:.3f} ms = {measured_ms / bound:.2f} times the roofline')), '',
        f'Not included: {trace.launches} operations in eager mode take {1e3 * trace.launches * rates.launch:.3f} ms to '
        f'launch, where that is not hidden; {small} of {len(layers)} layers need less time than a launch.']
    free = {kind: ms for kind, ms in profile.sum_by(1).items() if kind not in KINDS} if profile else {}
    if free:
        lines.append('Assumed to be free, but measured: ' + ', '.join(
            f'{kind} {ms:.3f} ms' for kind, ms in free.items()) + '.')
    above = sorted(((cells[b.part, b.kind] - b.ms, f'{b.kind} of {b.part}') for b in bounds
                    if (b.part, b.kind) in cells), reverse=True)
    if above and above[-1][0] < 0:
        lines.append(f'Measured faster than the roofline: {", ".join(name for ms, name in above if ms < 0)}. The rates '
                     f'were measured while the machine was busy, or maps stay in a cache.')
    if above:
        lines.append('Farthest above the roofline: ' + ', '.join(
            f'{name} by {ms:.3f} ms' for ms, name in above[:5]) + '.')
    return '\n'.join(lines)
