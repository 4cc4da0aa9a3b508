"""Core of linear attention as one Triton kernel, forward and backward.

`attend` computes the same as `linear_attention` of the models, the slow and obvious version that tests compare it with
and that runs without Triton. That one writes phi(q), phi(k), float32 copies of q, k and v, and rotated ones to memory;
here every input is read once and the result is written once.

A program takes one head of one sample and walks over its positions twice: to sum the *context* phi(k) v^T and the
*mass* phi(k), and to read them out with phi(q). Heads of large maps in small batches are too few to fill a GPU: their
positions are split over several programs, and the two walks become two launches with the partial sums in between. The
split depends on the shapes alone, and so does the order of all sums: repeated results are bit-identical.

The kernels get a rotary position code as its table and the strides of that, or as five times None, for which Triton
compiles a kernel without rotation.
"""
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..models.attention import EPS, check_shapes
from .launch import accumulation_types, matmul, on_its_device

__all__ = ['attend', 'attend_backward_into', 'attend_into']

WHOLE, SUMS, QUERIES, KEYS = (tl.constexpr(step) for step in range(4))  # parts of a kernel in one launch

POSITIONS_OF_A_PROGRAM = 512  # at least, where a head is split
PROGRAMS = 256  # enough to fill a large GPU


# Device functions -----------------------------------------------------------------------------------------------------

@triton.jit
def _positive(x):
    """phi(x) = elu(x) + 1 without cancellation; phi(-inf) = 0, which is what absent entries are loaded as."""
    return tl.where(x < 0, tl.exp(tl.minimum(x, 0)), x + 1)


@triton.jit
def _slope(x):
    """The derivative of phi."""
    return tl.where(x < 0, tl.exp(tl.minimum(x, 0)), 1)


@triton.jit
def _load(ptr, stride_c, stride_n, n, chs, N, other: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK channels, positions n) of a head, `other` outside of it."""
    c = tl.arange(0, BLOCK)
    mask = (c < chs)[:, None] & (n < N)[None, :]
    return tl.load(ptr + c[:, None] * stride_c + n[None, :] * stride_n, mask=mask, other=other).to(ACC)


@triton.jit
def _store(ptr, stride_c, stride_n, n, chs, N, values, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    mask = (c < chs)[:, None] & (n < N)[None, :]
    tl.store(ptr + c[:, None] * stride_c + n[None, :] * stride_n, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _head(ptr, stride_b, stride_h, heads):
    """Start of the head of this program."""
    return ptr + (tl.program_id(0) // heads).to(tl.int64) * stride_b + (tl.program_id(0) % heads) * stride_h


@triton.jit
def _turn(
        x, rotation, r_s, r_c, r_n, n, chs, N, BACK: tl.constexpr,
        BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    """R x of a head, or its inverse R^T x if BACK: the channels 2p and 2p + 1 of x (BLOCK, BLOCK_N) at positions n.

    `x` itself without a rotation. Absent entries of x must be 0.
    """
    if rotation is not None:
        PAIRS: tl.constexpr = BLOCK // 2
        cos = _load(rotation, r_c, r_n, n, chs // 2, N, 0., PAIRS, ACC)
        sin = _load(rotation + r_s, r_c, r_n, n, chs // 2, N, 0., PAIRS, ACC)
        if BACK:
            sin = -sin
        first, second = tl.split(tl.permute(tl.reshape(x, (PAIRS, 2, BLOCK_N)), (0, 2, 1)))
        turned = tl.join(first * cos - second * sin, first * sin + second * cos)
        x = tl.reshape(tl.permute(turned, (0, 2, 1)), (BLOCK, BLOCK_N))
    return x


@triton.jit
def _sum_keys(
        k, k_c, k_n, v, v_c, v_n, rotation, r_s, r_c, r_n, start, stop, D, E, N,
        BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
        ACC: tl.constexpr, PRECISION: tl.constexpr):
    """context = 1/N sum_j R_j phi(k_j) v_j^T (D, E), mass = 1/N sum_j phi(k_j) (D), of the positions start to stop."""
    context = tl.zeros((BLOCK_D, BLOCK_E), ACC)
    mass = tl.zeros((BLOCK_D,), ACC)
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        keys = _positive(_load(k, k_c, k_n, n, D, stop, float('-inf'), BLOCK_D, ACC)) / N
        values = _load(v, v_c, v_n, n, E, stop, 0., BLOCK_E, ACC)
        turned = _turn(keys, rotation, r_s, r_c, r_n, n, D, stop, False, BLOCK_D, BLOCK_N, ACC)
        context += matmul(turned, tl.trans(values), ACC, PRECISION)
        mass += tl.sum(keys, 1)
    return context, mass


@triton.jit
def _store_sums(
        context_ptr, mass_ptr, context, mass, D, E, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's part of the sums: to [split, head]."""
    part = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    mask = (d < D)[:, None] & (e < E)[None, :]
    tl.store(context_ptr + part * D * E + d[:, None] * E + e[None, :], context, mask=mask)
    tl.store(mass_ptr + part * D + d, mass, mask=d < D)


@triton.jit
def _load_sums(
        context_ptr, mass_ptr, D, E, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr):
    """The sums of a head over all of its parts, in order."""
    context = tl.zeros((BLOCK_D, BLOCK_E), ACC)
    mass = tl.zeros((BLOCK_D,), ACC)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    mask = (d < D)[:, None] & (e < E)[None, :]
    for split in range(0, tl.num_programs(1)):
        part = (split * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        context += tl.load(context_ptr + part * D * E + d[:, None] * E + e[None, :], mask=mask, other=0.)
        mass += tl.load(mass_ptr + part * D + d, mask=d < D, other=0.)
    return context, mass


# Kernels --------------------------------------------------------------------------------------------------------------

@triton.jit
def _forward(
        q, q_b, q_h, q_c, q_n, k, k_b, k_h, k_c, k_n, v, v_b, v_h, v_c, v_n, out, out_b, out_h, out_c, out_n,
        rotation, r_s, r_h, r_c, r_n, context_ptr, mass_ptr, heads, D, E, N, per_split, eps,
        STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
        ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Everything (WHOLE), the sums of a part of the positions (SUMS), or their reading (QUERIES)."""
    start = tl.program_id(1) * per_split
    stop = tl.minimum(start + per_split, N)
    if rotation is not None:
        rotation = _head(rotation, 0, r_h, heads)
    if STEP == QUERIES:
        context, mass = _load_sums(context_ptr, mass_ptr, D, E, BLOCK_D, BLOCK_E, ACC)
    else:
        context, mass = _sum_keys(
            _head(k, k_b, k_h, heads), k_c, k_n, _head(v, v_b, v_h, heads), v_c, v_n, rotation, r_s, r_c, r_n,
            start, stop, D, E, N, BLOCK_D, BLOCK_E, BLOCK_N, ACC, PRECISION)
    if STEP == SUMS:
        _store_sums(context_ptr, mass_ptr, context, mass, D, E, BLOCK_D, BLOCK_E)
    else:
        q, out = _head(q, q_b, q_h, heads), _head(out, out_b, out_h, heads)
        for first in range(start, stop, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            queries = _positive(_load(q, q_c, q_n, n, D, stop, float('-inf'), BLOCK_D, ACC))
            turned = _turn(queries, rotation, r_s, r_c, r_n, n, D, stop, False, BLOCK_D, BLOCK_N, ACC)
            values = matmul(tl.trans(context), turned, ACC, PRECISION)
            weight = tl.sum(mass[:, None] * queries, 0) + eps
            _store(out, out_c, out_n, n, E, stop, values / weight[None, :], BLOCK_E)


@triton.jit
def _query_gradients(
        q, q_c, q_n, g, g_c, g_n, dq, dq_c, dq_n, rotation, r_s, r_c, r_n, context, mass,
        start, stop, D, E, eps,
        BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
        ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Write dq of the positions start to stop; return their gradients of context (D, E) and mass (D)."""
    dcontext = tl.zeros((BLOCK_D, BLOCK_E), ACC)
    dmass = tl.zeros((BLOCK_D,), ACC)
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        x = _load(q, q_c, q_n, n, D, stop, float('-inf'), BLOCK_D, ACC)
        queries = _positive(x)
        grad = _load(g, g_c, g_n, n, E, stop, 0., BLOCK_E, ACC)
        weight = tl.sum(mass[:, None] * queries, 0) + eps
        turned = _turn(queries, rotation, r_s, r_c, r_n, n, D, stop, False, BLOCK_D, BLOCK_N, ACC)
        values = matmul(tl.trans(context), turned, ACC, PRECISION)
        grad = grad / weight[None, :]  # of the numerator
        dweight = -tl.sum(grad * (values / weight[None, :]), 0)
        dturned = matmul(context, grad, ACC, PRECISION)
        dqueries = _turn(dturned, rotation, r_s, r_c, r_n, n, D, stop, True, BLOCK_D, BLOCK_N, ACC)
        dqueries += mass[:, None] * dweight[None, :]
        _store(dq, dq_c, dq_n, n, D, stop, dqueries * _slope(x), BLOCK_D)
        dcontext += matmul(turned, tl.trans(grad), ACC, PRECISION)
        dmass += tl.sum(queries * dweight[None, :], 1)
    return dcontext, dmass


@triton.jit
def _key_gradients(
        k, k_c, k_n, v, v_c, v_n, dk, dk_c, dk_n, dv, dv_c, dv_n, rotation, r_s, r_c, r_n,
        dcontext, dmass, start, stop, D, E, N,
        BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
        ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Write dk and dv of the positions start to stop."""
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        x = _load(k, k_c, k_n, n, D, stop, float('-inf'), BLOCK_D, ACC)
        values = _load(v, v_c, v_n, n, E, stop, 0., BLOCK_E, ACC)
        dturned = matmul(dcontext, values, ACC, PRECISION)
        dkeys = _turn(dturned, rotation, r_s, r_c, r_n, n, D, stop, True, BLOCK_D, BLOCK_N, ACC) + dmass[:, None]
        _store(dk, dk_c, dk_n, n, D, stop, dkeys / N * _slope(x), BLOCK_D)
        dvalues = matmul(
            tl.trans(dcontext),
            _turn(_positive(x) / N, rotation, r_s, r_c, r_n, n, D, stop, False, BLOCK_D, BLOCK_N, ACC), ACC, PRECISION)
        _store(dv, dv_c, dv_n, n, E, stop, dvalues, BLOCK_E)


@triton.jit
def _backward(
        q, q_b, q_h, q_c, q_n, k, k_b, k_h, k_c, k_n, v, v_b, v_h, v_c, v_n, g, g_b, g_h, g_c, g_n,
        dq, dq_b, dq_h, dq_c, dq_n, dk, dk_b, dk_h, dk_c, dk_n, dv, dv_b, dv_h, dv_c, dv_n,
        rotation, r_s, r_h, r_c, r_n, context_ptr, mass_ptr, dcontext_ptr, dmass_ptr, heads, D, E, N, per_split, eps,
        STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
        ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Everything (WHOLE), dq and the gradients of the sums (QUERIES), or dk and dv from those (KEYS).

    With w_i = mass . phi(q_i) + eps and n_i = g_i / w_i, the gradient of the numerator of out_i:
        dphi(q_i) = R_i^T context n_i - mass (n_i . out_i);   dphi(k_j) = (R_j^T dcontext v_j + dmass) / N
        dcontext = sum_i R_i phi(q_i) n_i^T;   dmass = -sum_i phi(q_i) (n_i . out_i);
        dv_j = dcontext^T R_j phi(k_j) / N
    """
    start = tl.program_id(1) * per_split
    stop = tl.minimum(start + per_split, N)
    if rotation is not None:
        rotation = _head(rotation, 0, r_h, heads)
    k, v = _head(k, k_b, k_h, heads), _head(v, v_b, v_h, heads)
    if STEP == KEYS:
        dcontext, dmass = _load_sums(dcontext_ptr, dmass_ptr, D, E, BLOCK_D, BLOCK_E, ACC)
    else:
        if STEP == WHOLE:
            context, mass = _sum_keys(
                k, k_c, k_n, v, v_c, v_n, rotation, r_s, r_c, r_n, start, stop, D, E, N,
                BLOCK_D, BLOCK_E, BLOCK_N, ACC, PRECISION)
        else:
            context, mass = _load_sums(context_ptr, mass_ptr, D, E, BLOCK_D, BLOCK_E, ACC)
        dcontext, dmass = _query_gradients(
            _head(q, q_b, q_h, heads), q_c, q_n, _head(g, g_b, g_h, heads), g_c, g_n,
            _head(dq, dq_b, dq_h, heads), dq_c, dq_n, rotation, r_s, r_c, r_n, context, mass, start, stop, D, E, eps,
            BLOCK_D, BLOCK_E, BLOCK_N, ACC, PRECISION)
    if STEP == QUERIES:
        _store_sums(dcontext_ptr, dmass_ptr, dcontext, dmass, D, E, BLOCK_D, BLOCK_E)
    else:
        _key_gradients(
            k, k_c, k_n, v, v_c, v_n, _head(dk, dk_b, dk_h, heads), dk_c, dk_n,
            _head(dv, dv_b, dv_h, heads), dv_c, dv_n, rotation, r_s, r_c, r_n, dcontext, dmass, start, stop, D, E, N,
            BLOCK_D, BLOCK_E, BLOCK_N, ACC, PRECISION)


# Launches -------------------------------------------------------------------------------------------------------------

def split_positions(num_heads: int, num_positions: int) -> tuple[int, int]:
    """(programs per head, positions of each), which depend only on the shapes: see the module."""
    wanted = triton.cdiv(PROGRAMS, num_heads)
    splits = max(1, min(wanted, num_positions // POSITIONS_OF_A_PROGRAM))
    return splits, triton.cdiv(num_positions, splits)


def _arguments(k: torch.Tensor, v: torch.Tensor, eps: float) -> tuple[int, dict[str, Any]]:
    """Number of programs per head, and the arguments of both kernels."""
    heads, chs, num_positions = k.shape[1:]
    splits, per_split = split_positions(k.shape[0] * heads, num_positions)
    block_d, block_e = (max(16, triton.next_power_of_2(n)) for n in (chs, v.shape[2]))  # tl.dot takes no less than 16
    return splits, dict(
        heads=heads, D=chs, E=v.shape[2], N=num_positions, per_split=per_split, eps=eps,
        BLOCK_D=block_d, BLOCK_E=block_e, **accumulation_types(v))


def _tile(arguments: dict[str, Any], backward: bool) -> dict[str, int]:
    """The largest tile whose registers do not spill on an NVIDIA GPU of 64 K registers, by the compiler's report."""
    width = max(arguments['BLOCK_D'], arguments['BLOCK_E'])
    if backward:
        return dict(BLOCK_N=32, num_warps=4 if width == 16 else 8)
    return dict(BLOCK_N=64 if width == 16 else 32, num_warps=4 if width <= 32 else 8)


def _empty_sums(splits: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Room for the partial sums, context (splits, B * h, d, e) and mass (splits, B * h, d)."""
    num_heads = k.shape[0] * k.shape[1] if splits > 1 else 0
    dtype = torch.promote_types(v.dtype, torch.float32)
    return [torch.empty(splits, num_heads, *chs, dtype=dtype, device=v.device)
            for chs in ((k.shape[2], v.shape[2]), (k.shape[2],))]


def _strided(*tensors: torch.Tensor) -> list[Any]:
    return [argument for x in tensors for argument in (x, *x.stride())]


def _table(rotate: torch.Tensor | None) -> list[Any]:
    """The rotation as the kernels take it."""
    return [None] * 5 if rotate is None else _strided(rotate)


@on_its_device
def attend_into(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, eps: float,
        rotate: torch.Tensor | None = None) -> None:
    """Write linear attention of q, k (B, h, d, N) and v (B, h, e, N) to `out` (B, h, e, N); any strides, no copies.

    `rotate` (2, h, d / 2, N), floating, turns pairs of channels of phi(q) and phi(k) in the numerator.

    Cost: reads q, k, v once and writes out once, 2*B*h*N*(d + e) numbers (a split head adds d*(e + 1) float32
    per part); B*h*N*d*(2e + 2) multiply-adds and 2*B*h*N*d exponentials. A rotation adds 4*B*h*N*d multiply-adds
    and reads its h*N*d numbers twice for each sample, from cache but for the first.
    """
    check_shapes(q, k, v, rotate)
    splits, arguments = _arguments(k, v, eps)
    sums = _empty_sums(splits, k, v)
    tile = _tile(arguments, backward=False)
    tensors = *_strided(q, k, v, out), *_table(rotate), *sums
    for step in (WHOLE,) if splits == 1 else (SUMS, QUERIES):
        _forward[k.shape[0] * k.shape[1], splits](*tensors, STEP=step.value, **arguments, **tile)


@on_its_device
def attend_backward_into(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gradients: Sequence[torch.Tensor],
        eps: float, rotate: torch.Tensor | None = None) -> None:
    """Write the gradients of q, k and v, given that of the output, to the three `gradients`; any strides, no copies.

    The sums are computed again: they would take more memory to keep than k and v take to read.
    Cost: reads q, grad once, k, v twice (the second time mostly from cache) and writes dq, dk, dv once, 9*B*h*N*d
    numbers for d = e; B*h*N*d*(6e + 5) multiply-adds. A rotation adds 10*B*h*N*d and reads its table five times.
    """
    splits, arguments = _arguments(k, v, eps)
    sums, dsums = _empty_sums(splits, k, v), _empty_sums(splits, k, v)
    grid, table = (k.shape[0] * k.shape[1], splits), _table(rotate)
    if splits > 1:  # `grad` stands in for the output, which this step does not write
        tile = _tile(arguments, backward=False)
        _forward[grid](*_strided(q, k, v, grad), *table, *sums, STEP=SUMS.value, **arguments, **tile)
    tile = _tile(arguments, backward=True)
    tensors = *_strided(q, k, v, grad, *gradients), *table, *sums, *dsums
    for step in (WHOLE,) if splits == 1 else (QUERIES, KEYS):
        _backward[grid](*tensors, STEP=step.value, **arguments, **tile)


@torch.library.custom_op('caretrans::attend', mutates_args=())
def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = EPS,
        rotate: torch.Tensor | None = None) -> torch.Tensor:
    """`linear_attention` of the models as one kernel, with its gradients: same arguments, shapes, dtypes and errors.

    Widths d and e up to 128. Works under torch.compile, in CUDA graphs and under autocast: it computes in float32
    for all dtypes, float64 for float64. There are no second derivatives, and no gradient of `rotate`: a `rotate` that
    requires one is refused.
    """
    out = torch.empty_like(v)
    attend_into(q, k, v, out, eps, rotate)
    return out


@attend.register_fake
def _(q, k, v, eps=EPS, rotate=None):
    check_shapes(q, k, v, rotate)
    return torch.empty_like(v)


@torch.library.custom_op('caretrans::attend_backward', mutates_args=())
def attend_backward(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float,
        rotate: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = tuple(torch.empty_like(x) for x in (q, k, v))
    attend_backward_into(grad, q, k, v, gradients, eps, rotate)
    return gradients


@attend_backward.register_fake
def _(grad, q, k, v, eps, rotate):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.eps, rotate = inputs
    if rotate is not None and rotate.requires_grad:
        raise ValueError('attend: there is no gradient of rotate: detach it, or call linear_attention.')
    ctx.save_for_backward(q, k, v, rotate)


def _differentiate(ctx, grad):
    q, k, v, rotate = ctx.saved_tensors
    return *attend_backward(grad, q, k, v, ctx.eps, rotate), None, None


attend.register_autograd(_differentiate, setup_context=_save)
