"""ONNX programs, run by ONNX Runtime, in float32, in float16 with float32 input and output, and quantized to int8."""
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ...runtimes.onnx import (
    INPUT, OPSET, convert, halve, import_onnxruntime, make_session, quantize, split_batches)
from ...runtimes.tracing import trace_any_size
from ..config import Job
from ..metadata import describe, read_class_names
from ..program import Program, join_outputs, reading
from ..source import Source, build_network, trace

__all__ = ['read', 'write']

AXES = ('batch', None, 'height', 'width')
SHAPE_CHANGES = ('Reshape', 'Transpose', 'Unsqueeze', 'Squeeze', 'Flatten', 'Expand')
INT64 = 7  # of onnx.TensorProto


def _name_axes(model: Any) -> None:
    """Name the free axes, instead of the tracer's numbers."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    names = {dim.dim_param: name for dim, name in zip(dims, AXES, strict=True) if dim.dim_param}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
            elif dim.dim_param:
                dim.ClearField('dim_param')  # arithmetic on the tracer's numbers


def write(source: Source, job: Job, path: Path) -> list[str]:
    """Write a program for any number of images of any size, where the network allows it; see `Source`."""
    import onnx
    program = trace(source, job) if source.has_fixed_size else trace_any_size(
        build_network(source, job), source.make_example(job), is_checked=False)
    model = convert(program, source.name_outputs(job))
    _name_axes(model)
    if job.precision == 'int8':
        batches = split_batches(source.make_calibration(job), job.batch)
        model = onnx.load_from_string(quantize(model.SerializeToString(), batches))
    elif job.precision == 'fp16':
        model = halve(model)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, describe(source, job))
    model.producer_name = 'caretrans'
    onnx.save(model, str(path))
    return [f'opset {OPSET}']


def _list_shape_changes(model: Any) -> list[str]:
    """Reshapes and transposes of tensors; those of shapes, which are integers, do not count."""
    types = {value.name: value.type.tensor_type for value in [*model.graph.value_info, *model.graph.output]}
    lines = []
    for node in model.graph.node:
        kind = types.get(node.output[0])
        if node.op_type in SHAPE_CHANGES and (kind is None or kind.elem_type != INT64):
            dims = [] if kind is None else [dim.dim_param or str(dim.dim_value or '?') for dim in kind.shape.dim]
            lines.append(f'{node.op_type} {node.output[0]} to {" x ".join(dims)}')
    return lines


def read(job: Job, path: Path) -> Program:
    import onnx
    onnxruntime = import_onnxruntime()
    with reading(path):
        content = path.read_bytes()
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model)
        labels = read_class_names({entry.key: entry.value for entry in model.metadata_props})
        session = make_session(content, torch.get_num_threads())
    dims = model.graph.input[0].type.tensor_type.shape.dim
    operations = Counter(node.op_type for node in model.graph.node if node.op_type != 'Constant')
    return Program(
        lambda images: join_outputs(session.run(None, {INPUT: images.numpy()})),
        f'ONNX Runtime {onnxruntime.__version__}', labels, dict(operations), _list_shape_changes(model),
        least={dim.dim_param: 1 for dim in dims if dim.dim_param})
