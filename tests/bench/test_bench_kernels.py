"""The Triton kernels as a choice of benchmark.py. None of them runs here: where they seem to, PyTorch does instead."""
import csv
import functools
import json
import re
import shlex
from pathlib import Path

import caretrans.kernels
import pytest
import timm
import torch

from caretrans.bench import backends, infer, run, setups
from caretrans.bench.backends import Network, check_output, place_kernels, prepare
from caretrans.bench.config import BenchConfig, list_setups, parse_bench_config
from caretrans.bench.device_rates import DeviceRates
from caretrans.bench.setups import KERNELS, Setup, fit_setups
from caretrans.measure.sample_network import randomize

CUDA = torch.device('cuda')
ROOT = Path(__file__).parents[2]
QUICK = ['--device', 'cpu', '--img-size', 64, '--runs', 1, '--warmup', 1]


@pytest.fixture
def pretend(monkeypatch):
    """As if the kernels ran everywhere: modules become those with kernels, which on the CPU call PyTorch."""
    for module in (caretrans.kernels, setups):
        monkeypatch.setattr(module, 'why_unavailable', lambda device: '')


@pytest.fixture(scope='module')
def network():
    model, images = timm.create_model('care_s0', depths=(1, 1, 2, 2)).eval(), torch.randn(2, 3, 64, 64)
    return Network(randomize(model, images), images)


def test_without_triton_the_refusal_and_the_remark_name_the_reason(call, monkeypatch):
    monkeypatch.setattr(caretrans.kernels, 'find_spec', lambda name: None)
    refusal = call('--device', 'cpu', '--kernels', 'triton')[2]
    assert '--kernels triton with --device cpu: Triton is not installed' in refusal
    found, skipped = list_setups(BenchConfig(backend=['fused']), CUDA)
    assert [s.kernels for s in found] == ['torch'] and skipped == [
        "skipped: --kernels triton: Triton is not installed; PyTorch's own run instead."]


def test_by_default_the_fused_network_runs_with_all_kernels_that_the_device_has(pretend):
    found, skipped = list_setups(BenchConfig(backend=['eager', 'fused', 'compile', 'cudagraph']), CUDA)
    assert skipped == [] and [str(setup) for setup in found] == ['eager float32 nchw'] + [
        f'{backend} float32 channels_last{kernels}' for backend in ('fused', 'compile', 'cudagraph')
        for kernels in ('', ' triton')]
    assert [s.kernels for s in list_setups(BenchConfig(published=True), CUDA)[0]] == ['torch']
    found, _ = list_setups(BenchConfig(backend=['eager', 'fused'], kernels=['triton']), CUDA)
    assert [(s.backend, s.kernels) for s in found] == [('eager', 'torch'), ('fused', 'triton')]


def test_models_without_parts_run_with_the_kernels_of_pytorch_once(network):
    chosen = [Setup('eager'), *(Setup('fused', kernels=kernels) for kernels in KERNELS)]
    assert fit_setups(chosen, network.fused) == chosen
    assert fit_setups(chosen, timm.create_model('mlla_t', device='meta')) == chosen
    assert fit_setups(chosen, timm.create_model('mobilenetv2_035')) == chosen[:2]


def test_the_runner_names_the_kernels_that_run(network, pretend):
    for kernels in KERNELS:
        runner = prepare(network, Setup('fused', layout='channels_last', kernels=kernels))
        assert runner.kernels == kernels and check_output(network, runner, 'float32') < 5e-5
        parts = {type(module).part for module in runner.module.modules() if hasattr(type(module), 'part')}
        assert parts == ({'mixer'} if kernels == 'triton' else set()), 'attention is part of the mixer kernels'
        assert runner.notes == []
    assert not any(hasattr(type(module), 'part') for module in network.fused.modules()), 'a copy runs'


def test_where_no_kernel_runs_torch_is_named_with_the_reason(network):
    runner = prepare(network, Setup('fused', kernels='triton'))
    assert runner.kernels == 'torch' and runner.notes
    assert all('torch, the kernels run on CUDA GPUs, not on cpu' in note for note in runner.notes)


def test_parts_that_run_in_pytorch_are_noted(network, pretend, monkeypatch):
    monkeypatch.setattr(caretrans.kernels.modules, 'MAX_HEAD_CHS', 1)
    _, notes = place_kernels(network.fused, 'triton')
    caretrans.kernels.use_kernels(network.fused, parts=())
    assert len(notes) == 2
    assert all(re.fullmatch(r'\d+ x (mixer|attention): torch, heads are wider than 1 channels', note) for note in notes)


@pytest.mark.parametrize('backend, maker', [('compile', '_compile'), ('cudagraph', '_capture')])
def test_a_network_with_kernels_runs_once_before_it_is_compiled_or_captured(network, monkeypatch, backend, maker):
    runs, runs_before = [], []

    def place(model, kernels):
        model.register_forward_hook(lambda *args: runs.append(1))
        return kernels, []

    def make(model, images, setup):
        runs_before.append(len(runs))
        return (lambda: model(images)), None

    monkeypatch.setattr(backends, 'place_kernels', place)
    monkeypatch.setattr(backends, maker, make)
    for kernels in KERNELS:
        runs.clear()
        prepare(network, Setup(backend, kernels=kernels))
    assert runs_before == [0, 1]


def test_table_and_records_name_the_kernels(call, tmp_path, pretend, small):
    code, out, err = call('--model', 'mobilenetv2_035', 'care_s0', '--backend', 'eager', 'fused', '--output', tmp_path,
                          *QUICK)
    assert code == 0, err
    records = json.loads((tmp_path / 'results.json').read_text(encoding='utf-8'))['records']
    assert [(r['model'], r['backend'], r['kernels']) for r in records] == [
        ('mobilenetv2_035', 'eager', 'torch'), ('mobilenetv2_035', 'fused', 'torch'), ('care_s0', 'eager', 'torch'),
        *(('care_s0', 'fused', kernels) for kernels in KERNELS)]
    assert all(r['error'] < 5e-5 for r in records)
    with open(tmp_path / 'results.csv', newline='', encoding='utf-8') as file:
        assert [row['kernels'] for row in csv.DictReader(file)] == [r['kernels'] for r in records]
    assert re.search(r'care_s0 +fused +float32 +channels_last +triton +64 x 64 ', out)
    assert "mobilenetv2_035: no part has Triton kernels, so PyTorch's kernels run" in out


def test_profiles_are_of_each_choice_and_say_so(call, tmp_path, pretend, small, monkeypatch):
    monkeypatch.setattr(run, 'profile_call', functools.partial(run.profile_call, runs=1, warmup=1))
    monkeypatch.setattr(run, 'measure_rates', lambda device, dtype: DeviceRates(1e10, 2e10, 1e11, 5e10, 1e-6))
    code, _, err = call('--bench', 'profile', '--model', 'care_s0', '--backend', 'fused', '--img-size', 64, '--kernels',
                        'torch', 'triton', '--device', 'cpu', '--output', tmp_path)
    assert code == 0, err
    profiles = json.loads((tmp_path / 'results.json').read_text(encoding='utf-8'))['profiles']
    assert {title.split(',')[0]: rows[0]['kernels'] for title, rows in profiles.items()} == {
        'care_s0 fused float32 channels_last': 'torch', 'care_s0 fused float32 channels_last triton': 'triton'}


@pytest.mark.parametrize('bench', ['infer', 'profile'])
def test_on_a_cpu_a_remark_says_which_kernels_run(call, tmp_path, monkeypatch, bench):
    monkeypatch.setattr(infer, 'build_network', None)  # measures nothing
    monkeypatch.setattr(run, '_profile_all', lambda *args: None)
    code, out, _ = call('--bench', bench, '--model', 'care_s0', '--backend', 'fused', '--device', 'cpu', '--output',
                        tmp_path)
    assert code == (bench == 'infer') and out.count(
        "--kernels triton: the kernels run on CUDA GPUs, not on cpu; PyTorch's own run instead") == 1


def test_the_commands_for_a_gpu_are_those_of_the_page_and_are_accepted(pretend):
    """docs/gpu.md has a table of the steps of cmd/benchmark_gpu.sh."""
    page, script = (
        (ROOT / path).read_text(encoding='utf-8') for path in ('docs/gpu.md', 'cmd/benchmark_gpu.sh'))
    table = dict(re.findall(r'^\| `(\w+)` \| `python (.*?)` \|', page, re.MULTILINE))
    script = script.replace('"${models[@]}"', 'care_s0 care_s1 care_s2')
    steps = {name: f'benchmark.py --device cuda {flags}'
             for name, flags in re.findall(r'^bench (\w+) (.*)$', script, re.MULTILINE)}
    steps['tests'] = re.search(r'^step tests "\$python" (.*)$', script, re.MULTILINE)[1]
    assert len(table) >= 7 and {name: sorted(line.split()) for name, line in table.items()} == {
        name: sorted(line.split()) for name, line in steps.items()}
    assert all((ROOT / word).is_file() for word in steps.pop('tests').split() if word.endswith('.py'))
    for line in steps.values():
        config = parse_bench_config(shlex.split(line)[1:])
        found, skipped = list_setups(config, CUDA)
        if config.bench != 'train':
            assert config.list_models() and skipped == [] and str(found[0]) == 'eager tf32 nchw'
            assert {s.kernels for s in found} == ({'torch'} if config.published else set(KERNELS))
