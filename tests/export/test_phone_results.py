"""The file of latencies on phones: its schema holds for what is committed, and refuses what is wrong."""
import datetime
import re

import pytest
from launch import ROOT

from caretrans.__main__ import main
from caretrans.errors import PlotError, ResultsError
from caretrans.export.phone_results import COLUMNS, NAMES, describe_results, format_row, make_row, read_results
from caretrans.page.results import draw_results, name_panels

FILE = ROOT / 'coreml' / 'results.csv'
HEADER = ','.join(column.name for column in COLUMNS)
# Made up for the tests; nobody measured this.
ROW = dict(
    date='2026-01-31', reporter='Nobody', device='iPhone 15 Pro', os='iOS 18.1', model='care_s0', form='phone',
    size='224x224', batch='1', format='mlpackage', precision='fp16', compress='none', input='image', target='iOS16',
    version='0.1.0', tool='xcode', tool_version='16.0', runtime='', compute_units='all', threads='', statistic='median',
    runs='500', warm_up='50', latency_ms='1.25', p10_ms='', p90_ms='', first_ms='', load_ms='', drift='', error='',
    program='', note='')
IN_BROWSER = dict(
    ROW, device='Pixel 8', os='Android 15.0.0', form='fused', format='onnx', precision='fp32', input='tensor',
    target='', tool='browser', tool_version='Google Chrome 140.0.1.2', runtime='onnxruntime-web 1.30.0 wasm',
    compute_units='cpu_only', threads='1', p10_ms='1.2', p90_ms='1.40', first_ms='3.000', load_ms='500.0',
    drift='1.010', error='2.4e-6', program='0134d9ca90cc')

LITERT = dict(format='litert', form='bmm', runtime='LiteRT.js 2.5.3 wasm')


def write(tmp_path, *rows, header=HEADER):
    path = tmp_path / 'results.csv'
    path.write_text('\n'.join([header, *rows]) + '\n', encoding='utf-8')
    return path


@pytest.fixture
def run(capsys):
    """The exit code, stdout and stderr of the command."""
    return lambda *args: (main(['results', *map(str, args)]), *capsys.readouterr())


def test_committed_file_follows_its_schema():
    read_results(FILE)
    assert FILE.read_text(encoding='utf-8').splitlines()[0] == HEADER


def test_rows_are_read_as_they_were_written(tmp_path):
    other = dict(ROW, note='in a case, "warm"', format='mlmodel', target='', warm_up='', load_ms='80')
    rows = [ROW, other, IN_BROWSER]
    assert read_results(write(tmp_path, format_row(ROW), '', *map(format_row, rows[1:]), '', '')) == rows
    assert list(ROW) == NAMES


@pytest.mark.parametrize('cells, said', [
    (dict(date='31.01.2026'), "date .* is '31.01.2026', it must be a day as YYYY-MM-DD, not in the future"),
    (dict(date='20260131'), 'a day as YYYY-MM-DD'),
    (dict(date='2026-02-30'), 'a day as YYYY-MM-DD'),
    (dict(date=(datetime.date.today() + datetime.timedelta(days=3)).isoformat()), 'not in the future'),
    (dict(reporter=''), "reporter .* is '', it must be some text"),
    (dict(device='iPhone15,2'), "device .*Apple's name of the device, e.g. iPhone 15 Pro"),
    (dict(os='18.1'), 'os .*a system and its version, e.g. iOS 18.1'),
    (dict(os='macOS 15.1'), "os is 'macOS 15.1' with device iPhone 15 Pro: that runs iOS"),
    (dict(model='CARE S0'), 'model .*e.g. care_s0'),
    (dict(form='fused'), "form .* is 'fused', it must be one of phone, trained"),
    (dict(size='224'), 'size .*HEIGHTxWIDTH in pixels'),
    (dict(batch='0'), 'batch .* a whole number from 1'),
    (dict(format='onnx'), 'format .* one of mlpackage, mlmodel'),
    (dict(precision='int8'), 'precision .* one of fp16, fp32'),
    (dict(compress='zip'), 'compress .* one of none, int8, palette6, palette4'),
    (dict(input='photo'), 'input .* one of image, tensor'),
    (dict(target=''), "target is '' with format mlpackage"),
    (dict(format='mlmodel'), "target is 'iOS16' with format mlmodel"),
    (dict(version='new'), 'version .* e.g. 0.1.0'),
    (dict(tool='watch'), 'tool .* one of xcode, coremltools, app'),
    (dict(compute_units='gpu_only'), 'compute_units .* one of all, cpu_and_ne, cpu_and_gpu, cpu_only'),
    (dict(statistic='best'), 'statistic .* one of median, mean'),
    (dict(runs='3'), 'runs .* a whole number from 10'),
    (dict(runs='1e3'), 'runs .* a whole number'),
    (dict(latency_ms='1,2'), r"latency_ms \(milliseconds .* is '1,2', it must be a number from 0.01 to 100000"),
    (dict(latency_ms='0'), 'a number from 0.01'),
    (dict(latency_ms='-1'), 'a number from 0.01'),
    (dict(latency_ms='nan'), 'a number from 0.01'),
    (dict(latency_ms=''), 'a number from 0.01'),
    (dict(load_ms='fast'), 'load_ms .* a number'),
])
def test_wrong_cell_is_named_with_its_line_and_remedy(cells, said, tmp_path):
    line = ','.join(f'"{text}"' for text in dict(ROW, **cells).values())
    with pytest.raises(ResultsError, match=f'results.csv, line 3: .*{said}'):
        read_results(write(tmp_path, format_row(ROW), line))


@pytest.mark.parametrize('cells, said', [
    (dict(device=''), "device .* is '', it must be some text"),
    (dict(os='Linux'), 'os .*a system and its version'),
    (dict(form='phone'), "form .* is 'phone', it must be one of fused"),
    (dict(format='mlmodel'), 'format .* one of onnx, litert'),
    (dict(format='litert'), "form is 'fused' and runtime .* with format litert: that has form bmm, and LiteRT.js"),
    (dict(form='bmm'), 'with format onnx: that has form fused'),
    (dict(LITERT, precision='fp16'), 'precision is fp16 .* with format litert: the page runs it in fp32 and by wasm'),
    (dict(LITERT, runtime='LiteRT.js 2.5.3 webgpu', compute_units='gpu_only', threads=''), 'in fp32 and by wasm only'),
    (dict(target='iOS16'), "target .* is 'iOS16', it must be empty"),
    (dict(runtime=''), 'runtime .* e.g. onnxruntime-web 1.30.0 wasm'),
    (dict(compute_units='all'), 'compute_units .* one of cpu_only, gpu_only'),
    (dict(compute_units='gpu_only'), 'wasm is cpu_only and has threads'),
    (dict(threads=''), 'wasm is cpu_only and has threads'),
    (dict(runtime='onnxruntime-web 1.30.0 webgpu'), 'webgpu is gpu_only and has none'),
    (dict(p10_ms='1.3'), 'the median, between the two percentiles'),
    (dict(p90_ms=''), 'p90_ms .* a number'),
    (dict(statistic='mean'), 'a browser reports the median'),
    (dict(runs='9'), 'runs .* a whole number from 10'),
    (dict(error='3e-4'), 'error is 3e-4, more than 0.0001'),
    (dict(error='NaN'), 'error .* a number such as 2.4e-6'),
    (dict(program='0134'), 'program .* 12 hexadecimal digits')])
def test_wrong_cell_of_a_browser_is_named(cells, said, tmp_path):
    with pytest.raises(ResultsError, match=said):
        format_row(dict(IN_BROWSER, **cells))
    with pytest.raises(ResultsError, match="compute_units .* is 'gpu_only', it must be one of all"):
        format_row(dict(ROW, compute_units='gpu_only'))


@pytest.mark.parametrize('lines, message', [
    ([HEADER, 'a,b,c'], f'line 2: 3 cells for {len(NAMES)} columns'),
    ([HEADER, format_row(ROW), format_row(ROW)], 'line 3: it repeats an earlier row'),
    ([HEADER, '"never closed'], 'line 2: unexpected end of data'),
    ([HEADER.replace('latency_ms', 'latency')],
     'line 1: its columns must be date,.*; latency_ms missing; latency unknown'),
    ([format_row(ROW)], 'line 1: its columns must be date,.*,note, in this order; it has no such header.$'),
    ([''], 'line 1: its columns must be'), (None, 'results.csv cannot be read')])
def test_damaged_files_are_named(lines, message, tmp_path):
    path = tmp_path / 'results.csv' if lines is None else write(tmp_path, *lines[1:], header=lines[0])
    with pytest.raises(ResultsError, match=message):
        read_results(path)


def test_row_combines_metadata_and_measurements():
    facts = {name: ROW[name] for name in (
        'model', 'form', 'size', 'batch', 'format', 'precision', 'compress', 'input', 'target')}
    measured = {name: text for name, text in ROW.items() if name not in facts and name != 'version'}
    row = make_row(dict(facts, caretrans='0.1.0', torch='2.15.0', preprocessing='Resize'), measured)
    assert row == ROW
    with pytest.raises(ResultsError, match='no columns of the file: torch'):
        format_row(dict(row, torch='2.15.0'))


def test_table_has_the_fastest_of_each_model_first(tmp_path):
    rows = [dict(ROW, latency_ms='2.50'), dict(ROW, reporter='A|B', latency_ms='1.50'), dict(ROW, model='care_s1')]
    lines = describe_results(rows)
    assert len(lines) == 5 and all(line.startswith('| ') for line in lines)
    assert '1.50' in lines[2] and r'A\|B' in lines[2] and '2.50' in lines[3] and 'care_s1' in lines[4]


def test_command_checks_and_prints(run, tmp_path):
    code, text, _ = run(write(tmp_path, format_row(ROW)))
    assert code == 0 and 'iPhone 15 Pro' in text
    code, text, error = run(write(tmp_path, 'wrong'))
    assert (code, text) == (2, '') and error.startswith('caretrans results: ') and error.count('\n') == 1
    code, text, _ = run(FILE)
    assert code == 0 and text


def test_rows_are_drawn_a_panel_for_each_device_and_runtime(run, tmp_path):
    picture = tmp_path / 'plot.png'
    rows = [ROW, IN_BROWSER, dict(IN_BROWSER, model='casvit_xs'), dict(IN_BROWSER, latency_ms='1.300', reporter='B')]
    code, text, _ = run(write(tmp_path, *map(format_row, rows)), '--plot', picture)
    assert code == 0 and f'written to {picture}' in text and picture.read_bytes()[:4] == b'\x89PNG'
    with pytest.raises(PlotError, match='No accuracy is published'):
        draw_results([dict(ROW, model='resnet18')], picture)


def test_rows_that_cannot_be_compared_are_in_different_panels():
    other = [dict(tool_version='Firefox 150'), dict(size='384x384'), dict(threads='4'), dict(precision='fp16')]
    rows = [IN_BROWSER, *(dict(IN_BROWSER, **cells) for cells in other)]
    assert len(set(name_panels(rows))) == len(rows) and len(describe_results(rows)) == len(rows) + 2
    assert 'Firefox 150' in ''.join(describe_results(rows))
    other = [dict(tool='app'), dict(compress='int8'), dict(form='trained'), dict(input='tensor'), dict(batch='4')]
    assert len(set(name_panels([ROW, *(dict(ROW, **cells) for cells in other)]))) == len(other) + 1
    rows = [IN_BROWSER, dict(IN_BROWSER, model='fastvit_t8', size='256x256')]  # each at its own size
    assert len(set(name_panels(rows))) == 1


def test_readme_describes_every_column():
    text = (ROOT / 'coreml' / 'README.md').read_text(encoding='utf-8')
    described = re.findall(r'^\| `(\w+)` \| (.*) \|$', text, re.MULTILINE)
    assert [name for name, _ in described] == [column.name for column in COLUMNS]
    assert all(meaning.startswith(column.meaning) for (_, meaning), column in zip(described, COLUMNS, strict=True))
