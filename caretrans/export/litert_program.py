"""Programs of LiteRT, formerly TensorFlow Lite, run by its interpreter, in float32 and quantised to int8."""
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..errors import ExportError
from ..runtimes.onnx import split_batches
from ..runtimes.quiet import quiet
from .config import Job
from .metadata import describe, read_class_names
from .source import Source, build_network
from .verify import Program

__all__ = ['read', 'write']

INPUT, FACTS, SIGNATURE = 'input_1', 'caretrans', 'serving_default'
CALIBRATION = 64  # photographs: the quantiser keeps all that it sees
ATTENTION = '.*Attention.*'  # part of the names of its operations
SHAPE_CHANGES = ('RESHAPE', 'TRANSPOSE', 'SQUEEZE', 'EXPAND_DIMS')


# Writing --------------------------------------------------------------------------------------------------------------

class Named(nn.Module):
    """A network whose input and output have the names that the file gives them."""

    def __init__(self, network: nn.Module, output: str) -> None:
        super().__init__()
        self.network, self.output = network, output
        self.eval()

    def forward(self, input_1: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.output: self.network(input_1)}


def _quantize(program: bytes, source: Source, job: Job) -> bytes:
    """Weights and activations as 8-bit integers, weights per channel, ranges of activations from photographs.

    What goes in and comes out stays float32, and so does attention, whose denominators 8 bits would round to 0.
    """
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe
    tool = quantizer.Quantizer(program, recipe.static_wi8_ai8())
    names = qtyping.TFLOperationName
    for scope, operation in (('.*', names.INPUT), ('.*', names.OUTPUT), (ATTENTION, names.ALL_SUPPORTED)):
        tool.update_quantization_recipe(
            regex=scope, operation_name=operation, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE)
    photographs = source.make_calibration(job)
    chosen = photographs[::max(len(photographs) // CALIBRATION, 1)]
    ranges = tool.calibrate(
        {SIGNATURE: [{INPUT: batch} for batch in split_batches(chosen, job.batch)]}, num_threads=1)
    return bytes(tool.quantize(ranges).quantized_model)


def _add_facts(program: bytes, facts: dict[str, str]) -> bytes:
    """A program with metadata in its flatbuffer."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils
    model = flatbuffer_utils.read_model_from_bytearray(program)
    content = schema.BufferT()
    content.data = list(json.dumps(facts).encode())
    entry = schema.MetadataT()
    entry.name, entry.buffer = FACTS, len(model.buffers)
    model.buffers.append(content)
    model.metadata = [*(model.metadata or []), entry]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def write(source: Source, job: Job, path: Path) -> list[str]:
    images = source.make_example(job)
    with quiet(''):
        import litert_torch
        network = Named(build_network(source, job), job.output)
        litert_torch.convert(network, sample_kwargs={INPUT: images}).export(str(path))
        program = path.read_bytes()
        if job.precision == 'int8':
            program = _quantize(program, source, job)
        path.write_bytes(_add_facts(program, describe(source, job)))
    return [f'only images of shape {tuple(images.shape)}']


# Reading --------------------------------------------------------------------------------------------------------------

def _name_codes(schema: Any) -> dict[int, str]:
    return {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}


def _read_facts(model: Any) -> dict[str, str]:
    entry = next(entry for entry in model.metadata if entry.name in (FACTS, FACTS.encode()))
    return json.loads(bytes(model.buffers[entry.buffer].data))


def read(source: Source, job: Job, path: Path) -> Program:
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_litert.tools import flatbuffer_utils
    try:
        interpreter = Interpreter(str(path), num_threads=torch.get_num_threads())
        runner = interpreter.get_signature_runner(SIGNATURE)
        model = flatbuffer_utils.read_model_from_bytearray(path.read_bytes())
        labels = read_class_names(_read_facts(model))
    except Exception as error:  # of flatbuffers, of the interpreter
        raise ExportError(f'{path} cannot be read: {type(error).__name__}. Export it again.') from error
    codes, graph = _name_codes(schema), model.subgraphs[0]
    named = [(codes[model.operatorCodes[item.opcodeIndex].builtinCode], graph.tensors[item.outputs[0]])
             for item in graph.operators]
    changes = [f'{name} {tensor.name.decode().rpartition("/")[2]} to {list(tensor.shape)}' for name, tensor in named
               if name in SHAPE_CHANGES]
    return Program(
        lambda images: torch.from_numpy(runner(**{INPUT: images.numpy()})[job.output]),
        f'LiteRT {version("ai-edge-litert")}', labels, dict(Counter(name for name, _ in named)), changes)
