"""ExecuTorch programs: for XNNPACK, which runs on CPUs, and for Core ML through ExecuTorch's delegate.

The second kind runs on Apple's systems only. It holds a Core ML program, which is extracted from the file and evaluated
like any other.
"""
import json
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError
from ...runtimes.onnx import split_batches
from ...runtimes.quiet import quiet
from ...runtimes.tracing import trace_network
from ..config import Job
from ..coreml import convert
from ..metadata import describe, read_class_names
from ..program import Program, reading
from ..source import Source, trace

__all__ = ['check', 'read', 'write']

FACTS = 'caretrans'  # a method of the program that returns the metadata as bytes
CALIBRATION = 32  # images for the ranges of int8, which the quantizer processes slowly
SHAPE_CHANGES = ('view', 'permute', 'transpose', 'squeeze', 'unsqueeze', 'expand', 'reshape')


def check(job: Job) -> None:
    """Refuse targets that the Core ML delegate does not support.

    Raises:
        ConfigError: There is no such target.
    """
    if job.format == 'executorch-coreml' and job.target == 'iOS26':
        raise ConfigError(f'--target {job.target} with --format {job.format}: use iOS15, iOS16, iOS17 or iOS18.')


# Writing --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def _quantize(source: Source, job: Job) -> torch.export.ExportedProgram:
    """Weights and activations as 8-bit integers, weights per channel, ranges of activations from images."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(trace(source, job).module(), quantizer)
    for batch in split_batches(source.make_calibration(job, CALIBRATION), job.batch):
        prepared(torch.from_numpy(batch))
    return trace_network(convert_pt2e(prepared), source.make_example(job))


def _make_partitioner(job: Job) -> Any:
    if job.format == 'executorch':
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        return XnnpackPartitioner()
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    precision = coremltools.precision.FLOAT16 if job.precision == 'fp16' else coremltools.precision.FLOAT32
    return CoreMLPartitioner(compile_specs=CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=getattr(coremltools.target, job.target), compute_precision=precision))


def write(source: Source, job: Job, path: Path) -> list[str]:
    """Write a program for images of one shape."""
    from executorch.exir import to_edge_transform_and_lower
    facts = json.dumps(describe(source, job)).encode()
    with quiet(''):
        program = _quantize(source, job) if job.precision == 'int8' else trace(source, job)
        lowered = to_edge_transform_and_lower(
            program, partitioner=[_make_partitioner(job)],
            constant_methods={FACTS: torch.frombuffer(bytearray(facts), dtype=torch.uint8)})
        path.write_bytes(lowered.to_executorch().buffer)
    return []


# Reading --------------------------------------------------------------------------------------------------------------

def _count(content: bytes) -> tuple[dict[str, int], int]:
    """Calls of the method 'forward': operations outside of the delegates by type, and calls of delegates."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    plans = deserialize_pte_binary(content).program.execution_plan
    plan = next(plan for plan in plans if plan.name == 'forward')
    calls = [step.instr_args for chain in plan.chains for step in chain.instructions]
    kernels = [plan.operators[call.op_index].name for call in calls if type(call).__name__ == 'KernelCall']
    delegates = sum(type(call).__name__ == 'DelegateCall' for call in calls)
    return dict(Counter(name.removeprefix('aten::') for name in kernels)), delegates


def _evaluate_core_ml(job: Job, content: bytes) -> Program:
    """The Core ML program inside a file, which must compute everything."""
    from executorch.examples.apple.coreml.scripts.extract_coreml_models import extract_coreml_models
    kernels, delegates = _count(content)
    if kernels or delegates != 1:
        raise ValueError(f'{delegates} parts are for Core ML, and {sum(kernels.values())} operations for others')
    with tempfile.TemporaryDirectory() as folder:
        with quiet(''):
            extracted, = extract_coreml_models(content, Path(folder))
        program = convert.evaluate(next(extracted.rglob('*.mlpackage')), job)
    program.notes.append("evaluated: the ML Program in the file; ExecuTorch itself runs it on Apple's systems only")
    return program


class _Method:
    """The method 'forward' of a program, with the memory that it points into."""

    def __init__(self, content: bytes, program: Any) -> None:
        self.content, self.program = content, program
        self.method = program.load_method('forward')

    def run(self, images: torch.Tensor) -> torch.Tensor:
        return self.method.execute([images.contiguous()])[0].clone()


def _run_xnnpack(content: bytes, loaded: Any) -> Program:
    from executorch.extension.pybindings import portable_lib
    kernels, delegates = _count(content)
    threads = torch.get_num_threads()
    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    changes = [name for name, count in kernels.items() if name.startswith(SHAPE_CHANGES) for _ in range(count)]
    return Program(
        _Method(content, loaded).run, f'ExecuTorch {version("executorch")}', None,
        {**kernels, 'calls of XNNPACK': delegates}, changes, notes=['operations inside XNNPACK calls are not counted'])


def read(job: Job, path: Path) -> Program:
    from executorch.runtime import Runtime
    with reading(path):
        content = path.read_bytes()
        loaded = Runtime.get().load_program(content)
        facts, = loaded.load_method(FACTS).execute([])  # a constant: no delegate computes it
        program = _run_xnnpack(content, loaded) if job.format == 'executorch' else _evaluate_core_ml(job, content)
        program.labels = read_class_names(json.loads(bytes(facts.tolist())))
        return program
