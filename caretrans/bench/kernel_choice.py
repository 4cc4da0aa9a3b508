"""Which kernels a candidate runs with: those of PyTorch, or ours in Triton in the parts that have them."""
from collections.abc import Sequence

import torch
import torch.nn as nn

from ..errors import ConfigError
from ..kernels import PARTS, describe_placements, use_kernels, why_unavailable

__all__ = ['KERNELS', 'WITH_KERNELS', 'check_kernels', 'choose_kernels', 'fit_kernels', 'has_parts', 'place_kernels']

KERNELS: dict[str, tuple[str, ...]] = {
    'torch': (), 'triton': ('mixer', 'attention'), 'triton+expansion': PARTS}  # name: parts that run in Triton
WITH_KERNELS = ('fused', 'compile', 'cudagraph')  # backends that run the rewritten network in PyTorch


def check_kernels(kernels: str, backend: str, device: torch.device) -> None:
    """Refuse kernels that cannot run.

    Raises:
        ConfigError: Not with this backend, or not on this device.
    """
    if kernels == 'torch':
        return
    if backend not in WITH_KERNELS:
        raise ConfigError(
            f'--kernels {kernels} with --backend {backend}: they are for {", ".join(WITH_KERNELS)}: take --kernels '
            f'torch or one of these.')
    reason = why_unavailable(device)
    if reason:
        raise ConfigError(f'--kernels {kernels} with --device {device.type}: {reason}: take --kernels torch.')


def choose_kernels(
        named: Sequence[str], backends: Sequence[str], device: torch.device) -> tuple[list[str], list[str]]:
    """The kernels to measure, by default all that run on the device, and lines that say what is left out and why.

    Raises:
        ConfigError: Some that were named do not run here.
    """
    able = [backend for backend in backends if backend in WITH_KERNELS]
    for kernels in named:
        check_kernels(kernels, (able or backends)[0], device)
    if named or not able:
        return list(named) or ['torch'], []
    reason = why_unavailable(device)
    if not reason:
        return list(KERNELS), []
    ours = ', '.join(kernels for kernels in KERNELS if kernels != 'torch')
    return ['torch'], [f'left out: --kernels {ours}: {reason}; those of PyTorch run.']


def has_parts(model: nn.Module) -> bool:
    """Whether there are Triton kernels for parts of `model`, which runs with those of PyTorch afterwards."""
    return bool(use_kernels(model, parts=()))


def fit_kernels(model: nn.Module, kernels: str) -> str:
    """The first of `KERNELS` that runs the same parts of `model` in Triton as `kernels`; 'torch' where it has none."""
    parts = {placement.part for placement in use_kernels(model, parts=())}
    return next(name for name in KERNELS if parts.intersection(KERNELS[name]) == parts.intersection(KERNELS[kernels]))


def place_kernels(model: nn.Module, kernels: str) -> tuple[str, list[str]]:
    """Put kernels into a model that is on its device: which of `KERNELS` run, and why others do not."""
    if kernels == 'torch':
        return 'torch', []
    placements = use_kernels(model, parts=KERNELS[kernels])
    parts = {placement.part for placement in placements if placement.runs == 'triton'}
    ran = 'triton+expansion' if 'expansion' in parts else 'triton' if parts else 'torch'
    return ran, describe_placements([placement for placement in placements if placement.runs == 'torch'])
