"""Where the time goes: every operation finds its part and its kind, and no time is lost. No test asserts a speed."""
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from reference import filled_model
from torch.autograd import DeviceType

from caretrans.bench.operations import KINDS, classify_operation, find_attention
from caretrans.bench.profiling import (
    IN_ATTENTION, MARK, RUN, _sum_events, describe_profile, list_profile, profile_call, profile_forward)
from caretrans.fuse import fuse
from caretrans.measure.counts import OUTSIDE, list_parts

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """One operation of each kind, in known parts."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.GELU()), nn.Conv2d(8, 4, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stages(self.stem(x))
        return self.head((x + x).mean((2, 3)))


@pytest.fixture(scope='module')
def care_profile():
    return profile_forward(filled_model('care_s0'), IMAGES, runs=2, warmup=1)


def test_operations_of_a_known_network_land_in_their_cells():
    cells = profile_forward(Tiny().eval(), IMAGES, runs=2).cells
    expected = {('stem', 'conv other'), ('stages.0', 'conv depth-wise'), ('stages.0', 'normalisation'),
                ('stages.0', 'activation'), ('stages.1', 'conv 1x1'), (OUTSIDE, 'element-wise'), ('head', 'linear')}
    assert {cell for cell in cells if cell[1] not in ('rest', 'copies')} == expected  # oneDNN may copy
    assert all(cells[cell] > 0 for cell in expected)


def test_every_part_of_care_s0_has_its_kinds(care_profile):
    cells = {cell for cell, ms in care_profile.cells.items() if ms > 0}
    for stage in range(4):
        assert {(f'stages.{stage}', kind) for kind in
                ('conv 1x1', 'conv depth-wise', 'activation', 'normalisation', 'copies')} <= cells
    assert {cell[0] for cell in cells if cell[1] == 'attention'} == {'stages.2', 'stages.3'}
    assert {('head', 'linear'), ('head_dist', 'linear'), ('stem', 'conv other')} <= cells
    assert {kind for _, kind in cells} <= set(KINDS)


def test_the_cells_are_the_time_of_the_profiled_call(care_profile):
    """No operation is lost or counted twice: the sum is near the time of the call, which contains it."""
    assert 0.5 < care_profile.busy_ms / care_profile.profiled_ms < 1.3  # medians of cells and of calls
    assert sum(care_profile.sum_by(0).values()) == pytest.approx(care_profile.busy_ms)
    assert sum(care_profile.sum_by(1).values()) == pytest.approx(care_profile.busy_ms)


def test_calls_of_convolutions_are_counted_as_often_as_they_are(care_profile):
    convolutions = sum(isinstance(module, nn.Conv2d) for module in timm.create_model('care_s0').modules())
    calls = sum(calls for (kind, name, _), (_, calls) in care_profile.operations.items() if name == 'aten::conv2d')
    assert calls == convolutions


def test_the_hooks_are_gone_afterwards_and_outputs_stay():
    model = filled_model('care_s0')
    with torch.no_grad():
        before = model(IMAGES)
        profile_forward(model, IMAGES, runs=1)
        assert torch.equal(model(IMAGES), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_call_that_fails_leaves_no_hooks():
    model, calls = Tiny().eval(), iter(range(100))

    def call():
        if next(calls) == 2:
            raise RuntimeError('broken')
        model(IMAGES)

    with pytest.raises(RuntimeError, match='broken'):
        profile_call(call, torch.device('cpu'), model, runs=1, warmup=1)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_backward_pass_is_told_by_the_part_of_the_forward_pass():
    model = Tiny().train()
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        F.cross_entropy(model(IMAGES.expand(4, -1, -1, -1)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()

    profile = profile_call(step, torch.device('cpu'), model, runs=2)
    operations = {(kind, name) for kind, name, _ in profile.operations}
    for kind in ('conv 1x1', 'conv depth-wise', 'conv other'):
        assert (kind, 'aten::convolution_backward') in operations
    assert not any(part == OUTSIDE and kind.startswith('conv') for part, kind in profile.cells)
    assert profile.cells[OUTSIDE, 'optimizer'] > 0


def test_a_fused_network_has_the_same_parts_and_no_normalisation_in_its_stages():
    profile = profile_forward(fuse(filled_model('care_s0')), IMAGES, runs=1, warmup=1)
    cells = {cell for cell, ms in profile.cells.items() if ms > 0}
    assert {('stages.2', 'attention'), ('stages.0', 'conv depth-wise'), ('head', 'linear')} <= cells
    found = {part for part, kind in cells if kind == 'normalisation'}
    assert {'head'} <= found <= {'head', 'norm'}  # the second is an identity, of which its call alone is seen


@pytest.mark.parametrize('name', ['fastvit_t8', 'mobilenetv2_035', 'deit_tiny_patch16_224'])
def test_models_of_timm_are_profiled_too(name):
    size = 224 if 'deit' in name else 64
    model = timm.create_model(name).eval()
    profile = profile_forward(model, torch.randn(1, 3, size, size), runs=1, warmup=1)
    assert set(list_parts(model)) & {part for part, _ in profile.cells}
    if 'deit' in name:
        assert profile.sum_by(1)['attention'] > 0 and len(list(find_attention(model))) == 12


def test_the_table_and_the_records_say_what_the_cells_say(care_profile):
    table = describe_profile(care_profile, top=3)
    records = list_profile(care_profile, model='care_s0', backend='eager')
    assert all(part in table for part, _ in care_profile.cells) and 'conv depth-wise' in table
    assert 'under the profiler' in table and 'The longest operations' in table
    assert sum(record['share'] for record in records) == pytest.approx(1)
    assert {(record['part'], record['kind']): record['ms'] for record in records} == care_profile.cells
    assert all(record['model'] == 'care_s0' and record['bench'] == 'profile' for record in records)


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match='runs=0, it must be at least 1'):
        profile_call(lambda: None, torch.device('cpu'), runs=0)


@pytest.mark.parametrize('name, shapes, kind', [
    ('aten::conv2d', [[1, 24, 8, 8], [48, 24, 1, 1], [48]], 'conv 1x1'),
    ('aten::conv2d', [[1, 24, 8, 8], [24, 1, 7, 7], [24]], 'conv depth-wise'),
    ('aten::conv2d', [[1, 1, 8, 8], [24, 1, 7, 7], [24]], 'conv other'),
    ('aten::convolution_backward', [[1, 48, 8, 8], [1, 24, 8, 8], [48, 24, 1, 1]], 'conv 1x1'),
    ('mkldnn::_convolution_pointwise_', [[1, 24, 8, 8], [1, 48, 8, 8], [24, 48, 1, 1]], 'conv 1x1'),
    ('aten::bmm', (), 'attention'), ('aten::scaled_dot_product_attention', (), 'attention'),
    ('aten::addmm', (), 'linear'), ('aten::gelu_backward', (), 'activation'),
    ('aten::native_batch_norm', (), 'normalisation'), ('ConvolutionBackward0', [[1, 48, 8, 8]], None),
    ('aten::_to_copy', (), 'copies'), ('aten::cat', (), 'copies'), ('aten::add_', (), 'element-wise'),
    ('autograd::engine::evaluate_function: MmBackward0', (), 'linear'),
    ('graph_0_cpp_fused_convolution_0', (), 'generated'), ('triton_poi_fused_gelu_0', (), 'generated'),
    ('void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>', (), 'activation'),
    ('caretrans::mix_with_strips_backward', (), 'conv depth-wise'), ('_convolve', (), 'conv depth-wise'),
    ('caretrans::mix_with_attention', (), 'attention'), ('caretrans::expand', (), 'conv 1x1'),
    ('aten::expand', (), None), ('sm90_xmma_gemm_bf16', (), 'conv or product'),
    ('aten::view', (), None), ('aten::normal_', (), None),
])
def test_names_and_shapes_tell_the_kind(name, shapes, kind):
    assert classify_operation(name, shapes) == kind


# Events as a GPU gives them -------------------------------------------------------------------------------------------

def event(name, start, parent=None, kernels=(), device=DeviceType.CPU, microseconds=0., shapes=(), annotation=False):
    return SimpleNamespace(
        name=name, cpu_parent=parent, kernels=[SimpleNamespace(name=n, duration=d) for n, d in kernels],
        device_type=device, is_user_annotation=annotation, input_shapes=shapes, sequence_nr=-1, fwd_thread=0, thread=1,
        self_cpu_time_total=999., time_range=SimpleNamespace(start=start, elapsed_us=lambda: microseconds))


def on_gpu(name, start, microseconds, **kwargs):
    return event(name, start, device=DeviceType.CUDA, microseconds=microseconds, **kwargs)


def test_kernels_of_one_operation_of_ours_are_told_apart():
    run = event(RUN, 0)
    mix = event('caretrans::mix_with_attention', 1, event(f'{MARK}stages.3', 1, run),
                [('_forward', 2000.), ('_convolve', 1000.), ('FillFunctor', 500.)])
    cells, _ = _sum_events([run, mix.cpu_parent, mix], True, 1)
    assert cells == {('stages.3', 'attention'): 2.5, ('stages.3', 'conv depth-wise'): 1.}


def test_kernels_are_told_by_the_operations_that_launched_them_and_those_of_a_graph_by_name():
    run, other = event(RUN, 0), event(RUN, 100)
    stage = event(f'{MARK}stages.2', 1, run)
    attention = event(IN_ATTENTION, 2, stage)
    conv = event('aten::conv2d', 3, attention, [('implicit_gemm', 2000.)], shapes=[[1, 8, 4, 4], [16, 8, 1, 1]])
    product = event('aten::bmm', 4, attention, [('sgemm', 500.)])
    gelu = event('aten::gelu', 5, stage, [('GeluCUDAKernelImpl', 100.)])
    kernels = [on_gpu('implicit_gemm', 6, 2000.), on_gpu('sgemm', 7, 500.), on_gpu('GeluCUDAKernelImpl', 8, 100.),
               on_gpu('triton_poi_fused_add_0', 9, 300.), on_gpu(stage.name, 1, 5000., annotation=True),
               on_gpu('triton_poi_fused_add_0', 101, 300.)]
    cells, operations = _sum_events([run, other, stage, attention, conv, product, gelu, *kernels], True, 2)
    assert cells == {  # medians of a run that has them and one that has not, but for the kernel of the graph
        ('stages.2', 'conv 1x1'): 1., ('stages.2', 'attention'): .25, ('stages.2', 'activation'): .05,
        (OUTSIDE, 'generated'): .3}
    assert operations['generated', 'triton_poi_fused_add_0', ''] == (.3, 1.)
