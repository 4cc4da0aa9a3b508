"""How fast a forward pass could be at best: the bytes it must move and the operations it must do, layer by layer.

    layers = list_layers(trace_operations(model, (224, 224), batch=64, dtype=torch.bfloat16))
    seconds = bound_time(layers, measure_rates(torch.device('cuda'), 'bfloat16'))

A layer takes at least max(bytes / bandwidth, operations / peak), the roofline of Williams et al. 2009
(doi:10.1145/1498765.1498785): inputs, weights and outputs moved once each. Three sums are made, by what is assumed to
be fused (`FUSIONS`):

- 'none': every operation is a layer; the core of an attention is one layer.
- 'element-wise': between convolutions, products and attention nothing is moved: normalisation, activations, sums,
  residuals (also their second input), splits, concatenations and pooling are free.
- 'on chip': besides, what an expansion (1x1) hands to its depth-wise convolution stays on the chip, and depth-wise
  convolutions of slices of one map read it together.

Multiply-adds count as two operations; element-wise arithmetic is not counted. Depth-wise convolutions are held against
the float32 rate of the vector units, everything else against the rate of matrix products.
"""
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from ..measure.counts import OUTSIDE, list_parts
from .device_rates import DeviceRates
from .operations import ATTENTION, CONVOLUTIONS, DEPTHWISE, LINEAR, POINTWISE, REST, classify_operation, find_attention
from .profiling import Profile

__all__ = [
    'FUSIONS', 'Layer', 'Operation', 'bound_layer', 'bound_time', 'describe_bounds', 'list_bounds', 'list_layers',
    'trace_operations']

FUSIONS = ('none', 'element-wise', 'on chip')
HEAVY = (*CONVOLUTIONS, LINEAR, ATTENTION)
Span = tuple[int, int, int]  # of a storage: its identity, the first element, the number of elements


@dataclass
class Operation:
    """One operation of the network as it runs in eager mode.

    Attributes:
        part, kind: Where and what, as in `profiling`.
        name: Of the operation, with the shape of the map it gives.
        reads, writes: {span of memory: bytes}.
        flops: Two for each multiply-add.
        group: The attention module it belongs to, None for others.
        is_output: Whether the network gives out what it writes.
    """
    part: str
    kind: str
    name: str
    reads: dict[Span, int]
    writes: dict[Span, int]
    flops: int
    group: str | None = None
    is_output: bool = False


@dataclass(frozen=True)
class Layer:
    """Operations that are run as one: what it must move and do."""
    part: str
    kind: str
    name: str
    bytes: int
    flops: int
    vector_flops: int = 0


# Trace ----------------------------------------------------------------------------------------------------------------

def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _spans(values: Any) -> dict[Span, int]:
    return {(t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t.numel() * t.element_size()
            for t in _tensors(values) if t.numel()}


class _Tracer(TorchDispatchMode):
    """Notes every operation but views, which move nothing."""

    def __init__(self, model: nn.Module, tracker: ModuleTracker) -> None:
        super().__init__()
        self.tracker, root = tracker, type(model).__name__
        attention = set(map(id, find_attention(model)))
        self.parts = {f'{root}.{part}': part for part in list_parts(model)}
        self.attention = [f'{root}.{name}' for name, module in model.named_modules() if id(module) in attention]
        self.operations: list[Operation] = []
        self.alive: list[Any] = []  # so that no storage takes the identity of another

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive.append((args, out))
        reads, writes = _spans([*args, *(kwargs or {}).values()]), _spans(out)
        is_view = not func._schema.is_mutable and {span[0] for span in writes} <= {span[0] for span in reads}
        if writes and not is_view:
            self._note(func, args, kwargs or {}, out, reads, writes)
        return out

    def _note(self, func, args, kwargs, out, reads: dict[Span, int], writes: dict[Span, int]) -> None:
        name = func._schema.name
        kind = classify_operation(name, [tuple(t.shape) for t in _tensors(args)]) or REST
        group = next((name for name in self.attention if name in self.tracker.parents), None)
        if group is not None and kind not in (*CONVOLUTIONS, LINEAR):
            kind = ATTENTION
        formula = flop_registry.get(func._overloadpacket)
        part = next((self.parts[name] for name in self.tracker.parents if name in self.parts), OUTSIDE)
        shape = 'x'.join(map(str, next(_tensors(out)).shape))
        self.operations.append(Operation(
            part, kind, f'{name.removeprefix("aten::")} {shape}', reads, writes,
            formula(*args, **kwargs, out_val=out) if formula else 0, group if kind == ATTENTION else None))


def trace_operations(
        model: nn.Module, size: tuple[int, int], batch: int = 1, dtype: torch.dtype = torch.float32) -> list[Operation]:
    """The operations of a forward pass in evaluation mode, in order, without running it.

    Args:
        model: Any module of images (B, C, H, W); a copy without values is traced.
        size: Height and width of the images.
        batch: Number of images.
        dtype: Of weights and maps.
    """
    model = copy.deepcopy(model).to('meta', dtype).eval()
    images = torch.empty(batch, getattr(model, 'in_chans', 3), *size, device='meta', dtype=dtype)
    with torch.no_grad(), ModuleTracker() as tracker, _Tracer(model, tracker) as tracer:
        outputs = {storage for storage, *_ in _spans(model(images))}
    for operation in tracer.operations:
        operation.is_output = any(storage in outputs for storage, *_ in operation.writes)
    return tracer.operations


# Fusions --------------------------------------------------------------------------------------------------------------

class _Graph:
    """Which operation gives a storage, and which read it."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = operations
        self.producer: dict[int, int] = {}
        self.readers: dict[int, set[int]] = {}
        for number, operation in enumerate(operations):
            for storage, *_ in operation.reads:
                self.readers.setdefault(storage, set()).add(number)
            for storage, *_ in operation.writes:
                self.producer.setdefault(storage, number)

    def inputs(self, number: int) -> list[int]:
        """The storages that an operation reads and another one gives: no weights, no images."""
        reads = self.operations[number].reads
        return [storage for storage in dict.fromkeys(span[0] for span in reads) if storage in self.producer]

    def merge(self, group: Sequence[int]) -> Layer:
        """The layer of a group of operations: what comes from outside is read once, what is read outside written."""
        members, operations = set(group), [self.operations[number] for number in group]
        inner = {storage for op in operations for storage, *_ in op.writes if self.producer[storage] in members}
        reads = {span: size for op in operations for span, size in op.reads.items() if span[0] not in inner}
        writes = {span: size for op in operations for span, size in op.writes.items()
                  if op.is_output or span[0] not in inner or self.readers.get(span[0], set()) - members}
        vector = sum(op.flops for op in operations if op.kind == DEPTHWISE)
        first = next((op for op in operations if op.kind in HEAVY), operations[0])
        return Layer(
            first.part, first.kind, ' + '.join(op.name for op in operations if op.kind in CONVOLUTIONS) or first.name,
            sum(reads.values()) + sum(writes.values()), sum(op.flops for op in operations) - vector, vector)

    # What is fused

    def find_expansion(self, number: int) -> list[int] | None:
        """The expansion, and what is between, of a depth-wise convolution that alone reads it."""
        chain, inputs = [number], self.inputs(number)
        while len(inputs) == 1 and self.readers[inputs[0]] == {chain[0]}:
            chain.insert(0, self.producer[inputs[0]])
            if self.operations[chain[0]].is_output:
                return None
            kind = self.operations[chain[0]].kind
            if kind == POINTWISE:
                return chain
            if kind in HEAVY:
                return None
            inputs = self.inputs(chain[0])
        return None

    def add_sums(self, group: list[int]) -> list[int]:
        """With the element-wise operations all of whose maps come from the group."""
        for number, operation in enumerate(self.operations):
            inputs = self.inputs(number)
            if operation.kind == 'element-wise' and inputs and all(self.producer[s] in group for s in inputs):
                group = [*group, number]
        return group


def _find_attention_groups(operations: Sequence[Operation]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number, operation in enumerate(operations):
        if operation.group is not None:
            groups.setdefault(operation.group, []).append(number)
    return groups


def _find_chip_groups(graph: _Graph) -> list[list[int]]:
    groups, parallel = [], {}
    for number, operation in enumerate(graph.operations):
        if operation.kind != DEPTHWISE:
            continue
        expansion = graph.find_expansion(number)
        if expansion:
            groups.append(expansion)
        else:
            parallel.setdefault(tuple(graph.inputs(number)), []).append(number)
    return groups + [graph.add_sums(group) for group in parallel.values()]


def list_layers(operations: Sequence[Operation], fusion: str = 'none') -> list[Layer]:
    """The layers of a network when operations are fused as one of `FUSIONS` says, in order.

    Raises:
        ValueError: There is no such fusion.
    """
    if fusion not in FUSIONS:
        raise ValueError(f'fusion={fusion!r}, choose from {", ".join(FUSIONS)}.')
    graph = _Graph(operations)
    groups = list(_find_attention_groups(operations).values())
    if fusion == 'on chip':
        groups += _find_chip_groups(graph)
    grouped = {number for group in groups for number in group}
    groups += [[number] for number in range(len(operations)) if number not in grouped]
    layers = [graph.merge(group) for group in sorted(groups)]
    return layers if fusion == 'none' else [layer for layer in layers if layer.kind in HEAVY]


# Time -----------------------------------------------------------------------------------------------------------------

def bound_layer(layer: Layer, rates: DeviceRates, bandwidth: float | None = None) -> tuple[float, str]:
    """The least seconds of a layer, and what bounds it, 'bytes' or 'operations'.

    Args:
        bandwidth: Instead of that of `rates`.
    """
    moving = layer.bytes / (bandwidth or rates.bandwidth)
    working = layer.flops / rates.matmul + layer.vector_flops / rates.vector
    return max((moving, 'bytes'), (working, 'operations'))


def bound_time(layers: Iterable[Layer], rates: DeviceRates, bandwidth: float | None = None) -> float:
    """The least seconds of layers that run one after the other; `bandwidth` instead of that of `rates`."""
    return sum(bound_layer(layer, rates, bandwidth)[0] for layer in layers)


# For people and for files ---------------------------------------------------------------------------------------------

def list_bounds(
        layers: Sequence[Layer], rates: DeviceRates, profile: Profile | None = None, **facts: Any,
) -> list[dict[str, Any]]:
    """A flat record for each part and kind: bytes, operations, the bound in ms, its share, and what was measured.

    Args:
        profile: Of the same forward pass; `measured_ms` is None where it is not given or has no such cell.
        facts: Put into each record.
    """
    total = bound_time(layers, rates)
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.part, layer.kind), []).append(layer)
    records = []
    for (part, kind), members in groups.items():
        seconds = [bound_layer(layer, rates) for layer in members]
        by_bytes = sum(time for time, reason in seconds if reason == 'bytes')
        bound = sum(time for time, _ in seconds)
        records.append(dict(
            facts, bench='bound', part=part, kind=kind, layers=len(members), mbytes=sum(m.bytes for m in members) / 1e6,
            gflops=sum(m.flops + m.vector_flops for m in members) / 1e9, bound_ms=1e3 * bound, share=bound / total,
            limit='bytes' if by_bytes >= bound / 2 else 'operations',
            measured_ms=profile.cells.get((part, kind)) if profile else None))
    return records


def _describe_record(record: dict[str, Any]) -> str:
    measured = record['measured_ms']
    beside = '' if measured is None else f'{measured:12.4f}  {measured / record["bound_ms"]:8.1f}'
    return (f'{record["part"]:22} {record["kind"]:16} {record["layers"]:6} {record["mbytes"]:9.2f} '
            f'{record["gflops"]:9.3f} {record["bound_ms"]:10.4f} {record["share"]:7.1%}  {record["limit"]:10}'
            f'{beside}').rstrip()


def describe_bounds(
        operations: Sequence[Operation], rates: DeviceRates, profile: Profile | None = None,
        measured_ms: float | None = None) -> str:
    """The bound for people: the rates, a table of the network with fused element-wise operations, the sums, the rest.

    Args:
        operations: Of `trace_operations`, in the dtype of `rates`.
        profile: Of the same network, for the time of each row.
        measured_ms: A forward pass as fast as it was measured, compared with the sums; by default that of the profile.
    """
    if measured_ms is None and profile is not None:
        measured_ms = profile.total_ms
    lines = [
        f'Rates, {rates.how}: {rates.bandwidth / 1e9:.1f} GB/s ({rates.cached / 1e9:.1f} GB/s in cache), '
        f'{rates.matmul / 1e12:.3f} T operations/s of products, {rates.vector / 1e12:.3f} of vector units; '
        f'{1e6 * rates.launch:.1f} us to launch an operation.', '',
        f'{"part":22} {"kind":16} {"layers":>6} {"MB":>9} {"G oper.":>9} {"bound ms":>10} {"share":>7}  {"by":10}'
        f'{"measured ms":>12}  {"ratio":>8}']
    lines += map(_describe_record, list_bounds(list_layers(operations, 'element-wise'), rates, profile))
    return '\n'.join([*lines, '', *_describe_sums(operations, rates, measured_ms), '',
                      *_describe_rest(operations, rates, profile)])


MEANINGS = {
    'none': 'each operation by itself', 'element-wise': 'element-wise operations and copies free',
    'on chip': 'expansions kept on the chip as well'}


def _describe_sums(
        operations: Sequence[Operation], rates: DeviceRates, measured_ms: float | None) -> Iterator[str]:
    for fusion in FUSIONS:
        layers = list_layers(operations, fusion)
        bound, cached = 1e3 * bound_time(layers, rates), 1e3 * bound_time(layers, rates, rates.cached)
        measured = '' if measured_ms is None else (
            f'; measured {measured_ms:.3f} ms = {measured_ms / bound:.2f} times the bound')
        yield (f'bound, {MEANINGS[fusion]}: {bound:.4f} ms for {len(layers)} layers and '
               f'{sum(layer.bytes for layer in layers) / 1e6:.1f} MB ({cached:.4f} ms were all in cache){measured}')


def _describe_rest(operations: Sequence[Operation], rates: DeviceRates, profile: Profile | None) -> Iterator[str]:
    """What a bound does not hold, so far as it was measured."""
    layers = list_layers(operations, 'element-wise')
    small = sum(bound_layer(layer, rates)[0] < rates.launch for layer in layers)
    launches = 1e3 * len(operations) * rates.launch
    yield (f'Left out: {len(operations)} operations in eager mode take {launches:.3f} ms to launch, where that is not '
           f'hidden; {small} of {len(layers)} layers could be done in less than a launch.')
    if profile is None:
        return
    if profile.device == 'cuda':
        yield f'Of the {profile.total_ms:.3f} ms profiled, kernels run for {profile.busy_ms:.3f} ms.'
    free = {kind: ms for kind, ms in profile.sum_by(1).items() if kind not in HEAVY}
    if free:
        yield 'Taken to be free, but measured: ' + ', '.join(f'{kind} {ms:.3f} ms' for kind, ms in free.items()) + '.'
    apart = [(record['measured_ms'] - record['bound_ms'], record) for record in list_bounds(layers, rates, profile)
             if record['measured_ms'] is not None]
    farthest = sorted(apart, key=lambda item: -item[0])[:5]
    faster = [f'{record["kind"]} of {record["part"]}' for ms, record in apart if ms < 0]
    if faster:
        yield (f'Measured faster than bound: {", ".join(faster)}. The rates were measured while the machine was busy, '
               f'or maps stay in a cache.')
    if farthest:
        yield 'Farthest above their bounds: ' + ', '.join(
            f'{record["kind"]} of {record["part"]} by {ms:.3f} ms' for ms, record in farthest) + '.'
