"""Triton kernels for NVIDIA GPUs, in place of what PyTorch runs; the modules, their parameters and keys stay.

    import caretrans.kernels
    placements = caretrans.kernels.use_kernels(model.cuda())   # then run, train, compile or capture it as before
    caretrans.kernels.use_kernels(model, parts=())             # back to PyTorch

Every call looks where its input lies: on the CPU, in float64 and wherever Triton or the GPU is missing, PyTorch runs.
Run a network once before its calls are captured in a CUDA graph: the first call of a size compiles and tunes kernels.
"""
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn as nn

from .modules import KERNEL_MODULES, PARTS, KernelModule, is_interpreted

__all__ = ['PARTS', 'Placement', 'available', 'describe_placements', 'use_kernels', 'why_unavailable']

MIN_CAPABILITY = (8, 0)  # bfloat16 and TF32
NOT_ASKED = 'not asked for'


class Placement(NamedTuple):
    """Where a module runs: its name, which of `PARTS` it is, 'triton' or 'torch', and why not 'triton'."""
    name: str
    part: str
    runs: str
    reason: str


def why_unavailable(device: str | torch.device) -> str:
    """Why the kernels cannot run on `device`, in one line; '' if they can."""
    device = torch.device(device)
    if find_spec('triton') is None:
        return 'Triton is not installed'
    if is_interpreted():
        return '' if device.type == 'cpu' else "TRITON_INTERPRET=1 asks for Triton's interpreter, which runs on the CPU"
    if device.type != 'cuda':
        return f'the kernels run on CUDA GPUs, not on {device.type}'
    if torch.version.hip or not torch.cuda.is_available():
        return 'PyTorch sees no CUDA GPU'
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return 'the GPU has compute capability {}.{}, and the kernels need {}.{}'.format(*capability, *MIN_CAPABILITY)
    return ''


def available(device: str | torch.device) -> bool:
    """Whether the kernels can run on `device`; `why_unavailable` says why not."""
    return not why_unavailable(device)


def use_kernels(model: nn.Module, parts: Sequence[str] = ('mixer', 'attention')) -> list[Placement]:
    """Let the modules of `model` run as Triton kernels, in place; those of other `parts` go back to PyTorch.

    Args:
        model: A network of ours, fused or not, in training or in evaluation, on the device where it will run.
        parts: 'mixer': the depth-wise convolutions and the linear attention of `DecoupledMixer`, forward and backward;
            'attention': `LinearAttention` elsewhere and `RotaryLinearAttention`, forward and backward; 'expansion':
            expansion, GELU and depth-wise convolution of interactions whose normalisation is folded
            (`caretrans.fuse`), in inference.
    Returns:
        A `Placement` for each module that has a kernel version, save the attention of a mixer that runs in Triton.
    Raises:
        ValueError: An unknown part.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f'Unknown parts {", ".join(unknown)}: choose from {", ".join(PARTS)}.')
    tensor = next(model.parameters(), None)
    reason = why_unavailable('cpu' if tensor is None else tensor.device)
    placements: list[Placement] = []
    within = set()  # of mixers with kernels, which call nothing of their attention but its projection
    for name, module in model.named_modules():
        if module in within:
            _restore(module)
            continue
        placements.extend(_place(name, module, parts, reason))
        if isinstance(module, KernelModule) and module.part == 'mixer':
            within.add(module.long_range)
    return placements


def describe_placements(placements: Sequence[Placement]) -> list[str]:
    """A line for each part, where it runs and why, e.g. '12 x mixer: triton'; none for parts not asked for."""
    counts = Counter(
        (placement.part, placement.runs, placement.reason) for placement in placements
        if placement.reason != NOT_ASKED)
    return [f'{count} x {part}: {runs}' + (f', {reason}' if reason else '')
            for (part, runs, reason), count in counts.items()]


def _restore(module: nn.Module) -> None:
    if isinstance(module, KernelModule):
        module.__class__ = type(module).torch_class


def _place(name: str, module: nn.Module, parts: Sequence[str], reason: str) -> list[Placement]:
    _restore(module)
    kernel_class = KERNEL_MODULES.get(type(module))
    if kernel_class is None:
        return []
    reason = reason or ('' if kernel_class.part in parts else NOT_ASKED) or kernel_class.why_not(module)
    if not reason:
        module.__class__ = kernel_class
    return [Placement(name, kernel_class.part, 'torch' if reason else 'triton', reason)]
