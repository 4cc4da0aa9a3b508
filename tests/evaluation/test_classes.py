"""Data with some of the classes of a model: mapped by name, scored among all classes and among theirs."""
import json
import shutil
import sys

import pytest
import timm
import torch
from launch import run
from photos import FRUIT
from timm.data import ImageNetInfo
from validate import main as validate

from caretrans.checkpoint import create_from_checkpoint, save_checkpoint
from caretrans.checkpoint.preparation import resolve_eval_config
from caretrans.data.datasets import list_classes
from caretrans.data.loaders import build_eval_loader
from caretrans.errors import DataError
from caretrans.evaluation import EvalConfig, describe_result, evaluate_checkpoint, predict_images
from caretrans.evaluation.classes import match_classes
from caretrans.evaluation.evaluate import open_data

IMAGENET = ImageNetInfo().label_names()
CLASSES = sorted(path.name for path in (FRUIT / 'val').iterdir())
SIZE = 32


def make_data(folder, names, per_class=3):
    """Bundled images as data of classes of these names."""
    for i, name in enumerate(names):
        (folder / 'val' / name).mkdir(parents=True)
        for image in sorted((FRUIT / 'val' / CLASSES[i % len(CLASSES)]).glob('*.jpg'))[:per_class]:
            shutil.copy(image, folder / 'val' / name)
    return folder


def save_model(path, num_classes, **rest):
    torch.manual_seed(0)
    model = timm.create_model('care_s0', num_classes=num_classes, depths=(1, 1, 1, 1))
    torch.nn.init.normal_(model.head.fc.weight, std=1.)
    save_checkpoint(path, model, arch='care_s0', model_args=dict(depths=(1, 1, 1, 1)), **rest)
    return str(path)


def compute(checkpoint, data, classes):
    """(top1, top5, loss) by a plain loop, among all classes and among `classes`; label i is the i-th of these."""
    model, loaded = create_from_checkpoint(checkpoint)
    opened = open_data(loaded, str(data), '', '', model.num_classes)
    loader = build_eval_loader(opened.images, resolve_eval_config(model, img_size=SIZE), 64, 0)
    with torch.inference_mode():
        logits, labels = zip(*((model.eval()(images), labels) for images, labels in loader.run()), strict=True)
    logits, labels = torch.cat(logits), torch.cat(labels)
    for values, targets in ((logits, torch.tensor(classes)[labels]), (logits[:, classes], labels)):
        top = values.topk(min(5, values.shape[1])).indices
        yield (100 * (top[:, 0] == targets).double().mean().item(),
               100 * (top == targets[:, None]).any(dim=1).double().mean().item(),
               torch.nn.functional.cross_entropy(values, targets).item())


def check(checkpoint, data, classes):
    result = evaluate_checkpoint(EvalConfig(checkpoint, str(data), img_size=SIZE, workers=0, per_class=''))
    every, among = compute(checkpoint, data, classes)
    assert (result.top1, result.top5, result.loss) == pytest.approx(every, rel=1e-5)
    assert (result.subset.top1, result.subset.top5, result.subset.loss) == pytest.approx(among, rel=1e-5)
    assert result.subset.classes == len(classes) and result.subset.loss < result.loss
    printed = '\n'.join(describe_result(result))
    assert f'top-1 {result.top1:.3f} %' in printed and 'among all classes of the model' in printed
    assert f'top-1 {result.subset.top1:.3f} %   top-5 {result.subset.top5:.3f} %   loss {result.subset.loss:.4f}   ' \
        f'among the {len(classes)} classes of the data' in printed
    return result


def test_classes_of_a_checkpoint_are_matched_by_name(tmp_path):
    """A validation folder that lacks classes, the first among them: labels are not the model's classes."""
    checkpoint = save_model(tmp_path / 'x.pth.tar', len(CLASSES), class_names=CLASSES)
    result = check(checkpoint, make_data(tmp_path / 'data', CLASSES[3:9]), list(range(3, 9)))
    assert result.images == 18 and result.subset.top5 != result.top5


@pytest.mark.parametrize('numbers', [range(1, 1000, 5), [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]])
def test_imagenet_subsets_are_matched_to_a_published_file(tmp_path, numbers):
    """200 classes, as ImageNet-A and ImageNet-R have, and the ten of Imagenette, for a file without class names."""
    checkpoint = save_model(tmp_path / 'x.pth.tar', 1000)
    check(checkpoint, make_data(tmp_path / 'data', [IMAGENET[i] for i in numbers], per_class=1), list(numbers))


def test_folders_named_by_numbers_are_classes_by_number(tmp_path):
    """As in ImageNetV2; here every other class is missing."""
    checkpoint = save_model(tmp_path / 'x.pth.tar', 1000)
    opened = open_data(create_from_checkpoint(checkpoint)[1], str(
        make_data(tmp_path / 'data', [str(i) for i in range(0, 240, 2)], per_class=1)), '', '', 1000)
    assert sorted(opened.classes) == list(range(0, 240, 2))
    assert opened.classes == [int(name) for name in list_classes(opened.images)]
    check(checkpoint, tmp_path / 'data', opened.classes)


def test_the_same_classes_are_scored_once(tmp_path):
    checkpoint = save_model(tmp_path / 'x.pth.tar', 3, class_names=['a', 'b', 'c'])
    result = evaluate_checkpoint(EvalConfig(
        checkpoint, str(make_data(tmp_path / 'data', ['a', 'b', 'c'])), img_size=SIZE, workers=0))
    assert result.subset is None and 'subset' not in result.to_dict()
    assert not any('among' in line for line in describe_result(result))


def test_json_and_table_of_classes_name_the_subset(tmp_path, monkeypatch, capsys):
    checkpoint = save_model(tmp_path / 'x.pth.tar', len(CLASSES), class_names=CLASSES)
    data = make_data(tmp_path / 'data', CLASSES[3:9])
    monkeypatch.setattr(sys, 'argv', [
        'validate.py', checkpoint, str(data), '--json', '--img-size', '32', '--workers', '0', '--device', 'cpu',
        '--per-class', str(tmp_path / 'x.csv')])
    assert validate() == 0
    result = json.loads(capsys.readouterr().out)
    assert result['subset'].keys() == {'classes', 'loss', 'top1', 'top5'} and result['subset']['classes'] == 6
    assert [row['images'] for row in result['per_class']] == [0] * 3 + [3] * 6 + [0] * 5
    assert len((tmp_path / 'x.csv').read_text(encoding='utf-8').splitlines()) == 1 + len(CLASSES)


def test_several_processes_score_a_subset_like_one(tmp_path):
    """18 images in batches of 4, so that the shares differ."""
    checkpoint = save_model(tmp_path / 'x.pth.tar', len(CLASSES), class_names=CLASSES)
    data = make_data(tmp_path / 'data', CLASSES[3:9])
    one, two = (json.loads(run(
        'validate.py', checkpoint, data, '--json', '--img-size', SIZE, '--batch-size', 4, '--workers', 0, '--device',
        'cpu', processes=processes)[0]) for processes in (1, 2))
    assert two['processes'] == 2 and two['subset']['loss'] == pytest.approx(one['subset']['loss'], rel=1e-12)
    for key in ('top1', 'top5'):
        assert two[key] == one[key] and two['subset'][key] == one['subset'][key]


@pytest.mark.parametrize('found, known, num_classes, message', [
    (['a', 'x', 'y'], ['a', 'b'], 2, r'data has 2 of 3 classes that model does not know: x, y; it knows a, b'),
    ([IMAGENET[0], 'n99999999'], None, 1000, 'data has 1 of 2 classes that model does not know: n99999999'),
    ([*IMAGENET[:999], 'n99999999'], None, 1000, 'data has 1 of 1000 classes that model does not know: n99999999'),
    (['a', 'b', 'c'], None, 4, 'data has 3 classes, model has 4 and does not name them'),
    (['1', '2', '4'], None, 4, 'data has 3 classes, model has 4 and does not name them'),
    (['crane', 'a'], ['crane', 'crane', 'a'], 3, 'model has several classes of one name'),
])
def test_classes_unknown_to_the_file_are_named(found, known, num_classes, message):
    with pytest.raises(DataError, match=message):
        match_classes(found, known, num_classes, 'data', 'model')


@pytest.mark.parametrize('names', [['a'], {0: 'a', 1: 'b', 2: 'c'}, 'abc', None, 7])
def test_files_whose_class_names_are_no_list_of_one_per_class_have_none(tmp_path, names):
    checkpoint = save_model(tmp_path / 'x.pth.tar', 3)
    torch.save(dict(torch.load(checkpoint), class_names=names), checkpoint)
    data = str(make_data(tmp_path / 'data', ['a', 'b', 'c']))
    assert evaluate_checkpoint(EvalConfig(checkpoint, data, img_size=SIZE, workers=0)).images == 9
    first, *_ = predict_images(checkpoint, [data], img_size=SIZE)
    assert sorted(first.classes) == ['0', '1', '2']


@pytest.mark.parametrize('found, known, num_classes, expected', [
    (['a', 'b'], ['a', 'b'], 2, None), (['b', 'a'], ['a', 'b'], 2, [1, 0]), (['b'], ['a', 'b'], 2, [1]),
    (IMAGENET, None, 1000, None), (IMAGENET[:2], None, 1000, [0, 1]), (['x', 'y'], None, 2, None),
    (['0', '1', '10'], None, 11, [0, 1, 10]), (['00', '01'], None, 2, None), (['1', '2'], None, 2, None),
    (['1', '2'], ['0', '1', '2'], 3, [1, 2])])
def test_classes_are_matched(found, known, num_classes, expected):
    assert match_classes(found, known, num_classes, 'data', 'model') == expected
