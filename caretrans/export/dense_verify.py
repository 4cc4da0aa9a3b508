"""Verification of programs of detectors and segmenters, as `verify` does it for classifiers."""
import math
from collections.abc import Callable
from typing import Any

import torch

from .config import Job
from .dense import DenseSource
from .program import Program
from .source import Cases
from .verify import Verification, VerificationError, check_labels, check_structure, find_fault, run_batches

__all__ = ['verify_dense']


def verify_dense(
        source: DenseSource, job: Job, program: Program, cases: Cases, path: Any = '',
        report: Callable[[int], Any] = lambda count: None) -> Verification:
    """Run a program on images and compare all outputs with the original network in float64.

    Args:
        cases: Of `load_dense_cases`.
        report: Called with the number of images done since the last call.
    Raises:
        VerificationError: Labels differ; an output is not finite, or an error exceeds `job.tolerance` of the largest
            number of that output, of one level; or the likeliest class differs at too many pixels or anchors for
            `job.floor`.
    """
    check_labels(source, job, program, path)
    names = source.name_outputs(job)
    largest = [part.abs().max().item() for part in source.split(cases.logits)]
    errors, equal, done = [], [], 0
    for outputs, _ in run_batches(program.run, source, job, program, cases):
        if outputs.shape[1:] != cases.logits.shape[1:]:
            raise VerificationError(
                f'{path}: the program returns {outputs.shape[1]:,} numbers per image, the network '
                f'{cases.logits.shape[1]:,}.')
        batch = slice(done, done + len(outputs))
        expected = cases.logits[batch]
        done += len(outputs)
        report(job.batch)
        for name, part, wanted, most in zip(
                names, source.split(outputs), source.split(expected), largest, strict=True):
            _check_part(name, part.flatten(1), wanted.flatten(1), most, job, cases.images[batch], path, program)
        errors.append((outputs - expected).abs())
        equal.append(source.find_classes(outputs) == source.find_classes(expected))
    whole = torch.cat(errors)
    result = Verification(
        len(cases), cases.name, whole.max().item(), whole.mean().item(), max(largest),
        100 * torch.cat(equal).double().mean().item(), None, job.floor,
        compared='logits' if source.is_segmenter else 'logits, codes', findings=program.find())
    if result.top1_agreement < job.floor:
        raise VerificationError(
            f'{path}: {result.top1_agreement:.2f} % of the {"pixels" if source.is_segmenter else "anchors"} have the '
            f'likeliest class of PyTorch, at least {job.floor:g} % must; no file was written. A lower --floor allows '
            f'it.', result)
    check_structure(source, job, program, cases, path, result)
    return result


def _check_part(
        output: str, outputs: torch.Tensor, expected: torch.Tensor, largest: float, job: Job, images: list[str],
        path: Any, program: Program) -> None:
    """Refuse numbers of one output (B, numbers) that are not finite or too far from the network's."""
    name, error = find_fault(outputs, (outputs - expected).abs(), job.tolerance * largest, images)
    if error == math.inf:
        first = next((line for line in program.find() if 'not finite' in line), 'the operation is unknown')
        raise VerificationError(f'{path}: {name}: its {output} are not finite; {first}; no file was written.')
    if name:
        raise VerificationError(
            f'{path}: {name}: its {output} differ from PyTorch by {error:.2g}, more than {job.tolerance:g} of the '
            f'largest, {largest:.2g}: rounding does not explain it; no file was written.')
