"""LiteRT (formerly TensorFlow Lite) programs, run by its interpreter, in float32 and quantized to int8."""
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn as nn

from ...runtimes.onnx import split_batches
from ...runtimes.quiet import quiet
from ..config import Job
from ..metadata import describe, read_class_names
from ..program import Program, reading
from ..source import Source, build_network

__all__ = ['read', 'write']

INPUT, FACTS, SIGNATURE = 'input_1', 'caretrans', 'serving_default'
CALIBRATION = 64  # images: the quantizer keeps everything it sees
ATTENTION = '.*Attention.*'  # part of the names of its operations
SHAPE_CHANGES = ('RESHAPE', 'TRANSPOSE', 'SQUEEZE', 'EXPAND_DIMS')


# Writing --------------------------------------------------------------------------------------------------------------

class _Named(nn.Module):
    """A network whose input and output have the names that the file shows."""

    def __init__(self, network: nn.Module, output: str) -> None:
        super().__init__()
        self.network, self.output = network, output
        self.eval()

    def forward(self, input_1: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.output: self.network(input_1)}


def _quantize(program: bytes, source: Source, job: Job) -> bytes:
    """Weights and activations as 8-bit integers, weights per channel, ranges of activations from images.

    Inputs and outputs stay float32, and so does attention, whose denominators 8 bits would round to 0.
    """
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe
    tool = quantizer.Quantizer(program, recipe.static_wi8_ai8())
    names = qtyping.TFLOperationName
    for scope, operation in (('.*', names.INPUT), ('.*', names.OUTPUT), (ATTENTION, names.ALL_SUPPORTED)):
        tool.update_quantization_recipe(
            regex=scope, operation_name=operation, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE)
    batches = split_batches(source.make_calibration(job, CALIBRATION), job.batch)
    ranges = tool.calibrate({SIGNATURE: [{INPUT: batch} for batch in batches]}, num_threads=1)
    return bytes(tool.quantize(ranges).quantized_model)


def _add_facts(program: bytes, facts: dict[str, str]) -> bytes:
    """A program with metadata in its flatbuffer."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils
    model = flatbuffer_utils.read_model_from_bytearray(program)
    content, entry = schema.BufferT(), schema.MetadataT()
    content.data = list(json.dumps(facts).encode())
    entry.name, entry.buffer = FACTS, len(model.buffers)
    model.buffers.append(content)
    model.metadata = [*(model.metadata or []), entry]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def write(source: Source, job: Job, path: Path) -> list[str]:
    """Write a program for images of one shape."""
    images = source.make_example(job)
    with quiet(''):
        import litert_torch
        network = _Named(build_network(source, job), job.output)
        litert_torch.convert(network, sample_kwargs={INPUT: images}).export(str(path))
        program = path.read_bytes()
        if job.precision == 'int8':
            program = _quantize(program, source, job)
        path.write_bytes(_add_facts(program, describe(source, job)))
    return []


# Reading --------------------------------------------------------------------------------------------------------------

def read(job: Job, path: Path) -> Program:
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_litert.tools import flatbuffer_utils
    with reading(path):
        runner = Interpreter(str(path), num_threads=torch.get_num_threads()).get_signature_runner(SIGNATURE)
        model = flatbuffer_utils.read_model_from_bytearray(path.read_bytes())
        entry = next(entry for entry in model.metadata if entry.name in (FACTS, FACTS.encode()))
        labels = read_class_names(json.loads(bytes(model.buffers[entry.buffer].data)))
    codes = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    graph = model.subgraphs[0]
    named = [(codes[model.operatorCodes[item.opcodeIndex].builtinCode], graph.tensors[item.outputs[0]])
             for item in graph.operators]
    changes = [f'{name} {tensor.name.decode().rpartition("/")[2]} to {list(tensor.shape)}' for name, tensor in named
               if name in SHAPE_CHANGES]
    return Program(
        lambda images: torch.from_numpy(runner(**{INPUT: images.numpy()})[job.output]),
        f'LiteRT {version("ai-edge-litert")}', labels, dict(Counter(name for name, _ in named)), changes)
