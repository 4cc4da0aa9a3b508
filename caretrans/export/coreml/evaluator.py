"""Evaluation of saved Core ML files in PyTorch, operation by operation, with numbers rounded as phones round them.

Core ML itself runs on Apple's systems only. The evaluator runs the program in the file: its operations, parameters,
weights, labels and shapes. It says nothing about Apple's kernels.

Rounding: an operation takes the values of its inputs, sums and intermediate values within it are float32, and its
result is rounded once to float16, to nearest. A device that sums in float16 is less exact.
"""
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import ExportError
from ..program import Program

__all__ = ['Evaluator', 'Findings', 'ImageInput', 'Mode', 'Step', 'Weight', 'round_half_']

HALF = torch.finfo(torch.float16)
LARGEST_SUBNORMAL = HALF.smallest_normal - 2 ** -24
# Types of ML Programs and of neural networks.
RESHAPING = ('flatten', 'flattenTo2D', 'permute', 'rankPreservingReshape', 'reshape', 'reshapeStatic', 'transpose')
SOFTMAX = ('softmax', 'softmaxND')
KEEPING = ('cast', 'expandDims', 'expand_dims', 'flattenTo2D', 'identity', 'rankPreservingReshape', 'reshape',
           'reshapeStatic', 'squeeze')  # may follow a last softmax: they keep all its values, in their order


class Mode(Enum):
    """Handling of values that the file declares as float16."""
    ROUNDED = 'rounded to float16 after each operation'
    FLUSHED = 'rounded, and subnormal numbers become 0, as on devices without them'
    EXACT = 'float32, with the weights as the file has them'


def round_half_(x: torch.Tensor) -> torch.Tensor:
    """Round float32 values to the nearest float16, in place; what is too large becomes infinite."""
    return x.copy_(x.half())


def _flush(x: torch.Tensor) -> torch.Tensor:
    """Set float16 values below 6.1e-5 to 0; NaN is kept."""
    return F.hardshrink(x, LARGEST_SUBNORMAL) if x.is_floating_point() else x


class Weight:
    """Numbers stored in a file.

    Attributes:
        stored: As the file has them, float32.
        half: Whether operations take them in float16.
        rounded: As an operation takes them; the same tensor where nothing is rounded.
    """

    def __init__(self, stored: torch.Tensor, half: bool) -> None:
        self.stored, self.half, self.rounded = stored, half, stored
        if half:
            rounded = round_half_(stored.clone())
            self.rounded = stored if torch.equal(rounded, stored) else rounded

    def take(self, mode: Mode) -> torch.Tensor:
        """The numbers as a run in this mode uses them."""
        if mode is Mode.EXACT:
            return self.stored
        return _flush(self.rounded) if self.half and mode is Mode.FLUSHED else self.rounded


@dataclass
class Step:
    """One operation of a program.

    Attributes:
        operation: Takes the values of `inputs` and `fixed` by name.
        fixed: Its parameters and weights.
        inputs: {parameter: name of a value, or names of several}.
        shapes: Of the outputs, as the file declares them; None where it does not, -1 for a free size.
        half: Whether the outputs are float16.
        moves: Whether it only copies its inputs: nothing to round, nothing to record.
    """
    name: str
    type: str
    operation: Callable[..., Any]
    fixed: dict[str, Any]
    inputs: dict[str, str | list[str]]
    outputs: list[str]
    shapes: list[Sequence[int] | None]
    half: bool
    moves: bool = False

    def list_inputs(self) -> list[str]:
        return [name for names in self.inputs.values() for name in ([names] if isinstance(names, str) else names)]

    def compute(self, values: dict[str, torch.Tensor], mode: Mode) -> list[torch.Tensor]:
        """The outputs, not rounded.

        Raises:
            ValueError: They are not as the file declares.
        """
        inputs = {key: values[names] if isinstance(names, str) else [values[name] for name in names]
                  for key, names in self.inputs.items()}
        fixed = {key: value.take(mode) if isinstance(value, Weight) else value for key, value in self.fixed.items()}
        found = self.operation(**inputs, **fixed)
        results = list(found) if isinstance(found, (tuple, list)) else [found]
        if len(results) != len(self.outputs):
            raise ValueError(f'it has {len(results)} outputs, the file says {len(self.outputs)}.')
        for x, shape in zip(results, self.shapes, strict=True):
            if shape is not None and not (
                    len(shape) == x.dim() and all(size in (-1, n) for n, size in zip(x.shape, shape, strict=True))):
                raise ValueError(f'its output is {tuple(x.shape)}, the file says {tuple(shape)}.')
        return results

    def __str__(self) -> str:
        return f'{self.name} ({self.type})'


# Findings -------------------------------------------------------------------------------------------------------------

@dataclass
class _Count:
    total: int = 0
    infinite: int = 0
    lost: int = 0
    subnormal: int = 0


class Findings:
    """Values among the weights and in runs that float16 cannot hold, by operation.

    Attributes:
        largest: The largest finite magnitude that an operation computed, the operation, and whether it is float16.
    """

    def __init__(self) -> None:
        self.counts: dict[str, _Count] = {}
        self.largest: tuple[float, str, bool] = (0., '', False)

    def record_weight(self, source: str, weight: Weight) -> None:
        """Look at weights, as an operation takes them."""
        self._count(source, weight.rounded, weight.half, int(weight.stored.count_nonzero()))

    def record(self, step: Step, x: torch.Tensor, nonzero: int) -> None:
        """Look at an output of an operation.

        Args:
            x: float32, rounded to float16 if the step is.
            nonzero: Number of values that were not 0 before rounding.
        """
        largest = self._count(str(step), x, step.half, nonzero)
        if step.type != 'cast' and self.largest[0] < largest < float('inf'):  # a cast hands on pixels
            self.largest = largest, str(step), step.half

    def _count(self, source: str, x: torch.Tensor, half: bool, nonzero: int) -> float:
        """Add to the counts of a source; returns the largest magnitude."""
        low, high = (value.item() for value in torch.aminmax(x))
        largest = max(-low, high)
        count = self.counts.setdefault(source, _Count())
        count.total += x.numel()
        if not largest < float('inf'):  # NaN, too
            count.infinite += int((~x.isfinite()).sum())
        if half:
            left = int(x.count_nonzero())
            count.lost += nonzero - left
            count.subnormal += left - int(_flush(x).count_nonzero())
        return largest

    def describe(self) -> list[str]:
        """Lines, the worst first: the largest magnitude; then by operation how many values are not finite, in order of
        execution, how many underflowed to 0, and how many are subnormal, by their share.
        """
        largest, source, half = self.largest
        limit = f' of {HALF.max:.0f}' if half else ''
        lines = [f'largest magnitude: {largest:.4g}{limit} in {source}'] if source else []
        lines += [f'{source}: {count.infinite:,} of {count.total:,} values are not finite'
                  for source, count in self.counts.items() if count.infinite]
        for kind, text in (('lost', 'underflow to 0 in float16'), ('subnormal', 'are subnormal in float16')):
            found = [(getattr(count, kind), count.total, source) for source, count in self.counts.items()]
            lines += [f'{source}: {number:,} of {total:,} values {text} ({number / total:.2%})'
                      for number, total, source in sorted(found, key=lambda item: -item[0] / item[1]) if number]
        return lines


# The evaluator --------------------------------------------------------------------------------------------------------

@dataclass
class ImageInput:
    """The input of a file.

    Attributes:
        shape: (B, C, H, W).
        half: Whether the program holds it in float16.
        reverse_channels: Whether the file wants blue first; images are given in RGB.
        scale, shift: Applied to pixels before the first operation: a number, and one per channel.
    """
    name: str
    shape: tuple[int, ...]
    half: bool = False
    reverse_channels: bool = False
    scale: float = 1.
    shift: torch.Tensor | None = None

    def prepare(self, images: torch.Tensor, mode: Mode) -> torch.Tensor:
        """The input of the first operation, in new memory."""
        x = images.flip(1) if self.reverse_channels else images.clone()
        x = x * self.scale if self.shift is None else x * self.scale + self.shift[:, None, None]
        return Weight(x, self.half).take(mode)


@dataclass
class Evaluator:
    """A program read from a file, ready to run on images; it is checked and run once on a black image.

    Attributes:
        path: Of the file, for messages.
        constants: Values stored in the file, by name.
        output: The name of the value that is returned.
        labels: The classes named in the file, if any.
        findings: Of the weights, and of all calls of `run` so far.
        shape_changes: A line for each reshape and transpose.
    """
    path: str
    steps: list[Step]
    constants: dict[str, Weight]
    input: ImageInput
    output: str
    labels: list[str] | None
    findings: Findings = field(default_factory=Findings)
    shape_changes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        known, last = {*self.constants, self.input.name}, {}
        for number, step in enumerate(self.steps):
            missing = [name for name in step.list_inputs() if name not in known]
            if missing:
                raise ExportError(f'{self.path}: {step} takes {missing[0]}, which does not exist. Export it again.')
            known.update(step.outputs)
            last.update(dict.fromkeys(step.list_inputs() + step.outputs, number))
        if self.output not in known:
            raise ExportError(f'{self.path}: its output {self.output} does not exist. Export it again.')
        self._scores, self._logits = self._find_scores(), None
        self._last_uses: list[list[str]] = [[] for _ in self.steps]  # values that no later step needs
        for name, number in last.items():
            if name not in (self.output, self._scores):
                self._last_uses[number].append(name)
        result = self._run(torch.zeros(self.input.shape), Mode.ROUNDED, shape_changes=self.shape_changes)
        if result.dim() not in (2, 4) or len(result) != self.input.shape[0]:
            raise ExportError(
                f'{self.path}: its output is {tuple(result.shape)} for images of {tuple(self.input.shape)}, not '
                'one row of numbers, or one map per class, for each image.')
        if self.labels is not None and len(self.labels) != result.shape[1]:
            raise ExportError(f'{self.path}: it has {len(self.labels)} labels for {result.shape[1]} classes.')

    def _find_scores(self) -> str:
        """The name of the input of the softmax that the program ends in; '' where it ends otherwise."""
        makers = {name: step for step in self.steps for name in step.outputs}
        step = makers.get(self.output)
        while step is not None and step.type in KEEPING:
            step = makers.get(next(iter(step.list_inputs()), ''))
        return next(iter(step.list_inputs()), '') if step is not None and step.type in SOFTMAX else ''

    @property
    def operations(self) -> dict[str, int]:
        """Number of operations by type, without constants, the most frequent first."""
        return dict(Counter(step.type for step in self.steps).most_common())

    def to_program(self) -> Program:
        return Program(
            self.run, f'PyTorch {torch.__version__}, operation by operation as the file says', self.labels,
            self.operations, self.shape_changes, self.run_exact, self.run_flushed,
            self.get_logits if self._scores else None, self.findings.describe, timed=False)

    def run(self, images: torch.Tensor) -> torch.Tensor:
        """Compute what the file computes, and record findings.

        Args:
            images: (B, C, H, W) float32 in RGB, of the size in the file: pixels from 0 to 255, or what it takes.
        Returns:
            (B, classes) float32, of segmenters (B, classes, rows, columns).
        Raises:
            ExportError: Images of another shape, or an operation whose output has another shape than the file says.
        """
        return self._run(images, Mode.ROUNDED, self.findings)

    def run_exact(self, images: torch.Tensor) -> torch.Tensor:
        """The same with nothing rounded but the weights in the file, all else float32; nothing is recorded."""
        return self._run(images, Mode.EXACT)

    def run_flushed(self, images: torch.Tensor) -> torch.Tensor:
        """The same as `run` with subnormal float16 numbers flushed to 0, weights too; nothing is recorded."""
        return self._run(images, Mode.FLUSHED)

    def get_logits(self) -> torch.Tensor:
        """Input of the last softmax in the last run of any kind, (B, classes) float32.

        Only for programs that end in a softmax, after a run.
        """
        return self._logits.reshape(self.input.shape[0], -1)

    @torch.inference_mode()
    def _run(self, images: torch.Tensor, mode: Mode, findings: Findings | None = None,
             shape_changes: list[str] | None = None) -> torch.Tensor:
        """Run in one mode, and add to what is given."""
        if tuple(images.shape) != tuple(self.input.shape):
            raise ExportError(
                f'{self.path} expects images of {tuple(self.input.shape)}, not {tuple(images.shape)}: use these, or '
                'export it again for another --batch and --img-size.')
        values = {name: weight.take(mode) for name, weight in self.constants.items()}
        values[self.input.name] = self.input.prepare(images, mode)
        for step, last_uses in zip(self.steps, self._last_uses, strict=True):
            try:
                results = step.compute(values, mode)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                raise ExportError(
                    f'{self.path}: {step} cannot be computed: {str(error).splitlines()[0]} Export it again.') from error
            if not step.moves:
                results = [_finish(step, x, mode, findings) for x in results]
            if shape_changes is not None and step.type in RESHAPING:
                before = values[step.list_inputs()[0]]
                shape_changes.append(f'{step}: {tuple(before.shape)} -> {tuple(results[0].shape)}')
            values.update(zip(step.outputs, results, strict=True))
            for name in last_uses:
                del values[name]
        self._logits = values.get(self._scores)
        return values[self.output]


def _finish(step: Step, x: torch.Tensor, mode: Mode, findings: Findings | None) -> torch.Tensor:
    """An output of an operation, rounded as the mode wants, and recorded."""
    rounds = step.half and mode is not Mode.EXACT
    nonzero = int(x.count_nonzero()) if rounds and findings is not None else 0
    if rounds:
        round_half_(x)
    if findings is not None and x.is_floating_point():
        findings.record(step, x, nonzero)
    return _flush(x) if step.half and mode is Mode.FLUSHED else x
