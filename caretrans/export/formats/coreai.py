"""Core AI programs, the format that succeeds Core ML, run by Apple's own reference executor.

The executor also runs on Linux, slowly: it is an independent check of the numbers, and says nothing about speed.
"""
import asyncio
import hashlib
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ...runtimes.quiet import quiet
from ...runtimes.tracing import trace_network
from ..config import Job
from ..metadata import describe, read_class_names
from ..program import Program, reading
from ..source import Source, build_network

__all__ = ['read', 'write']

INPUT, FACTS, ENTRY = 'input_1', 'caretrans', 'main'
SHAPE_CHANGES = ('reshape', 'transpose', 'expand_dims', 'shrink_dims')
NOTE = 'operations are those of the file, with the bodies of functions that it calls'


class _Half(nn.Module):
    """A network that computes in float16, from float32 to float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.half()).float()


def write(source: Source, job: Job, path: Path) -> list[str]:
    """Write a program for images of one shape."""
    network, images = build_network(source, job), source.make_example(job)
    with quiet(''):
        import coreai_torch
        program = trace_network(_Half(network) if job.precision == 'fp16' else network, images)
        converter = coreai_torch.TorchConverter().add_exported_program(
            program.run_decompositions(coreai_torch.get_decomp_table()), input_names=[INPUT],
            output_names=[job.output])
        asset = converter.to_coreai().save_asset(path)
    asset.update_metadata(lambda metadata: metadata.set_custom(FACTS, describe(source, job)))
    return []


class _Executor:
    """A loaded program, and the event loop in which Core AI must be called."""

    def __init__(self, asset: Any) -> None:
        self.loop = asyncio.new_event_loop()
        context = asset.executable()
        model = self.loop.run_until_complete(context.__aenter__())
        self.function = model.load_function(ENTRY)
        weakref.finalize(self, _close, self.loop, context)

    def run(self, images: torch.Tensor, output: str) -> torch.Tensor:
        from coreai.runtime import NDArray
        outputs = self.loop.run_until_complete(self.function({INPUT: NDArray(images.numpy())}))
        return torch.from_numpy(outputs[output].numpy().copy())


def _close(loop: asyncio.AbstractEventLoop, context: Any) -> None:
    loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


def read(job: Job, path: Path) -> Program:
    from coreai.authoring import AIModelAsset
    with reading(path):
        code = path / 'main.mlirb'  # a truncated one ends the process; Core AI writes the SHA-256 of it beside it
        if hashlib.sha256(code.read_bytes()).digest() != code.with_suffix('.hash').read_bytes():
            raise ValueError(f'the SHA-256 of {code} is not the one in its .hash')
        asset = AIModelAsset.load(path)
        labels = read_class_names(asset.metadata.creator_defined_metadata[FACTS])
        operations = dict(asset.summary().operation_distribution)
        executor = _Executor(asset)
    operations.pop('constant', None)
    changes = [name for name in SHAPE_CHANGES for _ in range(operations.get(name, 0))]
    return Program(
        lambda images: executor.run(images, job.output), f'Core AI {version("coreai-core")}, its reference executor',
        labels, operations, changes, timed=False, notes=[NOTE])
