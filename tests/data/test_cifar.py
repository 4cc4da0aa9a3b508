"""CIFAR through torchvision and timm: downloaded, checked and trained on, with an archive of a few images."""
import hashlib
import io
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from caretrans.config import parse_train_config
from caretrans.data import list_classes, open_dataset
from caretrans.errors import DataError
from caretrans.evaluation import EvalConfig, describe_result, evaluate_checkpoint
from caretrans.training.run import train
from train import main

pytestmark = pytest.mark.slow

CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
FLAGS = ['--epochs', 1, '--warmup-epochs', 0, '--batch-size', 4, '--img-size', 32, '--workers', 0, '--device', 'cpu']


def make_batch(labels: str, classes: int, first: int) -> bytes:
    """Twelve images of noise, as the data sets keep them."""
    pixels = np.random.default_rng(first).integers(256, size=(12, 3072), dtype=np.uint8)
    return pickle.dumps({'data': pixels, labels: [(first + i) % classes for i in range(12)]})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the files of the folder server/ on this machine; (folder, URL)."""
    monkeypatch.setenv('no_proxy', '*')
    (tmp_path / 'server').mkdir()
    handler = type('Handler', (SimpleHTTPRequestHandler,), dict(log_message=lambda *_: None))
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=str(tmp_path / 'server'))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield tmp_path / 'server', f'http://127.0.0.1:{running.server_port}'
        running.shutdown()


def stand_in(monkeypatch, server, dataset: type, labels: str, names) -> Path:
    """An archive in the layout of the data set on the server, and its checksums in the place of the true ones."""
    files = {name: make_batch(labels, len(names), i) for i, (name, _) in enumerate(
        [*dataset.train_list, *dataset.test_list])}
    files[dataset.meta['filename']] = pickle.dumps({dataset.meta['key']: names})
    archive = server[0] / dataset.filename
    with tarfile.open(archive, 'w:gz') as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f'{dataset.base_folder}/{name}')
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    sums = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    monkeypatch.setattr(dataset, 'train_list', [[name, sums[name]] for name, _ in dataset.train_list])
    monkeypatch.setattr(dataset, 'test_list', [[name, sums[name]] for name, _ in dataset.test_list])
    monkeypatch.setattr(dataset, 'meta', dict(dataset.meta, md5=sums[dataset.meta['filename']]))
    monkeypatch.setattr(dataset, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(dataset, 'url', f'{server[1]}/{dataset.filename}')
    return archive


def configure(folder: Path, *flags):
    return parse_train_config([str(flag) for flag in (
        folder / 'data', *FLAGS, '--output', folder / 'run', *flags)])


@pytest.mark.parametrize('model', ['care_s0', 'casvit_xs', 'mlla_t'])
def test_cifar10_is_downloaded_and_every_family_trains_on_it(monkeypatch, server, tmp_path, model):
    """Then the checkpoint is evaluated on the same data without being told which."""
    stand_in(monkeypatch, server, CIFAR10, 'labels', CLASSES)
    result = train(configure(
        tmp_path, '--recipe', 'cifar10', '--dataset-download', '--model', model, '--crop-mode', 'squash'))
    checkpoint = torch.load(result.folder / 'last.pth.tar', weights_only=True)
    assert checkpoint['class_names'] == CLASSES and checkpoint['steps'] == 60 // 4
    assert (tmp_path / 'data' / CIFAR10.base_folder / 'data_batch_1').exists()
    scored = evaluate_checkpoint(EvalConfig(str(result.folder / 'last.pth.tar'), workers=0))
    assert scored.images == 12 and scored.top1 == result.last.scores['val_top1']
    assert 'crop_pct 1.0 (checkpoint), crop_mode squash (checkpoint)' in '\n'.join(describe_result(scored))


def test_cifar100_is_downloaded_and_trained_on(monkeypatch, server, tmp_path):
    names = [f'class {i}' for i in range(100)]
    stand_in(monkeypatch, server, CIFAR100, 'fine_labels', names)
    result = train(configure(tmp_path, '--recipe', 'cifar100', '--dataset-download'))
    checkpoint = torch.load(result.folder / 'last.pth.tar', weights_only=True)
    assert checkpoint['class_names'] == names and checkpoint['steps'] == 12 // 4


def test_a_downloaded_data_set_is_not_downloaded_again(monkeypatch, server, tmp_path):
    archive = stand_in(monkeypatch, server, CIFAR10, 'labels', CLASSES)
    open_dataset(tmp_path / 'data', 'train', 'torch/cifar10', download=True)
    archive.unlink()
    (tmp_path / 'data' / archive.name).unlink()
    for download in (True, False):
        val = open_dataset(tmp_path / 'data', 'val', 'torch/cifar10', download=download)
        assert len(val) == 12 and list_classes(val) == CLASSES


def test_missing_data_are_one_line_with_the_remedy(monkeypatch, server, tmp_path, capsys):
    archive = stand_in(monkeypatch, server, CIFAR10, 'labels', CLASSES)
    command = ['train.py', str(tmp_path / 'data'), *map(str, FLAGS), '--recipe', 'cifar10', '--output', 'none']

    def fail(*flags) -> str:
        monkeypatch.setattr('sys.argv', [*command, *flags])
        assert main() == 2
        line, = capsys.readouterr().err.splitlines()
        return line
    assert fail() == \
        f'train.py: {tmp_path / "data"} holds no complete copy of torch/cifar10: --dataset-download fetches it.'
    archive.unlink()
    start = f'train.py: torch/cifar10 could not be fetched into {tmp_path / "data"} '
    assert fail('--dataset-download').startswith(f'{start}(HTTPError: HTTP Error 404')
    monkeypatch.setattr(CIFAR10, 'url', 'http://127.0.0.1:1/cifar.tar.gz')
    assert fail('--dataset-download').startswith(f'{start}(URLError: ')


def test_a_damaged_archive_is_refused(monkeypatch, server, tmp_path):
    archive = stand_in(monkeypatch, server, CIFAR10, 'labels', CLASSES)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match='could not be fetched into .* File not found or corrupted'):
        open_dataset(tmp_path / 'data', 'train', 'torch/cifar10', download=True)


def test_other_errors_of_torchvision_stay_what_they_are(tmp_path):
    (tmp_path / 'data').write_text('a file, not a folder', encoding='utf-8')
    with pytest.raises(DataError, match="torch/cifar10, split 'train', cannot be read: .*[Ff]ile exists"):
        open_dataset(tmp_path / 'data', 'train', 'torch/cifar10', download=True)
