"""Evaluate saved Core ML files operation by operation in PyTorch, with numbers rounded as phones round them.

Core ML itself runs on Apple's systems alone. What stands here runs the program that is in the file: its operations,
parameters, weights, labels and shapes. It says nothing of Apple's kernels.

How numbers are modelled: an operation takes the numbers its inputs hold, sums and intermediate values within it are
float32, and its result is rounded to float16, to nearest, once. A device that sums in float16 is less exact than this.
"""
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F

from .verify import ExportError, Program

__all__ = ['Evaluator', 'Findings', 'ImageInput', 'Step', 'get_metadata', 'round_half_']

HALF = torch.finfo(torch.float16)
LARGEST_SUBNORMAL = HALF.smallest_normal - 2 ** -24
MAX_LINES = 6
Names = Union[str, List[str]]


def round_half_(x: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers to the nearest of float16, in place; what is too large becomes infinite."""
    return x.copy_(x.half())


@dataclass
class Step:
    """One operation of a program.

    Attributes:
        compute: Takes values by the keys of `inputs`.
        inputs: {parameter: name of a value, or names of several}.
        shapes: Of the outputs, as the file declares them; None where it does not, -1 for a size it leaves open.
        half: Whether what comes out is float16.
        moves: Whether it only hands on numbers that it takes: nothing to round, nothing to find.
    """
    name: str
    type: str
    compute: Callable[..., Any]
    inputs: Dict[str, Names]
    outputs: List[str]
    shapes: List[Optional[Sequence[int]]]
    half: bool
    moves: bool = False

    def list_inputs(self) -> List[str]:
        return [name for names in self.inputs.values() for name in ([names] if isinstance(names, str) else names)]

    def __str__(self) -> str:
        return f'{self.name} ({self.type})'


# Findings -------------------------------------------------------------------------------------------------------------

@dataclass
class _Count:
    total: int = 0
    infinite: int = 0
    subnormal: int = 0


class Findings:
    """Numbers among the weights and in runs that float16 cannot hold, by operation.

    Attributes:
        largest: The largest finite magnitude, and the operation it came from.
    """

    def __init__(self) -> None:
        self.counts: Dict[str, _Count] = {}
        self.largest: Tuple[float, str] = (0., '')

    def record(self, source: str, x: torch.Tensor, half: bool) -> None:
        """Look at float32 numbers.

        Args:
            source: The operation, for people.
            half: Whether they are rounded to float16, so that subnormal ones count.
        """
        low, high = (value.item() for value in torch.aminmax(x))
        largest = max(-low, high)
        count = self.counts.setdefault(source, _Count())
        count.total += x.numel()
        if not largest < float('inf'):  # not a number, too
            count.infinite += int((~x.isfinite()).sum())
        elif largest > self.largest[0]:
            self.largest = largest, source
        if half:
            count.subnormal += int(x.count_nonzero() - F.hardshrink(x, LARGEST_SUBNORMAL).count_nonzero())

    def describe(self) -> List[str]:
        """A line for each operation with such numbers: the not finite ones as they came up, then the most subnormal."""
        lines = [f'{source}: {count.infinite:,} of {count.total:,} values are not finite'
                 for source, count in self.counts.items() if count.infinite]
        tiny = sorted(((count.subnormal / count.total, source, count) for source, count in self.counts.items()
                       if count.subnormal), key=lambda item: -item[0])
        lines += [f'{source}: {count.subnormal:,} of {count.total:,} values are subnormal in float16 ({share:.2%})'
                  for share, source, count in tiny]
        more = [f'and {len(lines) - MAX_LINES} operations more'] if len(lines) > MAX_LINES else []
        return lines[:MAX_LINES] + more


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
    shape: Tuple[int, ...]
    half: bool = False
    reverse_channels: bool = False
    scale: float = 1.
    shift: Optional[torch.Tensor] = None

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """What the first operation takes, in new memory."""
        x = images.flip(1) if self.reverse_channels else images.clone()
        x = x * self.scale if self.shift is None else x * self.scale + self.shift[:, None, None]
        return round_half_(x) if self.half else x


@dataclass
class Evaluator:
    """A program as it was read from a file, ready to be run on images.

    Attributes:
        path: Of the file, for messages.
        constants: The values that the file brings, by name.
        output: The name of the value that comes out.
        labels: The classes that the file names, if it does.
        metadata: Author, licence and so on, as the file has them.
        reshaping: Types of operations that only change a shape or the order of axes.
        flush_subnormals: Whether float16 numbers below 6.1e-5 become 0 on the way, as on devices without them.
        findings: Of the weights, and of the runs so far.
        shape_changes: A line for each reshape and transpose.
    """
    path: str
    steps: List[Step]
    constants: Dict[str, torch.Tensor]
    input: ImageInput
    output: str
    labels: Optional[List[str]]
    metadata: Dict[str, str]
    reshaping: Sequence[str]
    flush_subnormals: bool = False
    findings: Findings = field(default_factory=Findings)
    shape_changes: List[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._last_uses = self._find_last_uses()
        self._check_file()

    @property
    def operations(self) -> Dict[str, int]:
        """How many of each type, constants left out, the commonest first."""
        counts: Dict[str, int] = {}
        for step in self.steps:
            counts[step.type] = counts.get(step.type, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def find(self) -> List[str]:
        """Lines on numbers of the runs so far that float16 cannot hold, the worst first and at most seven."""
        return self.findings.describe()

    def to_program(self) -> Program:
        return Program(
            self.run, f'PyTorch {torch.__version__}, operation by operation as the file says', self.labels,
            self.operations, self.shape_changes, self.find, timed=False)

    def run(self, images: torch.Tensor) -> torch.Tensor:
        """Compute what the file computes.

        Args:
            images: (B, C, H, W) float32 in RGB, of the size in the file: pixels from 0 to 255, or what it takes.
        Returns:
            (B, classes) float32.
        Raises:
            ExportError: Images of another shape, or an operation that gives another shape than the file says.
        """
        if tuple(images.shape) != tuple(self.input.shape):
            raise ExportError(
                f'{self.path} takes images of {tuple(self.input.shape)}, not {tuple(images.shape)}: give it these, or '
                'export it again for another --batch and --img-size.')
        return self._run(images, self._look)

    def _look(self, step: Step, inputs: Dict[str, Any], results: List[torch.Tensor]) -> None:
        if not step.moves:
            for x in results:
                if x.is_floating_point():
                    self.findings.record(str(step), x, step.half)

    @torch.inference_mode()
    def _run(self, images: torch.Tensor, look: Callable[[Step, Dict[str, Any], List[torch.Tensor]], None]
             ) -> torch.Tensor:
        values = dict(self.constants)
        values[self.input.name] = self.input.prepare(images)
        for step, last_uses in zip(self.steps, self._last_uses, strict=True):
            inputs = {key: values[names] if isinstance(names, str) else [values[name] for name in names]
                      for key, names in step.inputs.items()}
            results = self._compute(step, inputs)
            look(step, inputs, results)
            if self.flush_subnormals and step.half and not step.moves:
                results = [F.hardshrink(x, LARGEST_SUBNORMAL) for x in results]
            values.update(zip(step.outputs, results, strict=True))
            for name in last_uses:
                del values[name]
        return values[self.output]

    def _compute(self, step: Step, inputs: Dict[str, Any]) -> List[torch.Tensor]:
        try:
            found = step.compute(**inputs)
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
        if step.half and not step.moves:
            results = [round_half_(x) for x in results]
        return results

    def _find_last_uses(self) -> List[List[str]]:
        """For each step, the values that no later one needs."""
        last: Dict[str, int] = {}
        for number, step in enumerate(self.steps):
            last.update(dict.fromkeys(step.list_inputs() + step.outputs, number))
        last.pop(self.output, None)
        uses: List[List[str]] = [[] for _ in self.steps]
        for name, number in last.items():
            uses[number].append(name)
        return uses

    def _check_file(self) -> None:
        """Run the program once on a black image: every shape is seen, and changes of shape are written down."""
        known = {*self.constants, self.input.name}
        for step in self.steps:
            missing = [name for name in step.list_inputs() if name not in known]
            if missing:
                raise ExportError(f'{self.path}: {step} takes {missing[0]}, which nothing gives. Export it again.')
            known.update(step.outputs)
        if self.output not in known:
            raise ExportError(f'{self.path}: nothing gives its output {self.output}. Export it again.')
        result = self._run(torch.zeros(self.input.shape), self._note_shapes)
        if result.dim() != 2 or len(result) != self.input.shape[0]:
            raise ExportError(
                f'{self.path}: it gives {tuple(result.shape)} for images of {tuple(self.input.shape)}, not one row '
                'of numbers for each image.')
        if self.labels is not None and len(self.labels) != result.shape[1]:
            raise ExportError(f'{self.path}: it has {len(self.labels)} labels for {result.shape[1]} classes.')

    def _note_shapes(self, step: Step, inputs: Dict[str, Any], results: List[torch.Tensor]) -> None:
        if step.type in self.reshaping:
            before = next(iter(inputs.values()))
            before = before[0] if isinstance(before, list) else before
            self.shape_changes.append(f'{step}: {tuple(before.shape)} -> {tuple(results[0].shape)}')


def _fits(found: Sequence[int], declared: Sequence[int]) -> bool:
    return len(found) == len(declared) and all(b in (-1, a) for a, b in zip(found, declared, strict=True))


def get_metadata(spec: Any) -> Dict[str, str]:
    """What a Core ML file says of itself."""
    found = spec.description.metadata
    named = {'author': found.author, 'license': found.license, 'version': found.versionString,
             'description': found.shortDescription}
    return {**{key: value for key, value in named.items() if value}, **dict(found.userDefined)}
