"""Programs of ExecuTorch: for XNNPACK, which computes on processors, and for Core ML by ExecuTorch's delegate.

The second kind runs on Apple's systems alone. What it holds is an ML Program of Core ML, which is taken out of the file
and evaluated as all of those are.
"""
import json
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ExportError
from ..runtimes.onnx import split_batches
from ..runtimes.quiet import quiet
from ..runtimes.tracing import trace_network
from .config import Job
from .metadata import describe, read_class_names
from .source import Source
from .torch_program import trace
from .verify import Program

__all__ = ['check', 'extract_package', 'read', 'write']

FACTS = 'caretrans'  # a method of the program that returns the metadata as bytes
CALIBRATION = 32  # photographs for the ranges of int8: the quantiser looks at each for long
SHAPE_CHANGES = ('view', 'permute', 'transpose', 'squeeze', 'unsqueeze', 'expand', 'reshape')


def check(job: Job) -> None:
    """
    Raises:
        ConfigError: The Core ML delegate has no such system to aim at.
    """
    if job.format == 'executorch-coreml' and job.target == 'iOS26':
        raise ConfigError(f'--target {job.target} with --format {job.format}: take iOS15, iOS16, iOS17 or iOS18.')


# Writing --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def _quantize(source: Source, job: Job) -> torch.export.ExportedProgram:
    """Weights and activations as 8-bit integers, weights per channel, ranges of activations from photographs."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(trace(source, job).module(), quantizer)
    photographs = source.make_calibration(job)
    for batch in split_batches(photographs[::max(len(photographs) // CALIBRATION, 1)], job.batch):
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
    from executorch.exir import to_edge_transform_and_lower
    facts = json.dumps(describe(source, job)).encode()
    with quiet(''):
        program = _quantize(source, job) if job.precision == 'int8' else trace(source, job)
        lowered = to_edge_transform_and_lower(
            program, partitioner=[_make_partitioner(job)],
            constant_methods={FACTS: torch.frombuffer(bytearray(facts), dtype=torch.uint8)})
        path.write_bytes(lowered.to_executorch().buffer)
    return [f'only images of shape {tuple(source.make_example(job).shape)}']


# Reading --------------------------------------------------------------------------------------------------------------

def _deserialize(path: Path) -> Any:
    from executorch.exir._serialize._program import deserialize_pte_binary
    return deserialize_pte_binary(path.read_bytes())


def _count(content: Any) -> tuple[dict[str, int], int]:
    """What the method 'forward' calls: operations outside of the delegates by type, and calls of delegates."""
    plan = next(plan for plan in content.program.execution_plan if plan.name == 'forward')
    calls = [step.instr_args for chain in plan.chains for step in chain.instructions]
    kernels = [plan.operators[call.op_index].name for call in calls if type(call).__name__ == 'KernelCall']
    delegates = [plan.delegates[call.delegate_index].id for call in calls if type(call).__name__ == 'DelegateCall']
    return dict(Counter(name.removeprefix('aten::') for name in kernels)), len(delegates)


def extract_package(path: Path, folder: Path) -> Path:
    """The ML Program of Core ML that a file holds, as a package in `folder`.

    Raises:
        ValueError: It does not hold one that computes all.
    """
    from executorch.examples.apple.coreml.scripts.extract_coreml_models import extract_coreml_models
    kernels, delegates = _count(_deserialize(path))
    if kernels or delegates != 1:
        raise ValueError(f'{delegates} parts are for Core ML, and {sum(kernels.values())} operations for others.')
    with quiet(''):
        extracted, = extract_coreml_models(path.read_bytes(), folder)
    package = next(extracted.rglob('*.mlpackage'), None)
    if package is None:
        raise ValueError('it holds no package.')
    return package


def _load(content: bytes) -> Any:
    from executorch.runtime import Runtime
    return Runtime.get().load_program(content)


def _read_labels(program: Any) -> list[str]:
    """Of any program of ours: the method that returns the metadata is computed by no delegate."""
    facts, = program.load_method(FACTS).execute([])
    return read_class_names(json.loads(bytes(facts.tolist())))


def _read_coreml(job: Job, path: Path) -> Program:
    from . import coreml
    with tempfile.TemporaryDirectory() as folder:
        package = extract_package(path, Path(folder))
        program = coreml.evaluate(package, job)
    program.labels = _read_labels(_load(path.read_bytes()))
    program.notes.append('evaluated is the ML Program in the file; ExecuTorch itself runs it on Apple\'s systems alone')
    return program


class Method:
    """The method 'forward' of a program, with the memory that it points into."""

    def __init__(self, content: bytes, program: Any) -> None:
        self.content, self.program = content, program
        self.method = program.load_method('forward')

    def run(self, images: torch.Tensor) -> torch.Tensor:
        return self.method.execute([images.contiguous()])[0].clone()


def _read_xnnpack(job: Job, path: Path) -> Program:
    from executorch.extension.pybindings import portable_lib
    kernels, delegates = _count(_deserialize(path))
    threads = torch.get_num_threads()
    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    content = path.read_bytes()
    program = _load(content)
    changes = [name for name, count in kernels.items() if name.startswith(SHAPE_CHANGES) for _ in range(count)]
    return Program(
        Method(content, program).run, f'ExecuTorch {version("executorch")}', _read_labels(program),
        {**kernels, 'calls of XNNPACK': delegates}, changes, notes=['what XNNPACK does in a call is not counted'])


def read(source: Source, job: Job, path: Path) -> Program:
    try:
        return (_read_xnnpack if job.format == 'executorch' else _read_coreml)(job, path)
    except ExportError:
        raise
    except Exception as error:  # of flatbuffers, of ExecuTorch
        raise ExportError(f'{path} cannot be read: {type(error).__name__}. Export it again.') from error
