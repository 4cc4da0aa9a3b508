"""Measure models in every setup: parameters and multiply-adds, latency, throughput and memory.

All candidates of one batch and size are prepared, checked against float64 and then timed interleaved, so that they can
be compared with one another. A batch that does not fit into memory is halved; a candidate that fails is reported, and
the others are still measured.
"""
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import TextIO

import timm
import torch

from ..checkpoint.load import create_from_checkpoint
from ..devices import describe_device, list_versions, resolve_device, use_threads
from ..errors import CheckpointError
from ..measure.counts import count_operations, count_parameters
from ..measure.published import find_published
from ..measure.sample_network import load_sample_images, randomize
from ..measure.timing import (
    CandidateError, Rounds, compare_rounds, free_memory, is_out_of_memory, measure_peak, time_block, time_interleaved)
from ..progress import Progress
from .backends import Network, Runner, check_output, prepare
from .config import BenchConfig, list_setups
from .record import BenchResult, ModelCounts, Record, shorten
from .setups import Setup, fit_setups

__all__ = [
    'AGAIN', 'BUILDING', 'DEFAULT_RUNS', 'PATIENCE', 'ROUNDS', 'Candidate', 'build_network', 'count_network',
    'measure_group', 'run_inference', 'take_batch']

ROUNDS = 10
BUILDING = 10  # steps of progress for preparing a candidate; a timed block is one step
DEFAULT_RUNS = 50
PATIENCE = 5.  # seconds of timed runs of a candidate, where their number is not given
SAMPLE_IMAGES = 64  # images from which batches are made, and which calibrate int8
AGAIN = 'the reference again'
BESIDE = ' beside the other candidates'


@dataclass
class Candidate:
    """A network in one setup, and its results so far."""
    model: str
    setup: Setup
    network: Network
    runner: Runner | None = None
    error: float = 0.
    peak_mib: float | None = None
    count: int = 1  # runs in a round
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f'{self.model} {self.setup}'

    @property
    def batch(self) -> int:
        return len(self.network.images)

    def release(self) -> None:
        """Free its memory."""
        self.runner = None
        free_memory()

    def halve(self, beside: str = '') -> bool:
        """Halve a batch that does not fit; False if it is already one image.

        Args:
            beside: Note on what else holds memory, e.g. `BESIDE`.
        """
        self.release()
        if self.batch == 1:
            return False
        half = self.batch // 2
        self.notes.append(f'a batch of {self.batch} does not fit into memory{beside}: halved to {half}')
        self.network = self.network.with_images(self.network.images[:half])
        return True


# Networks -------------------------------------------------------------------------------------------------------------

def build_network(name: str, size: tuple[int, int], checkpoint: str = '') -> Network:
    """A model in evaluation mode with bundled images of (height, width); without a checkpoint it gets random
    sample weights."""
    model = create_from_checkpoint(checkpoint, name)[0] if checkpoint else timm.create_model(name)
    model.eval()
    calibration = images = load_sample_images(model, size, SAMPLE_IMAGES)
    if images is None:
        images = torch.randn(8, getattr(model, 'in_chans', 3), *size, generator=torch.Generator().manual_seed(0))
    if not checkpoint:
        randomize(model, images[:8])
    return Network(model, images, calibration=calibration)


def take_batch(network: Network, batch: int) -> Network:
    """The same network for `batch` images, repeated if there are fewer."""
    return network.with_images(network.images.repeat(-(-batch // len(network.images)), 1, 1, 1)[:batch])


def count_network(name: str, network: Network, size: tuple[int, int]) -> ModelCounts:
    """Parameters, multiply-adds and activations, original and fused, and published figures."""
    original, fused = (count_operations(model, size) for model in (network.model, network.fused))
    by_part: dict[str, dict[str, float]] = {}
    for (part, kind), number in original.macs.items():
        by_part.setdefault(part, {})[kind] = number / 1e9
    return ModelCounts(
        model=name, height=size[0], width=size[1], **count_parameters(network.model, network.fused),
        gmacs=original.gmacs, gmacs_fused=fused.gmacs, gmacs_by_kind=original.sum_by_kind(), gmacs_by_part=by_part,
        activations_m=original.activations / 1e6, activations_fused_m=fused.activations / 1e6,
        published=find_published(name))


# One batch and size ---------------------------------------------------------------------------------------------------

def _count_rounds(config: BenchConfig) -> int:
    return min(ROUNDS, config.runs or ROUNDS)


def _warm_up(candidate: Candidate, config: BenchConfig) -> None:
    """Build, check, measure memory, warm up, and choose the number of runs per round."""
    setup = candidate.setup
    with redirect_stdout(sys.stderr):  # messages of the runtimes
        runner = candidate.runner = prepare(candidate.network, setup)
    candidate.error = check_output(candidate.network, runner, setup.dtype)
    if runner.peak is not None:
        candidate.peak_mib = runner.peak / 2 ** 20
    elif runner.held is not None:
        candidate.peak_mib = measure_peak(runner.run, setup.device, runner.held)
    seconds = time_block(runner.run, max(config.warmup, 1), setup.device)[-1]
    if config.runs is not None:
        candidate.count = math.ceil(config.runs / _count_rounds(config))
    else:
        candidate.count = max(min(DEFAULT_RUNS, int(PATIENCE / seconds)) // ROUNDS, 1)


def _make_ready(candidate: Candidate, config: BenchConfig, others: Sequence[Candidate]) -> str:
    """Prepare a candidate with as much of its batch as fits beside the others; return the reason for a failure."""
    beside = BESIDE if others else ''
    while True:
        try:
            _warm_up(candidate, config)
            return ''
        except Exception as error:  # backends raise many kinds; the other candidates are still measured
            if not is_out_of_memory(error):
                candidate.release()
                return f'{candidate.name}: {shorten(error)}'
        if not candidate.halve(beside):
            return f'{candidate.name}: not even one image fits into memory{beside}'


def _time(
        ready: list[Candidate], config: BenchConfig, device: torch.device, progress: Progress, failures: list[str],
) -> dict[str, Rounds]:
    """Time the candidates, the first one twice; one that fails gets half of its batch, or is removed from `ready`."""
    while ready:
        first = ready[0].name
        runs = {candidate.name: candidate.runner.run for candidate in ready}
        counts = {candidate.name: candidate.count for candidate in ready}
        runs[AGAIN], counts[AGAIN] = runs[first], counts[first]
        try:
            return time_interleaved(runs, device, counts, _count_rounds(config), report=lambda: progress.update(1))
        except CandidateError as error:
            name, cause = first if error.name == AGAIN else error.name, error.__cause__
        failed = next(candidate for candidate in ready if candidate.name == name)
        problem, others = f'{name}: {shorten(cause)}', [candidate for candidate in ready if candidate is not failed]
        if is_out_of_memory(cause) and failed.halve(BESIDE if others else ''):
            problem = _make_ready(failed, config, others)
        if problem:
            failures.append(problem)
            ready.remove(failed)
    return {}


def _record(candidate: Candidate, reference: Candidate, times: dict[str, Rounds], config: BenchConfig,
            self_ratio: float) -> Record:
    setup, (batch, _, height, width) = candidate.setup, candidate.network.images.shape
    record = Record(
        model=candidate.model, bench='infer', backend=setup.backend, device=describe_device(setup.device),
        dtype=setup.dtype, layout=setup.layout, kernels=candidate.runner.kernels, threads=setup.threads, batch=batch,
        height=height, width=width, warmup=config.warmup, peak_mib=candidate.peak_mib, reference=reference.name,
        error=candidate.error, versions=list_versions(), notes=candidate.notes + candidate.runner.notes)
    record.add_times(times[candidate.name], times[reference.name], reference.batch, self_ratio)
    return record


def measure_group(
        candidates: list[Candidate], config: BenchConfig, device: torch.device, progress: Progress,
) -> tuple[list[Record], list[str]]:
    """Prepare candidates and time them interleaved.

    Ratios of a model refer to the first of its candidates that could be timed.

    Returns:
        Records, and a line for each candidate that failed.
    """
    failures: list[str] = []
    ready: list[Candidate] = []
    for candidate in candidates:
        progress.describe(candidate.name)
        problem = _make_ready(candidate, config, ready)
        progress.update(BUILDING)
        if problem:
            failures.append(problem)
        else:
            ready.append(candidate)
    progress.describe('timing')
    times = _time(ready, config, device, progress, failures)
    references: dict[str, Candidate] = {}
    for candidate in ready:
        references.setdefault(candidate.model, candidate)
    self_ratio = compare_rounds(times[ready[0].name], times[AGAIN])['ratio'] if ready else 1.
    records = [_record(candidate, references[candidate.model], times, config, self_ratio) for candidate in ready]
    for candidate in candidates:
        candidate.release()
    return records, failures


# The sweep ------------------------------------------------------------------------------------------------------------

def run_inference(config: BenchConfig, stream: TextIO | None = None) -> BenchResult:
    """Measure all models, backends, number formats, batches and sizes of a config.

    Args:
        stream: Output of the progress; stdout by default.
    Raises:
        ConfigError: The config asks for something that cannot be measured; nothing has been measured then.
        CheckpointError: The checkpoint does not fit the model.
    """
    names, device = config.list_models(), resolve_device(config.device)
    setups, skipped = list_setups(config, device)
    result = BenchResult(describe_device(device))
    if config.published and device.type != 'cuda':
        result.remarks.append(f'--published: TF32 does nothing on {device.type}, float32 is used')
    if not config.checkpoint:
        result.remarks.append(
            'weights: random, chosen so that an error in any layer shows; speed does not depend on them')
    result.remarks += skipped
    groups = len(config.list_batches()) * len(config.sizes)
    steps = groups * (len(names) * len(setups) * (BUILDING + _count_rounds(config)) + _count_rounds(config))
    with use_threads(config.threads), Progress(steps, 'steps', stream=stream) as progress:
        for size in config.sizes:
            networks: dict[str, Network] = {}
            for name in names:
                progress.describe(f'{name}, counting')
                try:
                    network = build_network(name, size, config.checkpoint)
                    result.counts.append(count_network(name, network, size))
                except CheckpointError:
                    raise
                except Exception as error:  # e.g. a model for images of another size
                    result.failures.append(f'{name} at {size[0]} x {size[1]}: {shorten(error)}')
                    continue
                networks[name] = network
                if any(setup.kernels != 'torch' for setup in setups) and all(
                        setup.kernels == 'torch' for setup in fit_setups(setups, network.fused)):
                    result.remarks.append(f"{name}: no part has Triton kernels, so PyTorch's kernels run")
            for batch in config.list_batches():
                batches = {name: take_batch(network, batch) for name, network in networks.items()}
                candidates = [Candidate(name, setup, network) for name, network in batches.items()
                              for setup in fit_setups(setups, network.fused)]
                records, failures = measure_group(candidates, config, device, progress)
                result.records += records
                result.failures += failures
    return result
