"""Run a network by any backend: each becomes a function without arguments that runs it once.

    network = Network(model, images)                     # evaluation mode, float32, on the CPU; images (B, 3, H, W)
    runner = prepare(network, Setup('compile', 'float32', 'channels_last'))
    check_output(network, runner, 'float32')             # against float64, before anything is timed
    runner.run()

The backend `eager` runs the original network. All others run the form that `to_form` makes of it, with everything fused
that can be, which computes the same.
"""
import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from ..fuse import to_form
from ..kernels import describe_placements, use_kernels
from ..runtimes.onnx import INPUT, export_onnx, make_session, quantize, split_batches
from ..runtimes.openvino import compile_model, make_model, quantize as quantize_for_openvino
from .device_rates import allow_tf32
from .setups import IN_TORCH, Setup

__all__ = [
    'TOLERANCES', 'TORCH_DTYPES', 'Network', 'Runner', 'Setup', 'WrongOutputError', 'check_output', 'measure_deviation',
    'measure_error', 'place_kernels', 'prepare']

CHECKED = 8  # images of a batch whose logits are compared
# Largest error of a logit against float64, relative to the largest logit, up to which an output passes: several times
# the rounding error of networks this deep. In float32 that is far below the effect of a missing bias or a swapped
# slice; in the other formats such a mistake can be smaller, and the next limit finds it.
TOLERANCES = {'float32': 5e-5, 'tf32': 2e-2, 'float16': 2e-2, 'bfloat16': 0.15, 'int8': 0.5}
# The norm of the error of all logits of up to `CHECKED` images, relative to theirs, must also stay below this multiple
# of the rounding error of the same network (`Network.measure_rounding`). Correct outputs have 0.6 to 1.2 times it. In
# bfloat16 each pair of swapped 3x3 and 7x7 convolutions in care_s0 has 10 times it or more, each missing bias of an
# expansion 3.7 or more; a change of the logits below rounding, such as many a missing bias of a projection, is not
# found.
ROUNDINGS = 3.
ROUNDED = {'tf32': torch.float16, 'float16': torch.float16, 'bfloat16': torch.bfloat16}  # with as many bits
# In int8 that norm itself is limited, correct outputs have up to 0.2: permuted classes are found, most missing biases
# and swapped convolutions are not.
INT8_TOLERANCE = 0.5

TORCH_DTYPES = {
    'float32': torch.float32, 'tf32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
OPENVINO_HINTS = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16', 'int8': 'f32'}  # int8: of unquantized layers
UNSEEN = 'the memory of this backend cannot be measured'


class WrongOutputError(RuntimeError):
    """The output of a backend differs from the original network."""


@dataclass
class Runner:
    """A network ready to run on given images.

    Attributes:
        run: Runs it once; on a GPU without waiting for the end.
        read: Turns the output of `run` into logits (B, num_classes), float64 on the CPU.
        images: Input of `run`; copy other images into this tensor to run them.
        held: Bytes of weights and images; None where the memory of the backend cannot be measured.
        peak: Peak bytes, where `held` and PyTorch's count during a run do not show it.
        notes: Remarks on its figures.
        module: The network that `run` calls, if its parts can have hooks.
        kernels: The kernels that run, 'torch' or 'triton'.
    """
    run: Callable[[], Any]
    read: Callable[[Any], torch.Tensor]
    images: torch.Tensor
    held: int | None = None
    peak: int | None = None
    notes: list[str] = field(default_factory=list)
    module: nn.Module | None = None
    kernels: str = 'torch'


class Network:
    """A network with images to run it on; derives the fused form, the reference and the ONNX program once.

    Args:
        model: Network in evaluation mode, float32, on the CPU.
        images: (B, C, H, W) float32, preprocessed for the model.
        fused: The result of `to_form(model)`, if it exists already.
        calibration: (N, C, H, W), images that calibrate int8.
    """

    def __init__(
            self, model: nn.Module, images: torch.Tensor, fused: nn.Module | None = None,
            calibration: torch.Tensor | None = None) -> None:
        self.model, self.images, self.calibration = model, images, calibration
        self.fused = to_form(model) if fused is None else fused
        self._programs: dict[torch.dtype, bytes] = {}
        self._roundings: dict[torch.dtype, float] = {}

    @cached_property
    def checked(self) -> list[int]:
        """Indices of the images whose logits are checked: the first, the last and some between, `CHECKED` at most."""
        count = len(self.images)
        return sorted({round(i * (count - 1) / (CHECKED - 1)) for i in range(CHECKED)})

    @cached_property
    def expected(self) -> torch.Tensor:
        """The logits of the checked images by the original network in float64."""
        return self._compute(copy.deepcopy(self.model).double(), torch.float64)

    def _compute(self, model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():  # one by one, for memory
            return torch.cat([model(self.images[[number]].to(dtype)) for number in self.checked])

    def measure_rounding(self, dtype: torch.dtype) -> float:
        """`measure_deviation` of the original network in float32 with weights, images and the output of each module
        rounded to `dtype`."""
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

    def with_images(self, images: torch.Tensor) -> 'Network':
        """The same network on other images."""
        return Network(self.model, images, self.fused, self.calibration)

    def export(self, dtype: torch.dtype = torch.float32) -> bytes:
        """The fused network as an ONNX program for images of this shape."""
        if dtype not in self._programs:
            self._programs[dtype] = export_onnx(copy.deepcopy(self.fused).to(dtype), self.images.to(dtype))
        return self._programs[dtype]


def _round(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, (tuple, list)):
        return type(values)(_round(value, dtype) for value in values)
    is_float = isinstance(values, torch.Tensor) and values.is_floating_point()
    return values.to(dtype).to(values.dtype) if is_float else values


# Correctness ----------------------------------------------------------------------------------------------------------

def measure_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a logit relative to the largest logit; infinite where logits are not finite."""
    error = ((logits.double() - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float('inf')


def measure_deviation(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the error of all logits relative to theirs; infinite where logits are not finite."""
    deviation = ((logits.double() - expected).norm() / expected.norm()).item()
    return deviation if deviation == deviation else float('inf')


def check_output(network: Network, runner: Runner, dtype: str) -> float:
    """Run once and compare up to `CHECKED` images with the original network in float64.

    Returns:
        The largest error of a logit, relative to the largest logit.
    Raises:
        WrongOutputError: It is above `TOLERANCES`, or the error of all logits is larger than rounding explains.
    """
    logits = runner.read(runner.run())[network.checked]
    broken = int((~logits.isfinite().all(dim=1)).sum())
    if broken:
        also = '' if network.expected.isfinite().all() else ', nor are those in float64: use another checkpoint'
        raise WrongOutputError(f'the logits of {broken} of {len(logits)} images are not finite{also}: not timed')
    error = measure_error(logits, network.expected)
    if not error <= TOLERANCES[dtype]:
        raise WrongOutputError(
            f'the logits differ from float64 by {error:.2g} of the largest, {TOLERANCES[dtype]:g} is allowed in '
            f'{dtype}: not timed')
    if dtype != 'float32':
        deviation = measure_deviation(logits, network.expected)
        limit = INT8_TOLERANCE if dtype == 'int8' else ROUNDINGS * network.measure_rounding(ROUNDED[dtype])
        if not deviation <= limit:
            raise WrongOutputError(
                f'the logits differ from float64 by {deviation:.2g} of their norm, rounding to {dtype} accounts for '
                f'{limit:.2g}: not timed')
    return error


# PyTorch --------------------------------------------------------------------------------------------------------------

@contextmanager
def _precision(setup: Setup) -> Iterator[None]:
    """No gradients, and on a GPU float32 as float32 or as TF32, independent of global settings."""
    with allow_tf32(setup.dtype == 'tf32'), torch.inference_mode():
        yield


def _guard(forward: Callable[[], Any], setup: Setup) -> Callable[[], Any]:
    """`forward` under the precision of `setup`, with as little overhead as the device allows."""
    context = (lambda: _precision(setup)) if setup.device.type == 'cuda' else torch.inference_mode

    def run() -> Any:
        with context():
            return forward()
    return run


def _compile(model: nn.Module, images: torch.Tensor, setup: Setup) -> tuple[Callable[[], Any], int | None]:
    """Inductor, and its peak bytes on a GPU.

    On a CPU it compiles ahead of time, with weights as constants and no Python between the kernels; on a GPU with its
    search for the best kernels and CUDA graphs.
    """
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    if setup.device.type == 'cpu':
        with torch.no_grad(), inductor.patch(freezing=True), tempfile.TemporaryDirectory() as folder:
            package = torch._inductor.aoti_compile_and_package(
                torch.export.export(model, (images,)), package_path=str(Path(folder) / 'network.pt2'))
            ahead = torch._inductor.aoti_load_package(package)
        return _guard(lambda: ahead(images), setup), None
    compiled = torch.compile(model, dynamic=False, fullgraph=True, mode='max-autotune')
    run = _guard(lambda: compiled(images), setup)
    with dynamo.patch(cache_size_limit=1024, accumulated_cache_size_limit=4096):  # many networks of one class
        run()
    return run, _trace_cuda_peak(lambda: [run() for _ in range(3)], setup.device)  # records graphs


def _capture(model: nn.Module, images: torch.Tensor, setup: Setup) -> tuple[Callable[[], Any], int]:
    """A CUDA graph of one forward pass, and its peak bytes."""
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
    """The peak of the bytes allocated during some work, beyond those before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def place_kernels(model: nn.Module, kernels: str) -> tuple[str, list[str]]:
    """Put kernels into a model that is on its device: which kernels run, and why others do not."""
    if kernels == 'torch':
        return 'torch', []
    placements = use_kernels(model)
    ran = 'triton' if any(placement.runs == 'triton' for placement in placements) else 'torch'
    return ran, describe_placements([placement for placement in placements if placement.runs == 'torch'])


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


# Runtimes -------------------------------------------------------------------------------------------------------------

def _prepare_onnxruntime(network: Network, setup: Setup) -> Runner:
    """A session of ONNX Runtime; on a GPU with images and logits there."""
    dtype = torch.float16 if setup.dtype == 'float16' else torch.float32
    program = network.export(dtype)
    if setup.dtype == 'int8':
        program = quantize(program, split_batches(network.calibration, len(network.images)))
    if setup.device.type == 'cpu':
        session, images = make_session(program, setup.threads), network.images.clone()
        feed = {INPUT: images.numpy()}
        return Runner(lambda: session.run(None, feed)[0], lambda logits: torch.from_numpy(logits).double(), images,
                      notes=[UNSEEN])
    index, stream = setup.device.index or 0, torch.cuda.current_stream(setup.device).cuda_stream
    session = make_session(program, setup.threads, [('CUDAExecutionProvider', dict(
        device_id=index, user_compute_stream=str(stream), use_tf32=int(setup.dtype == 'tf32')))])
    images = network.images.to(setup.device, dtype)
    logits = torch.empty(len(images), *session.get_outputs()[0].shape[1:], dtype=dtype, device=setup.device)
    numpy_type, binding = np.float16 if dtype == torch.float16 else np.float32, session.io_binding()
    binding.bind_input(INPUT, 'cuda', index, numpy_type, list(images.shape), images.data_ptr())
    binding.bind_output('logits', 'cuda', index, numpy_type, list(logits.shape), logits.data_ptr())

    def run() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return logits
    return Runner(run, lambda output: output.cpu().double(), images, notes=[UNSEEN])


def _prepare_openvino(network: Network, setup: Setup) -> Runner:
    """A request of OpenVINO on the CPU, for latency: one stream, `setup.threads` threads, the given number format.

    Without a hint OpenVINO computes in bfloat16 where the CPU has it.
    """
    model = make_model(network.export())
    if setup.dtype == 'int8':
        model = quantize_for_openvino(model, split_batches(network.calibration, len(network.images)))
    request = compile_model(model, setup.threads, OPENVINO_HINTS[setup.dtype]).create_infer_request()
    images = network.images.clone()
    feed = {0: images.numpy()}
    return Runner(
        lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0],
        lambda logits: torch.from_numpy(np.array(logits)).double(), images, notes=[UNSEEN])


def prepare(network: Network, setup: Setup) -> Runner:
    """Make a network ready to run; see `check_setup` for what works.

    Raises:
        RuntimeError and others: The backend fails, or memory does not suffice.
    """
    if setup.backend in IN_TORCH:
        return _prepare_in_torch(network, setup)
    return (_prepare_onnxruntime if setup.backend == 'onnxruntime' else _prepare_openvino)(network, setup)
