"""Linear attention: every position attends to all others, in time linear in their number."""
import torch

__all__ = ['EPS', 'linear_attention', 'positive_feature']

EPS = 1e-6  # in the denominator, of the published network


def positive_feature(x: torch.Tensor) -> torch.Tensor:
    """The feature map of linear attention, phi(x) = elu(x) + 1 > 0.

    Written as exp(x) below 0 and x + 1 above: `elu(x) + 1` cancels to 0 for very negative x.
    """
    return torch.where(x < 0, x.clamp(max=0).exp(), x + 1)


def _linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    num_positions = k.shape[-1]
    q, k = positive_feature(q), positive_feature(k)
    context = (v / num_positions) @ k.transpose(-2, -1)  # (B, h, e, d)
    mass = k.mean(dim=-1).unsqueeze(-2)  # (B, h, 1, d)
    return (context @ q) / (mass @ q + eps)


@torch.fx.wrap
def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """Mix positions globally in time linear in their number.

    With phi(t) = elu(t) + 1, positive, each query takes a weighted mean of the values:

        out_i = (1/N) sum_j w_ij v_j / ((1/N) sum_j w_ij + eps),   w_ij = phi(q_i) . phi(k_j)

    The feature map, the sums and the division are computed in float32 (float64 for float64 input), under autocast
    too, and 1/N goes inside the sums: in half precision the sums would overflow and the denominator vanish.

    Args:
        q, k: (B, h, d, N) queries and keys, channels first, any floating dtype.
        v: (B, h, e, N) values.
        eps: Added to the denominator.
    Returns:
        (B, h, e, N) in the dtype of `v`.
    Raises:
        ValueError: The shapes disagree; the message gives all three.
    Cost: B*h*N*d*(2e + 1) multiply-adds, against B*h*N^2*(d + e) for softmax attention.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236, section 3.2.
    """
    if q.shape != k.shape or k.shape[:2] != v.shape[:2] or k.shape[3] != v.shape[3]:
        raise ValueError(
            f'linear_attention: q and k must be (B, h, d, N) and v (B, h, e, N), '
            f'got q {q.shape}, k {k.shape}, v {v.shape}')
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
    if torch.jit.is_scripting():  # TorchScript has no such context manager: call a scripted model outside of autocast
        return _linear_attention(q, k, values, eps).to(v.dtype)
    if v.is_meta or not torch.is_autocast_enabled(v.device.type):  # keeps the context out of exported graphs
        return _linear_attention(q, k, values, eps).to(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        return _linear_attention(q, k, values, eps).to(v.dtype)
