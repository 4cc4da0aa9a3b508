"""Evaluate saved Core ML files operation by operation in PyTorch, with numbers rounded as phones round them.

Core ML itself runs on Apple's systems alone. What stands here runs the program that is in the file: its operations,
parameters, weights, labels and shapes. It says nothing of Apple's kernels.

How numbers are modelled: an operation takes the numbers its inputs hold, sums and intermediate values within it are
float32, and its result is rounded to float16, to nearest, once. A device that sums in float16 is less exact than this.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ExportError
from .verify import Program

__all__ = ['Evaluator', 'Findings', 'ImageInput', 'Mode', 'Step', 'Weight', 'round_half_']

HALF = torch.finfo(torch.float16)
LARGEST_SUBNORMAL = HALF.smallest_normal - 2 ** -24
SOFTMAX = ('softmax', 'softmaxND')
KEEPING = ('cast', 'expandDims', 'expand_dims', 'flattenTo2D', 'identity', 'rankPreservingReshape', 'reshape',
           'reshapeStatic', 'squeeze')  # what may stand behind a last softmax: all its numbers, in their order
Names = str | list[str]


class Mode(Enum):
    """How what the file declares as float16 is computed."""
    ROUNDED = 'rounded to float16 after each operation'
    FLUSHED = 'rounded, and subnormal numbers become 0, as on devices without them'
    EXACT = 'float32, with the weights as the file has them'


def round_half_(x: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers to the nearest of float16, in place; what is too large becomes infinite."""
    return x.copy_(x.half())


def _flush(x: torch.Tensor) -> torch.Tensor:
    """float16 numbers below 6.1e-5 become 0; what is no number stays."""
    return F.hardshrink(x, LARGEST_SUBNORMAL) if x.is_floating_point() else x


class Weight:
    """Numbers that a file brings.

    Attributes:
        stored: As the file has them, float32.
        half: Whether they are taken in float16.
        rounded: As an operation takes them; the same tensor where nothing is rounded.
    """

    def __init__(self, stored: torch.Tensor, half: bool) -> None:
        self.stored, self.half, self.rounded = stored, half, stored
        if half:
            rounded = round_half_(stored.clone())
            self.rounded = stored if torch.equal(rounded, stored) else rounded

    def take(self, mode: Mode) -> torch.Tensor:
        """The numbers as a run in this mode takes them."""
        if mode is Mode.EXACT:
            return self.stored
        return _flush(self.rounded) if self.half and mode is Mode.FLUSHED else self.rounded


@dataclass
class Step:
    """One operation of a program.

    Attributes:
        make: Gives a function that takes values by the keys of `inputs`, with the weights of a mode.
        inputs: {parameter: name of a value, or names of several}.
        shapes: Of the outputs, as the file declares them; None where it does not, -1 for a size it leaves open.
        half: Whether what comes out is float16.
        moves: Whether it only hands on numbers that it takes: nothing to round, nothing to find.
    """
    name: str
    type: str
    make: Callable[[Mode], Callable[..., Any]]
    inputs: dict[str, Names]
    outputs: list[str]
    shapes: list[Sequence[int] | None]
    half: bool
    moves: bool = False

    def list_inputs(self) -> list[str]:
        return [name for names in self.inputs.values() for name in ([names] if isinstance(names, str) else names)]

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
    """Numbers among the weights and in runs that float16 cannot hold, by operation.

    Attributes:
        largest: The largest finite magnitude that an operation gave, the operation, and whether it is float16.
    """

    def __init__(self) -> None:
        self.counts: dict[str, _Count] = {}
        self.largest: tuple[float, str, bool] = (0., '', False)

    def record(self, source: str, x: torch.Tensor, half: bool, nonzero: int, given: bool = False) -> None:
        """Look at the float32 numbers that an operation gave.

        Args:
            source: The operation, for people.
            half: Whether they were rounded to float16, so that subnormal ones count.
            nonzero: How many were not 0 before they were rounded; not used for others.
            given: Whether they were handed on, as pixels are by a cast; then none of them is the largest of its own.
        """
        largest = self._count(source, x, half, nonzero)
        if not given and self.largest[0] < largest < float('inf'):
            self.largest = largest, source, half

    def record_weight(self, source: str, weight: Weight) -> None:
        """Look at weights, as an operation takes them."""
        self._count(source, weight.rounded, weight.half, int(weight.stored.count_nonzero()))

    def _count(self, source: str, x: torch.Tensor, half: bool, nonzero: int) -> float:
        """Add to the counts of a source; gives the largest magnitude."""
        low, high = (value.item() for value in torch.aminmax(x))
        largest = max(-low, high)
        count = self.counts.setdefault(source, _Count())
        count.total += x.numel()
        if not largest < float('inf'):  # not a number, too
            count.infinite += int((~x.isfinite()).sum())
        if half:
            left = int(x.count_nonzero())
            count.lost += nonzero - left
            count.subnormal += left - int(_flush(x).count_nonzero())
        return largest

    def describe(self) -> list[str]:
        """Lines, the worst first: the largest magnitude; then for each operation how many numbers are not finite, as
        they came up, how many became 0, and how many are subnormal, by their share.
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
    """What a file takes.

    Attributes:
        shape: (B, C, H, W).
        half: Whether the program holds it in float16.
        reverse_channels: Whether the file wants blue first; images are given in RGB.
        scale, shift: What the file does to pixels before the first operation: a number, and one per channel.
    """
    name: str
    shape: tuple[int, ...]
    half: bool = False
    reverse_channels: bool = False
    scale: float = 1.
    shift: torch.Tensor | None = None

    def prepare(self, images: torch.Tensor, mode: Mode) -> torch.Tensor:
        """What the first operation takes, in new memory."""
        x = images.flip(1) if self.reverse_channels else images.clone()
        x = x * self.scale if self.shift is None else x * self.scale + self.shift[:, None, None]
        return Weight(x, self.half).take(mode)


@dataclass
class Evaluator:
    """A program as it was read from a file, ready to be run on images.

    Attributes:
        path: Of the file, for messages.
        constants: The values that the file brings, by name.
        output: The name of the value that comes out.
        labels: The classes that the file names, if it does.
        reshaping: Types of operations that only change a shape or the order of axes.
        findings: Of the weights, and of what `run` computed so far.
        shape_changes: A line for each reshape and transpose.
    """
    path: str
    steps: list[Step]
    constants: dict[str, Weight]
    input: ImageInput
    output: str
    labels: list[str] | None
    reshaping: Sequence[str]
    findings: Findings = field(default_factory=Findings)
    shape_changes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._check_names()
        self._scores = self._find_scores()
        self._logits: torch.Tensor | None = None
        self._last_uses = self._find_last_uses()
        self._functions = [step.make(Mode.ROUNDED) for step in self.steps]
        self._check_shapes()

    @property
    def operations(self) -> dict[str, int]:
        """How many of each type, constants left out, the commonest first."""
        counts: dict[str, int] = {}
        for step in self.steps:
            counts[step.type] = counts.get(step.type, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def find(self) -> list[str]:
        """Lines on the numbers that `run` met so far: the largest, and those that float16 cannot hold, worst first."""
        return self.findings.describe()

    def to_program(self) -> Program:
        return Program(
            self.run, f'PyTorch {torch.__version__}, operation by operation as the file says', self.labels,
            self.operations, self.shape_changes, self.run_exact, self.run_flushed,
            self.get_logits if self._scores else None, self.find, timed=False)

    def run(self, images: torch.Tensor) -> torch.Tensor:
        """Compute what the file computes, and write down what is found.

        Args:
            images: (B, C, H, W) float32 in RGB, of the size in the file: pixels from 0 to 255, or what it takes.
        Returns:
            (B, classes) float32.
        Raises:
            ExportError: Images of another shape, or an operation that gives another shape than the file says.
        """
        return self._run(images, Mode.ROUNDED, self.findings)

    def run_exact(self, images: torch.Tensor) -> torch.Tensor:
        """The same with nothing rounded but the weights in the file, all else float32; nothing is written down."""
        return self._run(images, Mode.EXACT)

    def run_flushed(self, images: torch.Tensor) -> torch.Tensor:
        """The same as `run` with subnormal float16 numbers taken for 0, weights too; nothing is written down."""
        return self._run(images, Mode.FLUSHED)

    def get_logits(self) -> torch.Tensor:
        """What the last softmax got in the last run of any kind, (B, classes) float32.

        Only for programs that end in a softmax, after a run.
        """
        return self._logits.reshape(self.input.shape[0], -1)

    @torch.inference_mode()
    def _run(self, images: torch.Tensor, mode: Mode, findings: Findings | None = None,
             shape_changes: list[str] | None = None) -> torch.Tensor:
        """Run in one mode, and add to what is given."""
        if tuple(images.shape) != tuple(self.input.shape):
            raise ExportError(
                f'{self.path} takes images of {tuple(self.input.shape)}, not {tuple(images.shape)}: give it these, or '
                'export it again for another --batch and --img-size.')
        values = {name: weight.take(mode) for name, weight in self.constants.items()}
        values[self.input.name] = self.input.prepare(images, mode)
        for step, function, last_uses in zip(self.steps, self._functions, self._last_uses, strict=True):
            inputs = {key: values[names] if isinstance(names, str) else [values[name] for name in names]
                      for key, names in step.inputs.items()}
            results = self._compute(step, function if mode is Mode.ROUNDED else step.make(mode), inputs)
            if not step.moves:
                results = [_finish(step, x, mode, findings) for x in results]
            if shape_changes is not None and step.type in self.reshaping:
                shape_changes.append(_describe_change(step, inputs, results))
            values.update(zip(step.outputs, results, strict=True))
            for name in last_uses:
                del values[name]
        self._logits = values.get(self._scores)
        return values[self.output]

    def _compute(self, step: Step, function: Callable[..., Any], inputs: dict[str, Any]) -> list[torch.Tensor]:
        try:
            found = function(**inputs)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ExportError(
                f'{self.path}: {step} cannot be computed: {str(error).splitlines()[0]} Export it again.') from error
        results = list(found) if isinstance(found, (tuple, list)) else [found]
        if len(results) != len(step.outputs):
            raise ExportError(
                f'{self.path}: {step} gives {len(results)} values, the file says {len(step.outputs)}. Export it again.')
        for x, shape in zip(results, step.shapes, strict=True):
            if shape is not None and not _fits(x.shape, shape):
                raise ExportError(
                    f'{self.path}: {step} gives a value of {tuple(x.shape)}, the file says {tuple(shape)}. '
                    'Export it again.')
        return results

    def _find_scores(self) -> str:
        """The name of what the softmax takes that the program ends in; '' where it ends otherwise."""
        makers = {name: step for step in self.steps for name in step.outputs}
        step = makers.get(self.output)
        while step is not None and step.type in KEEPING:
            step = makers.get(next(iter(step.list_inputs()), ''))
        return next(iter(step.list_inputs()), '') if step is not None and step.type in SOFTMAX else ''

    def _find_last_uses(self) -> list[list[str]]:
        """For each step, the values that no later one needs."""
        last: dict[str, int] = {}
        for number, step in enumerate(self.steps):
            last.update(dict.fromkeys(step.list_inputs() + step.outputs, number))
        for name in (self.output, self._scores):
            last.pop(name, None)
        uses: list[list[str]] = [[] for _ in self.steps]
        for name, number in last.items():
            uses[number].append(name)
        return uses

    def _check_names(self) -> None:
        """Each value that is taken was given before."""
        known = {*self.constants, self.input.name}
        for step in self.steps:
            missing = [name for name in step.list_inputs() if name not in known]
            if missing:
                raise ExportError(f'{self.path}: {step} takes {missing[0]}, which nothing gives. Export it again.')
            known.update(step.outputs)
        if self.output not in known:
            raise ExportError(f'{self.path}: nothing gives its output {self.output}. Export it again.')

    def _check_shapes(self) -> None:
        """Run the program once on a black image: every shape is seen, and changes of shape are written down."""
        result = self._run(torch.zeros(self.input.shape), Mode.ROUNDED, shape_changes=self.shape_changes)
        if result.dim() != 2 or len(result) != self.input.shape[0]:
            raise ExportError(
                f'{self.path}: it gives {tuple(result.shape)} for images of {tuple(self.input.shape)}, not one row '
                'of numbers for each image.')
        if self.labels is not None and len(self.labels) != result.shape[1]:
            raise ExportError(f'{self.path}: it has {len(self.labels)} labels for {result.shape[1]} classes.')


def _finish(step: Step, x: torch.Tensor, mode: Mode, findings: Findings | None) -> torch.Tensor:
    """What comes of a value that an operation computed: rounded as the mode wants, and written down."""
    rounds = step.half and mode is not Mode.EXACT
    nonzero = int(x.count_nonzero()) if rounds and findings is not None else 0
    if rounds:
        round_half_(x)
    if findings is not None and x.is_floating_point():
        findings.record(str(step), x, step.half, nonzero, given=step.type == 'cast')
    return _flush(x) if step.half and mode is Mode.FLUSHED else x


def _describe_change(step: Step, inputs: dict[str, Any], results: list[torch.Tensor]) -> str:
    before = next(iter(inputs.values()))
    before = before[0] if isinstance(before, list) else before
    return f'{step}: {tuple(before.shape)} -> {tuple(results[0].shape)}'


def _fits(found: Sequence[int], declared: Sequence[int]) -> bool:
    return len(found) == len(declared) and all(b in (-1, a) for a, b in zip(found, declared, strict=True))
