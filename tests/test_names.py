"""Names of folders, files and classes that are not UTF-8, or look like patterns, through every command."""
import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from launch import configure, run
from photos import FRUIT

from caretrans.__main__ import main
from caretrans.bench.compare_plan import parse_plan
from caretrans.data.datasets import open_dataset
from caretrans.export.config import ExportConfig
from caretrans.export.run import export
from caretrans.training.folder import find_run
from caretrans.training.run import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures('no_curves'),
    pytest.mark.skipif(sys.platform != 'linux', reason='other systems refuse names that are not UTF-8')]

CLASSES = {  # folder: class of the bundled images
    b'caf\xe9': 'kaiser', b'a [b]*?': 'orange', b'__x__': 'satsumas', 'Gr\u00f6\u00dfe v1.0'.encode(): 'watermelon'}
NAMES = sorted((os.fsdecode(name) for name in CLASSES), key=str.lower)  # as timm sorts them
ESCAPED = [name.replace('\udce9', '\\udce9') for name in NAMES]
TINY = [
    '--recipe', 'care_s0_fruit14', '--epochs', '1', '--warmup-epochs', '0', '--img-size', '32', '--val-img-size', '32',
    '--batch-size', '4', '--workers', '0', '--device', 'cpu', '--model-args', 'depths=[1,1,1,1]']
LIST_AND_PREDICT = '''
import sys
from caretrans.__main__ import main
from caretrans.data.folders import FolderReader
print(ascii(list(FolderReader(sys.argv[1]).class_to_idx)))
sys.exit(main(['predict', *sys.argv[1:]]))
'''
C_LOCALE = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')  # where text is ASCII


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Four classes of two images, and a folder, whose names are odd."""
    root = os.fsencode(tmp_path_factory.mktemp('odd')) + b'/a:b d\xe9 [x]*?{1..2}$a_$b_'
    for split in (b'train', b'val'):
        for folder, name in CLASSES.items():
            os.makedirs(root + b'/' + split + b'/' + folder)
            for number, image in enumerate(sorted((FRUIT / os.fsdecode(split) / name).iterdir())[:2]):
                shutil.copy(image, root + b'/' + split + b'/' + folder + b'/im\xe9\n[%d].jpg' % number)
    return os.fsdecode(root)


@pytest.fixture(scope='module')
def trained(data):
    """The folder of a run under runs/ beside the data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(data).parent)
        return Path(data).parent / train(configure(data, *TINY)).folder


@pytest.fixture(scope='module')
def checkpoint(trained):
    return str(trained / 'best.pth.tar')


def test_an_unfinished_run_is_found_again(data, trained, monkeypatch):
    monkeypatch.chdir(Path(data).parent)
    assert trained.name.startswith(f'care_s0-{Path(data).name}-')
    finished = trained / 'result.json'
    finished.rename(trained / 'aside')
    try:
        path, checkpoints = find_run(configure(data, *TINY))
        assert path == Path('runs') / trained.name and checkpoints
        other = Path(data).with_name('a:b d\udce9 xyz{1..2}$a_$b_')  # what the name matches as a pattern
        assert find_run(configure(str(other), *TINY))[1] == []
    finally:
        (trained / 'aside').rename(finished)


def test_a_run_holds_its_classes_events_and_settings(data, trained, checkpoint):
    assert torch.load(checkpoint, weights_only=True)['class_names'] == NAMES
    assert list(trained.glob('events.out.tfevents.*'))
    assert configure('--recipe', str(trained / 'config.yaml')).data == data


def test_an_evaluation_lists_the_classes(call_validate, data, checkpoint, tmp_path):
    table = tmp_path / 'c\udce9.csv'
    code, out, err = call_validate(
        checkpoint, data, '--device', 'cpu', '--workers', '0', '--confusion', '4', '--per-class', table)
    assert code == 0, err
    with open(table, newline='', encoding='utf-8') as file:
        assert [row['name'] for row in csv.DictReader(file)] == ESCAPED
    assert all(name in out for name in ESCAPED)


@pytest.fixture
def call_validate(monkeypatch, capsys):
    """Run validate.py in this process: its exit code, stdout and stderr."""
    import validate

    def call(*flags):
        monkeypatch.setattr('sys.argv', ['validate.py', *map(str, flags)])
        return validate.main(), *capsys.readouterr()
    return call


@pytest.mark.parametrize('as_json', [False, True])
def test_predictions_name_images_and_classes(capsys, data, checkpoint, as_json):
    code = main(['predict', f'{data}/val', '--checkpoint', checkpoint, '--device', 'cpu', *['--json'] * as_json])
    out = capsys.readouterr().out
    assert code == 0
    if as_json:
        results = [json.loads(line) for line in out.splitlines()]
        assert len(results) == 8 and all(sorted(result['classes']) == sorted(NAMES) for result in results)
        assert all(Path(result['image']).is_file() for result in results)
    else:
        assert out.count('im\\udce9\\n[') == 8 and out.count(ESCAPED[-1]) >= 8


def test_commands_work_where_text_is_ascii(data, checkpoint):
    """The classes of a folder, and their order, are the same as elsewhere."""
    out, _ = run('-c', LIST_AND_PREDICT, f'{data}/val', '--checkpoint', checkpoint, '--device', 'cpu', **C_LOCALE)
    assert out.splitlines()[0] == ascii(NAMES) and out.count('im\\udce9\\n[') == 8


def test_weights_are_converted_and_read_under_such_names(capsys, data, checkpoint, tmp_path):
    target = str(tmp_path / 'w\udce9 [1].safetensors')
    assert main(['convert', checkpoint, target, '--to', 'caretrans']) == 0
    assert main(['predict', f'{data}/val', '--checkpoint', target, '--device', 'cpu', '--json']) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if '"classes"' in line]) == 8


def test_shards_hold_every_image(data, tmp_path, monkeypatch):
    target = 'a:b d\udce9 [1]{a,b}::?#'
    monkeypatch.chdir(tmp_path)
    assert main(['shard', data, target]) == 0
    assert json.loads(Path(target, '_info.json').read_text(encoding='utf-8'))['classes'] == NAMES
    for split in ('train', 'val'):
        records = list(open_dataset(target, split).reader.read(0, 1))
        assert sorted(record.label for record in records) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert all(record.data is not None for record in records)


@pytest.mark.slow
@pytest.mark.parametrize('format', ['torch', 'openvino', 'mlpackage'])
def test_exports_have_escaped_labels(data, checkpoint, tmp_path, format):
    _, (result,) = export(ExportConfig(
        checkpoint=checkpoint, format=[format], precision=['fp32'], img_size='64', data=data, images=2, latency=False,
        output_dir=str(tmp_path / 'out\udce9 [1]')))
    assert result.failure == '' and result.program.labels == ESCAPED
    assert json.loads(Path(f'{result.path}.json').read_text(encoding='utf-8'))['data'].startswith(data)


def test_a_comparison_is_trained_and_drawn(capsys, data, tmp_path):
    folder = tmp_path / 'c\udce9 [1]'
    flags = ['compare', data, *TINY, '--runs', '1', '--model', 'care_s0', '--output', str(folder)]
    assert main(flags) == 0, capsys.readouterr().err
    assert (folder / 'comparison.png').read_bytes().startswith(b'\x89PNG')
    assert 'data a:b d\\udce9 [x]*?{1..2}$a_$b_: 8 training' in (folder / 'comparison.md').read_text(encoding='utf-8')
    assert json.loads((folder / 'comparison.json').read_text(encoding='utf-8'))['settings']['data'] == data
    assert parse_plan(flags[1:]).is_finished('care_s0', 42)
