"""Programs of torch.export, the input of other converters."""
import torch
import torch.nn as nn

__all__ = ['trace_any_size', 'trace_network']

FREE = torch.export.Dim.DYNAMIC
LEAST = 128  # pixels: no map of a network with a stride of 32 or 64 has a side of 1


@torch.no_grad()
def trace_network(network: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    """A network as a program of torch.export, for images (B, C, H, W) of this shape."""
    return torch.export.export(network, (images,))


@torch.no_grad()
def trace_any_size(network: nn.Module, images: torch.Tensor, is_checked: bool = True) -> torch.export.ExportedProgram:
    """A network as a program of torch.export for any number of images of any size, as far as that is possible.

    The tracer takes a size of 1 for a constant, so it gets two oblong images, large enough that no map has a side of 1.
    The program then checks that images are not smaller than that, 64 pixels for a network with a stride of 32.

    Args:
        images: (B, C, H, W); if the program cannot take them, it is traced for any number of images of their size, and
            if that is not possible either, for these alone.
        is_checked: Whether the checks stay in the program; converters may drop them.
    """
    _, chs, height, width = images.shape
    large = images.new_zeros(2, chs, max(height, LEAST), max(width, LEAST) + 32)
    for example, axes in (large, (0, 2, 3)), (images[:1].repeat(2, 1, 1, 1), (0,)):
        try:
            program = torch.export.export(network, (example,), dynamic_shapes=(dict.fromkeys(axes, FREE),))
            if is_checked:
                program.module()(images)
            return program
        except (torch._dynamo.exc.UserError, AssertionError, ValueError, RuntimeError):
            continue
    return trace_network(network, images)
