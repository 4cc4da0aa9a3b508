"""Text files and names: UTF-8 whatever the locale says, other encodings are read or refused in one line."""
import ast
import io
import re
import sys
from pathlib import Path

import pytest
from photos import FRUIT

from caretrans.bench.compare_plan import check_places, parse_plan
from caretrans.config import parse_train_config
from caretrans.data.datasets import open_dataset
from caretrans.data.shards import write_shards
from caretrans.errors import ConfigError, DataError, ResultsError, run_command
from caretrans.export.config import ExportConfig
from caretrans.export.phone_results import read_results
from caretrans.export.source import name_classes
from caretrans.text import escape, open_text, read_text, write_text

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob('*.py')) + sorted(
    path for folder in ('caretrans', 'coreml', 'cmd', 'data', 'tests') for path in (ROOT / folder).rglob('*.py'))
RECIPE = 'model: care_s0\nbatch_size: 8\ndata: Gr\u00f6\u00dfe\n'


def find_text_without_encoding(source: str) -> list[int]:
    """Lines that read or write text in the encoding of the locale."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, 'attr', '')
        keywords = {keyword.arg for keyword in node.keywords}
        mode = next((word.value for word in node.args[1:2] + [k.value for k in node.keywords if k.arg == 'mode']
                     if isinstance(word, ast.Constant)), 'r')
        is_open = isinstance(node.func, ast.Name) and name == 'open' and 'b' not in mode
        is_method = name in ('read_text', 'write_text') and isinstance(node.func, ast.Attribute)
        is_process = keywords & {'text', 'universal_newlines'}
        if (is_open or is_method or is_process) and not keywords & {'encoding', None}:  # None: **options
            lines.append(node.lineno)
    return lines


def test_no_text_depends_on_the_locale():
    found = {str(path.relative_to(ROOT)): lines for path in FILES
             if (lines := find_text_without_encoding(path.read_text(encoding='utf-8')))}
    assert not found
    assert find_text_without_encoding('open(a)\nopen(a, "rb")\nPath(a).read_text()\nrun(a, text=True)') == [1, 3, 4]


@pytest.mark.parametrize('data', [
    RECIPE.encode(), RECIPE.encode('utf-8-sig'), RECIPE.encode('utf-16'), b'\xfe\xff' + RECIPE.encode('utf-16-be'),
    RECIPE.replace('\n', '\r\n').encode()], ids=['utf-8', 'utf-8 with mark', 'utf-16', 'big endian', 'Windows lines'])
def test_recipes_of_windows_programs_are_read(tmp_path, data):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_bytes(data)
    assert read_text(recipe, ConfigError) == RECIPE
    config = parse_train_config(['--recipe', str(recipe)])
    assert config.data == 'Gr\u00f6\u00dfe' and config.batch_size == 8


@pytest.mark.parametrize('data, message', [
    (RECIPE.encode('latin-1'), 'recipe.yaml is not UTF-8 text (invalid start byte in line 3): save it as UTF-8.'),
    ('model: care_s0\n'.encode('utf-16-le'), 'recipe.yaml is not UTF-8 text (zero byte in line 1): save it as'),
    (RECIPE.encode('utf-16')[:-1], 'recipe.yaml is not UTF-16 text (truncated data in line '),
    (b'\x93model\x94: care_s0\n', 'recipe.yaml is not UTF-8 text (invalid start byte in line 1): save it'),
    (b'model: \x1b\n', 'is not YAML: ')])
def test_recipes_in_other_encodings_are_refused_in_one_line(tmp_path, data, message):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        parse_train_config(['--recipe', str(recipe)])
    assert '\n' not in str(error.value)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path, tmp_path / 'none.txt'):
        with pytest.raises(ConfigError, match=f'--labels {re.escape(str(path))} cannot be read: '):
            read_text(path, ConfigError, '--labels')


def test_names_that_are_not_utf_8_are_escaped_in_files(tmp_path):
    write_text(tmp_path / 'a.txt', 'caf\udce9 Gr\u00f6\u00dfe\n')
    with open_text(tmp_path / 'a.txt', 'a') as file:
        file.write('\udce9\r\n')
    assert (tmp_path / 'a.txt').read_bytes() == 'caf\\udce9 Gr\u00f6\u00dfe\n\\udce9\r\n'.encode()
    assert escape('caf\udce9 \u00f6\na\x1b') == 'caf\\udce9 \u00f6\\na\\x1b'


@pytest.mark.parametrize('encoding, shown', [('ascii', '\\udce9 \\xb1'), ('utf-8', '\\udce9 \u00b1')])
def test_a_command_escapes_what_its_output_cannot_show(monkeypatch, encoding, shown):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'stderr', err)

    def fail() -> int:
        print('\udce9 \u00b1')
        raise ConfigError('no folder \udce9 \u00b1\nhere')

    assert run_command('train.py', fail) == 2
    out.flush()
    err.flush()
    assert out.buffer.getvalue().decode(encoding) == shown + '\n'
    assert err.buffer.getvalue().decode(encoding) == f'train.py: no folder {shown}\\nhere\n'


# Files of users, through the commands ---------------------------------------------------------------------------------

LATIN = 'is not UTF-8 text (invalid '  # start or continuation byte


def test_labels_of_an_export_are_read_in_utf_16_and_refused_in_latin_1(tmp_path):
    labels, config = tmp_path / 'labels.txt', ExportConfig(model='care_s0', random_weights=True)
    config.labels = str(labels)
    labels.write_bytes('Gr\u00f6\u00dfe\nb\n'.encode('utf-16'))
    assert name_classes(config, 2) == ['Gr\u00f6\u00dfe', 'b']
    labels.write_bytes('Gr\u00f6\u00dfe\nb\n'.encode('latin-1'))
    with pytest.raises(ConfigError, match=re.escape(f'--labels {labels} {LATIN}')):
        name_classes(config, 2)


def test_a_page_in_latin_1_is_refused_before_any_measurement(call, tmp_path, monkeypatch):
    monkeypatch.setattr('benchmark.run_benches', None)
    page = tmp_path / 'page.md'
    page.write_bytes('# Gr\u00f6\u00dfe\n\n## Results\n'.encode('latin-1'))
    for flag in ('--update', '--check'):
        code, _, err = call(flag, '--readme', page)
        assert code == 2 and f'{page} {LATIN}' in err and err.count('\n') == 1


def test_a_description_of_shards_in_latin_1_is_refused(tmp_path):
    (tmp_path / '_info.json').write_bytes('{"name": "Gr\u00f6\u00dfe"}'.encode('latin-1'))
    with pytest.raises(DataError, match=re.escape(f'_info.json {LATIN}')):
        open_dataset(str(tmp_path), 'train')
    with pytest.raises(DataError, match=re.escape(f'_info.json {LATIN}')):
        write_shards(str(FRUIT), str(tmp_path))


def test_results_from_a_spreadsheet_are_read(tmp_path):
    """Excel writes a byte order mark, and Windows line ends."""
    rows = read_text(ROOT / 'coreml' / 'results.csv', ConfigError)
    file = tmp_path / 'results.csv'
    file.write_bytes(rows.replace('\n', '\r\n').encode('utf-8-sig'))
    assert read_results(file) == read_results(ROOT / 'coreml' / 'results.csv')
    file.write_bytes((rows + '\u00f6').encode('latin-1'))
    with pytest.raises(ResultsError, match=re.escape(f'results.csv {LATIN[:-1]}')):
        read_results(file)


def test_a_comparison_whose_settings_were_saved_in_latin_1_is_refused(tmp_path):
    plan = parse_plan(['DATA', '--model', 'care_s0', '--output', str(tmp_path)])
    (tmp_path / 'comparison.yaml').write_bytes('settings: Gr\u00f6\u00dfe\n'.encode('latin-1'))
    with pytest.raises(ConfigError, match='comparison.yaml cannot be read'):
        check_places(plan)
