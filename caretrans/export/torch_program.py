"""Programs of torch.export, saved and loaded: for servers, and as what other compilers start from."""
import json
from collections import Counter
from pathlib import Path
from typing import List, Tuple

import torch
import torch.nn as nn

from .config import Job
from .metadata import describe, read_class_names
from .source import Source, build_network
from .verify import ExportError, Program

__all__ = ['ANY_SIZE', 'read', 'trace', 'trace_any_size', 'trace_network', 'write']

FACTS = 'caretrans.json'
ANY_SIZE = 'any number of images, of any height and width from 64 pixels on'
SHAPE_CHANGES = (
    'view', 'reshape', 'flatten', 'squeeze', 'unsqueeze', 'transpose', 'permute', 't', 'mT', 'numpy_T', 'expand')


@torch.no_grad()
def trace_network(network: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    """A network as a program of torch.export, for images (B, C, H, W) of this shape."""
    return torch.export.export(network, (images,))


def trace(source: Source, job: Job) -> torch.export.ExportedProgram:
    """The network of a job as a program of torch.export, for images of its batch and size."""
    return trace_network(build_network(source, job), source.make_example(job))


@torch.no_grad()
def trace_any_size(network: nn.Module, images: torch.Tensor) -> Tuple[torch.export.ExportedProgram, str]:
    """A network as a program of torch.export for any number of images of any size, where it computes the same for all.

    The tracer takes a size of 1 for a constant, and is shown two oblong images. For the same reason the program checks
    that images have 64 pixels at least: at 1/32 of the size, smaller ones have one position left.

    Args:
        images: (B, C, H, W), for which it is traced where it cannot be for others.
    Returns:
        The program, and a remark on the only images that go in; '' if any do.
    """
    _, chs, height, width = images.shape
    free = {number: torch.export.Dim.DYNAMIC for number in (0, 2, 3)}
    try:
        program = torch.export.export(network, (images.new_zeros(2, chs, height, width + 32),), dynamic_shapes=(free,))
    except (torch._dynamo.exc.UserError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return trace_network(network, images), f'only images of shape {tuple(images.shape)}: {reason}'
    return program, ''


def write(source: Source, job: Job, path: Path) -> List[str]:
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
