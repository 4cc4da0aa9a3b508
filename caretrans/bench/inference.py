"""Measure models in every way they can be run: what they hold, how fast they are, how much memory they take.

All candidates of one batch and size are made ready, checked against float64 and then timed interleaved, so that they
can be compared with one another. One that does not fit into memory gets half of its batch; one that fails is reported,
and the rest goes on.
"""
import gc
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, TextIO

import timm
import torch

from ..checkpoint.load import create_from_checkpoint
from ..devices import describe_device, list_versions, resolve_device, use_threads
from ..errors import CheckpointError
from ..measure.counts import count_operations, count_parameters
from ..measure.sample_network import randomize, load_sample_images
from ..measure.timing import (
    CandidateError, Rounds, compare_rounds, is_out_of_memory, judge_noise, measure_peak, summarise, time_block,
    time_interleaved)
from ..progress import Progress
from .backends import Network, Runner, Setup, check_output, fit_setups, prepare
from .config import BenchConfig, list_setups
from .kernel_choice import has_parts
from ..measure.published import find_published

__all__ = [
    'BenchResult', 'Candidate', 'build_network', 'count_network', 'measure_group', 'run_inference', 'shorten',
    'take_batch']

Size = tuple[int, int]  # height, width

ROUNDS = 10
BUILDING = 10  # steps of progress that making a candidate ready counts as; a block that is timed is one
DEFAULT_RUNS = 50
PATIENCE = 5.  # seconds of timed runs of a candidate, where their number is not given
SAMPLE_IMAGES = 64  # of which batches are made, and by which int8 is calibrated
AGAIN = 'the reference again'
BESIDE = ' beside the other candidates'


@dataclass
class BenchResult:
    """What was measured: records of timings, counts of each model, and lines on what was left out or failed."""
    device: str
    counts: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    accuracy: list[dict[str, Any]] = field(default_factory=list)
    curves: list[Any] = field(default_factory=list)  # of `training_curves.Comparison`
    profiles: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)  # tables of profiles and of training
    plots: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass
class Candidate:
    """A network in one way of running it, and what is known of it so far."""
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

    def forget(self) -> None:
        """Give the memory back."""
        self.runner = None
        gc.collect()
        if self.setup.device.type == 'cuda':
            torch.cuda.empty_cache()

    def halve(self, beside: str = '') -> bool:
        """Take half of the batch, for the whole does not fit; False if there is one image only.

        Args:
            beside: What else holds memory, for the note.
        """
        self.forget()
        if self.batch == 1:
            return False
        self.notes.append(f'a batch of {self.batch} does not fit into memory{beside}: halved to {self.batch // 2}')
        self.network = self.network.halve()
        return True


# Networks -------------------------------------------------------------------------------------------------------------

def build_network(name: str, size: Size, checkpoint: str = '') -> Network:
    """A model in evaluation mode with photographs to run it on; without a checkpoint it gets lively weights."""
    model = create_from_checkpoint(checkpoint, name)[0] if checkpoint else timm.create_model(name)
    model.eval()
    photographs = load_sample_images(model, size, SAMPLE_IMAGES)
    images = photographs
    if photographs is None:
        images = torch.randn(8, getattr(model, 'in_chans', 3), *size, generator=torch.Generator().manual_seed(0))
    if not checkpoint:
        randomize(model, images[:8])
    return Network(model, images, photographs=photographs)


def take_batch(network: Network, batch: int) -> Network:
    """The same network for `batch` images, repeated if there are fewer."""
    images = network.images.repeat(-(-batch // len(network.images)), 1, 1, 1)[:batch]
    return Network(network.model, images, network.fused, network.photographs)


def count_network(name: str, network: Network, size: Size) -> dict[str, Any]:
    """Parameters, multiply-adds and activations, as trained and rewritten for inference, beside published figures."""
    trained, fused = (count_operations(model, size) for model in (network.model, network.fused))
    macs: dict[str, dict[str, float]] = {}
    for (part, kind), number in trained.macs.items():
        macs.setdefault(part, {})[kind] = number / 1e9
    row = find_published(name)
    return dict(
        model=name, height=size[0], width=size[1], **count_parameters(network.model, network.fused),
        gmacs=trained.gmacs, gmacs_fused=fused.gmacs, gmacs_by_kind=trained.sum_by_kind(), gmacs_by_part=macs,
        activations_m=trained.activations / 1e6, activations_fused_m=fused.activations / 1e6,
        published=None if row is None else vars(row))


# One batch and size ---------------------------------------------------------------------------------------------------

def shorten(error: BaseException) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def _count_rounds(config: BenchConfig) -> int:
    return min(ROUNDS, config.runs or ROUNDS)


def _make_ready(candidate: Candidate, config: BenchConfig) -> None:
    """Build, check, measure memory, warm up, and see how many runs a round can have."""
    setup = candidate.setup
    with redirect_stdout(sys.stderr):  # the runtimes' own remarks
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


def _try(candidate: Candidate, config: BenchConfig, others: Sequence[Candidate] = ()) -> str:
    """Make a candidate ready, with as much of its batch as fits beside the others; why it cannot be, or ''."""
    beside = BESIDE if others else ''
    while True:
        try:
            _make_ready(candidate, config)
            return ''
        except Exception as error:  # whatever a backend raises: the other candidates go on
            if not is_out_of_memory(error):
                candidate.forget()
                return f'{candidate.name}: {shorten(error)}'
        if not candidate.halve(beside):
            return f'{candidate.name}: not even one image fits into memory{beside}'


def _time(
        ready: list[Candidate], config: BenchConfig, device: torch.device, progress: Progress, failures: list[str],
) -> dict[str, Rounds]:
    """Time what is ready, the first candidate twice; one that fails on the way is halved or taken out of `ready`."""
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
            problem = _try(failed, config, others)
        if problem:
            failures.append(problem)
            ready.remove(failed)
    return {}


def _record(
        candidate: Candidate, reference: Candidate, times: dict[str, Rounds], self_ratio: float, config: BenchConfig,
) -> dict[str, Any]:
    rounds, setup = times[candidate.name], candidate.setup
    summary = summarise(rounds)
    noise = judge_noise(summary, self_ratio)
    return dict(
        model=candidate.model, bench='infer', backend=setup.backend, device=describe_device(setup.device),
        dtype=setup.dtype, layout=setup.layout, batch=candidate.batch, height=candidate.network.images.shape[2],
        width=candidate.network.images.shape[3], threads=setup.threads, warmup=config.warmup,
        runs=sum(map(len, rounds)), **summary, images_per_s=1e3 * candidate.batch / summary['median_ms'],
        peak_mib=candidate.peak_mib,
        **compare_rounds(times[reference.name], rounds, (reference.batch, candidate.batch)), reference=reference.name,
        noisy=bool(noise), error=candidate.error, kernels=candidate.runner.kernels, versions=list_versions(),
        notes=candidate.notes + candidate.runner.notes + noise)


def _make_all_ready(
        candidates: list[Candidate], config: BenchConfig, progress: Progress, failures: list[str]) -> list[Candidate]:
    """Those of the candidates that can be timed."""
    ready = []
    for candidate in candidates:
        progress.describe(candidate.name)
        problem = _try(candidate, config, ready)
        progress.update(BUILDING)
        if problem:
            failures.append(problem)
        else:
            ready.append(candidate)
    return ready


def measure_group(
        candidates: list[Candidate], config: BenchConfig, device: torch.device, progress: Progress,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Make candidates ready and time them interleaved.

    Ratios of a model are to the first of its candidates that could be timed.

    Returns:
        Records, and a line for each candidate that failed.
    """
    failures: list[str] = []
    ready = _make_all_ready(candidates, config, progress, failures)
    progress.describe('timing')
    times = _time(ready, config, device, progress, failures)
    references: dict[str, Candidate] = {}
    for candidate in ready:
        references.setdefault(candidate.model, candidate)
    self_ratio = compare_rounds(times[ready[0].name], times[AGAIN])['ratio'] if ready else 1.
    records = [_record(candidate, references[candidate.model], times, self_ratio, config) for candidate in ready]
    for candidate in candidates:
        candidate.forget()
    return records, failures


# The sweep ------------------------------------------------------------------------------------------------------------

def _list_conditions(config: BenchConfig, device: torch.device) -> Iterator[str]:
    if config.published and device.type != 'cuda':
        yield f'--published: TF32 does nothing on {device.type}, this is plain float32'
    if not config.checkpoint:
        yield 'weights: random ones under which all parts of a network count; speed does not depend on them'


def run_inference(config: BenchConfig, stream: TextIO | None = None) -> BenchResult:
    """Measure all models, backends, number formats, batches and sizes of a config.

    Args:
        stream: Where progress is shown; stdout if not given.
    Raises:
        ConfigError: Something that cannot be measured was asked for; nothing has been measured then.
        CheckpointError: The checkpoint does not fit the model.
    """
    names, device = config.list_models(), resolve_device(config.device)
    setups, left_out = list_setups(config, device)
    result = BenchResult(describe_device(device), remarks=[*_list_conditions(config, device), *left_out])
    groups = len(config.list_batches()) * len(config.sizes)
    steps = groups * (len(names) * len(setups) * (BUILDING + _count_rounds(config)) + _count_rounds(config))
    with use_threads(config.threads), Progress(steps, 'steps', stream=stream) as progress:
        for size in config.sizes:
            _measure_size(names, setups, size, config, device, progress, result)
    return result


def _describe_kernels(name: str, network: Network, setups: list[Setup]) -> list[str]:
    is_other = any(setup.kernels != 'torch' for setup in setups) and not has_parts(network.fused)
    return [f'{name}: no part of it has Triton kernels, those of PyTorch run'] if is_other else []


def _measure_size(
        names: list[str], setups: list[Setup], size: Size, config: BenchConfig, device: torch.device,
        progress: Progress, result: BenchResult) -> None:
    networks: dict[str, Network] = {}
    for name in names:
        progress.describe(f'{name}, counting')
        try:
            networks[name] = build_network(name, size, config.checkpoint)
            result.counts.append(count_network(name, networks[name], size))
            result.remarks += _describe_kernels(name, networks[name], setups)
        except CheckpointError:
            raise
        except Exception as error:  # models for images of another size among others: the rest goes on
            networks.pop(name, None)
            result.failures.append(f'{name} at {size[0]} x {size[1]}: {shorten(error)}')
    for batch in config.list_batches():
        batches = {name: take_batch(network, batch) for name, network in networks.items()}
        candidates = [Candidate(name, setup, network) for name, network in batches.items()
                      for setup in fit_setups(setups, network.fused)]
        records, failures = measure_group(candidates, config, device, progress)
        result.records += records
        result.failures += failures
