"""Run exported networks by ONNX Runtime and OpenVINO, in float formats and quantised to int8.

Both read one ONNX program: OpenVINO's own converter of PyTorch models reports its use to its makers, its reader of ONNX
does not. ONNX Runtime and NNCF are told not to.
"""
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn

if TYPE_CHECKING:
    from .backends import Network, Runner, Setup

__all__ = [
    'export_onnx', 'list_openvino_dtypes', 'prepare_onnxruntime', 'prepare_openvino', 'quantize_for_onnxruntime',
    'quantize_for_openvino']

OPSET = 20  # the first with a Gelu of its own
INPUT = 'images'
HINTS = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16', 'int8': 'f32'}  # int8: of what is not quantised
UNSEEN = 'the memory of this backend is not seen'


def export_onnx(model: nn.Module, images: torch.Tensor) -> bytes:
    """A network as an ONNX program with its weights, for images of this shape."""
    with torch.no_grad():
        program = torch.onnx.export(
            model, (images,), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=['logits'],
            verbose=False)
    return program.model_proto.SerializeToString()


def _split_photographs(network: 'Network') -> List[np.ndarray]:
    """Batches of the size of the program, at least one."""
    photographs, batch = network.photographs, len(network.images)
    repeats = -(-batch // len(photographs))
    whole = photographs.repeat(repeats, 1, 1, 1)
    return [part.numpy() for part in whole.split(batch) if len(part) == batch]


# ONNX Runtime ---------------------------------------------------------------------------------------------------------

def _import_onnxruntime() -> Any:
    os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')  # before it is loaded
    import onnxruntime
    return onnxruntime


def quantize_for_onnxruntime(network: 'Network') -> bytes:
    """Weights and activations as 8-bit integers, weights per channel, ranges of activations from photographs."""
    _import_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(_split_photographs(network))

        def get_next(self) -> Optional[Dict[str, np.ndarray]]:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    with tempfile.TemporaryDirectory() as folder:
        source, shaped, target = (Path(folder) / f'{name}.onnx' for name in ('source', 'shaped', 'target'))
        source.write_bytes(network.export())
        quant_pre_process(str(source), str(shaped), skip_symbolic_shape=True)
        quantize_static(
            str(shaped), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        return target.read_bytes()


def _provide(setup: 'Setup') -> List[Any]:
    if setup.device.type == 'cpu':
        return ['CPUExecutionProvider']
    stream = str(torch.cuda.current_stream(setup.device).cuda_stream)
    return [('CUDAExecutionProvider', dict(
        device_id=setup.device.index or 0, user_compute_stream=stream, use_tf32=int(setup.dtype == 'tf32')))]


def prepare_onnxruntime(network: 'Network', setup: 'Setup') -> 'Runner':
    """A session of ONNX Runtime; on a GPU with images and logits there."""
    from .backends import Runner
    onnxruntime = _import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = setup.threads, 1
    options.log_severity_level = 3
    dtype = torch.float16 if setup.dtype == 'float16' else torch.float32
    program = quantize_for_onnxruntime(network) if setup.dtype == 'int8' else network.export(dtype)
    session = onnxruntime.InferenceSession(program, options, providers=_provide(setup))
    if setup.device.type == 'cuda':
        return _bind(session, network.images.to(setup.device, dtype), setup)
    images = network.images.clone()
    feed = {INPUT: images.numpy()}
    return Runner(
        lambda: session.run(None, feed)[0], lambda logits: torch.from_numpy(logits).double(), images, notes=[UNSEEN])


def _bind(session: Any, images: torch.Tensor, setup: 'Setup') -> 'Runner':
    from .backends import Runner
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

@lru_cache(maxsize=None)
def _get_core() -> Any:
    """OpenVINO's entry point, one for the life of the process.

    It gives the process a stack of its own for signals and, when it goes, leaves that unmapped behind: the next signal
    that Python handles there, such as the end of a child process, would then kill this one.
    """
    import openvino
    return openvino.Core()


def list_openvino_dtypes() -> Tuple[str, ...]:
    """The number formats in which OpenVINO computes on this processor."""
    able = _get_core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')
    names = {'float32': 'FP32', 'bfloat16': 'BF16', 'float16': 'FP16', 'int8': 'INT8'}
    return tuple(dtype for dtype, name in names.items() if name in able)


def quantize_for_openvino(model: Any, network: 'Network') -> Any:
    """An OpenVINO model with weights and activations as 8-bit integers, ranges of activations from photographs."""
    os.environ.setdefault('NNCF_CI', '1')  # its switch against telemetry; before it is loaded
    import nncf

    batches = _split_photographs(network)
    return nncf.quantize(
        model, nncf.Dataset(batches), preset=nncf.QuantizationPreset.MIXED, subset_size=len(batches))


def prepare_openvino(network: 'Network', setup: 'Setup') -> 'Runner':
    """A request of OpenVINO on the CPU, for latency: one stream, `setup.threads` threads, the format as asked for.

    Raises:
        RuntimeError: It would compute in another format; without a hint it takes bfloat16 where the processor has it.
    """
    from .backends import Runner
    core = _get_core()
    model = core.read_model(network.export())
    if setup.dtype == 'int8':
        model = quantize_for_openvino(model, network)
    hint = HINTS[setup.dtype]
    compiled = core.compile_model(model, 'CPU', {
        'PERFORMANCE_HINT': 'LATENCY', 'NUM_STREAMS': '1', 'INFERENCE_NUM_THREADS': str(setup.threads),
        'INFERENCE_PRECISION_HINT': hint})
    taken = compiled.get_property('INFERENCE_PRECISION_HINT').to_string()
    if taken != hint:
        raise RuntimeError(f'OpenVINO computes in {taken} where {hint} was asked for')
    request, images = compiled.create_infer_request(), network.images.clone()
    feed = {0: images.numpy()}
    return Runner(
        lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0],
        lambda logits: torch.from_numpy(np.array(logits)).double(), images, notes=[UNSEEN])
