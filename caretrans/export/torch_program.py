"""Programs of torch.export, saved and loaded: for servers, and as what other compilers start from."""
import json
from collections import Counter
from pathlib import Path

import torch

from ..errors import ExportError
from ..runtimes.tracing import trace_any_size, trace_network
from .config import Job
from .metadata import describe, read_class_names
from .source import Source, build_network
from .verify import Program

__all__ = ['ANY_SIZE', 'read', 'trace', 'write']

FACTS = 'caretrans.json'
ANY_SIZE = 'any number of images, of any height and width from 64 pixels on'
SHAPE_CHANGES = (
    'view', 'reshape', 'flatten', 'squeeze', 'unsqueeze', 'transpose', 'permute', 't', 'mT', 'numpy_T', 'expand')


def trace(source: Source, job: Job) -> torch.export.ExportedProgram:
    """The network of a job as a program of torch.export, for images of its batch and size."""
    return trace_network(build_network(source, job), source.make_example(job))


def write(source: Source, job: Job, path: Path) -> list[str]:
    program, remark = trace_any_size(build_network(source, job), source.make_example(job))
    torch.export.save(program, path, extra_files={FACTS: json.dumps(describe(source, job))})
    return [remark or ANY_SIZE]


def _computes(node: torch.fx.Node) -> bool:
    """Whether a node makes a tensor of numbers, and is no arithmetic on sizes and no assertion."""
    return isinstance(node.meta.get('val'), (torch.Tensor, list, tuple)) and str(node.target).startswith('aten.')


def read(source: Source, job: Job, path: Path) -> Program:
    extra = {FACTS: ''}
    try:
        program = torch.export.load(path, extra_files=extra)
        labels = read_class_names(json.loads(extra[FACTS]))
    except Exception as error:  # of zip files, of JSON, of PyTorch
        raise ExportError(f'{path} cannot be read: {type(error).__name__}. Export it again.') from error
    calls = [node for node in program.graph.nodes if node.op == 'call_function' and _computes(node)]
    kinds = [str(node.target).removeprefix('aten.').removesuffix('.default') for node in calls]
    changes = [
        f'{node.name} to {tuple(node.meta["val"].shape)}' for node, kind in zip(calls, kinds, strict=True)
        if kind.split('.')[0] in SHAPE_CHANGES]
    module = program.module()

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return module(images)
    return Program(
        run, f'PyTorch {torch.__version__}', labels, operations=dict(Counter(kinds)), shape_changes=changes)
