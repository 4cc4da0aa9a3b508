"""Checkpoint files are read without running code and written atomically; errors are one clear line."""
import argparse
import os
import pickle
import resource
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from checkpoints import TINY, error_of, make_tiny, same
from safetensors.torch import save_file
from timm.models import load_checkpoint as timm_load_checkpoint
from timm.utils import ModelEmaV3

from caretrans.checkpoint import create_from_checkpoint, load_checkpoint, read_checkpoint, save_checkpoint
from caretrans.errors import CheckpointError

# Files that are no checkpoints ----------------------------------------------------------------------------------------

class MakesFolder:
    """Pickles into a call of os.mkdir."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize('save', [
    torch.save,
    lambda contents, path: torch.save(contents, path, _use_new_zipfile_serialization=False),
    lambda contents, path: path.write_bytes(pickle.dumps(contents, protocol=2)),
], ids=['zip', 'legacy', 'pickle'])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, save):
    path, folder = tmp_path / 'x.pth.tar', tmp_path / 'made'
    save({'args': MakesFolder(folder), 'state_dict': {'weight': torch.ones(2)}}, path)
    message = error_of(read_checkpoint, path)
    assert 'wants to run code' in message and f'({os.mkdir.__module__}.mkdir)' in message
    assert not folder.exists()
    with suppress(RuntimeError), open(path, 'rb') as file:  # torch refuses a bare pickle only after running it
        torch.load(file, weights_only=False)
    assert folder.exists(), 'the code was live'


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_of_any_protocol_is_not_run(tmp_path, protocol):
    path, folder = tmp_path / 'x.pth.tar', tmp_path / 'made'
    path.write_bytes(pickle.dumps({'args': MakesFolder(folder)}, protocol))
    error_of(read_checkpoint, path)
    assert not folder.exists()
    pickle.loads(path.read_bytes())
    assert folder.exists(), 'the code was live'


def test_other_classes_in_a_pickle_are_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / 'module.pth')
    assert '(torch.nn.modules.linear.Linear)' in error_of(read_checkpoint, tmp_path / 'module.pth')


NOT_WEIGHTS = {
    'empty': (b'', 'is empty (0 bytes)'),
    'html': (b'\n <!DOCTYPE html>\n<html><body>Quota exceeded</body></html>', 'is a web page'),
    'xml': (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', 'is a web page'),
    'lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 29468011\n', 'is a Git-LFS pointer'),
    'text': (b'Not found\n', "neither a file of torch.save nor safetensors (it begins with b'Not foun')"),
    'gzip': (b'\x1f\x8b\x08\x00' + bytes(40), 'unpack or download it again'),
    'nonsense': (b'\x80\x02' + bytes(40), 'is truncated or damaged'),
}


@pytest.mark.parametrize('kind', NOT_WEIGHTS)
@pytest.mark.parametrize('name', ['x.pth.tar', 'x.safetensors'])
def test_files_that_are_not_checkpoints_are_identified(tmp_path, name, kind):
    content, expected = NOT_WEIGHTS[kind]
    path = tmp_path / name
    path.write_bytes(content)
    if name == 'x.safetensors' and kind in ('text', 'gzip'):
        expected = 'is truncated or damaged'
    assert expected in error_of(read_checkpoint, path)


def test_missing_files_and_folders_are_refused(tmp_path):
    assert 'no such file' in error_of(read_checkpoint, tmp_path / 'none.pth')
    assert 'no such file' in error_of(load_checkpoint, make_tiny(), tmp_path / 'none' / 'none.pth')
    assert 'is a folder' in error_of(create_from_checkpoint, tmp_path)
    (tmp_path / 'file').touch()
    assert 'cannot be read (Not a directory)' in error_of(read_checkpoint, tmp_path / 'file' / 'x.pth')


@pytest.mark.parametrize('save', [
    torch.save,
    lambda contents, path: torch.save(contents, path, _use_new_zipfile_serialization=False),
    save_file,
], ids=['zip', 'legacy', 'safetensors'])
def test_truncated_files_are_refused_at_any_length(tmp_path, save):
    path = tmp_path / ('x.safetensors' if save is save_file else 'x.pth.tar')
    save(make_tiny().state_dict(), path)
    content = path.read_bytes()
    for end in {2, 5, 9, 40, 300, *(len(content) * i // 40 for i in range(1, 40)), len(content) - 1}:
        path.write_bytes(content[:end])
        assert 'is truncated' in error_of(read_checkpoint, path)


def test_other_archives_are_refused_with_their_content(tmp_path):
    torch.save({'weight': torch.ones(2)}, tmp_path / 'CARETrans_S0.pth.tar')
    with zipfile.ZipFile(tmp_path / 'drive.pth.tar', 'w') as archive:
        archive.write(tmp_path / 'CARETrans_S0.pth.tar', 'CARETrans_S0.pth.tar')
    assert 'zip archive of CARETrans_S0.pth.tar: unpack' in error_of(read_checkpoint, tmp_path / 'drive.pth.tar')
    with zipfile.ZipFile(tmp_path / 'script.pt', 'w') as archive:
        archive.writestr('net/data.pkl', '')
        archive.writestr('net/constants.pkl', '')
    assert 'is a TorchScript program' in error_of(read_checkpoint, tmp_path / 'script.pt')


@pytest.mark.parametrize('contents, expected', [
    ({'epoch': 3, 'args': {'lr': 0.1}}, 'holds no weights, only epoch, args'),
    ({'state_dict': {}}, 'holds no weights, only state_dict'),
    ({'counts': torch.arange(3)}, 'holds no weights, only counts'),
    ({}, 'holds no weights: take'),
    ([torch.ones(2)], 'holds a list'),
    (torch.ones(2), 'holds a Tensor'),
])
def test_files_without_weights_are_refused_with_their_content(tmp_path, contents, expected):
    torch.save(contents, tmp_path / 'x.pth')
    assert expected in error_of(read_checkpoint, tmp_path / 'x.pth')


def test_duplicate_weights_are_refused(tmp_path):
    state_dict, path = make_tiny().state_dict(), tmp_path / 'x.pth'
    torch.save({**state_dict, 'module.stem.conv.bias': torch.ones(16)}, path)
    assert 'both with and without module.' in error_of(load_checkpoint, make_tiny(), path)
    torch.save({**state_dict, 'stem.0.bias': torch.ones(16)}, path)
    assert 'under published keys and ours' in error_of(load_checkpoint, make_tiny(), path)


# Writing --------------------------------------------------------------------------------------------------------------

def test_saved_checkpoint_is_read_back(tmp_path):
    path, names = tmp_path / 'last.pth.tar', ['a', 'b', 'c', 'd', 'e']
    optimizer = torch.optim.AdamW(make_tiny(1).parameters())
    save_checkpoint(
        path, make_tiny(1), arch='care_s0', ema=ModelEmaV3(make_tiny(2)), class_names=names, epoch=3,
        model_args=TINY['care_s0'], metrics=dict(top1=81.5, top5=None), optimizer=optimizer.state_dict())
    model, checkpoint = create_from_checkpoint(path)
    assert same(model.state_dict(), make_tiny(2).state_dict())
    assert same(read_checkpoint(path, 'state_dict').state_dict, make_tiny(1).state_dict())
    meta = checkpoint.meta
    assert (meta['arch'], meta['num_classes'], meta['class_names'], meta['epoch']) == ('care_s0', 5, names, 3)
    assert (meta['metrics'], meta['model_args']) == (dict(top1=81.5, top5=None), TINY['care_s0'])
    optimizer.load_state_dict(meta['optimizer'])
    save_checkpoint(path, make_tiny(3), arch='care_s0')
    assert set(torch.load(path)) == {'arch', 'num_classes', 'version', 'state_dict'}


def test_plain_timm_loads_saved_checkpoints(tmp_path):
    path = tmp_path / 'last.pth.tar'
    save_checkpoint(path, make_tiny(1), arch='care_s0', epoch=3)
    for model in (make_tiny(2), timm.create_model('care_s0', num_classes=5, checkpoint_path=path, **TINY['care_s0'])):
        timm_load_checkpoint(model, path)
        assert same(model.state_dict(), make_tiny(1).state_dict())
    model = make_tiny(2)
    assert timm.models.resume_checkpoint(model, path) == 3  # epochs are finished
    assert same(model.state_dict(), make_tiny(1).state_dict())
    save_checkpoint(path, make_tiny(1), arch='care_s0', ema=make_tiny(4))
    timm_load_checkpoint(model, path)
    assert same(model.state_dict(), make_tiny(4).state_dict())


@pytest.mark.parametrize('rest, named', [
    (dict(metric=np.float64(1)), 'metric is a numpy.float64'),
    (dict(config=dict(lrs=[0.1, np.float32(1)])), r'config.lrs\[1\] is a numpy.float32'),
    (dict(config=dict(output=Path('x'))), 'config.output is a pathlib'),
    (dict(args=argparse.Namespace()), 'args is a argparse.Namespace'),
    (dict(steps={(1, 2): 3}), r'steps has the key \(1, 2\)'),
])
def test_unreadable_types_are_not_written(tmp_path, rest, named):
    with pytest.raises(TypeError, match=named):
        save_checkpoint(tmp_path / 'x.pth', make_tiny(), arch='care_s0', **rest)
    assert not list(tmp_path.iterdir())


def test_wrong_class_names_and_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match='2 class names for a model of 5 classes'):
        save_checkpoint(tmp_path / 'x.pth', make_tiny(), arch='care_s0', class_names=['a', 'b'])
    path = tmp_path / 'x.safetensors'
    assert 'end the name in .pth or .pth.tar' in error_of(save_checkpoint, path, make_tiny(), arch='care_s0')
    assert not list(tmp_path.iterdir())


def fail(error):
    def call(*args, **kwargs):
        raise error
    return call


@pytest.mark.parametrize('function, error, expected', [
    ('os.fsync', OSError(28, 'No space left on device'), CheckpointError),
    ('os.replace', PermissionError(13, 'Permission denied'), CheckpointError),
    ('os.fsync', KeyboardInterrupt(), KeyboardInterrupt),
    ('torch.save', MemoryError(), MemoryError),
])
def test_failed_write_keeps_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, error, expected):
    path = tmp_path / 'last.pth.tar'
    save_checkpoint(path, make_tiny(1), arch='care_s0', epoch=1)
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(expected) as caught:
        patch.setattr(function, fail(error))
        save_checkpoint(path, make_tiny(2), arch='care_s0', epoch=2)
    if expected is CheckpointError:
        assert str(caught.value).startswith(f'{path}: could not be written ({error.strerror}): make room for 0.')
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_full_disk_is_a_clear_error(tmp_path):
    path = tmp_path / 'last.pth.tar'
    save_checkpoint(path, make_tiny(1), arch='care_s0', epoch=1)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a real write that stops halfway
    try:
        message = error_of(save_checkpoint, path, make_tiny(2), arch='care_s0')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'could not be written (File too large)' in message and 'a file that was there is unchanged' in message
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_read_only_folders_are_clear_errors(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'folder.pth').mkdir()
    for path, reason in (
            (tmp_path / 'none' / 'x.pth', 'No such file or directory'),
            (tmp_path / 'file' / 'x.pth', 'Not a directory'),
            (tmp_path / 'folder.pth', 'Is a directory')):
        assert f'could not be written ({reason})' in error_of(save_checkpoint, path, make_tiny(), arch='care_s0')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'folder.pth']


def test_file_is_flushed_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr('os.fsync', lambda f: (calls.append(os.path.isdir(f'/dev/fd/{f}')), fsync(f)))
    monkeypatch.setattr('os.replace', lambda a, b: (calls.append((Path(a).parent, b)), replace(a, b)))
    save_checkpoint(tmp_path / 'x.pth', make_tiny(), arch='care_s0')
    assert calls == [False, (tmp_path, tmp_path / 'x.pth'), True]  # file, rename, folder


def test_timm_refuses_a_web_page_without_advice_to_run_it(tmp_path):
    (tmp_path / 'page.pth.tar').write_text('<!DOCTYPE html><html>Sign in</html>', encoding='utf-8')
    with pytest.raises(RuntimeError, match='page.pth.tar is no checkpoint .* web page') as error:
        timm.create_model(
            'care_s0', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'page.pth.tar')))
    assert 'weights_only=False' not in str(error.value)
