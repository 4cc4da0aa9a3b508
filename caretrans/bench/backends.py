"""Ways to run a network for inference: each becomes a function without arguments that runs it once.

    network = Network(model, images)                     # evaluation mode, float32, on the CPU; images (B, 3, H, W)
    runner = prepare(network, Setup('compile', 'float32', 'channels_last'))
    check_output(network, runner, 'float32')             # against float64, before anything is timed
    runner.run()

`eager` is the network as it is trained and published. All others run what `rewrite` makes of it: the network with
everything folded that can be folded, which computes the same.
"""
import copy
import importlib.util
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..config import ConfigError
from ..fuse import rewrite
from .device_rates import allow_tf32
from .kernel_choice import check_kernels, fit_kernels, place_kernels
from .lively import PHOTOGRAPHS

__all__ = [
    'BACKENDS', 'DTYPES', 'TOLERANCES', 'Network', 'Runner', 'Setup', 'WrongOutputError', 'check_output', 'check_setup',
    'find_obstacle', 'fit_setups', 'list_dtypes', 'measure_deviation', 'measure_error', 'prepare']

BACKENDS = ('eager', 'fused', 'compile', 'cudagraph', 'onnxruntime', 'openvino')
IN_TORCH = ('eager', 'fused', 'compile', 'cudagraph')
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
CHECKED = 8

TORCH_DTYPES = {
    'float32': torch.float32, 'tf32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
PACKAGES = {  # what to import: what to install
    'onnxruntime': {'onnxruntime': 'onnxruntime', 'onnx': 'onnx', 'onnxscript': 'onnxscript'},
    'openvino': {'openvino': 'openvino', 'onnx': 'onnx', 'onnxscript': 'onnxscript'},
}


class WrongOutputError(RuntimeError):
    """A way of running a network does not compute what the network computes."""


@dataclass(frozen=True)
class Setup:
    """How a network is run: one of `BACKENDS`, `DTYPES`, `LAYOUTS` and `KERNELS`, a device, threads of a CPU."""
    backend: str
    dtype: str = 'float32'
    layout: str = 'nchw'
    device: torch.device = torch.device('cpu')
    threads: int = 1
    kernels: str = 'torch'

    def __str__(self) -> str:
        return ' '.join([self.backend, self.dtype] + [self.layout] * (self.backend in IN_TORCH)
                        + [self.kernels] * (self.kernels != 'torch'))


@dataclass
class Runner:
    """A network ready to be run on given images.

    Attributes:
        run: Runs it once; on a GPU without waiting for the end.
        read: The logits (B, num_classes) of what `run` gave, float64 on the CPU.
        images: What `run` runs the network on; whatever is copied into this tensor is run next.
        held: Bytes of weights and images; None where the memory of the backend cannot be seen.
        peak: Bytes at most, where `held` and PyTorch's counting during a run do not tell it.
        notes: What a reader of its figures must know.
        module: The network that `run` calls, where there is one with its parts.
        kernels: Which of `KERNELS` run, if any of those that were asked for.
    """
    run: Callable[[], Any]
    read: Callable[[Any], torch.Tensor]
    images: torch.Tensor
    held: Optional[int] = None
    peak: Optional[int] = None
    notes: List[str] = field(default_factory=list)
    module: Optional[nn.Module] = None
    kernels: str = 'torch'


# What goes together ---------------------------------------------------------------------------------------------------

def _list_missing(packages: Dict[str, str]) -> List[str]:
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


def list_dtypes(backend: str, device: torch.device) -> Tuple[str, ...]:
    """The number formats that a backend computes in on a device."""
    if backend == 'openvino':
        from .runtimes import list_openvino_dtypes
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
    if setup.dtype == 'int8' and not PHOTOGRAPHS.is_dir():
        raise ConfigError(f'--dtype int8 is calibrated on photographs: {PHOTOGRAPHS} is not there.')


# Networks -------------------------------------------------------------------------------------------------------------

def fit_setups(setups: Sequence[Setup], model: nn.Module) -> List[Setup]:
    """The setups for a rewritten model, each once: without kernels for parts that it has not."""
    return list(dict.fromkeys(replace(setup, kernels=fit_kernels(model, setup.kernels)) for setup in setups))


class Network:
    """A network with images to run it on, and what is made of both once: rewrite, reference, exported program.

    Args:
        model: In evaluation mode, float32, on the CPU.
        images: (B, C, H, W) float32, made ready for the model.
        fused: What `rewrite` makes of `model`, where it is there already.
        photographs: (N, C, H, W), to calibrate int8.
    """

    def __init__(
            self, model: nn.Module, images: torch.Tensor, fused: Optional[nn.Module] = None,
            photographs: Optional[torch.Tensor] = None) -> None:
        self.model, self.images, self.photographs = model, images, photographs
        self.fused = rewrite(model) if fused is None else fused
        self._programs: Dict[torch.dtype, bytes] = {}
        self._roundings: Dict[torch.dtype, float] = {}

    @cached_property
    def checked(self) -> List[int]:
        """The images whose logits are checked: the first, the last and some between, `CHECKED` at most."""
        count = len(self.images)
        return sorted({round(i * (count - 1) / (CHECKED - 1)) for i in range(CHECKED)})

    @cached_property
    def expected(self) -> torch.Tensor:
        """The logits of the checked images, of the network as it is trained, in float64."""
        return self._compute(copy.deepcopy(self.model).double(), torch.float64)

    def _compute(self, model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():  # one by one, for memory
            return torch.cat([model(self.images[[number]].to(dtype)) for number in self.checked])

    def measure_rounding(self, dtype: torch.dtype) -> float:
        """`measure_deviation` of the network as it is trained, computed in float32, where weights, images and what
        each module gives are rounded to `dtype`."""
        if dtype not in self._roundings:
            model = copy.deepcopy(self.model)
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype).float()
            for module in model.modules():
                module.register_forward_pre_hook(lambda module, args: _round(args, dtype))
                module.register_forward_hook(lambda module, args, out: _round(out, dtype))
            self._roundings[dtype] = measure_deviation(self._compute(model, torch.float32), self.expected)
        return self._roundings[dtype]

    def halve(self) -> 'Network':
        """The same with half of the images."""
        return Network(self.model, self.images[:len(self.images) // 2], self.fused, self.photographs)

    def export(self, dtype: torch.dtype = torch.float32) -> bytes:
        """The rewritten network as an ONNX program for images of this shape."""
        if dtype not in self._programs:
            from .runtimes import export_onnx
            self._programs[dtype] = export_onnx(copy.deepcopy(self.fused).to(dtype), self.images.to(dtype))
        return self._programs[dtype]


def _round(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, (tuple, list)):
        return type(values)(_round(value, dtype) for value in values)
    is_float = isinstance(values, torch.Tensor) and values.is_floating_point()
    return values.to(dtype).to(values.dtype) if is_float else values


def measure_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a logit relative to the largest logit; infinite where logits are not finite."""
    error = ((logits.double() - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float('inf')


def measure_deviation(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the error of all logits relative to theirs; infinite where logits are not finite."""
    deviation = ((logits.double() - expected).norm() / expected.norm()).item()
    return deviation if deviation == deviation else float('inf')


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


def _compile(model: nn.Module, images: torch.Tensor, setup: Setup) -> Tuple[Callable[[], Any], Optional[int]]:
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


def _capture(model: nn.Module, images: torch.Tensor, setup: Setup) -> Tuple[Callable[[], Any], int]:
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
    from .runtimes import prepare_onnxruntime, prepare_openvino
    return (prepare_onnxruntime if setup.backend == 'onnxruntime' else prepare_openvino)(network, setup)
