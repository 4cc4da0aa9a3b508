"""Machine-independent counts of any model of timm: parameters, multiply-adds and activations.

    counts = count_operations(make_empty('care_s1'), (224, 224))
    counts.gmacs, counts.sum_by_stage()['stages.2'], counts.sum_by_kind()['conv 1x1'], counts.activations

Models are created on the meta device if they can be, so that counting costs no memory and no arithmetic.
"""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.module_tracker import ModuleTracker

from .. import models  # noqa: F401 (registers the models)

__all__ = ['KINDS', 'Operations', 'count_operations', 'count_parameters', 'list_parts', 'make_empty']

KINDS = POINTWISE, DEPTHWISE, OTHER_CONV, LINEAR, ATTENTION = (
    'conv 1x1', 'conv depth-wise', 'conv other', 'linear', 'attention')
OUTSIDE = 'outside of the parts'  # operations in the forward function of the network itself


def make_empty(name: str, **kwargs: Any) -> nn.Module:
    """A model of timm in evaluation mode on the meta device, without values; on the CPU if that fails."""
    try:
        with torch.device('meta'):
            return timm.create_model(name, **kwargs).eval()
    except (NotImplementedError, RuntimeError):  # a constructor that reads values of its tensors
        return timm.create_model(name, **kwargs).eval()


# Parameters -----------------------------------------------------------------------------------------------------------

def count_parameters(model: nn.Module, fused: nn.Module | None = None) -> dict[str, int]:
    """Numbers of parameters.

    Args:
        model: The original network.
        fused: Its fused form.
    Returns:
        `parameters` of the whole, `parameters_one_head` without the distillation head (`head_dist`), and with `fused`
        also `parameters_fused`.
    """
    def count(module: nn.Module | None) -> int:
        return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0

    counts = dict(parameters=count(model), parameters_one_head=count(model) - count(getattr(model, 'head_dist', None)))
    return dict(counts, parameters_fused=count(fused)) if fused is not None else counts


# Operations -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Operations:
    """Multiply-adds and outputs of the convolutions, linear layers and matmuls of one forward pass.

    Attributes:
        macs: {(part of the network, kind of operation): multiply-adds}, kinds of `KINDS`.
        activations: Elements of the outputs of these operations.
    """
    macs: dict[tuple[str, str], int]
    activations: int

    @property
    def gmacs(self) -> float:
        """Billions of multiply-adds."""
        return sum(self.macs.values()) / 1e9

    def sum_by_stage(self) -> dict[str, float]:
        """Billions of multiply-adds of each part, in the order of the network."""
        return self._sum(0)

    def sum_by_kind(self) -> dict[str, float]:
        """Billions of multiply-adds of each kind."""
        return {kind: self._sum(1).get(kind, 0.) for kind in KINDS}

    def _sum(self, place: int) -> dict[str, float]:
        sums: Counter = Counter()
        for key, macs in self.macs.items():
            sums[key[place]] += macs
        return {name: macs / 1e9 for name, macs in sums.items()}


def list_parts(model: nn.Module) -> list[str]:
    """The names of the parts of a network: its children, and the children of containers instead of these."""
    parts = []
    for name, child in model.named_children():
        is_container = isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child)
        parts += [f'{name}.{inner}' for inner, _ in child.named_children()] if is_container else [name]
    return parts


def _name_kind(name: str, args: Sequence[Any], weights: set) -> str:
    """The kind of an operation, by the shape of its weight; a matmul without a weight belongs to attention."""
    if name == 'convolution':
        weight, groups = args[1], args[8]
        if groups > 1 and groups == args[0].shape[1]:
            return DEPTHWISE
        return POINTWISE if all(side == 1 for side in weight.shape[2:]) else OTHER_CONV
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return LINEAR if any(t.untyped_storage()._cdata in weights for t in tensors) else ATTENTION


class OperationTracer(TorchDispatchMode):
    """Base of what looks at every operation of a forward pass: its part of the network, its kind, its operations.

    Args:
        tracker: Entered around the tracer.
    """

    def __init__(self, model: nn.Module, tracker: ModuleTracker) -> None:
        super().__init__()
        self.tracker, root = tracker, type(model).__name__
        self.parts = {f'{root}.{part}': part for part in list_parts(model)}
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        part = next((self.parts[name] for name in self.tracker.parents if name in self.parts), OUTSIDE)
        formula = flop_registry.get(func._overloadpacket)
        kind = _name_kind(func._overloadpacket.__name__, args, self.weights) if formula else None
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        self.trace(func, [*args, *kwargs.values()], out, part, kind, flops)
        return out

    def trace(self, func: Any, inputs: list[Any], out: Any, part: str, kind: str | None, flops: int) -> None:
        """Called after each operation; `kind` is None for one without multiply-adds."""
        raise NotImplementedError


class _KindCounter(OperationTracer):
    """Multiply-adds by part of the network and kind of operation, by PyTorch's formulas."""

    def __init__(self, model: nn.Module, tracker: ModuleTracker) -> None:
        super().__init__(model, tracker)
        self.macs: Counter = Counter()
        self.activations = 0

    def trace(self, func: Any, inputs: list[Any], out: Any, part: str, kind: str | None, flops: int) -> None:
        if kind is not None:
            self.macs[part, kind] += flops // 2
            self.activations += (out[0] if isinstance(out, tuple) else out).numel()


def count_operations(model: nn.Module, size: tuple[int, int], batch: int = 1) -> Operations:
    """Count the multiply-adds of a forward pass.

    Args:
        model: Network in evaluation mode, on any device.
        size: Height and width of the images.
        batch: Number of images.
    Raises:
        RuntimeError: The sums by part or by kind differ from PyTorch's own counter.
    """
    device = next(model.parameters()).device
    image = torch.zeros(batch, getattr(model, 'in_chans', 3), *size, device=device)
    total = FlopCounterMode(display=False)
    with torch.no_grad(), ModuleTracker() as tracker, _KindCounter(model, tracker) as kinds, total:
        model(image)
    counts = Operations(dict(kinds.macs), kinds.activations)
    by_module = {name: sum(flops.values()) / 2e9 for name, flops in total.get_flop_counts().items()}
    everything = total.get_total_flops() / 2e9
    wrong = [part for part, gmacs in counts.sum_by_stage().items() if part != OUTSIDE and abs(
        gmacs - by_module.get(f'{type(model).__name__}.{part}', 0.)) > 1e-9]
    if wrong or abs(sum(counts.sum_by_kind().values()) - everything) > 1e-9:
        raise RuntimeError(
            f'Multiply-adds by kind sum up to {counts.gmacs:.6f} G, PyTorch counts {everything:.6f} G; '
            f'parts that differ: {wrong or "none"}.')
    return counts
