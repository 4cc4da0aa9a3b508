"""Measurements of a Core ML program that need a Mac: its own predictions, placement of operations, and latency.

Written against the sources of coremltools 9.0. Untested: nothing here has run on a Mac yet. The tests replace Core ML
by stand-ins, which verify the bookkeeping and not the calls.
"""
import asyncio
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...errors import ExportError
from ..config import Job
from ..program import Program
from ..source import Cases, Source
from ..verify import Verification, verify
from .convert import INPUT, import_coremltools

__all__ = [
    'UNITS', 'Examination', 'Latency', 'Placement', 'describe_placements', 'examine', 'is_available', 'list_placements',
    'measure_latency', 'read_by_core_ml']

UNITS = {'all': 'ALL', 'cpu_and_ne': 'CPU_AND_NE', 'cpu_and_gpu': 'CPU_AND_GPU', 'cpu_only': 'CPU_ONLY'}
ENGINES = {
    'MLNeuralEngineComputeDevice': 'Neural Engine', 'MLGPUComputeDevice': 'GPU', 'MLCPUComputeDevice': 'CPU'}
WARM_UP, RUNS = 50, 500  # the protocol of the network's authors


def is_available() -> bool:
    """Whether Core ML can run programs here."""
    return sys.platform == 'darwin'


def _open(path: Path, units: str, load: bool = True) -> Any:
    """An MLModel; with `load`, one that predicts.

    Raises:
        ExportError: Core ML refuses the program.
    """
    ct = import_coremltools()
    model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[UNITS[units]], skip_model_load=not load)
    if load:
        try:
            model.get_compiled_model_path()
        except Exception as error:  # a plain one, of coremltools
            raise ExportError(
                f'{path}: Core ML cannot load it ({error}). Core ML needs macOS, at least the --target that the '
                f'program was exported for.') from error
    return model


# Predictions ----------------------------------------------------------------------------------------------------------

def make_feature(images: torch.Tensor, input: str) -> Any:
    """Images (batch, C, H, W) as Core ML takes them: one RGB image of PIL, or a float32 array."""
    if input == 'tensor':
        return images.numpy().astype(np.float32)
    return Image.fromarray(images[0].permute(1, 2, 0).numpy().astype(np.uint8))


def read_by_core_ml(source: Source, job: Job, path: Path, units: str = 'all') -> Program:
    """A program as Core ML itself computes it, for `verify`. Untested on a Mac.

    Args:
        units: Of `UNITS`: the compute units that it may use.
    """
    model = _open(path, units)

    def run(images: torch.Tensor) -> torch.Tensor:
        answer = model.predict({INPUT: make_feature(images, job.input)})
        if job.output == 'classes':  # by name: put them in the order of the classes
            return torch.tensor([[answer['probabilities'][name] for name in source.class_names]], dtype=torch.float32)
        return torch.from_numpy(np.asarray(answer[job.output], dtype=np.float32)).reshape(job.batch, -1)
    return Program(run, f'Core ML, compute units {units}', source.class_names if job.output == 'classes' else None)


# Placement of operations ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Placement:
    """Operations of one type on one device.

    Attributes:
        device: 'Neural Engine', 'GPU', 'CPU', or 'unknown'.
        share: Of the estimated cost of the program, %; None for neural networks, for which Core ML has no estimate.
    """
    operation: str
    device: str
    count: int
    share: float | None


def _walk(plan: Any) -> Iterator[tuple[str, Any, float | None]]:
    """(type, device usage, estimated share of the cost) of each operation that has a usage."""
    structure = plan.model_structure
    if structure.program is not None:
        for item in structure.program.functions['main'].block.operations:
            usage = plan.get_compute_device_usage_for_mlprogram_operation(item)
            cost = plan.get_estimated_cost_for_mlprogram_operation(item)
            if usage is not None:
                yield item.operator_name.rpartition('.')[2], usage, None if cost is None else cost.weight
        return
    for item in structure.neuralnetwork.layers:
        usage = plan.get_compute_device_usage_for_neuralnetwork_layer(item)
        if usage is not None:
            yield item.type, usage, None


def summarise_plan(plan: Any) -> list[Placement]:
    """An `MLComputePlan` as a table: the costliest first, then the most frequent."""
    counts, shares = Counter(), defaultdict(float)
    for operation, usage, share in _walk(plan):
        key = operation, ENGINES.get(type(usage.preferred_compute_device).__name__, 'unknown')
        counts[key] += 1
        if share is not None:
            shares[key] += 100 * share
    rows = [Placement(*key, count, shares.get(key)) for key, count in counts.items()]
    return sorted(rows, key=lambda row: (-(row.share or 0.), -row.count, row.operation, row.device))


def list_placements(path: Path, units: str = 'all') -> list[Placement]:
    """The device on which Core ML plans to run each operation on this Mac. Untested."""
    ct = import_coremltools()
    from coremltools.models.compute_plan import MLComputePlan
    model = _open(path, units)
    return summarise_plan(
        MLComputePlan.load_from_path(model.get_compiled_model_path(), compute_units=ct.ComputeUnit[UNITS[units]]))


def describe_placements(rows: list[Placement]) -> list[str]:
    """Lines: one for each device, then one for each type of operation on it."""
    def describe(parts: list[Placement]) -> str:
        known = [row.share for row in parts if row.share is not None]
        share = f', {sum(known):.1f} % of the estimated cost' if known else ''
        return f'{sum(row.count for row in parts)} operations{share}'

    lines = []
    for device in dict.fromkeys(row.device for row in rows):
        own = [row for row in rows if row.device == device]
        lines += [f'{device}: {describe(own)}', *(f'  {row.operation}: {describe([row])}' for row in own)]
    return lines


# Latency --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Latency:
    """Milliseconds of a prediction, as the caller of Core ML sees it.

    Attributes:
        load: Of the first load in this process, with the compilation for the device that it includes.
        runs: Timed predictions, one after another.
        warm_up: Predictions before them.
        tool: The function that measured it.
    """
    median: float
    minimum: float
    maximum: float
    load: float
    runs: int
    warm_up: int
    units: str
    tool: str
    device: str = 'this Mac'

    def __str__(self) -> str:
        return (f'{self.median:.2f} ms, median of {self.runs} ({self.minimum:.2f} to {self.maximum:.2f}) after '
                f'{self.warm_up} to warm up, load {self.load:.0f} ms; compute units {self.units}, {self.device}, '
                f'{self.tool}')


async def _benchmark(model: Any, feature: Any, warm_up: int, runs: int) -> tuple[list[float], float]:
    """Times of predictions, and of the load, milliseconds.

    The benchmarker's own warm-up is a single prediction, so it runs twice on the same loaded model; and it cannot
    create images.
    """
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    benchmarker = MLModelBenchmarker(model, device=None)
    load = await benchmarker.benchmark_load(iterations=1)
    await benchmarker.benchmark_predict(inputs={INPUT: feature}, iterations=warm_up)
    measured = await benchmarker.benchmark_predict(inputs={INPUT: feature}, iterations=runs)
    return measured.samples, load.samples[0]


def measure_latency(
        path: Path, job: Job, images: torch.Tensor, units: str = 'all', warm_up: int = WARM_UP, runs: int = RUNS,
) -> Latency:
    """Time predictions on this Mac. Untested.

    Args:
        images: (batch, C, H, W) float32 as the program takes them.
    Raises:
        ExportError: Core ML refuses the program, or the measurement failed.
    """
    feature, tool = make_feature(images, job.input), 'MLModelBenchmarker'
    if job.format == 'mlmodel':  # has no folder of weights, which the benchmarker of coremltools 9.0 needs
        model, samples, tool = _open(path, units), [], 'MLModel'
        load = model.load_duration_in_nano_seconds / 1e6
        for _ in range(warm_up + runs):
            model.predict({INPUT: feature})
            samples.append(model.last_predict_duration_in_nano_seconds / 1e6)
        samples = samples[warm_up:]
    else:
        model = _open(path, units, load=False)  # the benchmarker loads a copy, and times that
        try:
            samples, load = asyncio.run(_benchmark(model, feature, warm_up, runs))
        except Exception as error:  # of Core ML
            raise ExportError(f'{path} could not be measured: {type(error).__name__}: {error}') from error
    return Latency(
        statistics.median(samples), min(samples), max(samples), load, len(samples), warm_up, units,
        f'{tool} of coremltools {import_coremltools().__version__}')


# Everything, on this Mac ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Examination:
    """Results of Core ML on this Mac: see `verify.Verification`, `Placement` and `Latency`."""
    verification: Verification
    placements: list[Placement]
    latency: Latency

    def describe(self) -> Iterator[str]:
        """Lines for people."""
        result = self.verification
        yield (f'Core ML on this Mac: max error {result.max_error:.2g}, mean {result.mean_error:.2g}, same top-1 '
               f'{result.top1_agreement:.2f} %, top-5 overlap {result.top5_agreement:.2f} %')
        yield str(self.latency)
        yield from describe_placements(self.placements)


def examine(source: Source, job: Job, path: Path, cases: Cases) -> Examination:
    """Predict with Core ML itself and compare, list the placement of operations, and time it. Untested: needs a Mac.

    Raises:
        VerificationError: Core ML does not compute what the network computes; see `verify`.
        ExportError: Core ML refuses the program.
    """
    result = verify(source, job, read_by_core_ml(source, job, path), cases, path.name)
    return Examination(result, list_placements(path), measure_latency(path, job, source.make_example(job)))
