"""Depth-wise convolutions of a mixer as one Triton kernel, forward and backward.

A mixer convolves slices of its channels in different ways: [11x1 + 1x11 | 3x3 | 7x7] in the early stages, [3x3 | 7x7]
beside linear attention in the late ones. PyTorch copies the slices apart, launches a convolution for each, adds the
strips and copies the results together. Here one launch reads the slices where they lie and writes them where they
belong; a program takes some channels of one slice and some positions of one sample.

`convolve_in_torch` is the slow and obvious version that the tests compare with.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .launch import INTERPRETED, accumulation_types, is_channels_last, on_its_device, strides_in_units, tuned

__all__ = ['convolve_in_torch', 'convolve_into', 'sum_weight_gradients']

TILES = [  # positions, channels, warps; channels-last memory first
    (128, 8, 4), (512, 8, 4), (256, 16, 8), (64, 32, 4), (64, 64, 8), (256, 1, 4), (512, 1, 4), (128, 1, 2)]
CONFIGS = [triton.Config(dict(BLOCK_P=p, BLOCK_C=c), num_warps=warps) for p, c, warps in TILES]
TAPS = tl.constexpr(64)  # room for the weight gradients of a channel: 49 of the 7x7 kernel, and the bias
PROGRAMS = 512  # of weight gradients, enough to fill a large GPU
POSITIONS_OF_A_PROGRAM = 256  # of weight gradients, at least


def convolve_in_torch(
        x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Slices of `x` (B, C, H, W), each convolved on its own: see `convolve_into` for weights and biases."""
    def convolve(part: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv2d(part, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=len(weight))

    convs = list(zip(weights, biases, strict=True))
    long_range, local = convs[:-2], convs[-2:]
    chs = [len(weight) for weight in weights[-3:]]
    parts = x.split(chs, dim=1)
    strips = [sum(convolve(parts[0], *conv) for conv in long_range)] if long_range else []
    return torch.cat(strips + [convolve(part, *conv) for part, conv in zip(parts[-2:], local, strict=True)], dim=1)


# Convolution ----------------------------------------------------------------------------------------------------------

@triton.jit
def _add_taps(
        acc, x, x_c, x_h, x_w, weight, bias, c, chs, h, w, H, W,
        KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr, BIAS: tl.constexpr, UNIT: tl.constexpr):
    """acc (positions, channels) and the KH x KW convolution of channels c of `x` at positions (h, w)."""
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            row, col = h + SIGN * (i - KH // 2), w + SIGN * (j - KW // 2)
            inside = (row >= 0) & (row < H) & (col >= 0) & (col < W)
            tap = tl.load(weight + c * (KH * KW) + i * KW + j, mask=c < chs, other=0.).to(acc.dtype)
            values = tl.load(
                x + ((row * x_h + col * x_w) * UNIT)[:, None] + c[None, :] * x_c,
                mask=inside[:, None] & (c < chs)[None, :], other=0.).to(acc.dtype)
            acc += values * tap[None, :]
    if BIAS:
        acc += tl.load(bias + c, mask=c < chs, other=0.).to(acc.dtype)[None, :]
    return acc


def _fit_tiles(configs: list[triton.Config], named_args, **kwargs) -> list[triton.Config]:
    """The tiles for the layout of the input: one channel at a time unless channels lie next to each other."""
    return [config for config in configs if (config.kwargs['BLOCK_C'] > 1) == (named_args['x_c'] == 1)]


@tuned(CONFIGS, ['x_c', 'H', 'W', 'LONG', 'LOCAL', 'SIGN'], _fit_tiles)
@triton.jit
def _convolve(
        x, x_b, x_c, x_h, x_w, out, out_b, out_c, out_h, out_w,
        weight_11x1, weight_1x11, weight_3x3, weight_7x7, bias_11x1, bias_1x11, bias_3x3, bias_7x7,
        H, W, LONG: tl.constexpr, LOCAL: tl.constexpr, SIGN: tl.constexpr, BIAS: tl.constexpr, UNIT: tl.constexpr,
        ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels [LONG | LOCAL | LOCAL] of x to out; SIGN -1 transposes the convolutions."""
    block, long_blocks, local_blocks = tl.program_id(0), tl.cdiv(LONG, BLOCK_C), tl.cdiv(LOCAL, BLOCK_C)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    h, w = p // W, p % W
    x += tl.program_id(2).to(tl.int64) * x_b * UNIT
    out += tl.program_id(2).to(tl.int64) * out_b * UNIT
    c = tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    first, chs = 0, LOCAL  # of the slice
    if block < local_blocks:  # the most work goes first
        first = LONG + LOCAL
        c += block * BLOCK_C
        acc = _add_taps(
            acc, x + first * x_c, x_c, x_h, x_w, weight_7x7, bias_7x7, c, chs, h, w, H, W, 7, 7, SIGN, BIAS, UNIT)
    elif block < local_blocks + long_blocks:
        if LONG > 0:
            chs = LONG
            c += (block - local_blocks) * BLOCK_C
            acc = _add_taps(acc, x, x_c, x_h, x_w, weight_11x1, bias_11x1, c, chs, h, w, H, W, 11, 1, SIGN, BIAS, UNIT)
            acc = _add_taps(acc, x, x_c, x_h, x_w, weight_1x11, bias_1x11, c, chs, h, w, H, W, 1, 11, SIGN, BIAS, UNIT)
    else:
        first = LONG
        c += (block - local_blocks - long_blocks) * BLOCK_C
        acc = _add_taps(
            acc, x + first * x_c, x_c, x_h, x_w, weight_3x3, bias_3x3, c, chs, h, w, H, W, 3, 3, SIGN, BIAS, UNIT)
    out += ((h * out_h + w * out_w) * UNIT)[:, None] + (first + c)[None, :] * out_c
    tl.store(out, acc.to(out.dtype.element_ty), mask=(p < H * W)[:, None] & (c < chs)[None, :])


def _four(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Parameters of 11x1, 1x11, 3x3 and 7x7; without strips, others stand in for theirs and are not read."""
    return [weight.contiguous() for weight in (*weights[:2], *weights[-2:])]


@on_its_device
def convolve_into(
        x: torch.Tensor, out: torch.Tensor, weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor] | None, transposed: bool = False) -> None:
    """Convolve slices of the channels of `x` (B, C, H, W) into `out`, of the same shape; any strides, no copies.

    Args:
        weights: (chs, 1, KH, KW) of the kernels 11x1, 1x11, 3x3 and 7x7 for C = [long | local | local] channels, the
            two strips being summed; or of 3x3 and 7x7 for C = [local | local].
        biases: (chs,) for each, or None. Sums are float32 for all dtypes, float64 for float64.
        transposed: Whether to transpose the convolutions, to compute the gradient of the input.
    Cost: reads x once from memory (each value up to 49 times from the first cache) and writes out once, 2*B*C*H*W
    numbers; 22, 9 and 49 multiply-adds for each output of the three slices.
    """
    B, _, H, W = x.shape
    long_chs, local_chs = len(weights[0]) if len(weights) == 4 else 0, len(weights[-1])

    def grid(tile):
        blocks = triton.cdiv(long_chs, tile['BLOCK_C']) + 2 * triton.cdiv(local_chs, tile['BLOCK_C'])
        return blocks, triton.cdiv(H * W, tile['BLOCK_P']), B

    unit, (x_strides, out_strides) = strides_in_units(x, out)
    _convolve[grid](
        x, *x_strides, out, *out_strides, *_four(weights), *_four(weights if biases is None else biases), H, W,
        LONG=long_chs, LOCAL=local_chs, SIGN=-1 if transposed else 1, BIAS=biases is not None, UNIT=unit,
        ACC=accumulation_types(x)['ACC'])


# Gradients of the weights ---------------------------------------------------------------------------------------------

@triton.jit
def _sum_taps(
        x, x_b, x_c, x_h, x_w, grad, grad_b, grad_c, grad_h, grad_w, sums, block, chs, B, H, W, per_split,
        KH: tl.constexpr, KW: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """sum over samples and positions p of grad(p) x(p + tap), for the KH*KW taps; and of grad(p), for the bias."""
    c, t = block * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, T)
    i, j = t // KW - KH // 2, t % KW - KW // 2
    start = tl.program_id(1) * per_split
    stop = tl.minimum(start + per_split, B * H * W)
    acc = tl.zeros((BLOCK_P, T, BLOCK_C), ACC)
    for first in range(start, stop, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        b, h, w = (p // (H * W)).to(tl.int64), p // W % H, p % W
        row, col = h[:, None] + i[None, :], w[:, None] + j[None, :]
        present = (p < stop)[:, None] & (c < chs)[None, :]
        positions = (b * grad_b + h * grad_h + w * grad_w) * UNIT
        g = tl.load(grad + positions[:, None] + c[None, :] * grad_c, mask=present, other=0.)
        inside = (row >= 0) & (row < H) & (col >= 0) & (col < W) & (t < KH * KW)[None, :]
        values = tl.load(
            x + ((b[:, None] * x_b + row * x_h + col * x_w) * UNIT)[:, :, None] + c[None, None, :] * x_c,
            mask=inside[:, :, None] & present[:, None, :], other=0.)
        values = tl.where((t == KH * KW)[None, :, None], 1., values.to(ACC))
        acc += values * g.to(ACC)[:, None, :]
    tl.store(sums + c[None, :] * TAPS + t[:, None], tl.sum(acc, 0), mask=(c < chs)[None, :] & (t <= KH * KW)[:, None])


@triton.jit
def _weight_gradients(
        x, x_b, x_c, x_h, x_w, grad, grad_b, grad_c, grad_h, grad_w, sums, B, H, W, per_split,
        LONG: tl.constexpr, LOCAL: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """Sums of one split to [split, channels of 7x7, 3x3, 11x1 and 1x11, TAPS]."""
    block, long_blocks, local_blocks = tl.program_id(0), tl.cdiv(LONG, BLOCK_C), tl.cdiv(LOCAL, BLOCK_C)
    sums += tl.program_id(1).to(tl.int64) * 2 * (LONG + LOCAL) * TAPS
    if block < local_blocks:
        _sum_taps(
            x + (LONG + LOCAL) * x_c, x_b, x_c, x_h, x_w,
            grad + (LONG + LOCAL) * grad_c, grad_b, grad_c, grad_h, grad_w,
            sums, block, LOCAL, B, H, W, per_split, 7, 7, 64, UNIT, 64 // BLOCK_C, BLOCK_C, ACC)
    elif block < 2 * local_blocks:
        _sum_taps(
            x + LONG * x_c, x_b, x_c, x_h, x_w, grad + LONG * grad_c, grad_b, grad_c, grad_h, grad_w,
            sums + LOCAL * TAPS, block - local_blocks, LOCAL, B, H, W, per_split,
            3, 3, 16, UNIT, 256 // BLOCK_C, BLOCK_C, ACC)
    elif LONG > 0:
        strip = block - 2 * local_blocks
        if strip < long_blocks:
            _sum_taps(
                x, x_b, x_c, x_h, x_w, grad, grad_b, grad_c, grad_h, grad_w,
                sums + 2 * LOCAL * TAPS, strip, LONG, B, H, W, per_split,
                11, 1, 16, UNIT, 256 // BLOCK_C, BLOCK_C, ACC)
        else:
            _sum_taps(
                x, x_b, x_c, x_h, x_w, grad, grad_b, grad_c, grad_h, grad_w,
                sums + (2 * LOCAL + LONG) * TAPS, strip - long_blocks, LONG, B, H, W, per_split,
                1, 11, 16, UNIT, 256 // BLOCK_C, BLOCK_C, ACC)


@on_its_device
def sum_weight_gradients(
        x: torch.Tensor, grad: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of `weights`, then of the biases, of `convolve_into`, given that of its output (B, C, H, W).

    The positions of the batch are split over programs by the shapes alone and their sums added in order, so that the
    repeated results are bit-identical.
    Cost: reads x and grad once from memory (each value up to 49 times from the first cache), 2*B*C*H*W numbers, the
    strips' twice; as many multiply-adds as the convolution, and the padding of 49 to 64, 9 and 11 to 16.
    """
    B, _, H, W = x.shape
    long_chs, local_chs = len(weights[0]) if len(weights) == 4 else 0, len(weights[-1])
    block_c = 8 if is_channels_last(x) or INTERPRETED else 1
    blocks = 2 * (triton.cdiv(long_chs, block_c) + triton.cdiv(local_chs, block_c))
    splits = max(1, min(PROGRAMS // blocks, triton.cdiv(B * H * W, POSITIONS_OF_A_PROGRAM)))
    dtype = accumulation_types(x)['ACC']
    sums = torch.empty(
        splits, 2 * (long_chs + local_chs), TAPS.value, device=x.device,
        dtype=torch.float64 if dtype == tl.float64 else torch.float32)
    unit, (x_strides, grad_strides) = strides_in_units(x, grad)
    _weight_gradients[blocks, splits](
        x, *x_strides, grad, *grad_strides, sums, B, H, W, triton.cdiv(B * H * W, splits),
        LONG=long_chs, LOCAL=local_chs, UNIT=unit, BLOCK_C=block_c, ACC=dtype)
    seven, three, *strips = sums.split([local_chs] * 2 + [long_chs] * (len(weights) - 2), dim=1)
    parts = list(zip([*strips, three, seven], weights, strict=True))
    return [
        *(part[..., :weight[0].numel()].sum(dim=0).reshape(weight.shape).to(weight.dtype) for part, weight in parts),
        *(part[..., weight[0].numel()].sum(dim=0).to(weight.dtype) for part, weight in parts)]
