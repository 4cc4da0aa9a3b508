"""Expansion, GELU and the 3x3 depth-wise convolution of an interaction as one Triton kernel, for inference.

PyTorch writes the expanded map, 2 to 4 times as wide as the block, to memory twice between the three. Here a program
expands the positions of a tile and one row and one pixel more on either side, for some of the hidden channels, keeps
them in a scratch area of its own that stays in the cache, and convolves them from there. Programs are few and take
tiles one after the other, so that all scratch areas together stay small.

What it saves in memory traffic it pays in expanding the margins again, BLOCK_P + 2W + 2 positions instead of BLOCK_P:
whether it wins depends on the GPU and the size of the map. `expand_in_torch` is the slow and obvious version.
"""
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .launch import INTERPRETED, accumulation_types, empty_map, matrix_product, on_its_device, tuned

__all__ = ['expand', 'expand_in_torch']

PROGRAMS = 264  # two for each multiprocessor of a large GPU
BLOCK_M = 64  # positions expanded at a time
TILES = [(256, 64, 4), (512, 64, 8), (256, 32, 4), (128, 64, 4), (64, 64, 4)]  # positions, hidden channels, warps
TRITON_DTYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
CONFIGS = [triton.Config(dict(BLOCK_P=p, BLOCK_R=r), num_warps=warps) for p, r, warps in TILES]


def expand_in_torch(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dw_weight: torch.Tensor,
        dw_bias: torch.Tensor) -> torch.Tensor:
    """1x1 convolution (weight (R, C, 1, 1)), exact GELU, 3x3 depth-wise convolution (dw_weight (R, 1, 3, 3))."""
    return F.conv2d(F.gelu(F.conv2d(x, weight, bias)), dw_weight, dw_bias, padding=1, groups=len(dw_weight))


@triton.jit
def _expand_positions(
        x, x_c, x_p, weight, bias, p, r, C, R, HW,
        ACC: tl.constexpr, DTYPE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """(positions p, hidden channels r) after the GELU, 0 outside of the map. Factors are rounded to DTYPE."""
    inside = (p >= 0) & (p < HW)
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    for first in range(0, C, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        features = tl.load(
            x + p[:, None] * x_p + c[None, :] * x_c, mask=inside[:, None] & (c < C)[None, :], other=0.).to(DTYPE)
        rates = tl.load(weight + r[None, :] * C + c[:, None], mask=(r < R)[None, :] & (c < C)[:, None], other=0.)
        acc += matrix_product(features.to(FACTOR), rates.to(DTYPE).to(FACTOR), ACC, PRECISION)
    acc += tl.load(bias + r, mask=r < R, other=0.).to(ACC)[None, :]
    acc = 0.5 * acc * (1 + tl.erf(acc * 0.7071067811865476))
    return tl.where(inside[:, None], acc, 0.)


@triton.jit
def _convolve_positions(
        hidden, dw_weight, dw_bias, m, p, r, R, W, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """(positions p, hidden channels r) of the 3x3 convolution; position p lies at m + W + 1 in the scratch area."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC) + tl.load(dw_bias + r, mask=r < R, other=0.).to(ACC)[None, :]
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            col = p % W + j - 1
            values = tl.load(
                hidden + (m + i * W + j)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :],
                mask=((col >= 0) & (col < W))[:, None], other=0.)
            acc += values.to(ACC) * tl.load(dw_weight + r * 9 + i * 3 + j, mask=r < R, other=0.).to(ACC)[None, :]
    return acc


def _fitting_tiles(configs: list[triton.Config], named_args) -> list[triton.Config]:
    """No tiles of more than twice the positions of the map."""
    positions = named_args['H'] * named_args['W']
    return [config for config in configs if config.kwargs['BLOCK_P'] < 2 * positions or config.kwargs['BLOCK_P'] == 64]


@tuned(CONFIGS, ['x_c', 'C', 'R', 'H', 'W'], _fitting_tiles)
@triton.jit
def _expand(
        x, x_b, x_c, x_p, out, out_b, out_c, out_p, weight, bias, dw_weight, dw_bias, scratch, B, C, R, H, W,
        ACC: tl.constexpr, DTYPE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr):
    channel_blocks, position_blocks = tl.cdiv(R, BLOCK_R), tl.cdiv(H * W, BLOCK_P)
    span = tl.cdiv(BLOCK_P + 2 * W + 2, BLOCK_M) * BLOCK_M
    hidden = scratch + tl.program_id(0).to(tl.int64) * span * BLOCK_R
    for tile in range(tl.program_id(0), B * position_blocks * channel_blocks, tl.num_programs(0)):
        r = tile % channel_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        first = tile // channel_blocks % position_blocks * BLOCK_P
        b = (tile // channel_blocks // position_blocks).to(tl.int64)
        for start in range(0, span, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            values = _expand_positions(
                x + b * x_b, x_c, x_p, weight, bias, first - W - 1 + m, r, C, R, H * W,
                ACC, DTYPE, FACTOR, PRECISION, BLOCK_M, BLOCK_R, BLOCK_K)
            tl.store(hidden + m[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :], values.to(DTYPE))
        tl.debug_barrier()  # what some threads wrote others read
        for start in range(0, BLOCK_P, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            p = first + m
            values = _convolve_positions(hidden, dw_weight, dw_bias, m, p, r, R, W, ACC, BLOCK_M, BLOCK_R)
            tl.store(
                out + b * out_b + p[:, None] * out_p + r[None, :] * out_c, values.to(DTYPE),
                mask=(p < H * W)[:, None] & (r < R)[None, :])
        tl.debug_barrier()  # before the next tile overwrites it


@torch.library.custom_op('caretrans::expand', mutates_args=())
@on_its_device
def expand(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dw_weight: torch.Tensor, dw_bias: torch.Tensor,
        dtype: torch.dtype) -> torch.Tensor:
    """1x1 convolution with bias, exact GELU and 3x3 depth-wise convolution with bias; without gradients.

    Args:
        x: (B, C, H, W), any strides; its layout is the layout of the result.
        weight, bias: (R, C, 1, 1) and (R,) of the expansion.
        dw_weight, dw_bias: (R, 1, 3, 3) and (R,) of the depth-wise convolution.
        dtype: Of the matrix product, of the hidden map and of the result; sums are float32, float64 for float64.
    Returns:
        (B, R, H, W).
    Cost: reads x for every 64 hidden channels, mostly from cache, and writes the result once: B*H*W*(C + R) numbers;
    B*R*H*W*(C + 9) multiply-adds and B*R*H*W error functions, and the margins again.
    """
    B, C, H, W = x.shape
    chs = len(weight)
    out = empty_map(x, chs, dtype)
    flat = x.flatten(2)  # a view in the usual layouts
    largest = max(p for p, _, _ in TILES) + 2 * W + 2 + BLOCK_M
    scratch = torch.empty(PROGRAMS * largest * max(r for _, r, _ in TILES), dtype=dtype, device=x.device)

    def grid(tile):
        return min(PROGRAMS, B * triton.cdiv(H * W, tile['BLOCK_P']) * triton.cdiv(chs, tile['BLOCK_R'])),

    _expand[grid](
        flat, *flat.stride(), out, *out.flatten(2).stride(), weight.flatten(1).contiguous(), bias,
        dw_weight.contiguous(), dw_bias, scratch, B, C, chs, H, W, **_types(out),
        BLOCK_M=BLOCK_M, BLOCK_K=min(64, max(16, triton.next_power_of_2(C))))
    return out


def _types(out: torch.Tensor) -> dict[str, Any]:
    dtype = TRITON_DTYPES[out.dtype]
    factor = tl.float32 if INTERPRETED and dtype == tl.bfloat16 else dtype  # it multiplies the bits of bfloat16 numbers
    return dict(accumulation_types(out), DTYPE=dtype, FACTOR=factor)


@expand.register_fake
def _(x, weight, bias, dw_weight, dw_bias, dtype):
    return empty_map(x, weight.shape[0], dtype)
