"""OpenVINO programs, converted from ONNX, in float32, with weights in float16, and quantized to int8."""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ...runtimes.onnx import convert, split_batches
from ...runtimes.openvino import compile_model, get_core, make_model, quantize
from ...runtimes.quiet import quiet
from ...text import write_text
from ..config import Job
from ..metadata import describe, read_class_names
from ..program import Program, join_outputs, reading
from ..source import Source, trace

__all__ = ['read', 'write']

MODEL, FACTS = 'model.xml', 'caretrans.json'
SHAPE_CHANGES = ('Reshape', 'Transpose', 'Unsqueeze', 'Squeeze', 'Broadcast')
NO_OPERATIONS = ('Constant', 'Parameter', 'Result')


def write(source: Source, job: Job, path: Path) -> list[str]:
    """Write a folder with the program, its weights and its metadata, for images of one shape."""
    import openvino
    model = make_model(convert(trace(source, job), source.name_outputs(job)).SerializeToString())
    if job.precision == 'int8':
        with quiet(''):
            model = quantize(model, split_batches(source.make_calibration(job), job.batch))
    path.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, str(path / MODEL), compress_to_fp16=job.precision == 'fp16')
    write_text(path / FACTS, json.dumps(describe(source, job), indent=2, ensure_ascii=False) + '\n')
    return []


def read(job: Job, path: Path) -> Program:
    import openvino
    with reading(path):
        labels = read_class_names(json.loads((path / FACTS).read_text(encoding='utf-8')))
        model = get_core().read_model(path / MODEL)
        request = compile_model(model, torch.get_num_threads()).create_infer_request()
    nodes = [node for node in model.get_ops() if node.get_type_name() not in NO_OPERATIONS]
    changes = [
        f'{node.get_type_name()} {node.get_friendly_name()} to {node.get_output_partial_shape(0)}' for node in nodes
        if node.get_type_name() in SHAPE_CHANGES]
    return Program(
        lambda images: join_outputs([np.array(y) for y in request.infer({0: images.numpy()}).values()]),
        f'OpenVINO {openvino.__version__}', labels, dict(Counter(node.get_type_name() for node in nodes)), changes)
