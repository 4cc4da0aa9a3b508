"""torch.export programs, from which other runtimes start."""

import torch
import torch.nn as nn

__all__ = ['trace_any_size', 'trace_network']


@torch.no_grad()
def trace_network(network: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    """A network as a program of torch.export, for images (B, C, H, W) of this shape."""
    return torch.export.export(network, (images,))


@torch.no_grad()
def trace_any_size(network: nn.Module, images: torch.Tensor) -> tuple[torch.export.ExportedProgram, str]:
    """A network as a program of torch.export for any number of images of any size, where it computes the same for all.

    The tracer takes a size of 1 for a constant, and is shown two oblong images. For the same reason the program checks
    that images have 64 pixels at least: at 1/32 of the size, smaller ones have one position left.

    Args:
        images: (B, C, H, W), for which it is traced where it cannot be for others.
    Returns:
        The program, and a remark on the only images that go in; '' if any do.
    """
    _, chs, height, width = images.shape
    free = {number: torch.export.Dim.DYNAMIC for number in (0, 2, 3)}
    try:
        program = torch.export.export(network, (images.new_zeros(2, chs, height, width + 32),), dynamic_shapes=(free,))
    except (torch._dynamo.exc.UserError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return trace_network(network, images), f'only images of shape {tuple(images.shape)}: {reason}'
    return program, ''
