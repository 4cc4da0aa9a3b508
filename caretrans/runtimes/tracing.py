"""Programs of torch.export, the input of other converters."""
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

    The tracer takes a size of 1 for a constant, so it gets two oblong images. For the same reason the program checks
    that images have at least 64 pixels: at 1/32 of the size, smaller ones have only one position.

    Args:
        images: (B, C, H, W); a network that cannot be traced for any size is traced for these.
    Returns:
        The program, and a remark on the only images that it takes; '' if any.
    """
    _, chs, height, width = images.shape
    free = {number: torch.export.Dim.DYNAMIC for number in (0, 2, 3)}
    try:
        program = torch.export.export(network, (images.new_zeros(2, chs, height, width + 32),), dynamic_shapes=(free,))
    except (torch._dynamo.exc.UserError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return trace_network(network, images), f'only images of shape {tuple(images.shape)}: {reason}'
    return program, ''
