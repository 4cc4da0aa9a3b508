"""Verification that a program computes what PyTorch computes, on real images, before it is kept."""
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.nn as nn

from ..errors import ExportError
from .config import TOLERANCES, Job
from .program import Program, Run
from .source import Cases, Source, build_network

__all__ = [
    'Verification', 'VerificationError', 'check_labels', 'check_structure', 'compare', 'find_fault', 'run_batches',
    'verify']

TOP = 5
EXAMINED = 16  # images, for a program without its rounding
FLUSHED = 0.05  # largest effect of flushing subnormal numbers, as a share of the largest logit


class VerificationError(ExportError):
    """A program differs from the network; `verification` contains the figures."""

    def __init__(self, message: str, verification: Optional['Verification'] = None) -> None:
        super().__init__(message)
        self.verification = verification


@dataclass
class Verification:
    """Differences of a program from the original network in float64, on real images.

    Attributes:
        compared: 'logits'; 'probabilities' where the program returns those and its logits cannot be seen.
        max_error, mean_error: Of what is compared.
        largest: The largest magnitude of what is compared.
        top1_agreement: Share of images with the same top-1 class, %; of pixels, or of anchors, in dense tasks.
        top5_agreement: Mean share of the top-5 classes that are among the network's top-5, %; None in dense tasks.
        floor: Least top-1 agreement allowed, %.
        exact_error: Of `Program.run_exact` on some images, relative to the largest logit, against the network with the
            weights in the file.
        flushed_error: The largest of `Program.run_flushed` on the same images.
        top1, top1_expected: Accuracy of the program and of the network, %, if the labels of the data are its own.
        findings: Of `Program.find`.
    """
    images: int
    data: str
    max_error: float
    mean_error: float
    largest: float
    top1_agreement: float
    top5_agreement: float | None
    floor: float
    compared: str = 'logits'
    exact_error: float | None = None
    flushed_error: float | None = None
    top1: float | None = None
    top1_expected: float | None = None
    findings: list[str] = field(default_factory=list)


def check_labels(source: Source, job: Job, program: Program, path: Any) -> None:
    """Compare the classes named in a file with those of the network.

    Raises:
        VerificationError: They differ, or are missing from a classifier.
    """
    if program.labels is None:
        if job.output == 'classes':
            raise VerificationError(f'{path}: the program has no class labels.')
    elif program.labels != source.class_names:
        for number, (found, wanted) in enumerate(zip(program.labels, source.class_names, strict=False)):
            if found != wanted:
                raise VerificationError(f'{path}: class {number} is labelled {found!r}, expected {wanted!r}.')
        raise VerificationError(
            f'{path}: the program has {len(program.labels)} labels for {len(source.class_names)} classes.')


def run_batches(
        run: Run, source: Source, job: Job, program: Program, cases: Cases,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Outputs of each batch, and its logits where they can be seen: (batch, numbers) float64.

    Args:
        run: Of the program: `run`, `run_exact` or `run_flushed`.
    """
    left = len(cases)
    for pixels in cases.batches(job.batch):
        outputs = run(source.make_ready(pixels, job)).double().flatten(1)[:left]
        logits = outputs if job.output == 'logits' else None
        if logits is None and program.get_logits is not None:
            logits = program.get_logits().double()[:left]
        left -= len(outputs)
        yield outputs, logits


def compare(outputs: torch.Tensor, cases: Cases, job: Job, logits: torch.Tensor | None = None) -> Verification:
    """Compare outputs (n, classes) with the network; errors are of the logits if these are known."""
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


@torch.no_grad()
def _compute_rounded(source: Source, job: Job, cases: Cases) -> torch.Tensor | None:
    """Logits, in float64, of the exported network with its weights in the precision of the file.

    None where those are not known: converters fold remaining BatchNorms into convolutions, and round after that.
    """
    network = build_network(source, dataclasses.replace(job, output='logits')).double()
    if job.precision == 'fp16':
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            return None
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.copy_(tensor.half())
        for module in network.modules():
            if isinstance(getattr(module, 'eps', None), float) and job.format != 'mlmodel':  # which has it in float32
                module.eps = torch.tensor(module.eps).half().item()
    return torch.cat([network(source.make_ready(part, job).double()).flatten(1) for part in cases.pixels.split(8)])


def check_structure(
        source: Source, job: Job, program: Program, cases: Cases, path: Any, result: Verification) -> None:
    """Hold a program to the rounding of float32 where it can run without its own, and limit the effect of flushing.

    Rounding to float16 hides smaller mistakes, such as a lost bias. The same program without rounding, against the
    network with the weights in the file, hides nothing.

    Raises:
        VerificationError: It is not the same function, or is another one where subnormal numbers become 0.
    """
    if job.compress != 'none' or program.run_exact is None:
        return

    def compute(run: Run) -> torch.Tensor:
        return torch.cat([outputs if logits is None else logits
                          for outputs, logits in run_batches(run, source, job, program, some)])

    some = cases.select(EXAMINED)
    expected = _compute_rounded(source, job, some)
    if expected is not None:
        errors = (compute(program.run_exact) - expected).abs().amax(dim=1) / expected.abs().max()
        result.exact_error = errors.max().item()
        if not result.exact_error <= TOLERANCES['fp32']:
            first = int((~(errors <= TOLERANCES['fp32'])).nonzero()[0])
            raise VerificationError(
                f'{path}: {some.images[first]}: without rounding, its logits differ from the network by '
                f'{errors[first]:.2g} of the largest, {TOLERANCES["fp32"]:g} is allowed: the program computes '
                f'something else; no file was written.', result)
    if program.run_flushed is not None:
        errors = (compute(program.run_flushed) - some.logits).abs().amax(dim=1)
        result.flushed_error = errors.max().item()
        largest = some.logits.abs().max().item()
        if not result.flushed_error <= FLUSHED * largest:
            raise VerificationError(
                f'{path}: {some.images[int(errors.argmax())]}: with subnormal float16 numbers flushed to 0, as some '
                f'hardware does, logits differ from PyTorch by {result.flushed_error:.2g}, more than {FLUSHED:g} of '
                f'the largest, {largest:.2g}; no file was written. Use --precision fp32.', result)


def find_fault(outputs: torch.Tensor, errors: torch.Tensor, limit: float, names: Sequence[str]) -> tuple[str, float]:
    """The first image of a batch whose outputs are not finite or whose largest error exceeds a limit, and that error.

    Returns:
        ('', 0) if there is none; infinity for outputs that are not finite.
    """
    for name, row, error in zip(names, outputs, errors.amax(dim=1).tolist(), strict=True):
        if not bool(row.isfinite().all()):
            return name, math.inf
        if not error <= limit:
            return name, error
    return '', 0.


def verify(
        source: Source, job: Job, program: Program, cases: Cases, path: Any = '',
        report: Callable[[int], Any] = lambda count: None,
) -> Verification:
    """Run a program on images and compare with the original network in float64, up to the first image that fails.

    Args:
        report: Called with the number of images done since the last call.
    Raises:
        VerificationError: Labels differ, an output is not finite or its error exceeds `job.tolerance`, or top-1
            agreement is below `job.floor`.
    """
    check_labels(source, job, program, path)
    seen = job.output == 'logits' or program.get_logits is not None
    expected = cases.logits if seen else cases.logits.softmax(dim=-1)
    largest, others = expected.abs().max().item(), []
    parts: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def compare_so_far() -> Verification:
        outputs = torch.cat([part[0] for part in parts])
        logits = torch.cat([part[1] for part in parts]) if seen else None
        result = compare(outputs, cases.select(len(cases), len(outputs)), job, logits)
        result.findings = program.find()
        return result

    done = 0
    for outputs, logits in run_batches(program.run, source, job, program, cases):
        if outputs.shape[1:] != expected.shape[1:]:
            raise VerificationError(
                f'{path}: the program returns {outputs.shape[1]} numbers per image, the network has '
                f'{expected.shape[1]} classes.')
        parts.append((outputs, logits))
        batch = slice(done, done + len(outputs))
        done += len(outputs)
        report(job.batch)
        errors = ((logits if seen else outputs) - expected[batch]).abs()
        name, error = find_fault(outputs, errors, job.tolerance * largest, cases.images[batch])
        if error == math.inf:
            first = next((line for line in program.find() if 'not finite' in line), 'the operation is unknown')
            raise VerificationError(f'{path}: {name}: outputs are not finite; {first}.', compare_so_far())
        if name:
            raise VerificationError(
                f'{path}: {name}: outputs differ from PyTorch by {error:.2g}, more than {job.tolerance:g} of the '
                f'largest, {largest:.2g}: rounding does not explain it; no file was written.', compare_so_far())
        different = outputs.argmax(dim=-1) != expected[batch].argmax(dim=-1)
        others += [name for name, differs in zip(cases.images[batch], different, strict=True) if differs]
        if 100 * (1 - len(others) / len(cases)) < job.floor:
            result = compare_so_far()
            raise VerificationError(
                f'{path}: {result.top1_agreement:.2f} % of {done} images have the top-1 class of PyTorch, at least '
                f'{job.floor:g} % of {len(cases)} must; the first that has not is {others[0]} (largest error '
                f'{result.max_error:.2g} of {largest:.2g}); no file was written. A lower --floor allows it.', result)
    result = compare_so_far()
    check_structure(source, job, program, cases, path, result)
    return result
