"""Commands: features of images with a sheet of neighbours, and scores of a trunk."""
import csv
import json

import numpy as np
import pytest
import torch
from photos import copy_images
from PIL import Image

from caretrans.__main__ import main
from caretrans.data.decode import EvalTransform
from caretrans.selfsup import Design, Pretraining, probing, save_pretraining
from caretrans.selfsup.features import Features, extract_features, load_trunk


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return copy_images(tmp_path_factory.mktemp('images'), per_class=8)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('files') / 'last.pth.tar'
    torch.manual_seed(0)
    save_pretraining(path, Pretraining(Design(model='test_resnet', img_size=64, hidden=16, out=8, blocks=1)))
    return path


def test_features_are_those_of_the_trunk(data, checkpoint, tmp_path, capsys, monkeypatch):
    folder, output = data / 'train' / 'orange', tmp_path / 'features.npz'
    flags = ['--checkpoint', str(checkpoint), '--device', 'cpu']
    assert main(['features', str(folder), *flags, '--output', str(output)]) == 0
    assert 'features.npz: 96 features of 8 images' in capsys.readouterr().out
    with np.load(output) as arrays:
        features, names = arrays['features'], arrays['names'].tolist()
    trunk, preparation = load_trunk(str(checkpoint))
    with torch.no_grad():
        wanted = Features(trunk)(torch.stack([
            EvalTransform(preparation)((folder / name).read_bytes()) for name in sorted(
                path.name for path in folder.iterdir())]))
    assert [name.rpartition('/')[2] for name in names] == sorted(path.name for path in folder.iterdir())
    np.testing.assert_allclose(features, wanted.numpy(), rtol=1e-5, atol=1e-5)
    with Image.open(tmp_path / 'features-neighbours.png') as sheet:
        assert sheet.size == (8 * 98 + 2, 8 * 98 + 2)
    (data / 'broken.jpg').write_bytes(b'no image')
    assert main(['features', str(folder), str(data / 'broken.jpg'), *flags, '--output', str(tmp_path / 'f.csv'),
                 '--sheet', 'none']) == 1
    assert 'broken.jpg: cannot be read as an image' in capsys.readouterr().err
    with open(tmp_path / 'f.csv', encoding='utf-8') as file:
        rows = list(csv.reader(file))
    assert rows[0][:2] == ['name', 'f0'] and len(rows) == 9
    np.testing.assert_array_equal(np.array(rows[1][1:], np.float32), features[0])
    assert not (tmp_path / 'f-neighbours.png').exists()
    one = next(folder.iterdir())
    assert main(['features', str(one), *flags, '--output', str(tmp_path / 'one.npz')]) == 0
    assert 'no one-neighbours.png: one image has no neighbours' in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert not (tmp_path / 'runs').exists() and main(['features', str(one), *flags, '--sheet', 'none']) == 0
    assert (tmp_path / 'runs' / 'features.npz').is_file()


def test_the_nearest_neighbours_of_a_copy_are_itself(data, checkpoint, tmp_path):
    """An image that is there twice stands beside its copy."""
    folder = tmp_path / 'twice'
    folder.mkdir()
    for i, path in enumerate(sorted((data / 'train' / 'kaiser').iterdir())[:3]):
        for copy in 'ab':
            (folder / f'{i}{copy}.jpg').write_bytes(path.read_bytes())
    assert main(['features', str(folder), '--checkpoint', str(checkpoint), '--device', 'cpu',
                 '--output', str(tmp_path / 'x.npz')]) == 0
    with Image.open(tmp_path / 'x-neighbours.png') as sheet:
        pixels = np.asarray(sheet)
    for row in range(6):
        tiles = [pixels[2 + 98 * row:98 * row + 98, 2 + 98 * i:98 * i + 98] for i in (0, 1, 2)]
        assert np.array_equal(tiles[0], tiles[1]) and not np.array_equal(tiles[0], tiles[2])


@pytest.mark.parametrize('crops', ['--crops', '--no-crops'])
def test_a_trunk_is_scored(data, checkpoint, crops, capsys):
    flags = ['probe', str(data), '--checkpoint', str(checkpoint), '--device', 'cpu', '--workers', '0', '--epochs', '3',
             '--batch-size', '8', crops, '--k', '5']
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert 'last.pth.tar, 16 training images, 16 test images' in text and 'last epoch (3): top-1' in text
    assert 'images of 64 x 64 pixels, ' in text and 'orientation ' in text
    assert '(k 5, temperature 0.07, cosine)' in text and 'chosen on the test images' in text
    assert main([*flags, '--json']) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['k'] == 5 and report['linear']['epochs'] == 3 and report['crops'] == (crops == '--crops')
    assert 0 <= report['neighbours'] <= 100 and report['linear']['best']['top1'] >= report['linear']['last']['top1']
    assert f'top-1 {report["linear"]["last"]["top1"]:.2f} %' in text  # the same seed, the same figures


def test_random_weights_are_a_baseline(data, checkpoint, capsys, monkeypatch):
    """With statistics of the data; those of a pre-training see images prepared as for its weights."""
    trunks = []

    def watch(trunk, *args):
        trunks.append(trunk)
        return extract_features(trunk, *args)
    monkeypatch.setattr(probing, 'extract_features', watch)
    flags = ['probe', str(data), '--no-linear', '--device', 'cpu', '--workers', '0', '--json']
    reports = []
    for weights in (['--random-weights', '--model', 'test_resnet', '--img-size', '64'],
                    ['--random-weights', '--checkpoint', str(checkpoint)], ['--checkpoint', str(checkpoint)]):
        assert main([*flags, *weights]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]['weights'] == 'random weights of test_resnet' and reports[0]['linear'] is None
    assert reports[0]['preparation']['interpolation'] == 'bilinear'
    assert reports[0]['preparation']['orientation'] == 'exif' and reports[0]['preparation']['crop_pct'] == .875
    assert reports[1]['preparation'] == reports[2]['preparation']
    drawn, again, _, _, trained, _ = trunks
    assert drawn is again and drawn.bn1.running_mean.abs().max() > 1e-3 and not trained.bn1.running_mean.any()
    assert not torch.equal(next(trunks[2].parameters()), next(trained.parameters()))


def test_few_images_are_scored_all_the_same(data, checkpoint, capsys, caplog):
    assert main(['probe', str(data), '--checkpoint', str(checkpoint), '--no-crops', '--epochs', '2', '--device', 'cpu',
                 '--workers', '0']) == 0
    assert 'last epoch (2)' in capsys.readouterr().out
    assert 'The 16 training images do not fill a batch of 256: the classifier is trained with all' in caplog.text


@pytest.mark.parametrize('flags, message', [
    (['probe', 'DATA'], 'No weights: --checkpoint FILE'),
    (['probe', 'DATA', '--checkpoint', 'FILE', '--model', 'resnet18'], 'was pre-trained with test_resnet, not with '
     'resnet18: omit --model.'),
    (['features', 'DATA', '--checkpoint', 'FILE', '--model', 'resnet18'], 'was pre-trained with test_resnet'),
    (['probe', 'DATA', '--checkpoint', 'FILE', '--random-weights', '--teacher'], 'random weights have no teacher'),
    (['probe', 'nowhere', '--checkpoint', 'FILE'], "No data at 'nowhere'"),
    (['probe', 'DATA', '--model', 'test_resnet', '--random-weights', '--teacher'], 'have no teacher: omit --teacher'),
    (['features', 'DATA', '--checkpoint', 'FILE', '--output', 'x.txt'], 'let the name end in .npz or .csv'),
    (['features', 'DATA', '--checkpoint', 'FILE', '--output', 'nowhere/x.npz'], 'there is no folder nowhere'),
    (['features', 'nowhere.jpg', '--checkpoint', 'FILE'], "No image or folder 'nowhere.jpg'")])
def test_what_cannot_be_is_one_line(flags, message, data, checkpoint, capsys):
    flags = [dict(DATA=str(data), FILE=str(checkpoint)).get(flag, flag) for flag in flags]
    assert main(flags + ['--device', 'cpu']) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
