"""Latency by resolution: linear attention, and softmax attention in its place."""
import copy
from collections.abc import Callable, Sequence
from functools import partial

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..devices import describe_device, list_versions
from ..errors import ConfigError
from ..measure.timing import time_block, time_interleaved
from ..models.care import LinearAttention
from .record import Record

__all__ = ['SIZES', 'SoftmaxAttention', 'make_softmax_twin', 'measure_growth']

SIZES = (224, 384, 512, 768, 1024)
RUNS = 2  # of each network in a round


class SoftmaxAttention(nn.Module):
    """Softmax attention of the queries, keys and values of a linear attention: (B, C, H, W) to the same shape.

    It serves to compare the cost only: no network was trained with it.
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
        ConfigError: The network has no linear attention.
    """
    twin = copy.deepcopy(model)
    found = [(name, module) for name, module in twin.named_modules() if isinstance(module, LinearAttention)]
    if not found:
        raise ConfigError(f'{type(model).__name__} has no LinearAttention: choose a CARE network.')
    for name, module in found:
        twin.set_submodule(name, SoftmaxAttention(module))
    return twin


@torch.inference_mode()
def measure_growth(
        model_name: str, sizes: Sequence[int] = SIZES, device: torch.device = torch.device('cpu'),  # noqa: B008
        dtype: torch.dtype = torch.float32, batch: int = 1, rounds: int = 5,
        report: Callable[[], None] = lambda: None) -> list[Record]:
    """Time a CARE network and its softmax twin at several resolutions, interleaved, with random weights.

    Args:
        sizes: Sides of the images, pixels.
        report: Called after each block, 2 * `rounds` times for each size.
    Returns:
        A record for each network and size, with `attention` 'linear' or 'softmax'; ratios are over softmax.
    Raises:
        ConfigError: The model is no CARE network.
    """
    model = timm.create_model(model_name).eval()
    pair = {name: network.to(device, dtype) for name, network in dict(
        linear=model, softmax=make_softmax_twin(model)).items()}
    records = []
    for size in sizes:
        images = torch.zeros(batch, 3, size, size, device=device, dtype=dtype)
        calls = {name: partial(network, images) for name, network in pair.items()}
        for call in calls.values():
            time_block(call, 1, device)
        times = time_interleaved(calls, device, dict.fromkeys(calls, RUNS), rounds, report=report)
        for attention in pair:
            record = Record(
                model=model_name, bench='growth', attention=attention, device=describe_device(device),
                dtype=str(dtype).removeprefix('torch.'), batch=batch, height=size, width=size,
                threads=torch.get_num_threads(), warmup=1, versions=list_versions())
            record.add_times(times[attention], times['softmax'])
            records.append(record)
    return records
