"""Run exported networks by ONNX Runtime and OpenVINO, in float formats and quantised to int8.

The programs are those of `caretrans.export`; both runtimes read one of ONNX.
"""
from typing import Any

import numpy as np
import torch

from ..runtimes.onnx import INPUT, make_session, quantize, split_batches
from ..runtimes.openvino import compile_model, get_core, make_model, quantize as quantize_for_openvino

from .setups import Network, Runner, Setup

__all__ = ['list_openvino_dtypes', 'prepare_onnxruntime', 'prepare_openvino']

HINTS = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16', 'int8': 'f32'}  # int8: of what is not quantised
UNSEEN = 'the memory of this backend is not seen'


def _split_photographs(network: Network) -> list[np.ndarray]:
    return split_batches(network.photographs, len(network.images))


# ONNX Runtime ---------------------------------------------------------------------------------------------------------

def _provide(setup: Setup) -> list[Any]:
    if setup.device.type == 'cpu':
        return ['CPUExecutionProvider']
    stream = str(torch.cuda.current_stream(setup.device).cuda_stream)
    return [('CUDAExecutionProvider', dict(
        device_id=setup.device.index or 0, user_compute_stream=stream, use_tf32=int(setup.dtype == 'tf32')))]


def prepare_onnxruntime(network: Network, setup: Setup) -> Runner:
    """A session of ONNX Runtime; on a GPU with images and logits there."""
    dtype = torch.float16 if setup.dtype == 'float16' else torch.float32
    program = network.export(dtype)
    if setup.dtype == 'int8':
        program = quantize(program, _split_photographs(network))
    session = make_session(program, setup.threads, _provide(setup))
    if setup.device.type == 'cuda':
        return _bind(session, network.images.to(setup.device, dtype), setup)
    images = network.images.clone()
    feed = {INPUT: images.numpy()}
    return Runner(
        lambda: session.run(None, feed)[0], lambda logits: torch.from_numpy(logits).double(), images, notes=[UNSEEN])


def _bind(session: Any, images: torch.Tensor, setup: Setup) -> Runner:
    index = setup.device.index or 0
    numpy_type = np.float16 if images.dtype == torch.float16 else np.float32
    logits = torch.empty(len(images), *session.get_outputs()[0].shape[1:], dtype=images.dtype, device=images.device)
    binding = session.io_binding()
    binding.bind_input(INPUT, 'cuda', index, numpy_type, list(images.shape), images.data_ptr())
    binding.bind_output('logits', 'cuda', index, numpy_type, list(logits.shape), logits.data_ptr())

    def run() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return logits
    return Runner(run, lambda output: output.cpu().double(), images, notes=[UNSEEN])


# OpenVINO -------------------------------------------------------------------------------------------------------------

def list_openvino_dtypes() -> tuple[str, ...]:
    """The number formats in which OpenVINO computes on this processor."""
    able = get_core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')
    names = {'float32': 'FP32', 'bfloat16': 'BF16', 'float16': 'FP16', 'int8': 'INT8'}
    return tuple(dtype for dtype, name in names.items() if name in able)


def prepare_openvino(network: Network, setup: Setup) -> Runner:
    """A request of OpenVINO on the CPU, for latency: one stream, `setup.threads` threads, the format as asked for.

    Raises:
        RuntimeError: It would compute in another format; without a hint it takes bfloat16 where the processor has it.
    """
    model = make_model(network.export())
    if setup.dtype == 'int8':
        model = quantize_for_openvino(model, _split_photographs(network))
    request = compile_model(model, setup.threads, HINTS[setup.dtype]).create_infer_request()
    images = network.images.clone()
    feed = {0: images.numpy()}
    return Runner(
        lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0],
        lambda logits: torch.from_numpy(np.array(logits)).double(), images, notes=[UNSEEN])
