"""Triton kernels for NVIDIA GPUs in place of PyTorch's; modules, parameters and keys are unchanged.

    import caretrans.kernels
    placements = caretrans.kernels.use_kernels(model.cuda())   # then run, train, compile or capture it as before
    caretrans.kernels.use_kernels(model, parts=())             # back to PyTorch

Every call checks its input: on the CPU, in float64 and without Triton or a GPU, PyTorch runs. Run a network once before
you capture its calls in a CUDA graph: the first call of each size compiles and tunes kernels.
"""
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn as nn

from .modules import KERNEL_MODULES, PARTS, KernelModule, is_interpreted

__all__ = ['PARTS', 'Placement', 'describe_placements', 'use_kernels', 'why_unavailable']

MIN_CAPABILITY = (8, 0)  # bfloat16 and TF32
NOT_ASKED = 'not requested'


class Placement(NamedTuple):
    """Placement of a module: its name, its part of `PARTS`, 'triton' or 'torch', and the reason if not 'triton'."""
    name: str
    part: str
    runs: str
    reason: str


def why_unavailable(device: str | torch.device) -> str:
    """The reason why the kernels cannot run on `device`, in one line; '' if they can."""
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


def use_kernels(model: nn.Module, parts: Sequence[str] = PARTS) -> list[Placement]:
    """Let the modules of `model` run as Triton kernels, in place; those of other `parts` return to PyTorch.

    Args:
        model: A network of this package, fused or not, in training or evaluation, on the device where it will run.
        parts: 'mixer': the depth-wise convolutions and the linear attention of `DecoupledMixer`; 'attention':
            `LinearAttention` elsewhere, and `RotaryLinearAttention`. All of them forward and backward.
    Returns:
        A `Placement` for each module that has a kernel version, except the attention of a mixer that runs in Triton.
    Raises:
        ValueError: An unknown part.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f'Unknown parts {", ".join(unknown)}: choose from {", ".join(PARTS)}.')
    tensor = next(model.parameters(), None)
    reason = why_unavailable('cpu' if tensor is None else tensor.device)
    placements: list[Placement] = []
    within = set()  # attention of mixers with kernels, which call only its projection
    for name, module in model.named_modules():
        if isinstance(module, KernelModule):
            module.__class__ = type(module).torch_class
        kernel_class = KERNEL_MODULES.get(type(module))
        if kernel_class is None or module in within:
            continue
        obstacle = reason or ('' if kernel_class.part in parts else NOT_ASKED) or kernel_class.why_not(module)
        if not obstacle:
            module.__class__ = kernel_class
            if kernel_class.part == 'mixer':
                within.add(module.long_range)
        placements.append(Placement(name, kernel_class.part, 'torch' if obstacle else 'triton', obstacle))
    return placements


def describe_placements(placements: Sequence[Placement]) -> list[str]:
    """A line for each part, where it runs and why, e.g. '12 x mixer: triton'; none for parts not requested."""
    counts = Counter(
        (placement.part, placement.runs, placement.reason) for placement in placements
        if placement.reason != NOT_ASKED)
    return [f'{count} x {part}: {runs}' + (f', {reason}' if reason else '')
            for (part, runs, reason), count in counts.items()]
