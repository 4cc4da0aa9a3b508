"""Ways to run a network for inference: each becomes a function without arguments that runs it once.

    network = Network(model, images)                     # evaluation mode, float32, on the CPU; images (B, 3, H, W)
    runner = prepare(network, Setup('compile', 'float32', 'channels_last'))
    check_output(network, runner, 'float32')             # against float64, before anything is timed
    runner.run()

`eager` is the network as it is trained and published. All others run what `to_form` makes of it: the network with
everything folded that can be folded, which computes the same.
"""
import copy
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..errors import ConfigError
from ..measure.sample_network import SAMPLE_IMAGES
from .device_rates import allow_tf32
from .kernel_choice import check_kernels, fit_kernels, place_kernels
from .runtimes import list_openvino_dtypes, prepare_onnxruntime, prepare_openvino
from .setups import IN_TORCH, Network, Runner, Setup, WrongOutputError, measure_deviation

__all__ = [
    'BACKENDS', 'DTYPES', 'TOLERANCES', 'Network', 'Runner', 'Setup', 'WrongOutputError', 'check_output', 'check_setup',
    'find_obstacle', 'fit_setups', 'list_dtypes', 'measure_deviation', 'measure_error', 'prepare']

BACKENDS = ('eager', 'fused', 'compile', 'cudagraph', 'onnxruntime', 'openvino')
DTYPES = ('float32', 'tf32', 'bfloat16', 'float16', 'int8')
LAYOUTS = ('nchw', 'channels_last')

# Largest error of a logit against float64, relative to the largest logit, up to which an output passes: several times
# what rounding makes of networks this deep. In float32 that is far less than a dropped bias or a swapped slice makes;
# in the other formats such a mistake can be smaller, and the next limit is what finds it.
TOLERANCES = {'float32': 5e-5, 'tf32': 2e-2, 'float16': 2e-2, 'bfloat16': 0.15, 'int8': 0.5}
# The norm of the error of all logits of up to `CHECKED` images, relative to theirs, is also held against what rounding
# to the format makes of this very network (`Network.measure_rounding`), times this. Right outputs have 0.6 to 1.2 times
# it. In bfloat16 each pair of swapped 3x3 and 7x7 convolutions in care_s0 has 10 times it or more, each lost bias of an
# expansion 3.7 or more; what changes the logits less than rounding does, such as many a lost bias of a projection, is
# not found.
ROUNDINGS = 3.
ROUNDED = {'tf32': torch.float16, 'float16': torch.float16, 'bfloat16': torch.bfloat16}  # of as many bits
# In int8 that norm itself is limited, right outputs have up to 0.2: permuted classes are found, most lost biases and
# swapped convolutions are not.
INT8_TOLERANCE = 0.5

TORCH_DTYPES = {
    'float32': torch.float32, 'tf32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
PACKAGES = {  # what to import: what to install
    'onnxruntime': {'onnxruntime': 'onnxruntime', 'onnx': 'onnx', 'onnxscript': 'onnxscript'},
    'openvino': {'openvino': 'openvino', 'onnx': 'onnx', 'onnxscript': 'onnxscript'},
}


# What goes together ---------------------------------------------------------------------------------------------------

def _list_missing(packages: dict[str, str]) -> list[str]:
    return [package for module, package in packages.items() if importlib.util.find_spec(module) is None]


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get('CXX', 'g++'), 'g++', 'clang++', 'cl'))


def find_obstacle(backend: str, device: torch.device) -> str:
    """Why a backend does not work on a device, with the remedy; '' if it does."""
    missing = _list_missing(PACKAGES.get(backend, {}))
    if missing:
        return f'it is not installed: pip install {" ".join(missing)}'
    if backend == 'cudagraph' and device.type != 'cuda':
        return 'it is for GPUs of NVIDIA: take --device cuda'
    if backend == 'openvino' and device.type != 'cpu':
        return 'it runs on the processor: take --device cpu'
    if backend == 'compile' and device.type == 'mps':
        return 'it is for cpu and cuda: take --backend fused'
    if backend == 'compile' and device.type == 'cpu' and not _has_compiler():
        return 'it needs a C++ compiler: install g++'
    if backend == 'onnxruntime' and device.type != 'cpu':
        import onnxruntime
        if device.type == 'mps' or 'CUDAExecutionProvider' not in onnxruntime.get_available_providers():
            return f'the installed one has no provider for {device.type}: take --device cpu' \
                + (', or pip install onnxruntime-gpu in its place' if device.type == 'cuda' else '')
    return ''


def list_dtypes(backend: str, device: torch.device) -> tuple[str, ...]:
    """The number formats that a backend computes in on a device."""
    if backend == 'openvino':
        return list_openvino_dtypes()
    if backend == 'onnxruntime':
        return ('float32', 'int8') if device.type == 'cpu' else ('float32', 'tf32', 'float16')
    if device.type == 'cuda':
        return 'float32', 'tf32', 'bfloat16', 'float16'
    return 'float32', 'bfloat16', 'float16'


def check_setup(setup: Setup) -> None:
    """Refuse what cannot work before any work is done.

    Raises:
        ConfigError: The backend is not installed or not for this device, or has no such number format here.
    """
    obstacle = find_obstacle(setup.backend, setup.device)
    if obstacle:
        raise ConfigError(f'--backend {setup.backend} with --device {setup.device.type}: {obstacle}.')
    check_kernels(setup.kernels, setup.backend, setup.device)
    dtypes = list_dtypes(setup.backend, setup.device)
    if setup.dtype not in dtypes:
        raise ConfigError(
            f'--dtype {setup.dtype} with --backend {setup.backend} and --device {setup.device.type}: it has '
            f'{", ".join(dtypes)} there.')
    if setup.dtype == 'int8' and setup.backend == 'openvino' and _list_missing({'nncf': 'nncf'}):
        raise ConfigError('--dtype int8 with --backend openvino: it is not installed: pip install nncf.')
    if setup.dtype == 'int8' and not SAMPLE_IMAGES.is_dir():
        raise ConfigError(f'--dtype int8 is calibrated on photographs: {SAMPLE_IMAGES} is not there.')


# Networks -------------------------------------------------------------------------------------------------------------

def fit_setups(setups: Sequence[Setup], model: nn.Module) -> list[Setup]:
    """The setups for a rewritten model, each once: without kernels for parts that it has not."""
    return list(dict.fromkeys(replace(setup, kernels=fit_kernels(model, setup.kernels)) for setup in setups))


def measure_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a logit relative to the largest logit; infinite where logits are not finite."""
    error = ((logits.double() - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float('inf')


def check_output(network: Network, runner: Runner, dtype: str) -> float:
    """Run once and compare up to `CHECKED` images with the network as it is trained, in float64.

    Returns:
        The largest error of a logit, relative to the largest logit.
    Raises:
        WrongOutputError: It is above `TOLERANCES`, or the error of all logits above what rounding explains.
    """
    logits = runner.read(runner.run())[network.checked]
    error = measure_error(logits, network.expected)
    if not error <= TOLERANCES[dtype]:
        raise WrongOutputError(
            f'the logits differ from float64 by {error:.2g} of their largest, {TOLERANCES[dtype]:g} is allowed for '
            f'{dtype}: not timed')
    if dtype != 'float32':
        deviation = measure_deviation(logits, network.expected)
        limit = INT8_TOLERANCE if dtype == 'int8' else ROUNDINGS * network.measure_rounding(ROUNDED[dtype])
        if not deviation <= limit:
            raise WrongOutputError(
                f'the logits differ from float64 by {deviation:.2g} of their norm, rounding to {dtype} explains '
                f'{limit:.2g}: not timed')
    return error


# Running --------------------------------------------------------------------------------------------------------------

@contextmanager
def _precision(setup: Setup) -> Iterator[None]:
    """No gradients, and on a GPU float32 as float32 or as TF32, whatever is set outside."""
    with allow_tf32(setup.dtype == 'tf32'), torch.inference_mode():
        yield


def _guard(forward: Callable[[], Any], setup: Setup) -> Callable[[], Any]:
    """`forward` under the settings of `setup`, with as little around it as the device needs."""
    context = (lambda: _precision(setup)) if setup.device.type == 'cuda' else torch.inference_mode

    def run() -> Any:
        with context():
            return forward()
    return run


def _compile_ahead(model: nn.Module, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Inductor for a processor: ahead of time, weights as constants, no Python between the kernels."""
    import torch._inductor.config as inductor

    with torch.no_grad(), inductor.patch(freezing=True), tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, (images,)), package_path=str(Path(folder) / 'network.pt2'))
        return torch._inductor.aoti_load_package(package)


def _compile(model: nn.Module, images: torch.Tensor, setup: Setup) -> tuple[Callable[[], Any], int | None]:
    """Inductor: ahead of time on a processor, with its search for the best kernels and CUDA graphs on a GPU."""
    import torch._dynamo.config as dynamo

    if setup.device.type == 'cpu':
        ahead = _compile_ahead(model, images)
        return _guard(lambda: ahead(images), setup), None
    compiled = torch.compile(model, dynamic=False, fullgraph=True, mode='max-autotune')
    run = _guard(lambda: compiled(images), setup)
    with dynamo.patch(cache_size_limit=1024, accumulated_cache_size_limit=4096):  # many networks of one class
        run()
    return run, _trace_cuda_peak(lambda: [run() for _ in range(3)], setup.device)  # records graphs


def _capture(model: nn.Module, images: torch.Tensor, setup: Setup) -> tuple[Callable[[], Any], int]:
    """A CUDA graph of one forward pass."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    output = None

    def capture() -> None:
        nonlocal output
        with torch.cuda.graph(graph):
            output = model(images)

    with _precision(setup):
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(images)
        torch.cuda.current_stream().wait_stream(stream)
        peak = _trace_cuda_peak(capture, setup.device)

    def run() -> torch.Tensor:
        graph.replay()
        return output
    return run, peak


def _trace_cuda_peak(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that were allocated during some work beyond those before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _prepare_in_torch(network: Network, setup: Setup) -> Runner:
    dtype = TORCH_DTYPES[setup.dtype]
    memory_format = torch.channels_last if setup.layout == 'channels_last' else torch.contiguous_format
    source = network.model if setup.backend == 'eager' else network.fused
    model = copy.deepcopy(source).to(setup.device, dtype).to(memory_format=memory_format)
    images = network.images.to(setup.device, dtype, copy=True).contiguous(memory_format=memory_format)
    ran, notes = place_kernels(model, setup.kernels)
    run, peak = _guard(lambda: model(images), setup), None
    if ran != 'torch':
        run()  # compiles and tunes kernels, before anything is captured or memory is counted
    if setup.backend == 'compile':
        run, peak = _compile(model, images, setup)
    elif setup.backend == 'cudagraph':
        run, peak = _capture(model, images, setup)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers(), images])
    return Runner(
        run, lambda logits: logits.detach().cpu().double(), images, held, None if peak is None else peak + held, notes,
        module=model if setup.backend in ('eager', 'fused') else None, kernels=ran)


def prepare(network: Network, setup: Setup) -> Runner:
    """Make a network ready to be run in one way; see `check_setup` for what can be.

    Raises:
        RuntimeError and others: The backend cannot make it, or memory does not suffice.
    """
    if setup.backend in IN_TORCH:
        return _prepare_in_torch(network, setup)
    return (prepare_onnxruntime if setup.backend == 'onnxruntime' else prepare_openvino)(network, setup)
