"""benchmark.py: its flags, its results, and what it does when something fails."""
import csv
import json
import re

import pytest
import torch
from launch import run
from reference import published_state_dict
from registered import MODELS

import benchmark
from caretrans.bench import config as bench_config, infer
from caretrans.bench.backends import WrongOutputError, prepare
from caretrans.bench.config import BenchConfig, list_setups, parse_bench_config
from caretrans.bench.readme import check_readme
from caretrans.bench.record import ModelCounts, Record, write_csv
from caretrans.bench.report import describe_counts
from caretrans.bench.setups import BACKENDS
from caretrans.errors import ConfigError
from caretrans.measure.names import expand_models
from caretrans.measure.published import PUBLISHED, find_published, list_footnotes, list_paper_models, mark_accuracy
from caretrans.measure.timing import is_out_of_memory

CPU = torch.device('cpu')
QUICK = ['--device', 'cpu', '--img-size', '64', '--runs', '2', '--warmup', '1']
CARE = ['--model', 'care_s0', *QUICK]


def read(folder):
    with open(folder / 'results.csv', newline='', encoding='utf-8') as file:
        return json.loads((folder / 'results.json').read_text(encoding='utf-8')), list(csv.DictReader(file))


# Refused --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, message', [
    (['--model', 'care_s9'], '--model care_s9: no such model, the nearest are care_s'),
    (['--model', 'mobilnetv2_100'], 'mobilenetv2_100'), (['--model', 'nothing*'], '--model nothing.: no such model'),
    (['--backend', 'tensorrt'], 'tensorrt'), (['--backend', 'all', 'eager'], 'all cannot be combined'),
    (['--backend', 'eager', 'eager'], 'name each once'), (['--frobnicate'], 'frobnicate'),
    (['--dtype', 'int8', '--backend', 'eager'], '--dtype int8 with --backend eager'),
    (['--dtype', 'tf32'], '--dtype tf32 with --device cpu: no backend'),
    (['--backend', 'cudagraph'], '--backend cudagraph with --device cpu'),
    (['--backend', 'openvino', '--channels-last'], 'it chooses its own layout'),
    (['--img-size', '16'], "img_size is '16'"), (['--img-size', '224x'], 'HEIGHTxWIDTH'),
    (['--batch-size', '0'], 'batch_size is 0'), (['--threads', '0'], 'threads is 0'), (['--runs', 'many'], 'many'),
    (['--published', '--batch-size', '8'], '--published fixes --batch-size'),
    (['--checkpoint', 'x.pth', '--model', 'care_*'], 'with 3 models'),
    (['--checkpoint', 'x.pth', '--model', 'care_*', '--bench', 'profile'], 'with 3 models'),
    (['--checkpoint', 'not/there.pth'], 'not/there.pth'),
    (['--check', '--readme', 'none.md'], 'none.md does not exist'),
    (['--plots', 'a.png', '--bench', 'train'], '--plots a.png: a single plot needs --bench infer'),
    # flags of another bench
    (['--bench', 'train', '--backend', 'eager', 'fused'],
     '--backend eager fused with --bench train: it is for --bench infer, profile, accuracy; remove it'),
    (['--bench', 'train', '--dtype', 'bfloat16'], '--dtype bfloat16 with'),
    (['--bench', 'train', '--runs', '7'], '--runs 7 with'),
    (['--bench', 'train', '--checkpoint', 'x.pth'], '--checkpoint x.pth with'),
    (['--bench', 'train', '--channels-last'], '--channels-last with'),
    (['--bench', 'train', '--kernels', 'torch'], '--kernels torch with'),
    (['--bench', 'train', '--published'], '--published with'),
    (['--bench', 'train', '--data', 'x'], '--data x with --bench train: it is for --bench accuracy'),
    (['--bench', 'profile', '--runs', '7'], '--runs 7 with'), (['--bench', 'profile', '--warmup', '7'], '--warmup 7'),
    (['--bench', 'infer', '--teacher', 'resnet18'], '--teacher resnet18 with --bench infer: it is for --bench train'),
    (['--bench', 'infer', '--ways', 'published'], '--ways published with'),
    (['--bench', 'accuracy', '--checkpoint', 'x.pth', '--batch-size', '7'], '--batch-size 7 with'),
    # what cannot be trained
    (['--bench', 'train', '--img-size', '64x96'], '--img-size 64x96 with --bench train: training needs square images'),
    (['--bench', 'train', '--batch-size', '2', '7'], '--batch-size 7 with --bench train: mixup'),
    (['--bench', 'train', '--teacher', 'resnet18', '--model', 'care_s0', 'mobilenetv2_035'],
     '--teacher resnet18 with --model mobilenetv2_035: the model has no second head'),
    (['--bench', 'train', '--teacher', 'resnet18', '--model', 'casvit_xs'], 'casvit_xs: the model has no second head'),
    (['--bench', 'train', '--teacher', 'regnety_161'], '--teacher regnety_161: no such model'),
    (['--bench', 'train', '--ways', 'faster'], 'faster'), (['--bench', 'train', '--ways', 'tf32'], 'tf32'),
    # kernels
    (['--kernels', 'triton'], '--kernels triton with --device cpu: the kernels run on CUDA GPUs, not on cpu: use'),
    (['--kernels', 'torch', 'triton', '--backend', 'fused'], '--kernels triton with --device cpu'),
    (['--kernels', 'triton', '--backend', 'eager', 'openvino'],
     '--kernels triton with --backend eager: they run with fused, compile, cudagraph'),
    (['--kernels', 'cuda'], "invalid choice: 'cuda'"), (['--kernels', 'torch', 'torch'], 'name each once'),
    (['--kernels', 'torch', '--published'], '--published fixes --kernels'),
])
def test_invalid_measurements_are_refused_with_exit_code_2(call, flags, message):
    code, out, err = call('--device', 'cpu', *flags)
    assert code == 2 and out == '' and re.search(message, err)
    assert err.count('\n') == 1 and err.startswith('benchmark.py: ')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here')
def test_a_missing_gpu_is_refused(call):
    code, _, err = call('--device', 'cuda')
    assert code == 2 and err.startswith('benchmark.py: ') and 'cuda' in err and err.count('\n') == 1


@pytest.mark.parametrize('flags, message', [
    (['--output', 'FILE'], '--output .*page.md: .* is not a folder'), (['--plots', 'FILE/here'], '--plots .*here: '),
    (['--plots', 'FILE/here.png'], '--plots .*page.md: '),
    (['--update', '--readme', 'FILE/page.md'], '--readme .*page.md: .* is not a folder'),
    (['--update', '--readme', 'FILE'], '--readme .*page.md: it is not a writable page with the heading "## Results"')])
def test_unwritable_outputs_are_refused_before_any_measurement(call, tmp_path, monkeypatch, flags, message):
    file = tmp_path / 'page.md'
    file.write_text('text\n', encoding='utf-8')
    monkeypatch.setattr(benchmark, 'run_benches', None)
    code, out, err = call(*[flag.replace('FILE', str(file)) for flag in flags])
    assert code == 2 and out == '' and re.search(message, err) and err.count('\n') == 1


# Flags ----------------------------------------------------------------------------------------------------------------

def test_names_wildcards_and_paper_stand_for_models():
    assert expand_models(['care_s?', 'care_s1', 'resnet18']) == ['care_s0', 'care_s1', 'care_s2', 'resnet18']
    assert expand_models(['paper']) == list_paper_models() == [
        'mobilenetv2_100', 'mobileone_s0', 'fastvit_t8', 'mobileone_s2', 'fastvit_t12', 'mobileone_s4', 'mlla_t',
        'care_s0', 'care_s1', 'care_s2']
    assert expand_models(['care_*', 'casvit_*', 'mlla_*']) == [
        'care_s0', 'care_s1', 'care_s2', 'casvit_m', 'casvit_s', 'casvit_t', 'casvit_xs', 'mlla_b', 'mlla_s', 'mlla_t']
    assert expand_models(['rcvit_xs', 'mila_t']) == ['rcvit_xs', 'mila_t'], 'aliases are accepted'
    assert not set(expand_models(['*vit_*'])) & {'rcvit_xs', 'rcvit_s'}, 'wildcards skip aliases'
    with pytest.raises(ConfigError, match='rcvit_'):
        expand_models(['rcvit_*'])


def test_published_figures_that_are_not_known_are_empty():
    assert len(PUBLISHED) == 22 and find_published('fastvit_t8.apple_in1k').top1 == 76.7
    assert find_published('mobilenetv4_conv_small').top1 == 73.8
    assert find_published('resnet18') is None and find_published('mila_b').top1 == 85.3
    assert find_published('rcvit_s') is find_published('casvit_s') and find_published('casvit_t').gmacs == 3.597
    assert find_published('casvit_s').gmacs is None
    counts = [ModelCounts(name, 224, 224, 1, 1, 1, 1., 1., {}, {}, 1., 1., find_published(name))
              for name in ('casvit_s', 'mlla_b', 'resnet18')]
    rows = describe_counts(counts, markdown=True)[2:]
    assert [line.split(' | ')[-4:] for line in rows] == [
        ['80.9 [1]', '-', '5.76', '- |'], ['85.3 [2]', '16.2', '96', '- |'], ['-', '-', '-', '- |']]


def test_footnotes_name_training_and_source_of_each_accuracy():
    notes = list_footnotes(['mobilenetv2_100', 'mlla_t', 'care_s0', 'casvit_xs', 'care_s1'])
    assert notes[0].startswith('[1] top-1 of mlla_t, with self-distillation')
    assert notes[1].startswith('[2] top-1 of care_s0, care_s1, with a teacher')
    assert re.match(r'\[3\] top-1 of casvit_xs, second generation, without a teacher: .*77\.5', notes[2])
    assert mark_accuracy('care_s1', ['mlla_t', 'care_s1']) == '80.1 [2]' and mark_accuracy('resnet18', []) is None
    assert mark_accuracy('mobilenetv2_100', ['mobilenetv2_100']) == '71.8'
    sources = [line for line in notes if line.startswith('published figures of')]
    assert len(sources) == 2 and 'mobilenetv2_100, mlla_t, care_s0, care_s1: the table of the CARE' in sources[0]
    assert all(row.source and (row.accuracy_note or not row.name.startswith(('CARE', 'CAS', 'MLLA')))
               for row in PUBLISHED)
    assert list_footnotes(['resnet18']) == []


@pytest.mark.parametrize('bench, plots, benches', [
    ('infer', '', ['infer']), ('train', '', ['train']), ('all', '', ['infer', 'profile', 'train']),
    ('infer', 'here', ['infer', 'profile']), ('infer', 'here.png', ['infer'])])
def test_requested_benches_run_and_benches_that_plots_need(bench, plots, benches):
    assert BenchConfig(bench=bench, plots=plots).list_benches() == benches
    BenchConfig(bench='all', backend=['eager'], teacher=['resnet18'], ways=['published'], runs=7, warmup=2)


def test_all_means_available_backends_and_names_the_reason_for_others(monkeypatch):
    setups, skipped = list_setups(BenchConfig(dtype=['float32', 'int8']), CPU)
    assert [str(s) for s in setups] == [
        'eager float32 nchw', 'fused float32 channels_last', 'compile float32 channels_last', 'onnxruntime float32',
        'onnxruntime int8', 'openvino float32', 'openvino int8']
    named = [backend for backend in BACKENDS for line in skipped if f'--backend {backend} ' in line]
    assert named == ['eager', 'fused', 'compile', 'cudagraph'] and '--kernels' in skipped[0] and len(skipped) == 5
    assert all(line.startswith('skipped: --') and '\n' not in line for line in skipped)
    find = bench_config.check_setup

    def check(setup):
        if setup.backend == 'openvino':
            raise ConfigError('pip install openvino.')
        find(setup)

    monkeypatch.setattr(bench_config, 'check_setup', check)
    setups, skipped = list_setups(BenchConfig(), CPU)
    assert 'openvino' not in {s.backend for s in setups} and 'skipped: pip install openvino.' in skipped


@pytest.mark.parametrize('flag, layouts', [
    ([], ['nchw', 'channels_last']), (['--channels-last'], ['channels_last'] * 2),
    (['--no-channels-last'], ['nchw'] * 2)])
def test_the_layout_is_that_of_the_flag_or_of_the_backend(flag, layouts):
    setups, _ = list_setups(parse_bench_config(['--backend', 'eager', 'fused', *flag]), CPU)
    assert [s.layout for s in setups] == layouts


def test_published_is_the_setup_of_the_column(monkeypatch, small):
    config = BenchConfig(published=True)
    assert (config.backend, config.dtype, config.batch_size) == (['eager'], ['tf32'], [64])
    assert (config.warmup, config.runs, config.sizes) == (10, 40, [(224, 224)])
    assert [str(s) for s in list_setups(config, torch.device('cuda'))[0]] == ['eager tf32 nchw']
    assert [str(s) for s in list_setups(config, CPU)[0]] == ['eager float32 nchw']
    monkeypatch.setattr(infer, 'measure_group', lambda *args: ([], []))
    result = infer.run_inference(BenchConfig(published=True, device='cpu', img_size=['64']))
    assert result.remarks[0].startswith('--published: TF32 does nothing on cpu')
    assert BenchConfig(img_size=['224', '192x320']).sizes == [(224, 224), (192, 320)]


# Results --------------------------------------------------------------------------------------------------------------

def test_the_script_prints_a_table_and_writes_json_and_csv(tmp_path):
    out, err = run('benchmark.py', *CARE, '--backend', 'eager', 'fused', '--batch-size', '1', '2', '--output', tmp_path)
    assert err == '' and re.search(r'p90 +mean ms +images/s', out)
    assert '7,340,000 (one head 6,312,952)' in out and 'stages.2' in out and 'conv depth-wise' in out
    assert re.search(r'care_s0 +fused +float32 +channels_last +64 x 64 +2 ', out) and 'top-1 78.4 %' in out
    result, rows = read(tmp_path)
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
    assert list(counts) == [
        'model', 'height', 'width', 'parameters', 'parameters_one_head', 'parameters_fused', 'gmacs', 'gmacs_fused',
        'gmacs_by_kind', 'gmacs_by_part', 'activations_m', 'activations_fused_m', 'published']
    assert (counts['parameters'], counts['parameters_one_head']) == (7_340_000, 6_312_952)
    assert counts['parameters_fused'] < counts['parameters'] and counts['published']['top1'] == 78.4
    assert result['config']['batch_size'] == [1, 2]


def test_records_of_each_bench_have_their_columns(tmp_path):
    record = Record(model='care_s0', bench='growth', attention='linear', versions=dict(torch='2'), notes=['a', 'b'])
    assert list(record.to_dict())[:4] == ['model', 'bench', 'attention', 'backend'] and 'error' not in record.to_dict()
    assert record.to_dict()['median_ms'] is None and record.to_dict()['notes'] == ['a', 'b']
    assert Record(bench='train', error=float('inf')).to_dict()['error'] is None, 'JSON has no infinity'
    write_csv(tmp_path / 'results.csv', [record.to_dict()])
    with open(tmp_path / 'results.csv', newline='', encoding='utf-8') as file:
        row, = csv.DictReader(file)
    assert list(row) == list(record.to_dict()) and row['versions'] == '{"torch": "2"}' and row['notes'] == 'a; b'


def test_only_one_json_object_is_printed(call, tmp_path, small):
    code, out, _ = call(*CARE, '--backend', 'eager', '--json', '--output', tmp_path)
    assert code == 0 and json.loads(out)['records'][0]['model'] == 'care_s0'


def test_weights_come_from_the_checkpoint(call, tmp_path):
    file = tmp_path / 'care_s0.pth'
    torch.save(published_state_dict('care_s0'), file)
    code, out, _ = call(*CARE, '--checkpoint', file, '--backend', 'eager', '--output', tmp_path)
    assert code == 0 and 'weights: random' not in out


# Failures -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def measure(call, tmp_path, small, monkeypatch):
    """Measure a small care_s0 with a changed `prepare`: exit code, stdout, stderr, records."""
    def run_with(change, *flags):
        monkeypatch.setattr(infer, 'prepare', change)
        code, out, err = call(*CARE, *flags, '--output', tmp_path)
        return code, out, err, json.loads((tmp_path / 'results.json').read_text(encoding='utf-8'))['records']
    return run_with


def memory_for(most):
    """A `prepare` with memory for `most` images."""
    def prepare_or_fail(network, setup):
        if len(network.images) > most:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return prepare(network, setup)
    return prepare_or_fail


def failing(backend, error, after, batch=None):
    """A `prepare` with which a backend raises an error after some runs."""
    def prepare_late(network, setup):
        runner = prepare(network, setup)
        if setup.backend == backend and batch in (None, len(network.images)):
            runs, whole = iter(range(100)), runner.run

            def run():
                if next(runs) >= after:
                    raise error
                return whole()
            runner.run = run
        return runner
    return prepare_late


def test_a_batch_that_does_not_fit_is_halved_until_it_does_or_fails(measure):
    code, out, _, records = measure(memory_for(2), '--backend', 'eager', '--batch-size', 8)
    assert code == 0 and 'a batch of 8 does not fit into memory: halved to 4' in out
    assert records[0]['batch'] == 2 and records[0]['notes'][:2] == [
        'a batch of 8 does not fit into memory: halved to 4', 'a batch of 4 does not fit into memory: halved to 2']
    code, _, err, _ = measure(memory_for(0), '--backend', 'eager', '--batch-size', 2)
    assert code == 1 and 'failed: care_s0 eager float32 nchw: not even one image fits into memory' in err


def test_memory_that_runs_out_while_others_are_timed_halves_the_batch(measure):
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    code, _, _, records = measure(
        failing('fused', error, after=4, batch=4), '--backend', 'eager', 'fused', '--batch-size', 4)
    assert code == 0 and [(r['backend'], r['batch']) for r in records] == [('eager', 4), ('fused', 2)]
    assert records[1]['notes'][0] == (
        'a batch of 4 does not fit into memory beside the other candidates: halved to 2')


@pytest.mark.parametrize('after', [0, 4])
def test_a_candidate_that_fails_is_reported_and_the_others_are_measured(measure, after):
    code, _, err, records = measure(
        failing('eager', ValueError('a kernel is\nmissing'), after), '--backend', 'eager', 'fused')
    assert code == 1 and 'failed: care_s0 eager float32 nchw: ValueError: a kernel is missing' in err
    assert [r['backend'] for r in records] == ['fused']


def test_a_wrong_fused_network_is_not_timed(measure):
    """The first depth-wise convolution of the fused network loses its bias."""
    def prepare_broken(network, setup):
        if setup.backend == 'fused':
            conv = next(m for m in network.fused.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1)
            conv.bias.data.zero_()
        return prepare(network, setup)

    code, _, err, records = measure(prepare_broken, '--backend', 'eager', 'fused')
    assert code == 1 and re.search(r'care_s0 fused .* WrongOutputError: the logits differ .* not timed', err)
    assert [r['backend'] for r in records] == ['eager']


def test_a_noisy_run_says_so(measure, monkeypatch):
    def spread(runs, *args, **kwargs):
        return {name: [[0.01, 0.01, 0.03]] * 4 if 'fused' in name else [[0.01] * 3] * 4 for name in runs}

    monkeypatch.setattr(infer, 'time_interleaved', spread)
    _, out, _, records = measure(prepare, '--backend', 'eager', 'fused')
    assert [r['noisy'] for r in records] == [False, True]
    assert len(re.findall(r'noisy$', out, re.MULTILINE)) == 1
    assert 'noisy: the slowest tenth of the runs takes 3.00 times as long' in out

    def drift(runs, *args, **kwargs):
        return {name: [[0.012 if name == infer.AGAIN else 0.01]] * 4 for name in runs}

    monkeypatch.setattr(infer, 'time_interleaved', drift)
    _, out, _, _ = measure(prepare, '--backend', 'eager', 'fused')
    assert out.count('noisy: the reference differs from itself by a factor of 1.20 (all)') == 1


def test_a_model_for_another_size_is_reported(call, tmp_path, small):
    code, _, err = call(
        '--model', 'deit_tiny_patch16_224', 'care_s0', '--backend', 'eager', '--output', tmp_path, *QUICK)
    assert code == 1 and 'failed: deit_tiny_patch16_224 at 64 x 64' in err
    assert [r['model'] for r in read(tmp_path)[0]['records']] == ['care_s0']


@pytest.mark.parametrize('error, is_memory', [
    (torch.OutOfMemoryError('CUDA out of memory.'), True), (MemoryError(), True),
    (RuntimeError('[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried ...'), True),
    (RuntimeError('Failed to allocate memory for requested buffer of size 9'), True),
    (RuntimeError('std::bad_alloc'), True), (RuntimeError('shape mismatch'), False),
    (ValueError('out of memory'), False), (WrongOutputError('wrong'), False), (None, False)])
def test_out_of_memory_errors_are_recognised(error, is_memory):
    assert is_out_of_memory(error) == is_memory


def test_out_of_memory_is_recognised_in_exceptions_of_onnx_runtime():
    state = pytest.importorskip('onnxruntime.capi.onnxruntime_pybind11_state')
    for error in (state.Fail, state.RuntimeException):
        assert not issubclass(error, RuntimeError)
        assert is_out_of_memory(error('Failed to allocate memory for requested buffer of size 9'))
        assert not is_out_of_memory(error('Invalid rank for input'))


# Pages ----------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_figures_of_the_pages_are_counted_again(call):
    code, out, err = call('--check')
    figures = [int(count) for count in re.findall(r'(\d+) figures match the counts', out)]
    assert code == 0 and err == '' and len(figures) == 2
    assert figures[0] >= 3 * len(MODELS) and figures[1] == 5 * 16


TABLE = """\
| model | parameters, two heads | one head | GMACs at 224 x 224 | fused, M | top-1 |
|---|---|---|---|---|---|
| `care_s0` | 7,340,000 | 6,312,952 | 0.718 | 6.32 | 78.4 |
| mean | 1 | 2 | 3 | 4 | 5 |
"""


@pytest.mark.parametrize('old, new, message', [
    ('', '', None), ('| 0.718 |', '| 0.72 |', None),
    ('6,312,952', '6,312,953', 'care_s0, one head: the page has 6,312,953, counted 6,312,952'),
    ('| 0.718 |', '| 0.719 |', 'care_s0, GMACs at 224 x 224: the page has 0.719, counted 0.718'),
    ('| 0.718 |', '| about 2 |', 'care_s0, GMACs at 224 x 224: the page has about 2'),
    ('| 6.32 |', '| |', 'care_s0, fused, M: the page has nothing'),
    ('`care_s0`', '`care_s9`', 'care_s9: no such model')])
def test_a_wrong_figure_of_a_page_is_named(call, tmp_path, old, new, message):
    page = tmp_path / 'README.md'
    page.write_text(TABLE.replace(old, new) if old else TABLE, encoding='utf-8')
    code, _, err = call('--check', '--readme', page)
    assert code == (1 if message else 0) and (message or '') in err


def test_a_page_without_tables_of_models_is_refused(call, tmp_path):
    (tmp_path / 'README.md').write_text('| a | b |\n|---|---|\n| 1 | 2 |\n', encoding='utf-8')
    assert call('--check', '--readme', tmp_path / 'README.md')[0] == 2


def test_several_models_are_compared_in_one_table_and_written_to_a_page_that_can_be_checked(call, tmp_path):
    page = tmp_path / 'benchmarks.md'
    page.write_text('# Benchmarks\n\nhow to measure\n\n## Results\n\nold\n', encoding='utf-8')
    code, out, _ = call('--model', 'mobileone_s0', 'care_s0', '--backend', 'fused', '--markdown', '--update',
                        '--readme', page, '--output', tmp_path, *QUICK)
    assert code == 0 and '| top-1 %, published |' in out and '| `mobileone_s0` | 64 x 64 | 5.29 | 2.08 |' in out
    assert {r['reference'] for r in read(tmp_path)[0]['records']} == {
        'mobileone_s0 fused float32 channels_last', 'care_s0 fused float32 channels_last'}
    text = page.read_text(encoding='utf-8')
    assert text.startswith('# Benchmarks\n\nhow to measure\n\n## Results\n\n| model |') and 'old\n' not in text
    assert check_readme(page) == (10, [])
    page.write_text(text.replace('| 2.08 |', '| 2.09 |'), encoding='utf-8')
    assert check_readme(page)[1] == ['mobileone_s0, fused, M: the page has 2.09, counted 2.08']
