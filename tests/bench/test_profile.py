"""Profiles: every module has its part and its kind, and the cells sum up to the call. No test asserts a speed."""
import time
from functools import partial

import caretrans.kernels
import pytest
import timm
import torch
import torch.nn as nn
from reference import filled_model

from caretrans.bench.profile import KINDS, describe_profile, find_attention, list_profile, profile_call
from caretrans.bench.record import Record
from caretrans.fuse import fuse
from caretrans.measure.counts import OUTSIDE, list_parts

CPU = torch.device('cpu')
IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """One module of each kind, in known parts."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.GELU()), nn.Conv2d(8, 4, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stages(self.stem(x))
        return self.head((x + x).mean((2, 3)))


def profile(model, images=IMAGES, runs=1):
    with torch.inference_mode():
        return profile_call(partial(model, images), CPU, model, runs, warmup=1)


@pytest.fixture(scope='module')
def care():
    return filled_model('care_s0', depths=(1, 1, 2, 1))


@pytest.fixture(scope='module')
def care_profile(care):
    return profile(care, runs=2)


def test_modules_of_a_known_network_land_in_their_cells():
    cells = profile(Tiny().eval(), runs=2).cells
    assert set(cells) == {
        ('stem', 'conv other'), ('stages.0', 'conv depth-wise'), ('stages.0', 'normalisation'),
        ('stages.0', 'activation'), ('stages.0', 'rest'), ('stages.1', 'conv 1x1'), (OUTSIDE, 'rest'),
        ('head', 'linear')}
    assert all(ms > 0 for ms in cells.values())


def test_every_part_of_care_s0_has_its_kinds(care_profile):
    cells = {cell for cell, ms in care_profile.cells.items() if ms > 0}
    local = {(f'stages.{stage}', kind) for stage in range(4) for kind in (
        'conv 1x1', 'conv depth-wise', 'activation', 'normalisation', 'rest')}
    assert local | {('stages.2', 'attention'), ('stages.3', 'attention'), ('head', 'linear'), ('head_dist', 'linear'),
                    ('stem', 'conv other')} <= cells
    assert {kind for _, kind in cells} <= set(KINDS)


def test_the_cells_are_the_time_of_the_profiled_call(care_profile):
    """No module is missing or counted twice: with the rest, the sum is the time of the call."""
    assert 0.9 < care_profile.busy_ms / care_profile.profiled_ms < 1.1  # medians of cells and of calls
    assert sum(care_profile.sum_by(0).values()) == pytest.approx(care_profile.busy_ms)
    assert sum(care_profile.sum_by(1).values()) == pytest.approx(care_profile.busy_ms)


def test_a_slow_module_has_its_time_and_those_around_it_have_not(care):
    handle = care.stages[2].blocks[0].mixer.local_7x7.register_forward_hook(lambda *_: time.sleep(0.2))
    try:
        slow = profile(care)
    finally:
        handle.remove()
    assert slow.modules['stages.2', 'conv depth-wise', 'stages.2.blocks.0.mixer.local_7x7'] > 200
    assert slow.cells['stages.2', 'conv depth-wise'] > 200 > slow.busy_ms - slow.cells['stages.2', 'conv depth-wise']


def test_every_convolution_is_timed(care, care_profile):
    convolutions = {name for name, module in care.named_modules() if isinstance(module, nn.Conv2d)}
    assert {name for (_, kind, name), ms in care_profile.modules.items()
            if kind.startswith('conv') and ms > 0} == convolutions


def test_the_hooks_are_removed_and_outputs_unchanged(care):
    with torch.no_grad():
        before = care(IMAGES)
        profile(care)
        assert torch.equal(care(IMAGES), before)
    calls = iter(range(100))

    def call():
        if next(calls) == 2:
            raise RuntimeError('broken')
        care(IMAGES)

    with pytest.raises(RuntimeError, match='broken'):
        profile_call(call, CPU, care, runs=1, warmup=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in care.modules())


def test_a_fused_network_has_the_same_parts_and_no_normalisation_in_its_stages(care):
    cells = {cell for cell, ms in profile(fuse(care)).cells.items() if ms > 0}
    assert {('stages.2', 'attention'), ('stages.0', 'conv depth-wise'), ('head', 'linear')} <= cells
    assert not any(part.startswith('stages') for part, kind in cells if kind == 'normalisation')


def test_modules_with_kernels_are_kinds_of_their_own(care, monkeypatch):
    monkeypatch.setattr(caretrans.kernels, 'why_unavailable', lambda device: '')
    try:
        caretrans.kernels.use_kernels(care)
        assert profile(care).cells['stages.2', 'mixer'] > 0
    finally:
        caretrans.kernels.use_kernels(care, parts=())


def test_a_call_without_a_network_is_outside_of_the_parts():
    assert set(profile_call(lambda: None, CPU, runs=2).cells) == {(OUTSIDE, 'rest')}


@pytest.mark.parametrize('name, size, attention', [
    ('fastvit_t8', 64, 0), ('mobilenetv2_035', 64, 0), ('deit_tiny_patch16_224', 224, 12)])
def test_models_of_timm_are_profiled_too(name, size, attention):
    model = timm.create_model(name).eval()
    found = profile(model, torch.randn(1, 3, size, size))
    assert set(list_parts(model)) & {part for part, _ in found.cells}
    assert len(find_attention(model)) == attention and bool(found.sum_by(1).get('attention')) == bool(attention)


def test_the_table_and_the_records_agree_with_the_cells(care_profile):
    table = describe_profile(care_profile, top=3)
    records = list_profile(care_profile, Record(model='care_s0', backend='eager', batch=1, height=64, width=64))
    assert all(part in table for part, _ in care_profile.cells) and 'conv depth-wise' in table
    assert 'with the hooks of the profiler' in table and 'The longest modules' in table
    assert sum(record.share for record in records) == pytest.approx(1)
    assert {(record.part, record.kind): record.ms for record in records} == care_profile.cells
    assert all(record.model == 'care_s0' and record.bench == 'profile' and record.runs == 2 for record in records)


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match='runs=0 must be at least 1'):
        profile_call(lambda: None, CPU, runs=0)
