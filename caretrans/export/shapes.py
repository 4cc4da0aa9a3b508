"""The shapes of images that a written program takes: found by running it, before anybody is told."""

import torch
import torch.nn.functional as F

from .config import Job
from .program import Program
from .source import Cases, Source
from .verify import VerificationError

__all__ = ['describe_shapes']

SIDES = (32, 64, 128)  # pixels: the least of the networks of this package, and two more to try


@torch.no_grad()
def _run(source: Source, job: Job, program: Program, cases: Cases, shape: tuple[int, int, int]) -> str:
    """Run a program on images of another shape; returns why it cannot, '' if it can.

    Raises:
        VerificationError: It computes something else there.
    """
    batch, *size = shape
    pixels = cases.pixels[[i % len(cases) for i in range(batch)]].float()
    pixels = F.interpolate(pixels, size, mode='bilinear', antialias=True).round().to(torch.uint8)
    try:
        expected = source.model(source.normalise(pixels)).double()
        outputs = program.run(source.make_ready(pixels, job)).double()
    except Exception as error:  # whatever a network or a runtime raises
        return f'{type(error).__name__}: {" ".join(str(error).split())[:100]}'
    expected = expected if job.output == 'logits' else expected.softmax(dim=-1)
    error = (outputs - expected).abs().max() if outputs.shape == expected.shape else torch.tensor(float('nan'))
    if not error <= min(job.tolerance, 1.) * expected.abs().max():
        raise VerificationError(
            f'{job}: the program takes {batch} images of {size[0]} x {size[1]} pixels, but its outputs differ from '
            f'PyTorch by {error:.2g} of {expected.abs().max():.2g} there; no file was written.')
    return ''


def describe_shapes(source: Source, job: Job, program: Program, cases: Cases) -> str:
    """The shapes that a program takes, for people: what its file leaves free and was run here at other values.

    Raises:
        VerificationError: It computes something else for a shape that its file allows.
    """
    height, width = job.size
    batches = [number for number in (3, 2, 1) if number != job.batch] if 'batch' in program.least else [job.batch] * 2
    small, reason = 0, ''
    if 'height' in program.least:  # programs of torch refuse some sizes that their ranges allow
        for small in sorted({max(SIDES[0], program.least['height'], program.least['width']), *SIDES[1:]}):
            ran = (batches[0], small, small + 8), (batches[1], max(height, small) + 37, max(width, small) + 6)
            reason = next(filter(None, (_run(source, job, program, cases, shape) for shape in ran)), '')
            if not reason:
                break
    elif 'batch' in program.least:
        ran = (batches[0], height, width),
        reason = _run(source, job, program, cases, ran[0])
    if not program.least or reason:
        return f'only images of {height} x {width} pixels, {job.batch} at a time' + (f': {reason}' if reason else '')
    number = 'any number of images' if 'batch' in program.least else f'{job.batch} images at a time'
    size = f'any height and width from {small} pixels on' if small else f'{height} x {width} pixels'
    return f'{number} of {size} (run: {", ".join(" x ".join(map(str, shape)) for shape in ran)})'
