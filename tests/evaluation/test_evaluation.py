"""validate.py on checkpoints and images: each image counts once, in one process and in several."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from launch import run
from photos import FRUIT, copy_images
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from validate import main, parse_flags

import caretrans
from caretrans.checkpoint import create_from_checkpoint, save_checkpoint
from caretrans.checkpoint.preparation import resolve_eval_config
from caretrans.data import open_dataset
from caretrans.data.loaders import build_eval_loader
from caretrans.distributed import Processes
from caretrans.errors import DataError
from caretrans.evaluation import EvalConfig, describe_result, evaluate_checkpoint
from caretrans.evaluation.metrics import Accuracy
from caretrans.evaluation.real_labels import RealLabels

ROOT = Path(caretrans.__file__).parent.parent
SIZE = 64
FIGURES = ('images', 'top1', 'top5')


def save_model(path: Path, classes, **rest) -> str:
    """A checkpoint of random weights whose predictions vary from image to image."""
    torch.manual_seed(0)
    depths = dict(depths=[1, 1, 1, 1])
    model = timm.create_model('care_s0', num_classes=len(classes), **depths)
    torch.nn.init.normal_(model.head.fc.weight, std=1.)
    save_checkpoint(path, model, arch='care_s0', model_args=depths, class_names=classes, **rest)
    return str(path)


def validate(*flags, processes: int, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of validate.py in several processes, of which the failed ones must exit with `code`."""
    return run('validate.py', *flags, '--device', 'cpu', '--img-size', SIZE, processes=processes, code=code)


def predict_one_by_one(checkpoint: str, paths):
    """The logits (n, C) for image files by a plain loop."""
    model = create_from_checkpoint(checkpoint)[0].eval()
    config = resolve_eval_config(model, img_size=SIZE)
    transform = create_transform(
        config.input_size, interpolation=config.interpolation, mean=config.mean, std=config.std,
        crop_pct=config.crop_pct, crop_mode=config.crop_mode)
    with torch.inference_mode():
        return torch.cat([model(transform(Image.open(path).convert('RGB'))[None]) for path in paths])


# On images ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def fruit(tmp_path_factory):
    """A checkpoint of the classes of the bundled images."""
    classes = sorted(path.name for path in (FRUIT / 'val').iterdir())
    return save_model(tmp_path_factory.mktemp('fruit') / 'fruit.pth.tar', classes)


@pytest.mark.slow
def test_one_process_and_two_return_the_same_figures(fruit, tmp_path):
    """661 images, an odd number, in 11 batches: 6 for one process, 5 for the other."""
    options = dict(batch_size=64, workers=0, expect=661, worst=3)
    one = evaluate_checkpoint(EvalConfig(
        fruit, str(FRUIT), img_size=SIZE, per_class=str(tmp_path / 'one.csv'), **options), sys.stderr)
    out, err = validate(fruit, FRUIT, '--json', '--expect', 661, '--confusion', 3, '--workers', 1,
                        '--per-class', tmp_path / 'two.csv', processes=2)
    two = json.loads(out)
    whole = one.to_dict()
    assert {key: two[key] for key in FIGURES} == {key: whole[key] for key in FIGURES} and one.images == 661
    assert two['loss'] == pytest.approx(one.loss, rel=1e-12) and two.keys() == whole.keys()
    assert two['per_class'] == whole['per_class'] and two['worst'] == whole['worst'] and two['processes'] == 2
    assert (tmp_path / 'one.csv').read_text(encoding='utf-8') == (tmp_path / 'two.csv').read_text(encoding='utf-8')
    assert sum(row.images for row in one.per_class) == 661
    assert one.top1 == pytest.approx(sum(row.images * row.top1 for row in one.per_class) / 661)
    assert one.top5 == pytest.approx(sum(row.images * row.top5 for row in one.per_class) / 661)
    assert err.count('Loaded ') == 1, 'only the primary process prints'


@pytest.fixture(scope='module')
def two_kinds(tmp_path_factory):
    """(checkpoint, folder, files, labels) of 22 images of two classes, one of which is unreadable."""
    folder = copy_images(tmp_path_factory.mktemp('data'), per_class=11)
    files = sorted((folder / 'val').glob('*/*.jpg'))
    files[4].write_bytes(b'no image')
    labels = torch.tensor([['kaiser', 'orange'].index(path.parent.name) for path in files])
    return save_model(folder / 'two.pth.tar', ['kaiser', 'orange']), folder, files, labels


def test_each_image_counts_once_and_unreadable_images_are_skipped(two_kinds):
    checkpoint, folder, files, labels = two_kinds
    readable = [i for i in range(22) if i != 4]
    logits, labels = predict_one_by_one(checkpoint, [files[i] for i in readable]), labels[readable]
    for batch_size, workers in ((4, 1), (5, 0)):  # with 4 it is the first of a batch, with 5 the last
        result = evaluate_checkpoint(
            EvalConfig(checkpoint, str(folder), img_size=SIZE, batch_size=batch_size, workers=workers))
        assert result.images == 21
        assert result.top1 == 100 * (logits.argmax(1) == labels).sum().item() / 21
        assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert [name for name, _ in result.unreadable] == [str(files[4])]
    printed = '\n'.join(describe_result(result))
    assert '1 more image could not be read' in printed and 'of 21 images only' in printed
    assert f'{files[4]}: UnidentifiedImageError' in printed


def test_fewer_images_than_expected_are_an_error(two_kinds, monkeypatch):
    checkpoint, folder, files, _ = two_kinds
    options = dict(img_size=SIZE, workers=0)
    with pytest.raises(DataError, match='21 images were counted, but 22 are expected: 1 could not') as error:
        evaluate_checkpoint(EvalConfig(checkpoint, str(folder), expect=22, **options))
    assert str(files[4]) in str(error.value)
    monkeypatch.setattr(
        'caretrans.evaluation.evaluate.build_eval_loader', lambda *_: pytest.fail('work has started'))
    with pytest.raises(DataError, match='has 22 images, but 50000 are expected'):
        evaluate_checkpoint(EvalConfig(checkpoint, str(folder), expect=50000, **options))


@pytest.mark.parametrize('images, batch_size, world_size', [(22, 4, 1), (22, 4, 2), (22, 5, 3), (22, 1, 30)])
def test_processes_split_the_data_into_whole_batches(tmp_path, images, batch_size, world_size):
    dataset = open_dataset(copy_images(tmp_path, per_class=11), 'val')
    config = resolve_eval_config(timm.create_model('care_s0'), img_size=32)
    loaders = [build_eval_loader(dataset, config, batch_size, 0, Processes(rank, world_size))
               for rank in range(world_size)]
    assert sorted(index for loader in loaders for index in loader.share) == list(range(images))
    alone = dict(enumerate(build_eval_loader(dataset, config, batch_size, 0).run()))
    for rank, loader in enumerate(loaders):
        for count, (batch, labels) in enumerate(loader.run()):
            expected, expected_labels = alone[count * world_size + rank]
            assert torch.equal(batch, expected) and torch.equal(labels, expected_labels)


def test_settings_are_printed_with_their_sources(two_kinds, tmp_path):
    checkpoint = save_model(
        tmp_path / 'x.pth.tar', ['kaiser', 'orange'], config=dict(data=str(two_kinds[1])),
        eval_config=dict(input_size=[3, 96, 96], crop_pct=0.95))
    result = evaluate_checkpoint(EvalConfig(checkpoint, workers=0, interpolation='bilinear'))
    assert '96x96 pixels (from the checkpoint), bilinear (flag), crop_pct 0.95 (checkpoint)' \
        in '\n'.join(describe_result(result))
    result = evaluate_checkpoint(EvalConfig(two_kinds[0], str(two_kinds[1]), workers=0, img_size=SIZE))
    assert '64x64 pixels (from the flag), bicubic (model), crop_pct 0.875 (model)' in '\n'.join(describe_result(result))


def test_worst_classes_are_printed_with_what_they_are_mistaken_for(fruit):
    result = evaluate_checkpoint(EvalConfig(fruit, str(FRUIT / 'val'), img_size=32, workers=0, worst=2))
    worst = result.worst[0]
    assert len(result.worst) == 2 and worst.top1 <= result.worst[1].top1
    other = worst.taken_for[0]
    assert f'  {worst.name}  {worst.top1:.1f} % of {worst.images}: {other.name} {other.images}' \
        in '\n'.join(describe_result(result))
    assert result.per_class is None


@pytest.mark.parametrize('argv, checkpoint, data', [
    (['x.pth'], 'x.pth', ''), (['x.pth', 'd'], 'x.pth', 'd'), (['x.pth', '--device', 'cpu', 'd'], 'x.pth', 'd'),
    (['--json', 'x.pth', '--workers', '0', 'd', '--amp', 'bf16'], 'x.pth', 'd'),
    (['--checkpoint', 'x.pth', 'd'], 'x.pth', 'd'), (['d', '--checkpoint', 'x.pth'], 'x.pth', 'd'),
    (['--checkpoint', 'x.pth'], 'x.pth', ''), (['--pretrained', '--model', 'care_s0', 'd'], '', 'd'),
    (['d', '--model', 'care_s0', '--pretrained'], '', 'd')])
def test_arguments_without_a_flag_are_the_checkpoint_and_the_data(argv, checkpoint, data):
    flags = parse_flags(argv)
    assert (flags['checkpoint'], flags['data']) == (checkpoint, data) and 'checkpoint_and_data' not in flags


@pytest.mark.slow
def test_an_error_is_one_line_of_the_primary_process(two_kinds):
    out, err = validate(two_kinds[0], two_kinds[1], '--expect', 50000, processes=2, code=2)
    lines = [line for line in err.splitlines() if line.startswith('validate.py: ')]
    assert len(lines) == 1 and lines[0].endswith('has 22 images, but 50000 are expected.') and out == ''


@pytest.mark.parametrize('flags, message', [
    (['--expect', 23], 'has 22 images, but 23 are expected.'),
    (['--per-class', '/nowhere/classes.csv'], '/nowhere/classes.csv cannot be written: there is no folder /nowhere.'),
    (['--real-labels'], "--real-labels is for ImageNet's classes, from 'n01440764' on: this data set has 2 from "
                        "'kaiser' on."),
], ids=lambda value: str(value)[:20])
def test_bad_input_is_one_line_and_exit_code_2(two_kinds, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', list(map(str, ['validate.py', *two_kinds[:2], '--device', 'cpu', *flags])))
    assert main() == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith('Loaded ')]
    assert len(lines) == 1 and lines[0].startswith('validate.py: ') and lines[0].endswith(message)
    assert captured.out == ''


# ImageNet-ReaL --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def small_imagenet(tmp_path_factory):
    """Nine images under ImageNet names, the third unreadable: (checkpoint, folder, files, [top-1, top-5])."""
    folder, classes = tmp_path_factory.mktemp('imagenet'), ImageNetInfo().label_names()[:6]
    images = sorted(FRUIT.glob('val/*/*.jpg'))[::70][:9]
    files = []
    for i, image in enumerate(images):
        files.append(folder / 'val' / classes[i % 6] / f'ILSVRC2012_val_{9 - i:08d}.JPEG')
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_bytes(image.read_bytes() if i != 2 else b'no image')
    checkpoint = save_model(folder / 'six.pth.tar', classes)
    classes = predict_one_by_one(checkpoint, [path for i, path in enumerate(files) if i != 2]).topk(6).indices.tolist()
    classes.insert(2, [0] * 6)
    real = [[] for _ in files]  # by the number in the file's name
    for i, found in enumerate(classes):
        real[8 - i] = ([found[0]], [found[5]], [0], [], [found[3], found[5]], found[::5], [found[4]], [], [5])[i]
    (folder / 'real.json').write_text(json.dumps(real), encoding='utf-8')
    expected = [(found[0] in real[8 - i], bool(set(found[:5]) & set(real[8 - i])))
                for i, found in enumerate(classes) if i != 2 and real[8 - i]]
    return checkpoint, folder, files, [100 * sum(hits) / len(expected) for hits in zip(*expected, strict=True)]


def test_real_labels_count_images_that_have_a_label(small_imagenet):
    checkpoint, folder, files, (top1, top5) = small_imagenet
    assert 0 < top1 < top5 < 100
    result = evaluate_checkpoint(EvalConfig(
        checkpoint, str(folder), img_size=SIZE, workers=0, batch_size=2, real_labels=str(folder / 'real.json')))
    assert result.images == 8 and [name for name, _ in result.unreadable] == [str(files[2])]
    assert result.real == Accuracy(top1, top5, images=6)
    assert f'top-1 {top1:.3f} %   top-5 {top5:.3f} %   by the ImageNet-ReaL labels of 6 images' \
        in '\n'.join(describe_result(result))


@pytest.mark.slow
def test_process_without_images_takes_part(small_imagenet):
    """Nine images in one batch for two processes."""
    checkpoint, folder, files, (top1, top5) = small_imagenet
    flags = ['--batch-size', 9, '--workers', 0, '--real-labels', folder / 'real.json']
    result = json.loads(validate(checkpoint, folder, '--json', *flags, processes=2)[0])
    alone = evaluate_checkpoint(EvalConfig(checkpoint, str(folder), img_size=SIZE, workers=0, batch_size=9))
    assert [result[key] for key in FIGURES] == [alone.images, alone.top1, alone.top5]
    assert result['loss'] == pytest.approx(alone.loss, rel=1e-12) and result['processes'] == 2
    assert [name for name, _ in result['unreadable']] == [str(files[2])]
    assert result['real'] == dict(top1=top1, top5=top5, images=6)


def test_real_labels_are_refused_on_other_images(small_imagenet, tmp_path):
    _, folder, files, _ = small_imagenet
    dataset = open_dataset(folder, 'val')
    with pytest.raises(DataError, match='this data set has 9 images, which is not the number of real labels'):
        RealLabels(dataset, 6)
    (tmp_path / 'text.json').write_text('real', encoding='utf-8')
    (tmp_path / 'plain.json').write_text('[1, 2, 3, 4, 5, 6, 7, 8, 9]', encoding='utf-8')
    for name, message in (('gone', 'cannot be read as'), ('text', 'cannot be read as'), ('plain', 'a list of labels')):
        with pytest.raises(DataError, match=message):
            RealLabels(dataset, 6, str(tmp_path / f'{name}.json'))
    dataset.reader.samples[0] = (str(files[0].with_name('photo.JPEG')), 0)
    with pytest.raises(DataError, match='such as ILSVRC2012_val_00000001.JPEG: .*photo.JPEG is not one of them'):
        RealLabels(dataset, 6, str(folder / 'real.json'))


def test_timm_contains_the_real_labels_of_imagenet():
    """50,000 images under their names; the number without a real label is that of the paper."""
    real = timm.data.RealLabelsImagenet([f'ILSVRC2012_val_{i + 1:08d}.JPEG' for i in range(50000)])
    assert sum(not labels for labels in real.real_labels.values()) == 50000 - 46837
    assert max(max(labels) for labels in real.real_labels.values() if labels) == 999


@pytest.mark.slow
def test_script_runs_several_processes(two_kinds):
    """`NPROC=2 bash cmd/eval.sh` is torchrun; the Python that runs the tests is the active one."""
    environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'NPROC': '2'}
    done = subprocess.run(
        ['bash', 'cmd/eval.sh', two_kinds[0], str(two_kinds[1]), '--device', 'cpu', '--img-size', '32', '--json',
         '--batch-size', '6'], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result['processes'] == 2 and result['images'] == 21


def test_csv_names_each_class(two_kinds, tmp_path):
    checkpoint, folder, _, labels = two_kinds
    path = tmp_path / 'classes.csv'
    result = evaluate_checkpoint(EvalConfig(checkpoint, str(folder), img_size=SIZE, workers=0, per_class=str(path)))
    rows = list(csv.DictReader(path.read_text(encoding='utf-8').splitlines()))
    assert [row['class'] + row['name'] + ' ' + row['images'] for row in rows] == ['0kaiser 10', '1orange 11']
    assert [float(row['top1']) for row in rows] == [round(row.top1, 3) for row in result.per_class]
