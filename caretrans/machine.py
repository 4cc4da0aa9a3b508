"""What a measured figure needs beside it: the processor or the GPU, and the versions of what computed it."""
import os
import platform
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Dict, Iterator, Sequence

import torch

__all__ = ['count_cores', 'describe_device', 'describe_processor', 'list_versions', 'use_threads']

PACKAGES = ('torch', 'timm', 'numpy', 'triton', 'onnx', 'onnxruntime', 'onnxruntime-gpu', 'openvino', 'nncf')


def describe_processor() -> str:
    """The name of the processor, as the system gives it."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def describe_device(device: torch.device) -> str:
    """The kind of a device and its name, e.g. 'cuda: NVIDIA H200'."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else describe_processor()
    return f'{device.type}: {name}'


def list_versions(packages: Sequence[str] = PACKAGES) -> Dict[str, str]:
    """The versions of Python and of those packages that are installed."""
    found = dict(python=platform.python_version())
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Let PyTorch take so many threads of the processor, inside of the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
