"""Programs of torch.export, saved and loaded: for servers, and as what other compilers start from."""
from pathlib import Path
from typing import List

import torch

from .config import Job
from .source import Source, build_network
from .verify import ExportError, Program

__all__ = ['check', 'read', 'trace', 'write']


def check(job: Job) -> None:
    """Nothing to refuse."""


@torch.no_grad()
def trace(source: Source, job: Job) -> torch.export.ExportedProgram:
    """The network of a job as a program of torch.export, for images of its batch and size."""
    return torch.export.export(build_network(source, job), (source.make_example(job),))


def write(source: Source, job: Job, path: Path) -> List[str]:
    torch.export.save(trace(source, job), path)
    return []


def read(source: Source, job: Job, path: Path) -> Program:
    try:
        program = torch.export.load(path)
    except Exception as error:  # of zip files, of JSON, of PyTorch
        raise ExportError(f'{path} cannot be read: {type(error).__name__}. Export it again.') from error
    operations = {}
    for node in program.graph.nodes:
        if node.op == 'call_function':
            name = str(node.target).removesuffix('.default')
            operations[name] = operations.get(name, 0) + 1
    module = program.module()

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return module(images)
    return Program(run, f'PyTorch {torch.__version__}', operations=operations)
