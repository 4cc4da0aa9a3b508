"""Time several candidates in one process, interleaved, so that other load on the machine does not change their ratios.

A measurement consists of rounds. In each round every candidate runs a short block, in random order, so that other load
affects them all. A ratio is the median over the rounds of the ratios of blocks of the same round. One candidate, the
reference, is timed twice: the difference between the two shows how far the other ratios can be trusted.
"""
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = [
    'MAX_SELF_RATIO', 'MAX_SPREAD', 'CandidateError', 'Rounds', 'compare_rounds', 'free_memory', 'is_out_of_memory',
    'judge_noise', 'measure_peak', 'summarise', 'synchronise', 'time_block', 'time_interleaved']

Run = Callable[[], Any]
Rounds = list[list[float]]  # seconds of each run, a row for each round

MAX_SPREAD = 1.3  # p90 / p10 of the runs of a candidate, above which it is marked noisy
MAX_SELF_RATIO = 1.05  # of the reference to itself, above which all are


class CandidateError(RuntimeError):
    """A candidate failed while it was timed; `name` says which, `__cause__` why."""

    def __init__(self, name: str) -> None:
        super().__init__(f'{name} failed while it was timed.')
        self.name = name


def is_out_of_memory(error: BaseException | None) -> bool:
    """True if the error is out-of-memory, on GPU or CPU, as the different libraries report it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ('out of memory', 'not enough memory', "can't allocate memory", 'failed to allocate memory', 'bad_alloc')
    is_one = isinstance(error, RuntimeError) or type(error).__module__.startswith('onnxruntime.')  # has its own bases
    return is_one and any(sign in str(error).lower() for sign in signs)


# Time -----------------------------------------------------------------------------------------------------------------

def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def _time_by_events(run: Run, count: int, device: torch.device) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in zip(marks, marks[1:], strict=False)]


def time_block(run: Run, count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` runs, one after the other.

    A GPU gets them without pause, as a service would send them, with an event after each; other devices are
    synchronised after each.
    """
    synchronise(device)
    if device.type == 'cuda':
        return _time_by_events(run, count, device)
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def time_interleaved(
        runs: Mapping[str, Run],
        device: torch.device,
        counts: Mapping[str, int],
        rounds: int = 10,
        seed: int = 0,
        report: Callable[[], None] | None = None,
) -> dict[str, Rounds]:
    """Time candidates that are warmed up.

    Args:
        runs: {name: function that runs the candidate once}.
        counts: Runs of each candidate in a round.
        seed: Seed of the order in the rounds.
        report: Called after each block.
    Returns:
        Seconds of each candidate, by round.
    Raises:
        CandidateError: A candidate failed.
    """
    order, generator = list(runs), random.Random(seed)
    times: dict[str, Rounds] = {name: [] for name in runs}
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            generator.shuffle(order)
            for name in order:
                try:
                    times[name].append(time_block(runs[name], counts[name], device))
                except Exception as error:
                    raise CandidateError(name) from error
                if report is not None:
                    report()
    finally:
        if collects:
            gc.enable()
    return times


# Statistics -----------------------------------------------------------------------------------------------------------

def summarise(times: Rounds) -> dict[str, float]:
    """Median, 10th and 90th percentile and mean of all runs, milliseconds."""
    runs = 1e3 * np.concatenate([np.asarray(block) for block in times])
    p10, median, p90 = np.percentile(runs, [10, 50, 90])
    return dict(median_ms=float(median), p10_ms=float(p10), p90_ms=float(p90), mean_ms=float(runs.mean()))


def compare_rounds(reference: Rounds, times: Rounds, images: Sequence[int] = (1, 1)) -> dict[str, float]:
    """The speed-up of a candidate over the reference: above 1 it is faster.

    Args:
        images: Images per run of the reference and of the candidate, to compare images per second.
    Returns:
        Median, 10th and 90th percentile over the rounds of the ratio of the medians of both blocks.
    """
    ratios = [(np.median(a) / images[0]) / (np.median(b) / images[1]) for a, b in zip(reference, times, strict=True)]
    p10, median, p90 = np.percentile(ratios, [10, 50, 90])
    return dict(ratio=float(median), ratio_p10=float(p10), ratio_p90=float(p90))


def judge_noise(summary: Mapping[str, float], self_ratio: float = 1.) -> list[str]:
    """Reasons why a measurement is unreliable; none if it is reliable.

    Args:
        summary: Result of `summarise`.
        self_ratio: Ratio between both timings of the reference.
    """
    spread = summary['p90_ms'] / summary['p10_ms']
    apart = max(self_ratio, 1 / self_ratio)
    reasons = [f'noisy: the slowest tenth of the runs takes {spread:.2f} times as long as the fastest'] \
        if spread > MAX_SPREAD else []
    if apart > MAX_SELF_RATIO:
        reasons.append(f'noisy: the reference differs from itself by a factor of {apart:.2f}')
    return reasons


# Memory ---------------------------------------------------------------------------------------------------------------

def free_memory() -> None:
    """Return the memory of deleted networks to the device."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def _trace_cpu_peak(run: Run) -> int:
    """The peak of the bytes in PyTorch's CPU allocator during a run, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding='utf-8'))['traceEvents']
    changes = sorted((event['ts'], event['args']['Bytes']) for event in events if event.get('name') == '[memory]')
    return int(max(np.cumsum([0] + [size for _, size in changes])))


def measure_peak(run: Run, device: torch.device, held: int = 0) -> float | None:
    """The peak memory of PyTorch's allocator during a run, MiB; None where it cannot be measured (mps).

    Args:
        run: Runs a warmed-up candidate once.
        held: Bytes that the candidate holds between runs: its weights and its input.
    """
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before + held) / 2 ** 20
    if device.type == 'cpu':
        return (_trace_cpu_peak(run) + held) / 2 ** 20
    return None
