"""The Triton kernels as a choice of benchmark.py. Here none runs: where they seem to, PyTorch does in their place."""
import ast
import csv
import json
import re
import shlex
from pathlib import Path

import caretrans.kernels
import pytest
import timm
import torch

import benchmark
from caretrans.bench import backends, kernel_choice, training_ways
from caretrans.bench.backends import Network, Setup, check_output, check_setup, fit_setups, prepare
from caretrans.bench.config import BenchConfig, list_setups, parse_bench_config
from caretrans.bench.kernel_choice import KERNELS, place_kernels
from caretrans.bench.learning import list_comparisons
from caretrans.measure.names import expand_models
from caretrans.bench.operations import OUR_KERNELS, classify_operation
from caretrans.errors import ConfigError
from caretrans.measure.sample_network import randomize

CPU, CUDA = torch.device('cpu'), torch.device('cuda')
ROOT = Path(benchmark.__file__).parent
SOURCES = sorted(Path(caretrans.kernels.__file__).parent.glob('*.py'))


@pytest.fixture
def call(monkeypatch, capsys):
    """Run benchmark.py in this process, on the CPU: its exit code, stdout and stderr."""
    def main(*flags):
        monkeypatch.setattr('sys.argv', ['benchmark.py', '--device', 'cpu', *map(str, flags)])
        code = benchmark.main()
        return code, *capsys.readouterr()
    return main


@pytest.fixture
def pretend(monkeypatch):
    """As if the kernels ran everywhere: modules become those with kernels, which on the CPU call PyTorch."""
    for module in (caretrans.kernels, kernel_choice):
        monkeypatch.setattr(module, 'why_unavailable', lambda device: '')


def make_network(name='care_s0', size=64):
    model, images = timm.create_model(name).eval(), torch.randn(2, 3, size, size)
    return Network(randomize(model, images), images)


@pytest.fixture(scope='module')
def network():
    return make_network()


# Asked for ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, message', [
    (['--kernels', 'triton'], '--kernels triton with --device cpu: the kernels run on CUDA GPUs, not on cpu: take'),
    (['--kernels', 'torch', 'triton+expansion', '--backend', 'fused'], '--kernels triton.expansion with --device cpu'),
    (['--kernels', 'triton', '--backend', 'eager', 'openvino'],
     '--kernels triton with --backend eager: they are for fused, compile, cudagraph'),
    (['--kernels', 'cuda'], "invalid choice: 'cuda'"), (['--kernels', 'torch', 'torch'], 'name each once'),
    (['--kernels', 'torch', '--published'], '--published fixes --kernels')])
def test_kernels_that_cannot_run_are_refused(call, flags, message):
    code, out, err = call(*flags)
    assert code == 2 and out == '' and re.search(message, err) and err.count('\n') == 1


def test_without_triton_that_is_what_the_refusal_and_the_remark_say(call, monkeypatch):
    monkeypatch.setattr(caretrans.kernels, 'find_spec', lambda name: None)
    assert '--kernels triton with --device cpu: Triton is not installed' in call('--kernels', 'triton')[2]
    setups, left_out = list_setups(BenchConfig(backend=['fused']), CUDA)
    assert [s.kernels for s in setups] == ['torch'] and left_out == [
        'left out: --kernels triton, triton+expansion: Triton is not installed; those of PyTorch run.']


@pytest.mark.parametrize('setup', [Setup('eager', kernels='triton'), Setup('fused', kernels='triton')])
def test_setups_with_kernels_that_cannot_run_are_refused(setup):
    with pytest.raises(ConfigError, match='--kernels triton with'):
        check_setup(setup)


def test_by_default_the_rewritten_network_runs_with_all_kernels_that_the_device_has(pretend):
    setups, left_out = list_setups(BenchConfig(backend=['eager', 'fused', 'compile', 'cudagraph']), CUDA)
    assert left_out == [] and [str(setup) for setup in setups] == ['eager float32 nchw'] + [
        f'{backend} float32 channels_last{kernels}' for backend in ('fused', 'compile', 'cudagraph')
        for kernels in ('', ' triton', ' triton+expansion')]
    assert [s.kernels for s in list_setups(BenchConfig(published=True), CUDA)[0]] == ['torch']
    setups, _ = list_setups(BenchConfig(backend=['eager', 'fused'], kernels=['triton']), CUDA)
    assert [(s.backend, s.kernels) for s in setups] == [('eager', 'torch'), ('fused', 'triton')]


def test_models_without_parts_run_with_the_kernels_of_pytorch_once(network):
    setups = [Setup('eager'), *(Setup('fused', kernels=kernels) for kernels in KERNELS)]
    assert fit_setups(setups, network.fused) == setups
    assert fit_setups(setups, timm.create_model('mobilenetv2_035')) == setups[:2]


def test_kernels_for_parts_that_a_model_has_not_are_not_run_as_another_choice():
    setups = [Setup('fused', kernels=kernels) for kernels in KERNELS]
    model = timm.create_model('mlla_t', device='meta')
    assert fit_setups(setups, model) == [Setup('fused'), Setup('fused', kernels='triton')]
    assert fit_setups(setups[2:], model) == [Setup('fused', kernels='triton')]


# What ran -------------------------------------------------------------------------------------------------------------

def test_the_runner_says_which_kernels_run(network, pretend):
    for kernels in KERNELS:
        runner = prepare(network, Setup('fused', layout='channels_last', kernels=kernels))
        assert runner.kernels == kernels and check_output(network, runner, 'float32') < 5e-5
        parts = {type(module).part for module in runner.module.modules() if hasattr(type(module), 'part')}
        assert parts == set(KERNELS[kernels]) - {'attention'}, 'that of the mixers is part of their kernels'
        assert runner.notes == []
    assert not any(hasattr(type(module), 'part') for module in network.fused.modules()), 'what runs is a copy'


def test_where_none_of_the_kernels_runs_torch_is_named_with_the_reason(network):
    runner = prepare(network, Setup('fused', kernels='triton'))
    assert runner.kernels == 'torch'
    assert all('torch, the kernels run on CUDA GPUs, not on cpu' in note for note in runner.notes) and runner.notes


def test_parts_that_stay_with_pytorch_are_noted(network, pretend, monkeypatch):
    monkeypatch.setattr(caretrans.kernels.modules, 'MAX_HEAD_CHS', 1)
    ran, notes = place_kernels(network.fused, 'triton+expansion')
    place_kernels(network.fused, 'torch')
    caretrans.kernels.use_kernels(network.fused, parts=())
    assert ran == 'triton+expansion' and len(notes) == 2
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
    assert runs_before == [0, 1, 1]


def test_table_and_records_name_the_kernels(call, tmp_path, pretend):
    code, out, err = call(
        '--model', 'mobilenetv2_035', 'care_s0', '--backend', 'eager', 'fused', '--img-size', 64, '--runs', 2,
        '--warmup', 1, '--output', tmp_path)
    assert code == 0, err
    records = json.loads((tmp_path / 'results.json').read_text())['records']
    assert [(r['model'], r['backend'], r['kernels']) for r in records] == [
        ('mobilenetv2_035', 'eager', 'torch'), ('mobilenetv2_035', 'fused', 'torch'), ('care_s0', 'eager', 'torch'),
        *(('care_s0', 'fused', kernels) for kernels in KERNELS)]
    assert all(r['error'] < 5e-5 for r in records)
    with open(tmp_path / 'results.csv', newline='') as file:
        assert [row['kernels'] for row in csv.DictReader(file)] == [r['kernels'] for r in records]
    assert re.search(r'care_s0 +fused +float32 +channels_last +triton\+expansion +64 x 64 ', out)
    assert 'mobilenetv2_035: no part of it has Triton kernels, those of PyTorch run' in out


def test_profiles_are_of_each_choice_and_say_so(call, tmp_path, pretend):
    code, _, err = call(
        '--bench', 'profile', '--model', 'care_s0', '--backend', 'fused', '--img-size', 64, '--kernels', 'torch',
        'triton', '--output', tmp_path)
    assert code == 0, err
    profiles = json.loads((tmp_path / 'results.json').read_text())['profiles']
    assert {title.split(',')[0]: rows[0]['kernels'] for title, rows in profiles.items()} == {
        'care_s0 fused float32 channels_last': 'torch', 'care_s0 fused float32 channels_last triton': 'triton'}


def test_on_a_processor_a_remark_says_which_kernels_run(call, tmp_path):
    for bench in ('infer', 'profile'):
        code, out, _ = call('--bench', bench, '--model', 'care_s0', '--backend', 'fused', '--img-size', 64,
                            *['--runs', 2] * (bench == 'infer'), '--output', tmp_path)
        assert code == 0 and out.count(
            '--kernels triton, triton+expansion: the kernels run on CUDA GPUs, not on cpu; those of PyTorch run') == 1


# Commands of the document ---------------------------------------------------------------------------------------------

def read_commands():
    """{step: command line} of the table in docs/gpu.md, and those of cmd/benchmark_gpu.sh."""
    table = dict(re.findall(r'^\| `(\w+)` \| `python (.*?)` \|', (ROOT / 'docs' / 'gpu.md').read_text(), re.MULTILINE))
    script = (ROOT / 'cmd' / 'benchmark_gpu.sh').read_text().replace('"${models[@]}"', 'care_s0 care_s1 care_s2')
    steps = {name: f'benchmark.py --device cuda {flags}'
             for name, flags in re.findall(r'^bench (\w+) (.*)$', script, re.MULTILINE)}
    tests = re.search(r'^step tests "\$python" (.*)$', script, re.MULTILINE)[1]
    return table, dict(tests=tests, **steps)


def test_the_document_and_the_script_run_the_same():
    table, script = read_commands()
    assert len(table) == 8 and {name: sorted(line.split()) for name, line in table.items()} == {
        name: sorted(line.split()) for name, line in script.items()}


def test_the_commands_for_a_gpu_are_accepted(pretend, monkeypatch):
    monkeypatch.setattr(training_ways, 'why_unavailable', lambda device: '')
    for name, line in read_commands()[0].items():
        if name == 'tests':
            assert all((ROOT / word).is_file() for word in line.split() if word.endswith('.py'))
            continue
        config = parse_bench_config(shlex.split(line)[1:])
        models, (setups, left_out) = expand_models(config.model), list_setups(config, CUDA)
        if config.bench == 'curves':
            assert [way for _, way in list_comparisons(config, models, CUDA)] == ['channels_last+bf16+compile+kernels']
        elif config.bench != 'train':
            assert left_out == [] and str(setups[0]) == 'eager tf32 nchw'
            assert {s.kernels for s in setups} == ({'torch'} if config.published else set(KERNELS))


# Names ----------------------------------------------------------------------------------------------------------------

def list_launched(tree):
    """Kernels that a source launches, kernel[grid](...), which are those under @triton.jit."""
    jitted = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
              and any(ast.unparse(decorator) == 'triton.jit' for decorator in node.decorator_list)}
    return {node.func.value.id for node in ast.walk(tree) if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)} & jitted


def list_operators(tree):
    return {node.args[0].value for node in ast.walk(tree) if isinstance(node, ast.Call)
            and ast.unparse(node.func) == 'torch.library.custom_op'}


def test_profiles_know_every_kernel_and_operator_of_ours_and_no_others():
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    kernels, operators = (set().union(*map(find, trees)) for find in (list_launched, list_operators))
    assert kernels and operators and set(OUR_KERNELS) == kernels | operators
    assert all(classify_operation(name) == kind for name, kind in OUR_KERNELS.items())
