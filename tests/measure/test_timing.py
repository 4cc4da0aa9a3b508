"""Timing: who runs when, what is made of the times, when a measurement is called noisy. No test asserts a speed."""
import gc
from collections import Counter

import pytest
import torch

from caretrans.measure import timing
from caretrans.measure.timing import (
    CandidateError, compare_rounds, judge_noise, measure_peak, summarise, time_block, time_interleaved)

CPU = torch.device('cpu')


def test_candidates_take_turns_in_blocks_and_random_order():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in 'abc'}
    times = time_interleaved(runs, CPU, dict(a=2, b=2, c=3), rounds=8)
    assert {name: [len(block) for block in rounds] for name, rounds in times.items()} == dict(
        a=[2] * 8, b=[2] * 8, c=[3] * 8)
    rounds = [calls[start:start + 7] for start in range(0, 56, 7)]
    assert all(Counter(names) == dict(a=2, b=2, c=3) for names in rounds)
    assert all(''.join(names).count(name * count) == 1 for names in rounds for name, count in dict(a=2, c=3).items())
    assert len({tuple(names) for names in rounds}) > 1
    calls.clear()
    time_interleaved(runs, CPU, dict(a=2, b=2, c=3), rounds=8)
    assert [calls[start:start + 7] for start in range(0, 56, 7)] == rounds, 'the order is that of the seed'


def test_the_time_of_each_run_is_taken_alone(monkeypatch):
    clock = iter([0., 1., 10., 12., 20., 24.])
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(clock))
    assert time_block(lambda: None, 3, CPU) == [1., 2., 4.]


def test_the_candidate_that_fails_is_named_and_the_collector_runs_again():
    def fail():
        raise MemoryError('no')

    assert gc.isenabled()
    with pytest.raises(CandidateError, match='broken') as error:
        time_interleaved({'fine': int, 'broken': fail}, CPU, {'fine': 1, 'broken': 1})
    assert error.value.name == 'broken' and isinstance(error.value.__cause__, MemoryError) and gc.isenabled()


def test_each_block_is_reported():
    steps = []
    time_interleaved({'a': int, 'b': int}, CPU, dict(a=1, b=1), rounds=3, report=lambda: steps.append(1))
    assert len(steps) == 6


def test_percentiles_are_over_all_runs():
    times = [[0.001 * n for n in range(1, 51)], [0.001 * n for n in range(51, 102)]]
    assert summarise(times) == pytest.approx(dict(median_ms=51, p10_ms=11, p90_ms=91, mean_ms=51))


def test_ratios_are_of_blocks_of_the_same_round():
    """The machine is 3 times as slow in one round, for both: the ratio does not see it."""
    slow = [1., 3., 1., 1.]
    ratios = compare_rounds([[2. * s] for s in slow], [[1. * s] for s in slow])
    assert ratios == dict(ratio=2., ratio_p10=2., ratio_p90=2.)
    assert compare_rounds([[1.]], [[1.]], images=(64, 32))['ratio'] == 0.5, 'the same time for half of the images'
    one_slow_run = compare_rounds([[1., 1., 9.]], [[1., 1., 1.]])
    assert one_slow_run['ratio'] == 1., 'of a block the median counts'


@pytest.mark.parametrize('p90, self_ratio, reasons', [
    (11., 1., []), (14., 1., ['the slowest tenth of the runs takes 1.40 times']),
    (11., 1.1, ['differs from itself by a factor of 1.10']), (11., 0.9, ['by a factor of 1.11']),
    (14., 0.9, ['1.40 times', '1.11'])])
def test_a_noisy_measurement_says_so(p90, self_ratio, reasons):
    found = judge_noise(dict(p10_ms=10., p90_ms=p90), self_ratio)
    assert len(found) == len(reasons) and all(part in text for part, text in zip(reasons, found, strict=True))
    assert all(text.startswith('noisy: ') for text in found)


def test_peak_memory_counts_simultaneous_allocations():
    mib = torch.zeros(256, 1024)

    def run():
        first = mib + 1
        second = first + 1  # 2 MiB now
        del first
        return (second + 1).sum()  # and again

    assert measure_peak(run, CPU) == pytest.approx(2, abs=0.01)
    assert measure_peak(run, CPU, held=2 ** 20) == pytest.approx(3, abs=0.01)
    assert measure_peak(run, torch.device('mps')) is None
