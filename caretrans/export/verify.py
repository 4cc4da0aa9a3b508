"""Prove that a program computes what PyTorch computes, on photographs, before it is shipped."""
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.nn as nn

from ..errors import ExportError
from .config import TOLERANCES, Job
from .source import Cases, Source, build_network

__all__ = ['Program', 'Verification', 'VerificationError', 'verify']

TOP = 5
EXAMINED = 16  # photographs, of a program without its rounding
Run = Callable[[torch.Tensor], torch.Tensor]


class VerificationError(ExportError):
    """A program does not compute what the network computes; `verification` holds the figures."""

    def __init__(self, message: str, verification: Optional['Verification'] = None) -> None:
        super().__init__(message)
        self.verification = verification


@dataclass
class Program:
    """What a file computes, read back from the file.

    Attributes:
        run: Images (batch, C, H, W) float32 as the program takes them, to (batch, classes) logits or probabilities.
        runner: What computes here, e.g. 'ONNX Runtime 1.31.1' or 'operation by operation in PyTorch'.
        labels: The classes that the file names, if it does.
        operations: How many of each type the file has, constants left out; {} where it cannot be seen.
        shape_changes: A line for each reshape and transpose.
        run_exact: The same with nothing rounded between the operations, only the weights as the file has them; where
            that can be computed. It shows mistakes that are smaller than rounding.
        run_flushed: The same as `run` with subnormal numbers taken for 0, as some hardware does; likewise.
        get_logits: What the softmax of the last `run` got, (batch, classes), for programs that end in one; likewise.
        find: Lines on numbers that came up in the runs so far and that float16 cannot hold: not finite, subnormal; the
            worst first.
        timed: Whether `run` is the runtime that users have, so that its time means something.
        notes: What a reader of the figures must know.
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
    timed: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass
class Verification:
    """How a program differs from the network as trained, in float64, on photographs.

    Attributes:
        compared: 'logits'; 'probabilities' where the program gives those and its logits cannot be seen.
        max_error, mean_error: Of what is compared.
        exact_error: Of `Program.run_exact` on some photographs, relative to the largest logit, against the network with
            the weights that the file has.
        flushed_error: The largest of `Program.run_flushed` on the same photographs.
        largest: The largest magnitude of what is compared.
        top1_agreement: Share of photographs with the same first answer, %.
        top5_agreement: Mean share of the first five answers that are among the network's first five, %.
        top1, top1_expected: Accuracy of the program and of the network, %, where the labels of the data are its own.
        findings: Of `Program.find`.
    """
    images: int
    data: str
    max_error: float
    mean_error: float
    largest: float
    top1_agreement: float
    top5_agreement: float
    floor: float
    compared: str = 'logits'
    exact_error: float | None = None
    flushed_error: float | None = None
    top1: float | None = None
    top1_expected: float | None = None
    findings: list[str] = field(default_factory=list)


def _check_labels(source: Source, job: Job, program: Program, path: Any) -> None:
    if program.labels == source.class_names:
        return
    if program.labels is None:
        if job.output == 'classes':
            raise VerificationError(f'{path}: it names no classes.')
        return
    for number, (found, wanted) in enumerate(zip(program.labels, source.class_names, strict=False)):
        if found != wanted:
            raise VerificationError(f'{path}: its class {number} is labelled {found!r}, it should be {wanted!r}.')
    raise VerificationError(f'{path}: it has {len(program.labels)} labels for {len(source.class_names)} classes.')


def compute(
        source: Source, job: Job, program: Program, cases: Cases, report: Callable[[int], Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a program makes of all photographs, and the logits behind it where they can be seen: (n, classes) float64.

    Args:
        report: Is told how many photographs more are done.
    """
    outputs, logits = [], []
    for pixels in cases.batches(job.batch):
        outputs.append(program.run(source.make_ready(pixels, job)).double())
        if job.output == 'logits':
            logits.append(outputs[-1])
        elif program.get_logits is not None:
            logits.append(program.get_logits().double())
        report(job.batch)
    return torch.cat(outputs)[:len(cases)], torch.cat(logits)[:len(cases)] if logits else None


def compare(
        outputs: torch.Tensor, cases: Cases, job: Job, logits: torch.Tensor | None = None) -> Verification:
    """Figures of outputs (n, classes) against those of the network, errors of the logits where they are known."""
    if job.output == 'logits':
        logits = outputs
    expected = cases.logits if logits is not None else cases.logits.softmax(dim=-1)
    errors = ((outputs if logits is None else logits) - expected).abs()
    first, wanted = outputs.argmax(dim=-1), expected.argmax(dim=-1)
    top = min(TOP, expected.shape[1])
    shared = outputs.topk(top).indices[:, :, None] == expected.topk(top).indices[:, None]

    def share(values: torch.Tensor) -> float:
        return 100 * values.double().mean().item()

    return Verification(
        len(cases), cases.name, errors.max().item(), errors.mean().item(), expected.abs().max().item(),
        share(first == wanted), share(shared.any(dim=-1)), job.floor,
        compared='probabilities' if logits is None else 'logits',
        top1=None if cases.labels is None else share(first == cases.labels),
        top1_expected=None if cases.labels is None else share(wanted == cases.labels))


def _compute_logits(run: Run, source: Source, job: Job, program: Program, cases: Cases) -> torch.Tensor:
    outputs = []
    for pixels in cases.batches(job.batch):
        answer = run(source.make_ready(pixels, job))
        outputs.append((answer if program.get_logits is None else program.get_logits()).double())
    return torch.cat(outputs)[:len(cases)]


@torch.no_grad()
def _compute_rounded(source: Source, job: Job, cases: Cases) -> torch.Tensor | None:
    """Logits, in float64, of the exported network with its weights in the precision of the file.

    None where those are not known: converters fold BatchNorms that are left into convolutions, and round after that.
    """
    network = build_network(source, dataclasses.replace(job, output='logits')).double()
    if job.precision == 'fp16':
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            return None
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.copy_(tensor.half())
    return torch.cat([network(source.make_ready(part, job).double()) for part in cases.pixels.split(8)])


def _examine_structure(
        source: Source, job: Job, program: Program, cases: Cases, path: Any, result: Verification) -> None:
    """Hold a program to float32's rounding where it can be run without its own, and see what flushing does.

    Rounding to float16 hides what is smaller than it: a lost bias, say. The same program without rounding, against the
    network with the weights that the file has, hides nothing.

    Raises:
        VerificationError: It is not the same function.
    """
    if job.compress != 'none' or program.run_exact is None:
        return
    some = cases.select(EXAMINED)
    expected = _compute_rounded(source, job, some)
    if expected is not None:
        errors = (_compute_logits(program.run_exact, source, job, program, some) - expected).abs()
        result.exact_error = (errors.max() / expected.abs().max()).item()
        if not result.exact_error <= TOLERANCES['fp32']:
            raise VerificationError(
                f'{path}: without rounding, its logits differ from those of the network by {result.exact_error:.2g} of '
                f'the largest, {TOLERANCES["fp32"]:g} is allowed: it is another function. Nothing was kept.', result)
    if program.run_flushed is not None:
        flushed = _compute_logits(program.run_flushed, source, job, program, some)
        result.flushed_error = (flushed - some.logits).abs().max().item()


def verify(
        source: Source, job: Job, program: Program, cases: Cases, path: Any = '',
        report: Callable[[int], Any] = lambda count: None,
) -> Verification:
    """Run a program on photographs and compare with the network as trained, in float64.

    Raises:
        VerificationError: Labels differ, an output is not finite or further off than `job.tolerance`, or fewer first
            answers agree than `job.floor`.
    """
    _check_labels(source, job, program, path)
    outputs, logits = compute(source, job, program, cases, report)
    if outputs.shape != cases.logits.shape:
        raise VerificationError(
            f'{path}: it gives {outputs.shape[1]} numbers an image, the network has {cases.logits.shape[1]} classes.')
    result = compare(outputs, cases, job, logits)
    result.findings = program.find()
    if not bool(outputs.isfinite().all()):
        first = next((line for line in result.findings if 'not finite' in line), 'no operation is known for it')
        raise VerificationError(f'{path}: outputs are not finite; {first}.', result)
    if not result.top1_agreement >= job.floor:
        raise VerificationError(
            f'{path}: {result.top1_agreement:.2f} % of {result.images} first answers are those of PyTorch, at least '
            f'{job.floor:g} % must be (largest error {result.max_error:.2g} of {result.largest:.2g}). Nothing was '
            f'kept; a lower --floor keeps it.', result)
    if not result.max_error <= job.tolerance * result.largest:
        raise VerificationError(
            f'{path}: outputs differ from those of PyTorch by up to {result.max_error:.2g}, that is more than '
            f'{job.tolerance:g} of the largest, {result.largest:.2g}: rounding does not explain it. Nothing was '
            f'kept.', result)
    _examine_structure(source, job, program, cases, path, result)
    return result
