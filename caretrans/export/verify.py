"""Verification that a program computes what PyTorch computes, on real images, before it is kept."""
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.nn as nn

from ..errors import ExportError
from .config import TOLERANCES, Job
from .program import Program, Run
from .source import Cases, Source, build_network

__all__ = ['Verification', 'VerificationError', 'compare', 'verify']

TOP = 5
EXAMINED = 16  # images, for a program without its rounding


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
        top1_agreement: Share of images with the same top-1 class, %.
        top5_agreement: Mean share of the top-5 classes that are among the network's top-5, %.
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
    top5_agreement: float
    floor: float
    compared: str = 'logits'
    exact_error: float | None = None
    flushed_error: float | None = None
    top1: float | None = None
    top1_expected: float | None = None
    findings: list[str] = field(default_factory=list)


def _check_labels(source: Source, job: Job, program: Program, path: Any) -> None:
    if program.labels is None:
        if job.output == 'classes':
            raise VerificationError(f'{path}: the program has no class labels.')
    elif program.labels != source.class_names:
        for number, (found, wanted) in enumerate(zip(program.labels, source.class_names, strict=False)):
            if found != wanted:
                raise VerificationError(f'{path}: class {number} is labelled {found!r}, expected {wanted!r}.')
        raise VerificationError(
            f'{path}: the program has {len(program.labels)} labels for {len(source.class_names)} classes.')


def _compute(
        run: Run, source: Source, job: Job, program: Program, cases: Cases,
        report: Callable[[int], Any] = lambda count: None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Outputs for all images, and the logits where they can be seen: (n, classes) float64.

    Args:
        run: Of the program: `run`, `run_exact` or `run_flushed`.
        report: Called with the number of images done since the last call.
    """
    outputs, logits = [], []
    for pixels in cases.batches(job.batch):
        outputs.append(run(source.make_ready(pixels, job)).double())
        if job.output == 'logits':
            logits.append(outputs[-1])
        elif program.get_logits is not None:
            logits.append(program.get_logits().double())
        report(job.batch)
    return torch.cat(outputs)[:len(cases)], torch.cat(logits)[:len(cases)] if logits else None


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
    return torch.cat([network(source.make_ready(part, job).double()) for part in cases.pixels.split(8)])


def _check_structure(
        source: Source, job: Job, program: Program, cases: Cases, path: Any, result: Verification) -> None:
    """Hold a program to the rounding of float32 where it can run without its own, and measure the effect of flushing.

    Rounding to float16 hides smaller mistakes, such as a lost bias. The same program without rounding, against the
    network with the weights in the file, hides nothing.

    Raises:
        VerificationError: It is not the same function.
    """
    if job.compress != 'none' or program.run_exact is None:
        return

    def compute(run: Run) -> torch.Tensor:
        outputs, logits = _compute(run, source, job, program, some)
        return outputs if logits is None else logits

    some = cases.select(EXAMINED)
    expected = _compute_rounded(source, job, some)
    if expected is not None:
        errors = (compute(program.run_exact) - expected).abs()
        result.exact_error = (errors.max() / expected.abs().max()).item()
        if not result.exact_error <= TOLERANCES['fp32']:
            raise VerificationError(
                f'{path}: without rounding, its logits differ from the network by {result.exact_error:.2g} of '
                f'the largest, {TOLERANCES["fp32"]:g} is allowed: the program computes something else; no file was '
                f'written.', result)
    if program.run_flushed is not None:
        result.flushed_error = (compute(program.run_flushed) - some.logits).abs().max().item()


def verify(
        source: Source, job: Job, program: Program, cases: Cases, path: Any = '',
        report: Callable[[int], Any] = lambda count: None,
) -> Verification:
    """Run a program on images and compare with the original network in float64.

    Raises:
        VerificationError: Labels differ, an output is not finite or its error exceeds `job.tolerance`, or top-1
            agreement is below `job.floor`.
    """
    _check_labels(source, job, program, path)
    outputs, logits = _compute(program.run, source, job, program, cases, report)
    if outputs.shape != cases.logits.shape:
        raise VerificationError(
            f'{path}: the program returns {outputs.shape[1]} numbers per image, the network has '
            f'{cases.logits.shape[1]} classes.')
    result = compare(outputs, cases, job, logits)
    result.findings = program.find()
    if not bool(outputs.isfinite().all()):
        first = next((line for line in result.findings if 'not finite' in line), 'the operation is unknown')
        raise VerificationError(f'{path}: outputs are not finite; {first}.', result)
    if not result.top1_agreement >= job.floor:
        raise VerificationError(
            f'{path}: {result.top1_agreement:.2f} % of {result.images} images have the top-1 class of PyTorch, at '
            f'least {job.floor:g} % must (largest error {result.max_error:.2g} of {result.largest:.2g}); no file was '
            f'written. A lower --floor allows it.', result)
    if not result.max_error <= job.tolerance * result.largest:
        raise VerificationError(
            f'{path}: outputs differ from PyTorch by up to {result.max_error:.2g}, more than '
            f'{job.tolerance:g} of the largest, {result.largest:.2g}: rounding does not explain it; no file was '
            f'written.', result)
    _check_structure(source, job, program, cases, path, result)
    return result
