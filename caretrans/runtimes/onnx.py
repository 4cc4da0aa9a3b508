"""ONNX programs: convert, quantize to int8, run with ONNX Runtime, whose telemetry is switched off."""
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from .quiet import quiet
from .tracing import trace_network

__all__ = [
    'INPUT', 'OPSET', 'convert', 'export_onnx', 'halve', 'import_onnxruntime', 'make_session', 'quantize',
    'split_batches']

OPSET = 20  # the first with its own Gelu
INPUT = 'input_1'


def convert(program: torch.export.ExportedProgram, outputs: Sequence[str] = ('logits',)) -> Any:
    """A program of torch.export as an ONNX model with its weights, in opset `OPSET`.

    Args:
        outputs: Names of the outputs; the input is called `INPUT`.
    """
    with torch.no_grad(), quiet(''):
        converted = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=list(outputs), verbose=False)
    return converted.model_proto


def export_onnx(model: nn.Module, images: torch.Tensor) -> bytes:
    """A network as an ONNX program with its weights, for images of this shape."""
    return convert(trace_network(model, images)).SerializeToString()


def split_batches(images: torch.Tensor, batch: int) -> list[np.ndarray]:
    """Images in batches of one size, at least one batch: a program may accept only that size."""
    repeats = -(-batch // len(images))
    whole = images.repeat(repeats, 1, 1, 1)
    return [part.numpy() for part in whole.split(batch) if len(part) == batch]


def quantize(program: bytes, batches: Sequence[np.ndarray]) -> bytes:
    """Weights and activations as 8-bit integers, weights per channel, ranges of activations from images.

    Args:
        program: In float32.
        batches: Images as the program takes them.
    """
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    with tempfile.TemporaryDirectory() as folder, quiet(''):
        source, shaped, target = (Path(folder) / f'{name}.onnx' for name in ('source', 'shaped', 'target'))
        source.write_bytes(program)
        quant_pre_process(str(source), str(shaped), skip_symbolic_shape=True)
        quantize_static(
            str(shaped), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        return target.read_bytes()


def halve(model: Any) -> Any:
    """An ONNX model that stores its weights and computes in float16; input and output stay float32."""
    import_onnxruntime()
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with quiet(''):
        halved = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
        halved.topological_sort()  # the casts of input and output are appended
    return halved.model


def import_onnxruntime() -> Any:
    """onnxruntime, without telemetry."""
    os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')  # before it is loaded
    import onnxruntime
    return onnxruntime


def make_session(program: bytes, threads: int, providers: Sequence[Any] = ('CPUExecutionProvider',)) -> Any:
    """A session of ONNX Runtime for a program in memory."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(program, options, providers=list(providers))
