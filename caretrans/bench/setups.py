"""Setups: backend, number format, layout, device and kernels that run a network, and checks of their availability."""
import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from ..errors import ConfigError
from ..kernels import use_kernels, why_unavailable
from ..measure.sample_network import SAMPLE_IMAGES
from ..runtimes.openvino import get_core

__all__ = [
    'BACKENDS', 'DTYPES', 'FUSED_IN_TORCH', 'IN_TORCH', 'KERNELS', 'Setup', 'check_setup', 'choose_kernels',
    'find_obstacle', 'fit_setups', 'list_dtypes']

BACKENDS = ('eager', 'fused', 'compile', 'cudagraph', 'onnxruntime', 'openvino')
IN_TORCH = BACKENDS[:4]
FUSED_IN_TORCH = BACKENDS[1:4]  # with kernels of this package, and faster in channels-last layout
DTYPES = ('float32', 'tf32', 'bfloat16', 'float16', 'int8')
KERNELS = ('torch', 'triton')
PACKAGES = {'onnxruntime': ('onnxruntime', 'onnx', 'onnxscript'), 'openvino': ('openvino', 'onnx', 'onnxscript')}
OPENVINO_NAMES = {'float32': 'FP32', 'bfloat16': 'BF16', 'float16': 'FP16', 'int8': 'INT8'}


@dataclass(frozen=True)
class Setup:
    """Setup of a network: backend, number format, layout ('nchw' or 'channels_last'), device, CPU threads, kernels.

    Valid values are in `BACKENDS`, `DTYPES` and `KERNELS`.
    """
    backend: str
    dtype: str = 'float32'
    layout: str = 'nchw'
    device: torch.device = torch.device('cpu')
    threads: int = 1
    kernels: str = 'torch'

    def __str__(self) -> str:
        return ' '.join([self.backend, self.dtype] + [self.layout] * (self.backend in IN_TORCH)
                        + [self.kernels] * (self.kernels != 'torch'))


# What works here ------------------------------------------------------------------------------------------------------

def _list_missing(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def find_obstacle(backend: str, device: torch.device) -> str:
    """Reason why a backend does not work on a device, with the remedy; '' if it works."""
    missing = _list_missing(PACKAGES.get(backend, ()))
    if missing:
        return f'it is not installed: pip install {" ".join(missing)}'
    if backend == 'cudagraph' and device.type != 'cuda':
        return 'it needs an NVIDIA GPU: use --device cuda'
    if backend == 'openvino' and device.type != 'cpu':
        return 'it runs on the CPU: use --device cpu'
    if backend == 'compile' and device.type == 'mps':
        return 'it supports cpu and cuda: use --backend fused'
    if backend == 'compile' and device.type == 'cpu' and not any(
            map(shutil.which, (os.environ.get('CXX', 'g++'), 'g++', 'clang++', 'cl'))):
        return 'it needs a C++ compiler: install g++'
    if backend == 'onnxruntime' and device.type != 'cpu':
        import onnxruntime
        if device.type == 'mps' or 'CUDAExecutionProvider' not in onnxruntime.get_available_providers():
            return f'the installed version has no provider for {device.type}: use --device cpu' \
                + (', or pip install onnxruntime-gpu instead' if device.type == 'cuda' else '')
    return ''


def list_dtypes(backend: str, device: torch.device) -> tuple[str, ...]:
    """Number formats that a backend supports on a device."""
    if backend == 'openvino':
        able = get_core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')
        return tuple(dtype for dtype, name in OPENVINO_NAMES.items() if name in able)
    if backend == 'onnxruntime':
        return ('float32', 'int8') if device.type == 'cpu' else ('float32', 'tf32', 'float16')
    if device.type == 'cuda':
        return 'float32', 'tf32', 'bfloat16', 'float16'
    return 'float32', 'bfloat16', 'float16'


def _check_kernels(kernels: str, backend: str, device: torch.device) -> None:
    if kernels == 'torch':
        return
    if backend not in FUSED_IN_TORCH:
        raise ConfigError(
            f'--kernels {kernels} with --backend {backend}: they run with {", ".join(FUSED_IN_TORCH)}: use --kernels '
            f'torch or one of these backends.')
    reason = why_unavailable(device)
    if reason:
        raise ConfigError(f'--kernels {kernels} with --device {device.type}: {reason}: use --kernels torch.')


def check_setup(setup: Setup) -> None:
    """Refuse a setup that cannot work, before any work is done.

    Raises:
        ConfigError: The backend is not installed or does not support this device, number format or kernels.
    """
    obstacle = find_obstacle(setup.backend, setup.device)
    if obstacle:
        raise ConfigError(f'--backend {setup.backend} with --device {setup.device.type}: {obstacle}.')
    _check_kernels(setup.kernels, setup.backend, setup.device)
    dtypes = list_dtypes(setup.backend, setup.device)
    if setup.dtype not in dtypes:
        raise ConfigError(
            f'--dtype {setup.dtype} with --backend {setup.backend} and --device {setup.device.type}: choose from '
            f'{", ".join(dtypes)}.')
    if setup.dtype == 'int8' and setup.backend == 'openvino' and _list_missing(['nncf']):
        raise ConfigError('--dtype int8 with --backend openvino: nncf is not installed: pip install nncf.')
    if setup.dtype == 'int8' and not SAMPLE_IMAGES.is_dir():
        raise ConfigError(f'--dtype int8 is calibrated on the bundled images, but {SAMPLE_IMAGES} does not exist.')


# Kernels --------------------------------------------------------------------------------------------------------------

def choose_kernels(
        named: Sequence[str], backends: Sequence[str], device: torch.device) -> tuple[list[str], list[str]]:
    """Kernels to measure, by default all that run on the device, and remarks on skipped kernels.

    Raises:
        ConfigError: Requested kernels do not run here.
    """
    able = [backend for backend in backends if backend in FUSED_IN_TORCH]
    for kernels in named:
        _check_kernels(kernels, (able or backends)[0], device)
    if named or not able:
        return list(named) or ['torch'], []
    reason = why_unavailable(device)
    if not reason:
        return list(KERNELS), []
    return ['torch'], [f"skipped: --kernels triton: {reason}; PyTorch's own run instead."]


def fit_setups(setups: Sequence[Setup], model: nn.Module) -> list[Setup]:
    """Setups for a fused model without duplicates: a model without parts for Triton kernels runs with PyTorch's own."""
    has_parts = bool(use_kernels(model, parts=()))
    return list(dict.fromkeys(setup if has_parts else replace(setup, kernels='torch') for setup in setups))
