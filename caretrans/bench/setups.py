"""What a backend runs: a network, a setup of it, and the runner that it becomes."""
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn as nn

from ..fuse import to_form
from ..runtimes.onnx import export_onnx

__all__ = ['IN_TORCH', 'Network', 'Runner', 'Setup', 'WrongOutputError', 'measure_deviation']

IN_TORCH = ('eager', 'fused', 'compile', 'cudagraph')
CHECKED = 8


class WrongOutputError(RuntimeError):
    """A way of running a network does not compute what the network computes."""


@dataclass(frozen=True)
class Setup:
    """How a network is run: one of `BACKENDS`, `DTYPES`, `LAYOUTS` and `KERNELS`, a device, threads of a CPU."""
    backend: str
    dtype: str = 'float32'
    layout: str = 'nchw'
    device: torch.device = torch.device('cpu')
    threads: int = 1
    kernels: str = 'torch'

    def __str__(self) -> str:
        return ' '.join([self.backend, self.dtype] + [self.layout] * (self.backend in IN_TORCH)
                        + [self.kernels] * (self.kernels != 'torch'))


@dataclass
class Runner:
    """A network ready to be run on given images.

    Attributes:
        run: Runs it once; on a GPU without waiting for the end.
        read: The logits (B, num_classes) of what `run` gave, float64 on the CPU.
        images: What `run` runs the network on; whatever is copied into this tensor is run next.
        held: Bytes of weights and images; None where the memory of the backend cannot be seen.
        peak: Bytes at most, where `held` and PyTorch's counting during a run do not tell it.
        notes: What a reader of its figures must know.
        module: The network that `run` calls, where there is one with its parts.
        kernels: Which of `KERNELS` run, if any of those that were asked for.
    """
    run: Callable[[], Any]
    read: Callable[[Any], torch.Tensor]
    images: torch.Tensor
    held: int | None = None
    peak: int | None = None
    notes: list[str] = field(default_factory=list)
    module: nn.Module | None = None
    kernels: str = 'torch'


class Network:
    """A network with images to run it on, and what is made of both once: rewrite, reference, exported program.

    Args:
        model: In evaluation mode, float32, on the CPU.
        images: (B, C, H, W) float32, made ready for the model.
        fused: What `to_form` makes of `model`, where it is there already.
        photographs: (N, C, H, W), to calibrate int8.
    """

    def __init__(
            self, model: nn.Module, images: torch.Tensor, fused: nn.Module | None = None,
            photographs: torch.Tensor | None = None) -> None:
        self.model, self.images, self.photographs = model, images, photographs
        self.fused = to_form(model) if fused is None else fused
        self._programs: dict[torch.dtype, bytes] = {}
        self._roundings: dict[torch.dtype, float] = {}

    @cached_property
    def checked(self) -> list[int]:
        """The images whose logits are checked: the first, the last and some between, `CHECKED` at most."""
        count = len(self.images)
        return sorted({round(i * (count - 1) / (CHECKED - 1)) for i in range(CHECKED)})

    @cached_property
    def expected(self) -> torch.Tensor:
        """The logits of the checked images, of the network as it is trained, in float64."""
        return self._compute(copy.deepcopy(self.model).double(), torch.float64)

    def _compute(self, model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():  # one by one, for memory
            return torch.cat([model(self.images[[number]].to(dtype)) for number in self.checked])

    def measure_rounding(self, dtype: torch.dtype) -> float:
        """`measure_deviation` of the network as it is trained, computed in float32, where weights, images and what
        each module gives are rounded to `dtype`."""
        if dtype not in self._roundings:
            model = copy.deepcopy(self.model)
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype).float()
            for module in model.modules():
                module.register_forward_pre_hook(lambda module, args: _round(args, dtype))
                module.register_forward_hook(lambda module, args, out: _round(out, dtype))
            self._roundings[dtype] = measure_deviation(self._compute(model, torch.float32), self.expected)
        return self._roundings[dtype]

    def halve(self) -> 'Network':
        """The same with half of the images."""
        return Network(self.model, self.images[:len(self.images) // 2], self.fused, self.photographs)

    def export(self, dtype: torch.dtype = torch.float32) -> bytes:
        """The rewritten network as an ONNX program for images of this shape."""
        if dtype not in self._programs:
            self._programs[dtype] = export_onnx(copy.deepcopy(self.fused).to(dtype), self.images.to(dtype))
        return self._programs[dtype]


def measure_deviation(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the error of all logits relative to theirs; infinite where logits are not finite."""
    deviation = ((logits.double() - expected).norm() / expected.norm()).item()
    return deviation if deviation == deviation else float('inf')


def _round(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, (tuple, list)):
        return type(values)(_round(value, dtype) for value in values)
    is_float = isinstance(values, torch.Tensor) and values.is_floating_point()
    return values.to(dtype).to(values.dtype) if is_float else values
