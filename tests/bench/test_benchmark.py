"""benchmark.py: what it is asked for, what it does when something fails, and what it writes."""
import csv
import json
import re
from pathlib import Path

import pytest
import torch
from launch import run
from reference import published_state_dict

import benchmark
from caretrans.bench import config as bench_config, inference
from caretrans.bench.backends import BACKENDS, WrongOutputError, prepare
from caretrans.bench.config import BenchConfig, list_setups, parse_bench_config
from caretrans.measure.names import expand_models
from caretrans.measure.published import PUBLISHED, find_published, list_footnotes, list_paper_models, mark_accuracy
from caretrans.bench.readme import BEGIN, END, check_readme
from caretrans.bench.report import describe_counts
from caretrans.errors import ConfigError
from caretrans.measure.timing import is_out_of_memory

README = Path(__file__).parents[2] / 'README.md'
CPU = torch.device('cpu')
QUICK = ['--device', 'cpu', '--img-size', '64', '--runs', '2', '--warmup', '1']


def read(folder):
    with open(folder / 'results.csv', newline='') as file:
        return json.loads((folder / 'results.json').read_text()), list(csv.DictReader(file))


# Refused --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, message', [
    (['--model', 'care_s9'], '--model care_s9: no such model, the nearest are care_s'),
    (['--model', 'mobilnetv2_100'], 'mobilenetv2_100'), (['--model', 'nothing*'], '--model nothing.: no such model'),
    (['--backend', 'tensorrt'], 'tensorrt'), (['--backend', 'all', 'eager'], 'all stands alone'),
    (['--backend', 'eager', 'eager'], 'name each once'), (['--frobnicate'], 'frobnicate'),
    (['--dtype', 'int8', '--backend', 'eager'], '--dtype int8 with --backend eager'),
    (['--dtype', 'tf32'], '--dtype tf32 with --device cpu: no backend'),
    (['--backend', 'cudagraph'], '--backend cudagraph with --device cpu'),
    (['--backend', 'openvino', '--channels-last'], 'it chooses its own order'),
    (['--img-size', '16'], "img_size is '16'"), (['--img-size', '224x'], 'HEIGHTxWIDTH'),
    (['--batch-size', '0'], 'batch_size is 0'), (['--threads', '0'], 'threads is 0'), (['--runs', 'many'], 'many'),
    (['--published', '--batch-size', '8'], '--published fixes --batch-size'),
    (['--checkpoint', 'x.pth', '--model', 'care_*'], 'with 3 models'),
    (['--checkpoint', 'x.pth', '--model', 'care_*', '--bench', 'profile'], 'with 3 models'),
    (['--checkpoint', 'not/there.pth'], 'not/there.pth'), (['--check', '--readme', 'none.md'], 'none.md is not there'),
])
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(call, flags, message):
    code, out, err = call('--device', 'cpu', *flags)
    assert code == 2 and out == '' and re.search(message, err)
    assert err.count('\n') == 1 and err.startswith('benchmark.py: ')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here')
def test_a_gpu_that_is_not_there_is_refused(call):
    assert call('--device', 'cuda')[0::2] == (2, 'benchmark.py: device=cuda, but there is only cpu here.\n')


@pytest.mark.parametrize('flags, message', [
    (['--output', 'FILE'], '--output .*README.md: .* is not a folder'), (['--plots', 'FILE/here'], '--plots .*here: '),
    (['--update', '--readme', 'FILE'], 'has no place for the tables'),
    (['--update', '--readme', 'none.md'], 'none.md is not a file that can be written')])
def test_what_cannot_be_written_is_refused_before_anything_is_measured(call, tmp_path, monkeypatch, flags, message):
    file = tmp_path / 'README.md'
    file.write_text('no markers\n')
    monkeypatch.setattr(benchmark, 'run_benches', None)
    code, out, err = call(*[flag.replace('FILE', str(file)) for flag in flags])
    assert code == 2 and out == '' and re.search(message, err) and err.count('\n') == 1


# What is asked for ----------------------------------------------------------------------------------------------------

def test_names_wildcards_and_paper_stand_for_models():
    assert expand_models(['care_s?', 'care_s1', 'resnet18']) == ['care_s0', 'care_s1', 'care_s2', 'resnet18']
    assert expand_models(['paper']) == list_paper_models() == [
        'mobilenetv2_100', 'mobileone_s0', 'fastvit_t8', 'mobileone_s2', 'fastvit_t12', 'mobileone_s4', 'mlla_t',
        'care_s0', 'care_s1', 'care_s2']
    assert len(PUBLISHED) == 21 and find_published('fastvit_t8.apple_in1k').top1 == 76.7
    assert find_published('resnet18') is None


def test_wildcards_leave_out_other_names_of_our_models_which_work_as_they_are():
    assert expand_models(['care_*', 'casvit_*', 'mlla_*']) == [
        'care_s0', 'care_s1', 'care_s2', 'casvit_m', 'casvit_s', 'casvit_t', 'casvit_xs', 'mlla_b', 'mlla_s', 'mlla_t']
    assert expand_models(['rcvit_xs', 'mila_t']) == ['rcvit_xs', 'mila_t'] and not set(
        expand_models(['*vit_*'])) & {'rcvit_xs', 'rcvit_s'}
    with pytest.raises(ConfigError, match='rcvit_'):
        expand_models(['rcvit_*'])


def test_published_figures_that_are_not_known_are_empty():
    assert find_published('rcvit_s') is find_published('casvit_s') and find_published('mila_b').top1 == 85.3
    assert find_published('casvit_s').gmacs is None and find_published('casvit_t').gmacs == 3.597
    counts = [dict(
        model=name, height=224, width=224, parameters=1, parameters_fused=1, gmacs=1., gmacs_fused=1.,
        activations_fused_m=1.) for name in ('casvit_s', 'mlla_b', 'resnet18')]
    rows = describe_counts([dict(count, published=(row := find_published(count['model'])) and vars(row))
                            for count in counts], markdown=True)[2:]
    assert [line.split(' | ')[-4:] for line in rows] == [
        ['80.9 [1]', '-', '5.76', '- |'], ['85.3 [2]', '16.2', '96', '- |'], ['-', '-', '-', '- |']]


def test_footnotes_say_what_each_accuracy_is_and_where_it_stands():
    notes = list_footnotes(['mobilenetv2_100', 'mlla_t', 'care_s0', 'casvit_xs', 'care_s1'])
    assert notes[0].startswith('[1] top-1 of mlla_t, with self-distillation')
    assert notes[1].startswith('[2] top-1 of care_s0, care_s1, with a teacher')
    assert re.match(r'\[3\] top-1 of casvit_xs, the second generation .*77\.5', notes[2])
    assert mark_accuracy('care_s1', ['mlla_t', 'care_s1']) == '80.1 [2]' and mark_accuracy('resnet18', []) is None
    assert mark_accuracy('mobilenetv2_100', ['mobilenetv2_100']) == '71.8'
    sources = [line for line in notes if line.startswith('published figures of')]
    assert len(sources) == 2 and 'mobilenetv2_100, mlla_t, care_s0, care_s1: the table of the CARE' in sources[0]
    assert all(row.source and (row.accuracy_note or not row.name.startswith(('CARE', 'CAS', 'MLLA')))
               for row in PUBLISHED)
    assert list_footnotes(['resnet18']) == []


def test_sizes_are_height_by_width():
    assert BenchConfig(img_size=['224', '192x320']).sizes == [(224, 224), (192, 320)]


def test_all_backends_are_those_that_work_here_and_the_others_say_why(monkeypatch):
    setups, left_out = list_setups(BenchConfig(dtype=['float32', 'int8']), CPU)
    assert [str(s) for s in setups] == [
        'eager float32 nchw', 'fused float32 channels_last', 'compile float32 channels_last', 'onnxruntime float32',
        'onnxruntime int8', 'openvino float32', 'openvino int8']
    named = [backend for backend in BACKENDS for line in left_out if f'--backend {backend} ' in line]
    assert named == ['eager', 'fused', 'compile', 'cudagraph'] and '--kernels' in left_out[0] and len(left_out) == 5
    assert all(line.startswith('left out: --') and '\n' not in line for line in left_out)
    find = bench_config.check_setup

    def check(setup):
        if setup.backend == 'openvino':
            raise ConfigError('pip install openvino.')
        find(setup)

    monkeypatch.setattr(bench_config, 'check_setup', check)
    setups, left_out = list_setups(BenchConfig(), CPU)
    assert 'openvino' not in {s.backend for s in setups} and 'left out: pip install openvino.' in left_out


@pytest.mark.parametrize('flag, layouts', [
    ([], ['nchw', 'channels_last']), (['--channels-last'], ['channels_last'] * 2),
    (['--no-channels-last'], ['nchw'] * 2)])
def test_the_layout_is_that_of_the_flag_or_of_the_backend(flag, layouts):
    setups, _ = list_setups(parse_bench_config(['--backend', 'eager', 'fused', *flag]), CPU)
    assert [s.layout for s in setups] == layouts


def test_published_is_how_the_column_was_made(monkeypatch):
    config = BenchConfig(published=True)
    assert (config.backend, config.dtype, config.batch_size) == (['eager'], ['tf32'], [64])
    assert (config.warmup, config.runs, config.sizes) == (10, 40, [(224, 224)])
    assert [str(s) for s in list_setups(config, torch.device('cuda'))[0]] == ['eager tf32 nchw']
    assert [str(s) for s in list_setups(config, CPU)[0]] == ['eager float32 nchw']
    assert list(inference._list_conditions(config, CPU))[0].startswith('--published: TF32 does nothing on cpu')


# What is measured -----------------------------------------------------------------------------------------------------

def test_the_table_is_printed_and_written_as_json_and_csv(call, tmp_path):
    code, out, _ = call('--model', 'care_s0', '--backend', 'eager', 'fused', '--batch-size', 1, 2, '--output',
                        tmp_path / 'here', *QUICK)
    assert code == 0
    assert '7,340,000 (one head 6,312,952)' in out and 'stages.2' in out and 'conv depth-wise' in out
    assert re.search(r'care_s0 +fused +float32 +channels_last +64 x 64 +2 ', out) and 'top-1 78.4 %' in out
    result, rows = read(tmp_path / 'here')
    assert re.search(r'p90 +mean ms +images/s', out)
    assert [(r['backend'], r['batch']) for r in result['records']] == [
        ('eager', 1), ('fused', 1), ('eager', 2), ('fused', 2)]
    record = result['records'][1]
    assert list(record) == [
        'model', 'bench', 'backend', 'device', 'dtype', 'layout', 'batch', 'height', 'width', 'threads', 'warmup',
        'runs', 'median_ms', 'p10_ms', 'p90_ms', 'mean_ms', 'images_per_s', 'peak_mib', 'ratio', 'ratio_p10',
        'ratio_p90', 'reference', 'noisy', 'error', 'kernels', 'versions', 'notes']
    assert record['reference'] == 'care_s0 eager float32 nchw' and record['device'].startswith('cpu: ')
    assert (record['runs'], record['warmup'], record['threads']) == (2, 1, 1) and record['versions']['torch']
    assert record['p10_ms'] <= record['median_ms'] <= record['p90_ms'] and record['peak_mib'] > 24
    assert record['images_per_s'] == pytest.approx(1000 / record['median_ms']) and 0 < record['error'] < 5e-5
    assert [row['median_ms'] for row in rows] == [str(r['median_ms']) for r in result['records']]
    counts = result['counts'][0]
    assert (counts['parameters'], counts['parameters_one_head']) == (7_340_000, 6_312_952)
    assert counts['parameters_fused'] < counts['parameters'] and counts['published']['top1'] == 78.4
    assert result['config']['batch_size'] == [1, 2]


def test_one_json_object_is_all_that_is_printed(call, tmp_path):
    code, out, _ = call('--model', 'care_s0', '--backend', 'eager', '--json', '--output', tmp_path, *QUICK)
    assert code == 0 and json.loads(out)['records'][0]['model'] == 'care_s0'


def test_models_are_compared_in_one_table_with_published_columns(call, tmp_path):
    code, out, _ = call('--model', 'mobileone_s0', 'care_s0', '--backend', 'fused', '--markdown', '--output', tmp_path,
                        *QUICK)
    assert code == 0 and '| top-1 %, published |' in out and '| `mobileone_s0` | 64 x 64 | 5.29 | 2.08 |' in out
    assert {r['reference'] for r in read(tmp_path)[0]['records']} == {
        'mobileone_s0 fused float32 channels_last', 'care_s0 fused float32 channels_last'}


def test_the_weights_of_a_checkpoint_are_measured(call, tmp_path):
    file = tmp_path / 'weights.pth'
    torch.save(published_state_dict('care_s0'), file)
    code, out, _ = call('--checkpoint', file, '--model', 'care_s0', '--backend', 'eager', '--output', tmp_path, *QUICK)
    assert code == 0 and 'weights: random' not in out


# What goes wrong ------------------------------------------------------------------------------------------------------

def memory_for(most):
    """A way to prepare candidates with memory for `most` images."""
    def prepare_or_fail(network, setup):
        if len(network.images) > most:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return prepare(network, setup)
    return prepare_or_fail


def test_a_batch_that_does_not_fit_is_halved_until_it_does(call, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, 'prepare', memory_for(2))
    code, out, _ = call('--model', 'care_s0', '--backend', 'eager', '--batch-size', 8, '--output', tmp_path, *QUICK)
    assert code == 0 and 'a batch of 8 does not fit into memory: halved to 4' in out
    record = read(tmp_path)[0]['records'][0]
    assert record['batch'] == 2 and record['notes'][:2] == [
        'a batch of 8 does not fit into memory: halved to 4', 'a batch of 4 does not fit into memory: halved to 2']


def test_one_image_that_does_not_fit_is_a_failure(call, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, 'prepare', memory_for(0))
    code, out, err = call('--model', 'care_s0', '--backend', 'eager', '--batch-size', 2, '--output', tmp_path, *QUICK)
    assert code == 1 and 'failed: care_s0 eager float32 nchw: not even one image fits into memory' in err


def test_memory_that_runs_out_while_others_are_timed_halves_the_batch(call, tmp_path, monkeypatch):
    def prepare_late(network, setup):
        runner = prepare(network, setup)
        if setup.backend == 'fused' and len(network.images) == 4:
            runs, whole = iter(range(100)), runner.run

            def run():
                if next(runs) > 3:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
                return whole()
            runner.run = run
        return runner

    monkeypatch.setattr(inference, 'prepare', prepare_late)
    code, out, _ = call('--model', 'care_s0', '--backend', 'eager', 'fused', '--batch-size', 4, '--output', tmp_path,
                        *QUICK)
    records = read(tmp_path)[0]['records']
    assert code == 0 and [(r['backend'], r['batch']) for r in records] == [('eager', 4), ('fused', 2)]
    assert records[1]['notes'][0] == (
        'a batch of 4 does not fit into memory beside the other candidates: halved to 2')


@pytest.mark.parametrize('late', [False, True])
def test_a_candidate_that_fails_is_reported_and_the_others_go_on(call, tmp_path, monkeypatch, late):
    def prepare_badly(network, setup):
        runner = prepare(network, setup)
        if setup.backend == 'eager':
            calls = iter(range(100))
            whole, most = runner.run, 3 if late else -1

            def run():
                if next(calls) > most:
                    raise ValueError('a kernel is\nmissing')
                return whole()
            runner.run = run
        return runner

    monkeypatch.setattr(inference, 'prepare', prepare_badly)
    code, out, err = call('--model', 'care_s0', '--backend', 'eager', 'fused', '--output', tmp_path, *QUICK)
    assert code == 1 and 'failed: care_s0 eager float32 nchw: ValueError: a kernel is missing' in err
    assert [r['backend'] for r in read(tmp_path)[0]['records']] == ['fused']


def test_a_rewrite_that_is_wrong_is_not_timed(call, tmp_path, monkeypatch):
    """The first depth-wise convolution of the rewritten network loses its bias."""
    def prepare_broken(network, setup):
        if setup.backend == 'fused':
            conv = next(m for m in network.fused.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1)
            conv.bias.data.zero_()
        return prepare(network, setup)

    monkeypatch.setattr(inference, 'prepare', prepare_broken)
    code, out, err = call('--model', 'care_s0', '--backend', 'eager', 'fused', '--output', tmp_path, *QUICK)
    assert code == 1 and re.search(r'care_s0 fused .* WrongOutputError: the logits differ .* not timed', err)
    assert [r['backend'] for r in read(tmp_path)[0]['records']] == ['eager']


def test_a_noisy_run_says_so(call, tmp_path, monkeypatch):
    def spread(runs, *args, **kwargs):
        return {name: [[0.01, 0.01, 0.03]] * 4 if 'fused' in name else [[0.01] * 3] * 4 for name in runs}

    monkeypatch.setattr(inference, 'time_interleaved', spread)
    _, out, _ = call('--model', 'care_s0', '--backend', 'eager', 'fused', '--output', tmp_path, *QUICK)
    assert [r['noisy'] for r in read(tmp_path)[0]['records']] == [False, True]
    assert len(re.findall(r'noisy$', out, re.MULTILINE)) == 1
    assert 'noisy: the slowest tenth of the runs takes 3.00 times as long' in out

    def drift(runs, *args, **kwargs):
        return {name: [[0.012 if name == inference.AGAIN else 0.01]] * 4 for name in runs}

    monkeypatch.setattr(inference, 'time_interleaved', drift)
    _, out, _ = call('--model', 'care_s0', '--backend', 'eager', 'fused', '--output', tmp_path, *QUICK)
    assert out.count('noisy: the reference differs from itself by a factor of 1.20 (all)') == 1


def test_a_model_for_another_size_is_reported(call, tmp_path):
    code, out, err = call('--model', 'deit_tiny_patch16_224', 'care_s0', '--backend', 'eager', '--output', tmp_path,
                          *QUICK)
    assert code == 1 and 'failed: deit_tiny_patch16_224 at 64 x 64' in err
    assert [r['model'] for r in read(tmp_path)[0]['records']] == ['care_s0']


@pytest.mark.parametrize('error, is_memory', [
    (torch.OutOfMemoryError('CUDA out of memory.'), True), (MemoryError(), True),
    (RuntimeError('[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried ...'), True),
    (RuntimeError('Failed to allocate memory for requested buffer of size 9'), True),
    (RuntimeError('std::bad_alloc'), True), (RuntimeError('shape mismatch'), False),
    (ValueError('out of memory'), False)])
def test_what_lack_of_memory_looks_like(error, is_memory):
    assert is_out_of_memory(error) == is_memory and not is_out_of_memory(WrongOutputError('wrong'))
    assert not is_out_of_memory(None)


@pytest.mark.parametrize('name', ['Fail', 'RuntimeException'])
def test_lack_of_memory_is_seen_in_the_exceptions_of_onnx_runtime(name):
    state = pytest.importorskip('onnxruntime.capi.onnxruntime_pybind11_state')
    error = getattr(state, name)
    assert not issubclass(error, RuntimeError)
    assert is_out_of_memory(error('Failed to allocate memory for requested buffer of size 9'))
    assert not is_out_of_memory(error('Invalid rank for input'))


# The README -----------------------------------------------------------------------------------------------------------

def test_the_figures_of_the_readme_are_counted_again(call):
    code, out, err = call('--check')
    assert code == 0 and err == '' and re.search(r'\d+ figures are as counted', out)
    assert check_readme(README)[0] >= 9


@pytest.mark.parametrize('old, new, message', [
    ('8,575,376', '8,575,377', 'care_s1, one head: 8,575,377 there, 8,575,376 counted'),
    ('| 0.718 |', '| 0.72 |', None), ('| 0.718 |', '| 0.719 |', 'care_s0, GMACs at 224 x 224: 0.719 there, 0.718'),
    ('| 1.923 |', '| about 2 |', 'care_s2, GMACs at 224 x 224: about 2 there')])
def test_a_figure_of_the_readme_that_is_wrong_is_named(call, tmp_path, old, new, message):
    copy = tmp_path / 'README.md'
    text = README.read_text()
    assert old in text
    copy.write_text(text.replace(old, new))
    code, _, err = call('--check', '--readme', copy)
    assert code == (1 if message else 0) and (message or '') in err


def test_a_readme_without_tables_of_models_is_refused(call, tmp_path):
    (tmp_path / 'README.md').write_text('| a | b |\n|---|---|\n| 1 | 2 |\n')
    assert call('--check', '--readme', tmp_path / 'README.md')[0] == 2


def test_measured_tables_are_written_between_the_markers_and_can_be_checked(call, tmp_path):
    file = tmp_path / 'README.md'
    flags = ['--model', 'mobileone_s0', 'care_s0', '--backend', 'fused', '--update', '--readme', file, '--output',
             tmp_path, *QUICK]
    file.write_text('above\n')
    assert call(*flags)[0] == 2 and file.read_text() == 'above\n'
    file.write_text(f'above\n{BEGIN}\nold\n{END}\nbelow\n')
    assert call(*flags)[0] == 0
    text = file.read_text()
    assert text.startswith(f'above\n{BEGIN}\n| model |') and text.endswith(f'{END}\nbelow\n') and 'old' not in text
    assert check_readme(file) == (10, [])
    file.write_text(text.replace('| 2.08 |', '| 2.09 |'))
    assert check_readme(file)[1] == ['mobileone_s0, rewritten, M: 2.09 there, 2.08 counted']


@pytest.mark.parametrize('old, new, message', [
    ('`care_s0`', '`care_s9`', 'care_s9: no such model'),
    ('| 2.08 |', '| |', 'mobileone_s0, rewritten, M: nothing there')])
def test_rows_of_unknown_models_and_missing_figures_are_named(tmp_path, old, new, message):
    text = '| model | rewritten, M |\n|---|---|\n| `mobileone_s0` | 2.08 |\n| `care_s0` | 6.30 |\n| mean | 4.19 |\n'
    file = tmp_path / 'README.md'
    file.write_text(text)
    assert not [line for line in check_readme(file)[1] if line.startswith(('mobileone', 'mean'))]
    assert old in text
    file.write_text(text.replace(old, new))
    assert any(line.startswith(message) for line in check_readme(file)[1])


def test_the_script_runs_as_a_user_starts_it(tmp_path):
    out, err = run('benchmark.py', '--model', 'care_s0', '--backend', 'eager', '--output', tmp_path, *QUICK)
    assert 'median ms' in out and err == ''
    assert 'no such model' in run('benchmark.py', '--model', 'care_s9', code=2)[1]
