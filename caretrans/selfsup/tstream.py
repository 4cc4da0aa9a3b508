"""T-stream: blocks with attention over all positions of a map, which run beside the last stage of a network.

Source: Ge et al. 2021, arXiv:2110.05340, section 3.2; the blocks are those of Srinivas et al. 2021, arXiv:2101.11605.
Names of modules are those of the published files.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['AbsolutePositions', 'Attention', 'RelativePositions', 'TBlock', 'TStream']

Size = tuple[int, int]  # height and width of a map


class AbsolutePositions(nn.Module):
    """Learned code of each position, the sum of one for its row and one for its column, added to the keys."""

    def __init__(self, size: Size, dim: int) -> None:
        super().__init__()
        self.height, self.width = (nn.Parameter(torch.randn(side, dim) * dim ** -.5) for side in size)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys with their code, and no term to add to the logits."""
        return k + (self.height[:, None] + self.width).flatten(0, 1), None


class RelativePositions(nn.Module):
    """Learned code of the distances between two positions, down and across, multiplied with the queries.

    CARE does not use it.
    """

    def __init__(self, size: Size, dim: int) -> None:
        super().__init__()
        self.size = size
        self.rel_height, self.rel_width = (nn.Parameter(torch.randn(2 * side - 1, dim) * dim ** -.5) for side in size)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The keys, and the term to add to the logits (B, heads, N, N)."""
        height, width = self.size
        queries = q.unflatten(2, self.size)  # B, heads, row, column, dim
        rows, columns = (torch.arange(side, device=q.device) for side in self.size)
        down = self.rel_height[rows - rows[:, None] + height - 1]  # row of the query, row of the key, dim
        across = self.rel_width[columns - columns[:, None] + width - 1]
        bias = torch.einsum('bhrcd,rid->bhrci', queries, down)[..., None] \
            + torch.einsum('bhrcd,cjd->bhrcj', queries, across)[..., None, :]
        return k, bias.flatten(4).flatten(2, 3) * q.shape[-1] ** -.5


class Attention(nn.Module):
    """Softmax attention over all positions of a map (B, dim, *size) to (B, heads * head_dim, *size).

        logits = q . (k + p) / sqrt(head_dim),   p = height[row] + width[column]

    There is no projection after it.
    """

    def __init__(self, dim: int, size: Size, heads: int, head_dim: int, relative: bool = False) -> None:
        super().__init__()
        self.size, self.heads = tuple(size), heads
        self.to_qkv = nn.Conv2d(dim, 3 * heads * head_dim, 1, bias=False)
        self.pos_emb = (RelativePositions if relative else AbsolutePositions)(self.size, head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(f'The map is {" x ".join(map(str, x.shape[2:]))}, but the position code was made for '
                             f'{" x ".join(map(str, self.size))}: use images of that size.')
        qkv = self.to_qkv(x).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each B, heads, N, head_dim
        k, bias = self.pos_emb(q, k)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return y.transpose(-1, -2).flatten(1, 2).unflatten(2, self.size)


class TBlock(nn.Module):
    """Bottleneck with attention: (B, dim, *size) to (B, out_dim, *size), or half that size with `downsample`.

    Args:
        size: Height and width of the map that it takes.
        factor: Its inner width is `out_dim` / `factor`.
    """

    def __init__(
            self, dim: int, out_dim: int, size: Size, heads: int, head_dim: int, factor: int = 4,
            downsample: bool = False, relative: bool = False,
    ) -> None:
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if downsample or dim != out_dim:
            kernel, stride = (3, 2) if downsample else (1, 1)
            self.shortcut = nn.Sequential(
                nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out_dim), nn.ReLU())
        self.net = nn.Sequential(
            nn.Conv2d(dim, out_dim // factor, 1, bias=False), nn.BatchNorm2d(out_dim // factor), nn.ReLU(),
            Attention(out_dim // factor, size, heads, head_dim, relative),
            nn.AvgPool2d(2) if downsample else nn.Identity(), nn.BatchNorm2d(heads * head_dim), nn.ReLU(),
            nn.Conv2d(heads * head_dim, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.net(x) + self.shortcut(x))


class TStream(nn.Module):
    """A stack of `TBlock`, of which the first halves the map.

    Convolutions start from Kaiming's normal distribution over the fan out, and every BatchNorm from 1 and 0.

    Args:
        dim, size: Channels, height and width of the map that it takes.
        out_dim: Channels of the map that it returns.
        downsample: Whether the first block halves the map; its sides must then be even.
        relative: Code distances between positions instead of positions.
    """

    def __init__(
            self, dim: int, out_dim: int, size: Size, blocks: int = 5, heads: int = 4, head_dim: int = 128,
            factor: int = 4, downsample: bool = True, relative: bool = False,
    ) -> None:
        super().__init__()
        if downsample and any(side % 2 for side in size):
            raise ValueError(f'The T-stream halves a map of {size[0]} x {size[1]}, whose sides must be even.')
        inner = tuple(side // 2 for side in size) if downsample else tuple(size)
        self.net = nn.Sequential(*(
            TBlock(dim if i == 0 else out_dim, out_dim, size if i == 0 else inner, heads, head_dim, factor,
                   downsample and i == 0, relative)
            for i in range(blocks)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)
