"""How latency grows with resolution: linear attention, and softmax attention in its place."""
import copy
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..devices import describe_device, list_versions
from ..errors import ConfigError
from ..measure.timing import compare_rounds, judge_noise, summarise, time_block, time_interleaved
from ..models.care import LinearAttention

__all__ = ['SIZES', 'SoftmaxAttention', 'make_softmax_twin', 'measure_growth']

SIZES = (224, 384, 512, 768, 1024)


class SoftmaxAttention(nn.Module):
    """Softmax attention of the queries, keys and values of a linear attention: (B, C, H, W) to the same shape.

    For the comparison of their cost alone: no network was trained with it.
    """

    def __init__(self, linear: LinearAttention) -> None:
        super().__init__()
        self.num_heads, self.qk = linear.num_heads, linear.qk
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        q, k = self.qk(x).chunk(2, dim=1)
        q, k, v = (t.reshape(B, self.num_heads, C // self.num_heads, H * W).transpose(2, 3) for t in (q, k, x))
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H, W)


def make_softmax_twin(model: nn.Module) -> nn.Module:
    """A copy of a CARE network, fused or not, with softmax attention of the same weights in place of linear attention.

    Raises:
        ValueError: The network has no linear attention.
    """
    twin = copy.deepcopy(model)
    found = [(name, module) for name, module in twin.named_modules() if isinstance(module, LinearAttention)]
    if not found:
        raise ValueError(f'{type(model).__name__} has no LinearAttention: take a CARE network.')
    for name, module in found:
        twin.set_submodule(name, SoftmaxAttention(module))
    return twin


def _make_pair(
        model_name: str, device: torch.device, dtype: torch.dtype, rewrite: Callable[[nn.Module], nn.Module],
) -> dict[str, nn.Module]:
    model = timm.create_model(model_name).eval()
    try:
        pair = dict(linear=model, softmax=make_softmax_twin(model))
    except ValueError as error:
        raise ConfigError(f'{model_name}: {error}') from None
    return {name: rewrite(network).to(device, dtype) for name, network in pair.items()}


def measure_growth(
        model_name: str, sizes: Sequence[int] = SIZES, device: torch.device = torch.device('cpu'),  # noqa: B008
        dtype: torch.dtype = torch.float32, batch: int = 1, rounds: int = 5, runs: int = 2,
        rewrite: Callable[[nn.Module], nn.Module] = lambda model: model, backend: str = 'eager',
        report: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Time a CARE network and its softmax twin at several resolutions, interleaved, random weights.

    Args:
        sizes: Sides of the images, pixels.
        runs: Of each in a round.
        rewrite: What is done to both before they are timed, e.g. `torch.compile`; `backend` is the name of it.
        report: Called after each block, 2 * `rounds` times for each size.
    Returns:
        A record for each network and size, with `attention` 'linear' or 'softmax'; ratios are to softmax.
    Raises:
        ConfigError: The model is no CARE network.
    """
    pair = _make_pair(model_name, device, dtype, rewrite)
    records = []
    for size in sizes:
        times = _time_pair(pair, torch.zeros(batch, 3, size, size, device=device, dtype=dtype), rounds, runs, report)
        for attention in pair:
            figures = {**summarise(times[attention]), **compare_rounds(times['softmax'], times[attention])}
            notes = judge_noise(figures)
            records.append(dict(
                model=model_name, bench='growth', attention=attention, backend=backend,
                device=describe_device(device), dtype=str(dtype).removeprefix('torch.'), layout='nchw', batch=batch,
                height=size, width=size, threads=torch.get_num_threads(), warmup=1, runs=rounds * runs, **figures,
                images_per_s=1e3 * batch / figures['median_ms'], noisy=bool(notes), versions=list_versions(),
                notes=notes))
    return records


def _time_pair(
        pair: dict[str, nn.Module], images: torch.Tensor, rounds: int, runs: int, report: Callable[[], None],
) -> dict[str, list[list[float]]]:
    def bind(network: nn.Module) -> Callable[[], Any]:
        def run() -> Any:
            with torch.inference_mode():
                return network(images)
        return run

    calls = {name: bind(network) for name, network in pair.items()}
    for call in calls.values():
        time_block(call, 1, images.device)
    return time_interleaved(calls, images.device, dict.fromkeys(calls, runs), rounds, report=report)
