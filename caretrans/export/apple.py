"""What only Apple's systems can tell of a Core ML program: its own predictions, where it runs, how fast.

Written against the sources of coremltools 9.0. Untested: nothing here has run on a Mac or a phone yet. The tests put
stand-ins in the place of Core ML, which prove the bookkeeping and not the calls.
"""
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import ExportError
from .config import Job
from .coreml import INPUT, import_coremltools
from .source import Cases, Source
from .verify import Program, Verification, verify

__all__ = [
    'UNITS', 'Examination', 'Latency', 'Placement', 'describe_placements', 'examine', 'find_device', 'is_available',
    'list_placements',
    'measure_latency', 'measure_on_device', 'read_by_core_ml']

UNITS = {'all': 'ALL', 'cpu_and_ne': 'CPU_AND_NE', 'cpu_and_gpu': 'CPU_AND_GPU', 'cpu_only': 'CPU_ONLY'}
ENGINES = {
    'MLNeuralEngineComputeDevice': 'Neural Engine', 'MLGPUComputeDevice': 'GPU', 'MLCPUComputeDevice': 'CPU'}
WARM_UP, RUNS = 50, 500  # as the authors of the network measured


def is_available() -> bool:
    """Whether Core ML can run programs here."""
    return sys.platform == 'darwin'


def _open(path: Path, units: str, load: bool = True) -> Any:
    """An MLModel; one that predicts, if it is loaded.

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
                f'{path}: Core ML cannot load it ({error}). It runs on macOS alone, from the --target on that the '
                f'program was exported for.') from error
    return model


# Predictions ----------------------------------------------------------------------------------------------------------

def make_feature(images: torch.Tensor, input: str) -> Any:
    """Images (batch, C, H, W) as Core ML takes them: one RGB image of PIL, or a float32 array."""
    if input == 'tensor':
        return images.numpy().astype(np.float32)
    return Image.fromarray(images[0].permute(1, 2, 0).numpy().astype(np.uint8))


def collect_outputs(answer: dict[str, Any], job: Job, class_names: list[str]) -> torch.Tensor:
    """What Core ML answered, as (batch, classes) float32 in the order of the classes."""
    if job.output == 'classes':
        return torch.tensor([[answer['probabilities'][name] for name in class_names]], dtype=torch.float32)
    return torch.from_numpy(np.asarray(answer[job.output], dtype=np.float32)).reshape(job.batch, -1)


def read_by_core_ml(source: Source, job: Job, path: Path, units: str = 'all') -> Program:
    """A program as Core ML itself computes it, for `verify`. Untested on a Mac.

    Args:
        units: Of `UNITS`: what it may run on.
    """
    model = _open(path, units)

    def run(images: torch.Tensor) -> torch.Tensor:
        answer = model.predict({INPUT: make_feature(images, job.input)})
        return collect_outputs(answer, job, source.class_names)
    labels = source.class_names if job.output == 'classes' else None  # it answers by name: those are looked up
    return Program(run, f'Core ML, compute units {units}', labels)


# Where operations run -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Placement:
    """Operations of one type on one device.

    Attributes:
        device: 'Neural Engine', 'GPU', 'CPU', or 'unknown'.
        share: Of the estimated cost of the program, %; None for neural networks, of which Core ML does not estimate it.
    """
    operation: str
    device: str
    count: int
    share: float | None


def _walk(plan: Any) -> Iterator[tuple[str, Any, float | None]]:
    """(type, usage of devices, estimated share of the cost) of each operation that has a usage."""
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
    counts: dict[tuple[str, str], int] = {}
    shares: dict[tuple[str, str], float | None] = {}
    for operation, usage, share in _walk(plan):
        key = operation, ENGINES.get(type(usage.preferred_compute_device).__name__, 'unknown')
        counts[key] = counts.get(key, 0) + 1
        if share is not None:
            shares[key] = (shares.get(key) or 0.) + 100 * share
    rows = [Placement(*key, count, shares.get(key)) for key, count in counts.items()]
    return sorted(rows, key=lambda row: (-(row.share or 0.), -row.count, row.operation, row.device))


def list_placements(path: Path, units: str = 'all') -> list[Placement]:
    """Which operations Core ML means to run on the Neural Engine, the GPU and the CPU of this Mac. Untested."""
    ct = import_coremltools()
    from coremltools.models.compute_plan import MLComputePlan
    model = _open(path, units)
    return summarise_plan(
        MLComputePlan.load_from_path(model.get_compiled_model_path(), compute_units=ct.ComputeUnit[UNITS[units]]))


def describe_placements(rows: list[Placement]) -> list[str]:
    """Lines: one for each device, then one for each type of operation on it."""
    lines = []
    for device in dict.fromkeys(row.device for row in rows):
        own = [row for row in rows if row.device == device]
        lines.append(f'{device}: {_describe_part(sum(row.count for row in own), own)}')
        lines += [f'  {row.operation}: {_describe_part(row.count, [row])}' for row in own]
    return lines


def _describe_part(count: int, rows: list[Placement]) -> str:
    known = [row.share for row in rows if row.share is not None]
    return f'{count} operations' + (f', {sum(known):.1f} % of the estimated cost' if known else '')


# Latency --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Latency:
    """Milliseconds of a prediction, as Core ML's caller sees it on the device.

    Attributes:
        load: Of the first load in this process, with whatever compiling for the device it includes.
        runs: Predictions that were timed, one after another.
        warm_up: Predictions before them.
        tool: What measured it.
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


def find_device(name: str = '') -> Any:
    """A connected iPhone or iPad, for `measure_on_device`. Needs a Mac with Xcode. Untested.

    Args:
        name: As in its settings; may be left out where one alone is connected.
    Raises:
        ExportError: None is connected, or several and none of that name.
    """
    import_coremltools()
    from coremltools.models.ml_program.experimental.remote_device import Device, DeviceType
    try:
        found = [device for kind in (DeviceType.IPHONE, DeviceType.IPAD)
                 for device in Device.get_connected_devices(kind)]
    except Exception as error:  # a ValueError where devicectl is not on the PATH; its own errors where that fails
        raise ExportError(f'Connected devices cannot be listed: {error}') from error
    chosen = [device for device in found if not name or device.name == name]
    if len(chosen) == 1:
        return chosen[0]
    names = ', '.join(device.name for device in found) or 'none'
    raise ExportError(
        f'Connected devices: {names}. ' + ('Choose one by its name.' if found else
        'Connect one by cable, unlock it, trust this Mac, and switch on its Developer Mode.'))


async def _measure_by_benchmarker(
        model: Any, device: Any, feature: Any, warm_up: int, runs: int) -> tuple[list[float], float]:
    """Times of predictions, and of the load, milliseconds.

    Its own warm-up is a single prediction, so that the same loaded model is asked twice; and it cannot make up images.
    """
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    benchmarker = MLModelBenchmarker(model, device=device)
    load = await benchmarker.benchmark_load(iterations=1)
    await benchmarker.benchmark_predict(inputs={INPUT: feature}, iterations=warm_up)
    measured = await benchmarker.benchmark_predict(inputs={INPUT: feature}, iterations=runs)
    return measured.samples, load.samples[0]


def _measure_by_hand(model: Any, feature: Any, warm_up: int, runs: int) -> tuple[list[float], float]:
    """The same for neural networks, which have no folder of weights: the benchmarker of coremltools 9.0 wants one."""
    load = model.load_duration_in_nano_seconds / 1e6
    samples = []
    for _ in range(warm_up + runs):
        model.predict({INPUT: feature})
        samples.append(model.last_predict_duration_in_nano_seconds / 1e6)
    return samples[warm_up:], load


async def _measure_remotely(
        model: Any, device: Any, credentials: Any, feature: Any, warm_up: int, runs: int) -> tuple[list[float], float]:
    with tempfile.TemporaryDirectory() as folder:
        ready = await device.prepare_for_model_debugging(credentials, working_directory=Path(folder))
        try:
            return await _measure_by_benchmarker(model, ready, feature, warm_up, runs)
        finally:
            ready.session.stop()


def measure_latency(
        path: Path, job: Job, images: torch.Tensor, units: str = 'all', warm_up: int = WARM_UP, runs: int = RUNS,
) -> Latency:
    """Time predictions on this Mac. Untested.

    Args:
        images: (batch, C, H, W) float32 as the program takes them.
    Raises:
        ExportError: Core ML refuses the program.
    """
    feature = make_feature(images, job.input)
    if job.format == 'mlmodel':
        return _summarise(*_measure_by_hand(_open(path, units), feature, warm_up, runs), warm_up, units, 'MLModel')
    model = _open(path, units, load=False)  # the benchmarker loads a copy, and times that
    measured = _await(path, _measure_by_benchmarker(model, None, feature, warm_up, runs))
    return _summarise(*measured, warm_up, units, 'MLModelBenchmarker')


def measure_on_device(
        path: Path, job: Job, images: torch.Tensor, device: Any, team: str, bundle: str | None = None,
        units: str = 'all', warm_up: int = WARM_UP, runs: int = RUNS,
) -> Latency:
    """Time predictions on a connected iPhone or iPad; coremltools builds, signs and installs an app there. Untested.

    Args:
        images: (batch, C, H, W) float32 as the program takes them.
        device: Of `find_device`.
        team: Apple's identifier of the development team that signs the app.
        bundle: Its bundle identifier, e.g. com.example.modelrunner; that of coremltools if not given.
    Raises:
        ExportError: coremltools cannot measure such a program there, or the measurement failed.
    """
    _check_remote(path, job, team)
    import_coremltools()
    from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials
    credentials = AppSigningCredentials(development_team=team, bundle_identifier=bundle)
    measured = _await(path, _measure_remotely(
        _open(path, units, load=False), device, credentials, make_feature(images, job.input), warm_up, runs))
    return _summarise(
        *measured, warm_up, units, 'MLModelBenchmarker', f'{device.name} ({device.type.value} {device.os_version})')


def _await(path: Path, work: Coroutine[Any, Any, tuple[list[float], float]]) -> tuple[list[float], float]:
    try:
        return asyncio.run(work)
    except Exception as error:  # of Xcode, of the signature, of the connection, of Core ML
        raise ExportError(f'{path} could not be measured: {type(error).__name__}: {error}') from error


def _check_remote(path: Path, job: Job, team: str) -> None:
    if job.format != 'mlpackage':
        raise ExportError(f'{path}: coremltools measures .mlpackage alone on devices. Use the report of Xcode.')
    if job.input != 'tensor' or job.output == 'classes':
        raise ExportError(
            f'{path}: coremltools sends arrays alone to devices, no images and no labels. Export with --input tensor '
            f'--output logits, or use the report of Xcode.')
    if not team:
        raise ExportError('An app is installed on the device, and must be signed: name the development team.')


def _summarise(
        samples: list[float], load: float, warm_up: int, units: str, tool: str, device: str = 'this Mac') -> Latency:
    return Latency(
        statistics.median(samples), min(samples), max(samples), load, len(samples), warm_up, units,
        f'{tool} of coremltools {import_coremltools().__version__}', device)


# All of it, on this Mac ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Examination:
    """What Core ML of this Mac says of a program: see `verify.Verification`, `Placement` and `Latency`."""
    verification: Verification
    placements: list[Placement]
    latency: Latency

    def describe(self) -> Iterator[str]:
        """Lines for people."""
        result = self.verification
        yield (f'Core ML on this Mac: max error {result.max_error:.2g}, mean {result.mean_error:.2g}, same first '
               f'answer {result.top1_agreement:.2f} %, first five shared {result.top5_agreement:.2f} %')
        yield str(self.latency)
        yield from describe_placements(self.placements)


def examine(source: Source, job: Job, path: Path, cases: Cases) -> Examination:
    """Predict with Core ML itself and compare, list where operations run, and time it. Untested: needs a Mac.

    Raises:
        VerificationError: Core ML does not compute what the network computes; see `verify`.
        ExportError: Core ML refuses the program.
    """
    result = verify(source, job, read_by_core_ml(source, job, path), cases, path.name)
    return Examination(result, list_placements(path), measure_latency(path, job, source.make_example(job)))
