"""The file of latencies on phones: its schema holds for what is committed, and refuses what is wrong."""
import datetime
import re
import runpy
import sys

import pytest
from launch import ROOT

from caretrans.errors import ResultsError
from caretrans.export.coreml.phone_results import COLUMNS, describe_results, format_row, make_row, read_results

FILE = ROOT / 'coreml' / 'results.csv'
HEADER = ','.join(column.name for column in COLUMNS)
# Made up for the tests; nobody measured this.
ROW = dict(
    date='2026-01-31', reporter='Nobody', device='iPhone 15 Pro', os='iOS 18.1', model='care_s0', form='phone',
    size='224x224', batch='1', format='mlpackage', precision='fp16', compress='none', input='image', target='iOS16',
    version='0.1.0', tool='xcode', tool_version='16.0', compute_units='all', statistic='median', runs='500',
    warm_up='50', latency_ms='1.25', load_ms='', note='')


def write(tmp_path, *rows, header=HEADER):
    path = tmp_path / 'results.csv'
    path.write_text('\n'.join([header, *rows]) + '\n', encoding='utf-8')
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """The exit code, stdout and stderr of the command."""
    def call(*args):
        monkeypatch.setattr('sys.argv', ['results.py', *map(str, args)])
        monkeypatch.setattr('sys.path', list(sys.path))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / 'coreml' / 'results.py'), run_name='__main__')
        return end.value.code, *capsys.readouterr()
    return call


def test_committed_file_follows_its_schema():
    read_results(FILE)
    assert FILE.read_text(encoding='utf-8').splitlines()[0] == HEADER


def test_rows_are_read_as_they_were_written(tmp_path):
    other = dict(ROW, note='in a case, "warm"', format='mlmodel', target='', warm_up='', load_ms='80')
    path = write(tmp_path, format_row(ROW), format_row(other))
    assert read_results(path) == [ROW, other]


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
    (dict(compute_units='ne'), 'compute_units .* one of all, cpu_and_ne, cpu_and_gpu, cpu_only'),
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


@pytest.mark.parametrize('lines, message', [
    ([HEADER, 'a,b,c'], 'line 2: 3 cells for 23 columns'),
    ([HEADER, format_row(ROW), format_row(ROW)], 'line 3: it repeats an earlier row'),
    ([HEADER, '"never closed'], 'line 2: unexpected end of data'),
    ([HEADER.replace('latency_ms', 'latency')],
     'line 1: its columns must be date,.*; latency_ms missing; latency unknown'),
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
    assert (code, text) == (2, '') and error.startswith('results.py: ') and error.count('\n') == 1
    code, text, _ = run()  # the committed file
    assert code == 0 and text


def test_readme_describes_every_column():
    text = (ROOT / 'coreml' / 'README.md').read_text(encoding='utf-8')
    described = re.findall(r'^\| `(\w+)` \| (.*) \|$', text, re.MULTILINE)
    assert [name for name, _ in described] == [column.name for column in COLUMNS]
    assert all(meaning.startswith(column.meaning) for (_, meaning), column in zip(described, COLUMNS, strict=True))
