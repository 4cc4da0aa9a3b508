"""Programs of OpenVINO, made from those of ONNX; benchmark.py runs what is made here too.

OpenVINO's own converter of PyTorch models reports its use to its makers, its reader of ONNX does not. NNCF is told not
to.
"""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ..errors import ExportError
from ..runtimes.onnx import convert, split_batches
from ..runtimes.openvino import compile_model, get_core, make_model, quantize
from ..runtimes.quiet import quiet
from .config import Job
from .metadata import describe, read_class_names
from .source import Source
from .torch_program import trace
from .verify import Program

__all__ = ['read', 'write']

MODEL, FACTS = 'model.xml', 'caretrans.json'
SHAPE_CHANGES = ('Reshape', 'Transpose', 'Unsqueeze', 'Squeeze', 'Broadcast')
NO_OPERATIONS = ('Constant', 'Parameter', 'Result')


def write(source: Source, job: Job, path: Path) -> list[str]:
    import openvino
    model = make_model(convert(trace(source, job), job.output).SerializeToString())
    if job.precision == 'int8':
        with quiet(''):
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
