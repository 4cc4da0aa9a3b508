"""Programs of OpenVINO, made from those of ONNX; benchmark.py runs what is made here too.

OpenVINO's own converter of PyTorch models reports its use to its makers, its reader of ONNX does not. NNCF is told not
to.
"""
import json
import os
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, List, Sequence

import numpy as np
import torch

from .config import Job
from .metadata import describe, read_class_names
from .onnx_program import convert, split_batches
from .silence import silence
from .source import Source
from .torch_program import trace
from .verify import ExportError, Program

__all__ = ['compile_model', 'get_core', 'make_model', 'quantize', 'read', 'write']

MODEL, FACTS = 'model.xml', 'caretrans.json'
SHAPE_CHANGES = ('Reshape', 'Transpose', 'Unsqueeze', 'Squeeze', 'Broadcast')
NO_OPERATIONS = ('Constant', 'Parameter', 'Result')


@lru_cache(maxsize=None)
def get_core() -> Any:
    """OpenVINO's entry point, one for the life of the process.

    It gives the process a stack of its own for signals and, when it goes, leaves that unmapped behind: the next signal
    that Python handles there, such as the end of a child process, would then kill this one.
    """
    import openvino
    return openvino.Core()


def make_model(program: bytes) -> Any:
    """An ONNX program as a model of OpenVINO."""
    from openvino.passes import ConstantFolding, Manager
    model = get_core().read_model(program)
    manager = Manager()
    manager.register_pass(ConstantFolding())  # the reader looks up shapes that are known
    manager.run_passes(model)
    return model


def quantize(model: Any, batches: Sequence[np.ndarray]) -> Any:
    """An OpenVINO model with weights and activations as 8-bit integers, ranges of activations from photographs."""
    os.environ.setdefault('NNCF_CI', '1')  # its switch against telemetry; before it is loaded
    import nncf

    return nncf.quantize(
        model, nncf.Dataset(list(batches)), preset=nncf.QuantizationPreset.MIXED, subset_size=len(batches))


def compile_model(model: Any, threads: int, hint: str = 'f32') -> Any:
    """A model for the processor, for latency: one stream, the format of numbers as asked for.

    Args:
        model: Of OpenVINO.
        hint: 'f32', 'f16' or 'bf16', in OpenVINO's words; without one it takes bfloat16 where the processor has it.
    Raises:
        RuntimeError: It would compute in another format.
    """
    compiled = get_core().compile_model(model, 'CPU', {
        'PERFORMANCE_HINT': 'LATENCY', 'NUM_STREAMS': '1', 'INFERENCE_NUM_THREADS': str(threads),
        'INFERENCE_PRECISION_HINT': hint})
    taken = compiled.get_property('INFERENCE_PRECISION_HINT').to_string()
    if taken != hint:
        raise RuntimeError(f'OpenVINO computes in {taken} where {hint} was asked for')
    return compiled


def write(source: Source, job: Job, path: Path) -> List[str]:
    import openvino
    model = make_model(convert(trace(source, job), job.output).SerializeToString())
    if job.precision == 'int8':
        with silence(''):
            model = quantize(model, split_batches(source.make_calibration(job), job.batch))
    path.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, str(path / MODEL), compress_to_fp16=job.precision == 'fp16')
    (path / FACTS).write_text(json.dumps(describe(source, job), indent=2, ensure_ascii=False) + '\n')
    return [f'only images of shape {tuple(model.input(0).shape)}']


def read(source: Source, job: Job, path: Path) -> Program:
    import openvino
    try:
        labels = read_class_names(json.loads((path / FACTS).read_text()))
        model = get_core().read_model(path / MODEL)
        request = compile_model(model, torch.get_num_threads()).create_infer_request()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f'{path} cannot be read: {type(error).__name__}. Export it again.') from error
    nodes = [node for node in model.get_ops() if node.get_type_name() not in NO_OPERATIONS]
    changes = [
        f'{node.get_type_name()} {node.get_friendly_name()} to {node.get_output_partial_shape(0)}' for node in nodes
        if node.get_type_name() in SHAPE_CHANGES]

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.array(request.infer({0: images.numpy()})[0]))
    return Program(
        run, f'OpenVINO {openvino.__version__}', labels, dict(Counter(node.get_type_name() for node in nodes)), changes)
