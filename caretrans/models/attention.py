"""Linear attention: every position attends to all others, in time linear in their number."""
from typing import Optional

import torch

__all__ = ['EPS', 'check_shapes', 'linear_attention', 'positive_feature', 'turn_pairs']

EPS = 1e-6  # added to the denominator, as in the published network


def positive_feature(x: torch.Tensor) -> torch.Tensor:
    """The feature map of linear attention, phi(x) = elu(x) + 1 > 0.

    Written as exp(x) below 0 and x + 1 above: `elu(x) + 1` cancels to 0 for very negative x.
    """
    return torch.where(x < 0, x.clamp(max=0).exp(), x + 1)


def turn_pairs(x: torch.Tensor, rotate: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of channels (2p, 2p + 1) of x (B, h, d, N) by its angle at each position.

    Args:
        rotate: (2, h, d / 2, N), cosines and sines of the angles.
    """
    B, h, d, N = x.shape
    pairs = x.reshape(B, h, d // 2, 2, N)
    first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
    cos, sin = rotate[0], rotate[1]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=3).reshape(B, h, d, N)


def check_shapes(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotate: Optional[torch.Tensor] = None) -> None:
    """Raise ValueError, naming all shapes, if the arguments of `linear_attention` have inconsistent shapes."""
    if q.shape != k.shape or k.shape[:2] != v.shape[:2] or k.shape[3] != v.shape[3]:
        raise ValueError(
            f'linear_attention: q and k must be (B, h, d, N) and v (B, h, e, N), '
            f'got q {q.shape}, k {k.shape}, v {v.shape}')
    if rotate is not None:
        if rotate.shape[0] != 2 or rotate.shape[1:] != (q.shape[1], q.shape[2] // 2, q.shape[3]) or q.shape[2] % 2:
            raise ValueError(
                f'linear_attention: rotate must be (2, h, d / 2, N) for q (B, h, d, N), d even, '
                f'got rotate {rotate.shape}, q {q.shape}')


def _linear_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float,
        rotate: Optional[torch.Tensor] = None) -> torch.Tensor:
    num_positions = k.shape[-1]
    q, k = positive_feature(q), positive_feature(k)
    weight = k.mean(dim=-1).unsqueeze(-2) @ q + eps  # (B, h, 1, N)
    if rotate is not None:
        rotate = rotate.to(q.dtype)
        q, k = turn_pairs(q, rotate), turn_pairs(k, rotate)
    context = (v / num_positions) @ k.transpose(-2, -1)  # (B, h, e, d)
    return (context @ q) / weight


@torch.fx.wrap
def linear_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = EPS,
        rotate: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Mix positions globally in time linear in their number.

    With phi(t) = elu(t) + 1 > 0, the output for each query is a weighted mean of the values:

        out_i = (1/N) sum_j w_ij v_j / ((1/N) sum_j w_ij + eps),   w_ij = phi(q_i) . phi(k_j)

    With `rotate`, a rotary position code, only the weights of the numerator become R_i phi(q_i) . R_j phi(k_j): they
    may be negative and need not sum to 1.

    The feature map, the sums and the division are computed in float32 (float64 for float64 input), under autocast
    too, with 1/N inside the sums: in half precision the sums would overflow and the denominator vanish.

    Args:
        q, k: (B, h, d, N) queries and keys, channels first, any floating dtype.
        v: (B, h, e, N) values.
        eps: Added to the denominator.
        rotate: (2, h, d / 2, N), cosines and sines of the angles by which R rotates the channels 2p and 2p + 1 of a
            head at each position; None for no rotation.
    Returns:
        (B, h, e, N) in the dtype of `v`.
    Raises:
        ValueError: The shapes are inconsistent; the message names them all.
    Cost: B*h*N*d*(2e + 1) multiply-adds, against B*h*N^2*(d + e) for softmax attention.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236, section 3.2; Su et al. 2021, arXiv:2104.09864, section 3.3,
        equation 19, for the rotation of linear attention.
    """
    check_shapes(q, k, v, rotate)
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
    if torch.jit.is_scripting():  # TorchScript has no such context manager: call a scripted model outside of autocast
        return _linear_attention(q, k, values, eps, rotate).to(v.dtype)
    if v.is_meta or not torch.is_autocast_enabled(v.device.type):  # keeps the context out of exported graphs
        return _linear_attention(q, k, values, eps, rotate).to(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        return _linear_attention(q, k, values, eps, rotate).to(v.dtype)
