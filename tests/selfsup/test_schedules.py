"""Learning rate and momentum of each step are the published ones."""
import re

import pytest
import torch
from published import error, golden

from caretrans.selfsup.optimizer import build_optimizer, build_schedule
from caretrans.selfsup.pretraining import momentum_at

STEPS = {'e12_b96': 7, 'e15_b160': 11}  # per epoch
RUNS = [key.removesuffix('_lr') for key in golden('schedules') if key.endswith('_lr') and not key.startswith('probe')]


def list_rates(steps, lr, **options):
    """The rates that these steps, counted from 0, use."""
    optimizer = build_optimizer(torch.nn.Linear(1, 1), lr)
    schedule = build_schedule(optimizer, **options)
    rates = []
    for step in steps:
        if step:
            schedule.step_update(step)
        rates.append(optimizer.param_groups[0]['lr'])
    return rates


@pytest.mark.parametrize('run', RUNS)
def test_rates_and_momenta_are_the_published_ones(run):
    arrays = golden('schedules')
    epochs, batch = map(int, re.match(r'e(\d+)_b(\d+)', run).groups())
    steps, per_epoch = arrays[f'{run}_steps'].tolist(), STEPS.get(run, 1251)
    rates = list_rates(steps, .05 * batch / 256, epochs=epochs, warmup_epochs=10, steps_per_epoch=per_epoch)
    momenta = [momentum_at(step, epochs * per_epoch) for step in steps]
    assert error(rates, arrays[f'{run}_lr']) < 1e-12 and error(momenta, arrays[f'{run}_momentum']) < 1e-12


def test_rates_of_the_probe_are_the_published_ones():
    arrays = golden('schedules')
    rates = list_rates(arrays['probe_steps'].tolist(), .2, epochs=80, warmup_epochs=0, steps_per_epoch=5004)
    assert error(rates, arrays['probe_lr']) < 1e-12


def test_rates_of_the_small_run_are_those_of_the_schedule():
    wanted = golden('care_r18_small')['lrs']
    assert error(list_rates(range(len(wanted)), .1, epochs=6, warmup_epochs=1, steps_per_epoch=2), wanted) < 1e-12


def test_momentum_stays_at_the_end():
    assert momentum_at(100, 100) == momentum_at(200, 100) == 1 and momentum_at(0, 100) == .99


def test_momentum_is_off_by_no_step():
    assert momentum_at(0, 12) == .99 and momentum_at(12, 12) == 1
    wanted = golden('care_r18_small')['momenta']
    assert error([momentum_at(step, 12) for step in range(len(wanted))], wanted) < 1e-12
    assert error([momentum_at(step + 1, 12) for step in range(len(wanted))], wanted) > 1e-5
