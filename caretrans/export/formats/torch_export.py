"""Programs of torch.export, saved and loaded: for servers, and as input of other compilers."""
import json
from collections import Counter
from pathlib import Path

import torch

from ...runtimes.tracing import trace_any_size
from ..config import Job
from ..metadata import describe, read_class_names
from ..program import Program, join_outputs, reading
from ..source import Source, build_network, trace

__all__ = ['read', 'write']

FACTS = 'caretrans.json'
AXES = ('batch', '', 'height', 'width')
SHAPE_CHANGES = (
    'view', 'reshape', 'flatten', 'squeeze', 'unsqueeze', 'transpose', 'permute', 't', 'mT', 'numpy_T', 'expand')


def write(source: Source, job: Job, path: Path) -> list[str]:
    """Write a program for any number of images of any size, where the network allows it."""
    program = trace(source, job) if source.has_fixed_size else trace_any_size(
        build_network(source, job), source.make_example(job))
    torch.export.save(program, path, extra_files={FACTS: json.dumps(describe(source, job))})
    return []


def _computes(node: torch.fx.Node) -> bool:
    """Whether a node computes a tensor, rather than a size or an assertion."""
    return node.op == 'call_function' and str(node.target).startswith('aten.') \
        and isinstance(node.meta.get('val'), (torch.Tensor, list, tuple))


def _find_least(program: torch.export.ExportedProgram) -> dict[str, int]:
    """The free axes of the input, and their least sizes."""
    node = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    ranges = program.range_constraints
    return {name: int(ranges[size.node.expr].lower) for name, size in zip(AXES, node.meta['val'].shape, strict=True)
            if isinstance(size, torch.SymInt)}


def read(job: Job, path: Path) -> Program:
    extra = {FACTS: ''}
    with reading(path):
        program = torch.export.load(path, extra_files=extra)
        labels = read_class_names(json.loads(extra[FACTS]))
    calls = [node for node in program.graph.nodes if _computes(node)]
    kinds = [str(node.target).removeprefix('aten.').removesuffix('.default') for node in calls]
    changes = [
        f'{node.name} to {tuple(node.meta["val"].shape)}' for node, kind in zip(calls, kinds, strict=True)
        if kind.split('.')[0] in SHAPE_CHANGES]
    module = program.module()

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return join_outputs(module(images))
    return Program(
        run, f'PyTorch {torch.__version__}', labels, dict(Counter(kinds)), changes, least=_find_least(program))
