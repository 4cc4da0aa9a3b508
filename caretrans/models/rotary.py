"""The rotary position code (RoPE) of MLLA in two dimensions, and its tables in published checkpoints."""
from typing import Dict, Sequence

import torch

__all__ = ['make_rotations', 'rotary_code']

STRIDE = 4  # pixels per position of the first stage; every stage halves the map
SIDES = 32  # published networks need square images of a multiple of this


def rotary_code(x: torch.Tensor) -> torch.Tensor:
    """Cosines and sines that rotate the pairs of channels of a map (B, C, H, W): (2, C / 2, H, W), float32 or wider.

    With n = C / 4 and theta_i = 10000^(-i / n), pair p is rotated by row * theta_p for p < n, and by column *
    theta_(p - n) for the others.
    Source: Su et al. 2021, arXiv:2104.09864, in two dimensions.
    """
    chs, height, width = x.shape[1], x.shape[2], x.shape[3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    theta = 10000 ** (-torch.arange(chs // 4, device=x.device, dtype=dtype) / (chs // 4))
    rows = theta[:, None] * torch.arange(height, device=x.device, dtype=dtype)
    columns = theta[:, None] * torch.arange(width, device=x.device, dtype=dtype)
    rows, columns = torch.stack([rows.cos(), rows.sin()]), torch.stack([columns.cos(), columns.sin()])
    return torch.cat([
        rows.unsqueeze(3).expand(-1, -1, -1, width), columns.unsqueeze(2).expand(-1, -1, height, -1)], dim=1)


def make_rotations(chs: Sequence[int], depths: Sequence[int], height: int, width: int) -> Dict[str, torch.Tensor]:
    """Tables of the rotary code in a published checkpoint for images of `height` x `width` pixels.

    Args:
        chs, depths: Channels and blocks of each stage.
    Returns:
        {published key: (H', W', C / 2, 2)}, cosines and sines in float32, one table per block; H' x W' is the size of
        the map in its stage, 56 x 56 in the first one for 224 x 224 pixels.
    Raises:
        ValueError: The published networks do not support this size.
    """
    if height != width or height % SIDES:
        raise ValueError(
            f'the published network takes square images of a multiple of {SIDES} pixels, not {height} x {width}')
    tables = {}
    for i, (width_chs, depth) in enumerate(zip(chs, depths, strict=True)):
        side = height // STRIDE // 2 ** i
        table = rotary_code(torch.zeros(1, width_chs, side, side)).permute(2, 3, 1, 0)
        tables.update({
            f'layers.{i}.blocks.{j}.attn.rope.rotations': table.clone(memory_format=torch.contiguous_format)
            for j in range(depth)})
    return tables
