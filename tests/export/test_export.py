"""coreml/export.py as users call it."""
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exports import change, make_job, make_source
from launch import ENVIRONMENT, ROOT, kill, start, wait_for
from reference import filled_model

from caretrans.checkpoint import save_checkpoint
from caretrans.data import list_classes, open_dataset
from caretrans.errors import ConfigError, run_command
from caretrans.evaluation import EvalConfig, evaluate_checkpoint
from caretrans.export.config import ExportConfig
from caretrans.export.formats import torch_export
from caretrans.export.run import Export, _replace, name_program
from caretrans.export.source import load_source, name_classes
from caretrans.export.verify import Verification

sys.path.insert(0, str(ROOT / 'coreml'))
FRUIT = ROOT / 'data' / 'fruit14'
RANDOM = ['--model', 'test_efficientnet', '--random-weights']
FAST = ['--format', 'torch', '--img-size', '64', '--images', '14', '--no-latency']
PROGRAM = 'test_efficientnet-64x64.pt2'


@pytest.fixture
def run(monkeypatch, capsys):
    """The exit code, stdout and stderr of the command."""
    import export as command

    def call(*flags):
        monkeypatch.setattr('sys.argv', ['export.py', *map(str, flags)])
        code = run_command('export.py', command.main)
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def convert(programs, monkeypatch):
    """Let the converter of torch.export return a program made before, spoiled as asked."""
    made, _ = programs.write(make_job('torch'), 'test_efficientnet')

    def play(spoil=lambda path: None):
        def write(source, job, path):
            shutil.copy(made, path)
            spoil(path)
            return []
        monkeypatch.setattr(torch_export, 'write', write)
    play()
    return play


@pytest.fixture
def checkpoint(tmp_path):
    """A small CARE with the 14 classes of the bundled images."""
    model = filled_model('care_s0', num_classes=14, depths=(1, 1, 2, 1))
    path = tmp_path / 'fruit.pth.tar'
    save_checkpoint(path, model, arch='care_s0', model_args=dict(depths=[1, 1, 2, 1]),
                    class_names=list_classes(open_dataset(str(FRUIT), 'val')))
    return path


def list_left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_is_exported_verified_and_reported(run, checkpoint, tmp_path):
    out = tmp_path / 'out'
    code, text, _ = run('--checkpoint', checkpoint, '--output-dir', out, *FAST)
    assert code == 0
    assert list_left(out) == ['care_s0-64x64.pt2', 'care_s0-64x64.pt2.json']
    report = json.loads((out / 'care_s0-64x64.pt2.json').read_text(encoding='utf-8'))
    assert report['verification']['top1_agreement'] == 100 and report['verification']['images'] == 14
    assert report['verification']['top1'] == report['verification']['top1_expected'] is not None
    assert report['sha256'] in text and len(report['sha256']) == 64
    assert 'torch fp32' in text and 'same top-1 %' in text
    claim = 'any number of images of any height and width from 64 pixels on (run: 3 x 64 x 72, 2 x 101 x 70)'
    assert claim in text and claim in report['notes']


def test_json_is_one_object_with_the_latency_beside_eager(run, convert, tmp_path):
    code, text, progress = run(*RANDOM, '--output-dir', tmp_path, '--json', *FAST, '--latency')
    assert code == 0
    result = json.loads(text)
    program, = result['programs']
    assert result['weights'] == 'random' and program['failure'] == ''
    assert program['verification']['max_error'] < 1e-4
    assert all(program['latency'][name] > 0 for name in ('median_ms', 'ratio', 'eager_ms'))


def test_program_that_computes_something_else_is_not_kept(run, convert, monkeypatch, tmp_path):
    source = change(make_source('test_efficientnet'), lambda model: model.classifier.weight.data.neg_())
    monkeypatch.setattr('caretrans.export.run.load_source', lambda config: source)
    code, _, error = run(*RANDOM, '--output-dir', tmp_path, *FAST)
    assert code == 1 and list_left(tmp_path) == []
    assert f'failed: {PROGRAM}:' in error and 'no file was written' in error


@pytest.mark.parametrize('spoil, message', [
    (lambda path: path.write_bytes(b'half') and 1 / 0, 'torch fp32 could not be made: ZeroDivisionError: division'),
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), f'{PROGRAM} cannot be read')])
def test_earlier_file_stays_when_an_export_fails(spoil, message, run, convert, tmp_path):
    assert run(*RANDOM, '--output-dir', tmp_path, *FAST)[0] == 0
    before = (tmp_path / PROGRAM).read_bytes()
    convert(spoil)
    code, _, error = run(*RANDOM, '--output-dir', tmp_path, *FAST)
    assert code == 1 and message in error
    assert (tmp_path / PROGRAM).read_bytes() == before and len(list_left(tmp_path)) == 2


@pytest.mark.parametrize('make', [
    lambda target: target.write_text('mine', encoding='utf-8'), lambda target: target.mkdir(),
    lambda target: target.symlink_to('/tmp')])
def test_other_files_are_not_replaced(run, tmp_path, make):
    target = tmp_path / PROGRAM
    make(target)
    code, _, error = run(*RANDOM, '--output-dir', tmp_path, *FAST)
    assert code == 2 and f'{PROGRAM} already exists and was not exported: move it away' in error
    assert list_left(tmp_path) == [target.name]


def test_folder_that_was_exported_is_replaced_and_kept_if_that_fails(tmp_path):
    new, target = tmp_path / 'unfinished' / 'a.openvino', tmp_path / 'a.openvino'
    for folder, text in [(new, 'new'), (target, 'old')]:
        folder.mkdir(parents=True)
        (folder / 'model.xml').write_text(text, encoding='utf-8')
    _replace(new, target)
    assert (target / 'model.xml').read_text(encoding='utf-8') == 'new' and not new.exists()
    with pytest.raises(FileNotFoundError):
        _replace(tmp_path / 'other.openvino', target)
    assert (target / 'model.xml').read_text(encoding='utf-8') == 'new'


def test_programs_that_differ_have_different_names():
    source = make_source('care')
    jobs = [
        make_job(format='mlpackage', precision='fp16', input='image', output='classes', size=source.size),
        make_job(format='mlpackage', precision='fp16', input='tensor', output='logits', size=source.size),
        make_job(format='mlpackage', precision='fp16', input='image', output='classes', target='iOS18', batch=2),
        make_job(format='mlmodel', precision='fp32', input='image', output='classes', unfused=True, compress='int8')]
    assert [name_program(source, job) for job in jobs] == [
        'care_s0.mlpackage', 'care_s0-tensor-logits.mlpackage', 'care_s0-64x64-b2-iOS18.mlpackage',
        'care_s0-64x64-fp32-int8-unfused.mlmodel']


def test_terminated_export_leaves_nothing(tmp_path):
    process = start(
        'coreml/export.py', *RANDOM, '--output-dir', tmp_path / 'out', '--format', 'mlpackage', '--img-size', '64',
        '--images', '4', log=tmp_path / 'log')
    assert wait_for(lambda: list((tmp_path / 'out').glob('.unfinished-*/*')), process)
    assert kill(process, signal.SIGTERM) == 143
    assert list_left(tmp_path / 'out') == []


def test_sizes_that_a_model_does_not_take_are_named(run, tmp_path):
    code, _, error = run(
        '--model', 'vit_tiny_patch16_224', '--random-weights', '--output-dir', tmp_path, '--format', 'torch',
        '--img-size', '64', '--images', '2')
    assert code == 2 and '--img-size 64x64: vit_tiny_patch16_224 does not support this size' in error


def test_images_of_other_than_three_channels_are_refused(run, tmp_path):
    path = tmp_path / 'grey.pth.tar'
    save_checkpoint(path, filled_model('care_s0', in_chans=1), arch='care_s0')
    code, _, error = run('--checkpoint', path, '--output-dir', tmp_path / 'out')
    assert code == 2 and '--input image: care_s0 has 1 input channels, but an RGB image has 3' in error


def test_figures_that_are_not_finite_are_null_in_json():
    item = Export(make_job(), Path('x'), verification=Verification(1, 'data', float('nan'), 1., 2., 3., 4., 5.))
    plain = json.loads(json.dumps(item.to_dict(), allow_nan=False))
    assert plain['verification']['max_error'] is None and plain['verification']['mean_error'] == 1.


@pytest.mark.parametrize('flags, said', [
    ([], 'No weights: --checkpoint FILE loads a file, --pretrained --model NAME the published weights of a model, and '
         '--random-weights makes random ones to measure speed.'),
    (['--model', 'care_s0'], 'No weights'),
    (['--random-weights'], '--random-weights needs a model: add --model'),
    (['--pretrained'], '--pretrained needs a model: add --model'),
    (['--pretrained', *RANDOM], '--pretrained and --random-weights exclude each other'),
    (['--model', 'care_s9', '--random-weights'], '--model care_s9: no such model, the nearest are'),
    (['--model', 'care_*', '--random-weights'], 'export one model at a time'),
    (['--checkpoint', 'nowhere.pth'], 'nowhere.pth'),
    (['--checkpoint', 'nowhere.pth', '--random-weights'],
     '--checkpoint and --random-weights exclude each other'),
    ([*RANDOM, '--img-size', '16'], "img_size is '16'"),
    ([*RANDOM, '--img-size', '224x'], "img_size is '224x'"),
    ([*RANDOM, '--format', 'tflite'], 'invalid choice'),
    ([*RANDOM, '--format', 'torch', 'torch'], 'name each once'),
    ([*RANDOM, '--format', 'torch', '--precision', 'fp16'],
     '--precision fp16 with --format torch: it supports fp32'),
    ([*RANDOM, '--format', 'torch', '--output', 'classes'],
     '--output classes with --format torch: it supports logits, probabilities'),
    ([*RANDOM, '--format', 'torch', '--compress', 'int8'], '--compress int8 is for'),
    ([*RANDOM, '--target', 'iOS12'], 'invalid choice'),
    ([*RANDOM, '--format', 'torch', '--data', 'nowhere'], 'No images at nowhere'),
    ([*RANDOM, '--format', 'torch', '--labels', 'nowhere.txt'],
     '--labels nowhere.txt cannot be read'),
    ([*RANDOM, '--format', 'onnx', '--target', 'iOS18'], '--target iOS18 is for'),
    (['--quick'], 'unrecognized arguments: --quick'),
])
def test_bad_input_is_one_line_and_exit_code_2(run, flags, said, tmp_path):
    code, text, error = run(*flags, '--output-dir', tmp_path / 'out')
    assert code == 2 and text == ''
    assert error.startswith('export.py: ') and error.count('\n') == 1 and said in error
    assert not (tmp_path / 'out').exists() or list_left(tmp_path / 'out') == []


def test_target_that_cannot_be_written_is_named_before_any_work(run, tmp_path):
    (tmp_path / 'file').write_text('', encoding='utf-8')
    code, _, error = run(*RANDOM, *FAST, '--output-dir', tmp_path / 'file' / 'out')
    assert code == 2 and 'cannot be written: Not a directory; name another' in error


def test_checkpoint_of_another_variant_is_refused(run, checkpoint, tmp_path):
    code, _, error = run('--checkpoint', checkpoint, '--model', 'care_s1', '--output-dir', tmp_path / 'out', *FAST)
    assert code == 2 and 'care_s0' in error and 'care_s1' in error


def test_weights_that_are_not_finite_are_refused_before_anything_is_written(run, tmp_path):
    model = filled_model('care_s0', num_classes=14, depths=(1, 1, 2, 1))
    model.stages[1].blocks[0].inter1.expand.bias.data[3] = float('nan')
    path = tmp_path / 'nan.pth.tar'
    save_checkpoint(path, model, arch='care_s0', model_args=dict(depths=[1, 1, 2, 1]))
    code, _, error = run('--checkpoint', path, '--output-dir', tmp_path / 'out', *FAST)
    assert code == 2 and 'of 14 images are not finite' in error and list_left(tmp_path / 'out') == []


def test_labels_of_another_number_of_classes_are_refused(run, checkpoint, tmp_path):
    labels = tmp_path / 'labels.txt'
    labels.write_text('apple\npear\n', encoding='utf-8')
    code, _, error = run('--checkpoint', checkpoint, '--labels', labels, '--output-dir', tmp_path / 'out', *FAST)
    assert code == 2 and 'names 2 classes, the network has 14' in error
    labels.write_text('apple\n\npear\n', encoding='utf-8')
    code, _, error = run('--checkpoint', checkpoint, '--labels', labels, '--output-dir', tmp_path / 'out', *FAST)
    assert code == 2 and 'labels.txt: line 2 is empty: give each class a name' in error


@pytest.mark.parametrize('text', ['a\nb', 'a\nb\n', 'a\nb\n\n', 'a\r\nb\r\n', '\ufeffa\nb\n', 'a\nb\n  \n\t\n'])
def test_empty_last_lines_of_labels_are_no_classes(tmp_path, text):
    (tmp_path / 'labels.txt').write_bytes(text.encode())
    config = ExportConfig(model='care_s0', random_weights=True, labels=str(tmp_path / 'labels.txt'))
    assert name_classes(config, 2) == ['a', 'b']


def test_package_that_is_not_installed_is_named_with_its_install_line(monkeypatch):
    find = __import__('importlib.util').util.find_spec
    monkeypatch.setattr(
        'importlib.util.find_spec', lambda name, *args: None if name == 'coremltools' else find(name, *args))
    with pytest.raises(ConfigError, match=r'--format mlpackage: it is not installed: pip install coremltools==9.0'):
        ExportConfig(model='care_s0', random_weights=True).list_jobs((224, 224))


@pytest.mark.parametrize('form', ['fused', 'phone'])
def test_exported_form_can_be_evaluated(checkpoint, form):
    settings = dict(data=str(FRUIT), img_size=64, workers=0)
    base = evaluate_checkpoint(EvalConfig(str(checkpoint), **settings))
    result = evaluate_checkpoint(EvalConfig(str(checkpoint), form=form, **settings))
    assert (result.form, result.top1, result.top5) == (form, base.top1, base.top5)
    assert result.loss == pytest.approx(base.loss, rel=1e-5)


def test_script_passes_flags_on(tmp_path):
    done = subprocess.run(
        ['bash', 'cmd/export.sh', '--model', 'care_s0'], cwd=ROOT, capture_output=True, text=True,
        env=dict(ENVIRONMENT, PATH=f'{sys.prefix}/bin:{ENVIRONMENT["PATH"]}'), timeout=300, encoding='utf-8')
    assert done.returncode == 2 and 'No weights' in done.stderr


def test_random_weights_are_the_same_each_time():
    config = ExportConfig(model='test_efficientnet', random_weights=True)
    first, second = (load_source(config).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
