"""Parts of the network as slow and obvious formulas in float64, to compare the fast ones with."""
import torch
import torch.nn as nn
import torch.nn.functional as F


def linear_attention_by_definition(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6, rotate=None) -> torch.Tensor:
    """All N x N weights: out_i = (1/N) sum_j w_ij v_j / ((1/N) sum_j w_ij + eps), w_ij = phi(q_i) . phi(k_j).

    With `rotate` (2, h, d / 2, N) the weights of the numerator are R_i phi(q_i) . R_j phi(k_j): each pair of channels
    is a complex number, multiplied by cos + i sin.
    """
    q, k, v = positive(q.double()), positive(k.double()), v.double()
    weights = torch.einsum('bhdi,bhdj->bhij', q, k) / k.shape[-1]
    mass = weights.sum(dim=-1)
    if rotate is not None:
        turn = torch.complex(*rotate.double())
        q, k = (torch.complex(x[:, :, 0::2], x[:, :, 1::2]) * turn for x in (q, k))
        weights = torch.einsum('bhdi,bhdj->bhij', q, k.conj()).real / k.shape[-1]
    return torch.einsum('bhij,bhej->bhei', weights, v) / (mass + eps).unsqueeze(-2)


def positive(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, x.exp(), x + 1)


def head_by_definition(features: torch.Tensor, fc: nn.Linear, norm: nn.LayerNorm) -> torch.Tensor:
    """Global mean, exact GELU, LayerNorm with eps 1e-6, linear: features (B, C, H, W) to logits (B, num_classes)."""
    x = F.gelu(features.double().mean(dim=(2, 3)))
    x = (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return (x * norm.weight + norm.bias) @ fc.weight.T + fc.bias


def random_rotation(num_heads: int, head_chs: int, num_positions: int) -> torch.Tensor:
    """(2, h, d / 2, N): cosines and sines of random angles, float64."""
    angles = 6 * torch.rand(num_heads, head_chs // 2, num_positions, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()])


def assert_linear_attention(attention, eps: float = 1e-6, rotate=None) -> None:
    """Check the function `attention(q, k, v)` in float64, also where keys are so small that eps decides."""
    for scale, shift in (1., 0.), (10., 0.), (1., -7.), (1., -12.):  # phi(-7) phi(-7) is of the order of eps
        q, k, v = (torch.randn(2, 3, 8, 35, dtype=torch.float64) for _ in range(3))
        q, k = scale * q + shift, scale * k + shift
        expected = linear_attention_by_definition(q, k, v, eps, rotate)
        worst = ((attention(q, k, v) - expected).abs().max() / expected.abs().max()).item()
        assert worst <= 1e-12, f'off by {worst:.1e}'


def assert_head(model: nn.Module) -> None:
    """Check both heads of a float64 model, also for features so small that the eps of the LayerNorm decides."""
    for scale in 1., 1e-3:
        features = scale * torch.randn(2, model.num_features, 3, 3, dtype=torch.float64)
        heads = [head_by_definition(features, head.fc, head.norm) for head in (model.head, model.head_dist)]
        worst = (model.forward_head(features) - (heads[0] + heads[1]) / 2).abs().max().item()
        assert worst <= 1e-12, f'off by {worst:.1e}'
