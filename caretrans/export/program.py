"""A program as it is read back from its file, and what the module of a format provides to write and read it."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import ExportError
from .config import Job
from .source import Source

__all__ = ['FormatModule', 'Program', 'Run', 'join_outputs', 'reading']

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Program:
    """A program read back from its file.

    Attributes:
        run: Images (batch, C, H, W) float32 as the program takes them, to (batch, classes) logits or probabilities; of
            detectors and segmenters to what `join_outputs` returns.
        runner: What computes here, e.g. 'ONNX Runtime 1.31.1' or 'operation by operation in PyTorch'.
        labels: The classes named in the file, if any.
        operations: Number of operations by type, without constants; {} where the file does not show them.
        shape_changes: A line for each reshape and transpose.
        run_exact: The same as `run` with nothing rounded between operations, only the weights as the file has them. It
            shows mistakes that are smaller than rounding. None where it cannot be computed.
        run_flushed: The same as `run` with subnormal numbers flushed to 0, as some hardware does; likewise.
        get_logits: Input (batch, classes) of the softmax in the last run, for programs that end in one; likewise.
        find: Lines on values of the runs so far that float16 cannot hold (not finite, subnormal), the worst first.
        least: Axes of the images that the file leaves free, 'batch', 'height' and 'width', and the least size of each.
        timed: Whether `run` is the runtime that users have, so that its time means something.
        notes: Remarks for readers of the figures.
    """
    run: Run
    runner: str
    labels: list[str] | None = None
    operations: dict[str, int] = field(default_factory=dict)
    shape_changes: list[str] = field(default_factory=list)
    run_exact: Run | None = None
    run_flushed: Run | None = None
    get_logits: Callable[[], torch.Tensor] | None = None
    find: Callable[[], list[str]] = list
    least: dict[str, int] = field(default_factory=dict)
    timed: bool = True
    notes: list[str] = field(default_factory=list)


class FormatModule(Protocol):
    """The functions of a module named in `formats.table`; `check` may be missing."""

    def check(self, job: Job) -> None:
        """Raise ConfigError for settings that the format cannot combine, before any work."""

    def write(self, source: Source, job: Job, path: Path) -> list[str]:
        """Write a finished file or folder at `path`; returns remarks for people."""

    def read(self, job: Job, path: Path) -> Program:
        """Read what is in the file, ready to run; raises ExportError where it is damaged."""


def join_outputs(outputs: Any) -> torch.Tensor:
    """One tensor of the outputs of a program, arrays or tensors: the only one, or all in a row, (batch, numbers)."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    tensors = [torch.as_tensor(y) for y in outputs]
    return tensors[0] if len(tensors) == 1 else torch.cat([y.flatten(1) for y in tensors], dim=1)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors of libraries on damaged files to an ExportError that names the file and the remedy."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), '')[:200]
        raise ExportError(
            f'{path} cannot be read ({type(error).__name__}: {line}). Copy the complete file again, or export it again.'
        ) from error
