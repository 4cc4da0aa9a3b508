"""The decoupled mixer, [attention or strips | 3x3 | 7x7], without copies: its kernels read the slices of the channels
where they lie and write them where they belong, forward and backward.

Both operators work under torch.compile, in CUDA graphs and under autocast, sum in float32 for all dtypes (float64 for
float64), and return the dtype and the layout of their input. `DecoupledMixer.forward` is the slow and obvious
version.
"""

import torch

from .depthwise import convolve_into, sum_weight_gradients
from .launch import empty_map
from .linear_attention import attend_backward_into, attend_into

__all__ = ['mix_with_attention', 'mix_with_strips']


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """A map (B, C, H, W), maybe a slice of another, as heads (B, h, C / h, H*W): a view in the usual layouts."""
    return x.flatten(2).unflatten(1, (num_heads, -1))


def _head_views(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The same as a view, to write to."""
    B, C, H, W = x.shape
    return x.view(B, num_heads, C // num_heads, H * W)


def _empty_parameters(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Empty gradients of `weights` and of their biases."""
    shapes = [weight.shape for weight in weights] + [weight.shape[:1] for weight in weights]
    return [weights[0].new_empty(shape) for shape in shapes]


# Strips: stages 1 and 2 -----------------------------------------------------------------------------------------------

@torch.library.custom_op('caretrans::mix_with_strips', mutates_args=())
def mix_with_strips(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    """[11x1 + 1x11 | 3x3 | 7x7] of x (B, C, H, W): `convolve_into` says which weights and biases, and the cost."""
    out = empty_map(x, x.shape[1])
    convolve_into(x, out, weights, biases)
    return out


@mix_with_strips.register_fake
def _(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    return empty_map(x, x.shape[1])


@torch.library.custom_op('caretrans::mix_with_strips_backward', mutates_args=())
def mix_with_strips_backward(
        grad: torch.Tensor, x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of x, of the weights and of the biases."""
    dx = empty_map(x, x.shape[1])
    convolve_into(grad, dx, weights, None, transposed=True)
    return [dx, *sum_weight_gradients(x, grad, weights)]


@mix_with_strips_backward.register_fake
def _(grad, x, weights):
    return [empty_map(x, x.shape[1]), *_empty_parameters(weights)]


def _save_strips(ctx, inputs, output) -> None:
    x, weights, _ = inputs
    ctx.save_for_backward(x, *weights)


def _differentiate_strips(ctx, grad):
    x, *weights = ctx.saved_tensors
    dx, *gradients = mix_with_strips_backward(grad, x, weights)
    return dx, gradients[:len(weights)], gradients[len(weights):]


mix_with_strips.register_autograd(_differentiate_strips, setup_context=_save_strips)


# Attention: stages 3 and 4 --------------------------------------------------------------------------------------------

@torch.library.custom_op('caretrans::mix_with_attention', mutates_args=())
def mix_with_attention(
        x: torch.Tensor, qk: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor],
        num_heads: int, eps: float = 1e-6) -> torch.Tensor:
    """[linear attention | 3x3 | 7x7] of x (B, C, H, W), in two kernels.

    Args:
        x: The values, then the two slices to convolve.
        qk: (B, 2*A, H, W) queries, then keys, for the A channels of the attention slice.
        weights, biases: Parameters of the 3x3 and the 7x7 convolution.
    """
    chs = qk.shape[1] // 2
    out = empty_map(x, x.shape[1])
    q, k = (_heads(part, num_heads) for part in qk.split(chs, dim=1))
    attend_into(q, k, _heads(x[:, :chs], num_heads), _head_views(out[:, :chs], num_heads), eps)
    convolve_into(x[:, chs:], out[:, chs:], weights, biases)
    return out


@mix_with_attention.register_fake
def _(x, qk, weights, biases, num_heads, eps=1e-6):
    return empty_map(x, x.shape[1])


@torch.library.custom_op('caretrans::mix_with_attention_backward', mutates_args=())
def mix_with_attention_backward(
        grad: torch.Tensor, x: torch.Tensor, qk: torch.Tensor, weights: list[torch.Tensor], num_heads: int,
        eps: float) -> list[torch.Tensor]:
    """Gradients of x, of qk, of the weights and of the biases."""
    chs = qk.shape[1] // 2
    dx, dqk = empty_map(x, x.shape[1]), empty_map(qk, 2 * chs)
    q, k = (_heads(part, num_heads) for part in qk.split(chs, dim=1))
    dq, dk = (_head_views(part, num_heads) for part in dqk.split(chs, dim=1))
    attend_backward_into(
        _heads(grad[:, :chs], num_heads), q, k, _heads(x[:, :chs], num_heads),
        (dq, dk, _head_views(dx[:, :chs], num_heads)), eps)
    convolve_into(grad[:, chs:], dx[:, chs:], weights, None, transposed=True)
    return [dx, dqk, *sum_weight_gradients(x[:, chs:], grad[:, chs:], weights)]


@mix_with_attention_backward.register_fake
def _(grad, x, qk, weights, num_heads, eps):
    return [empty_map(x, x.shape[1]), empty_map(qk, qk.shape[1]), *_empty_parameters(weights)]


def _save_attention(ctx, inputs, output) -> None:
    x, qk, weights, _, ctx.num_heads, ctx.eps = inputs
    ctx.save_for_backward(x, qk, *weights)


def _differentiate_attention(ctx, grad):
    x, qk, *weights = ctx.saved_tensors
    dx, dqk, *gradients = mix_with_attention_backward(grad, x, qk, weights, ctx.num_heads, ctx.eps)
    return dx, dqk, gradients[:len(weights)], gradients[len(weights):], None, None


mix_with_attention.register_autograd(_differentiate_attention, setup_context=_save_attention)
