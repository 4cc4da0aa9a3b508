"""Devices: choosing and describing them, and the versions of the packages that compute on them."""
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .errors import ConfigError

__all__ = [
    'autocast', 'count_cores', 'describe_cpu', 'describe_device', 'list_versions', 'resolve_device', 'use_threads']

PACKAGES = ('torch', 'timm', 'numpy', 'triton', 'onnx', 'onnxruntime', 'onnxruntime-gpu', 'openvino', 'nncf')
AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; 'auto' is cuda, else mps, else cpu.

    Args:
        local_rank: Number of this process on its machine; with cuda, each process gets its own GPU.
    Raises:
        ConfigError: This machine has no such device.
    """
    available = [kind for kind, module in (('cuda', torch.cuda), ('mps', torch.backends.mps)) if module.is_available()]
    kind = (available + ['cpu'])[0] if name == 'auto' else name
    if kind.split(':')[0] not in available + ['cpu']:
        raise ConfigError(f'device={name}, but there is only {", ".join(available + ["cpu"])} here.')
    if kind != 'cuda' and local_rank and kind.startswith('cuda'):
        raise ConfigError(f'device={name}, but each process needs its own GPU: use device=cuda.')
    if kind != 'cuda':
        return torch.device(kind)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f'No GPU for process {local_rank} of this machine, which has {torch.cuda.device_count()}: start as many '
            f'processes as GPUs.')
    torch.cuda.set_device(local_rank)
    return torch.device('cuda', local_rank)


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """Autocast in 'bf16' or 'fp16'; nothing for 'off'."""
    return nullcontext() if amp == 'off' else torch.autocast(device.type, AMP_DTYPES[amp])


def describe_cpu() -> str:
    """The name of the CPU, as reported by the system."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines()
        return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def count_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def describe_device(device: torch.device) -> str:
    """The kind of a device and its name, e.g. 'cuda: NVIDIA H200'."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else describe_cpu()
    return f'{device.type}: {name}'


def list_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of Python and of the installed ones among `packages`."""
    found = dict(python=platform.python_version())
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Limit PyTorch to `number` CPU threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
