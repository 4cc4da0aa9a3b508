"""Checkpoints of other projects: keys and objects beside the weights are read or refused, and code never runs."""
import argparse
import collections
import datetime
import enum
import importlib
import logging
import pathlib
import subprocess
import sys
import types
import typing

import numpy as np
import pytest
import timm
import torch
from checkpoints import TINY, error_of, make_tiny, publish, publish_model, same
from photos import FRUIT
from torch.optim.swa_utils import AveragedModel

from caretrans.__main__ import main
from caretrans.checkpoint import convert_checkpoint, create_from_checkpoint, load_checkpoint, read_checkpoint


def load_with_messages(path, caplog, seed=2):
    """A tiny care_s0 with the weights of a file, and the messages about it."""
    caplog.clear()
    model = make_tiny(seed)
    with caplog.at_level(logging.INFO):
        load_checkpoint(model, path)
    return model, [message for message in caplog.messages if message.startswith(f'{path}: ')]


# Keys -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('prefix', [
    'model.', 'net.', 'network.', 'backbone.', 'encoder.', 'model.backbone.', 'module.model.', 'model.module.net.',
    '_orig_mod.model._orig_mod.'])
def test_common_prefix_is_removed_and_logged(tmp_path, caplog, prefix, published):
    expected, path = make_tiny(1).state_dict(), tmp_path / 'x.pth'
    keys = publish(expected) if published else expected
    torch.save({'state_dict': {prefix + key: value for key, value in keys.items()}}, path)
    model, messages = load_with_messages(path, caplog)
    assert same(model.state_dict(), expected)
    assert len(messages) == 1 and messages[0].endswith(' was removed from all keys')


def test_prefix_of_some_keys_is_not_removed(tmp_path):
    state_dict, path = make_tiny(1).state_dict(), tmp_path / 'x.pth'
    torch.save({key if key.startswith('head') else f'model.{key}': value for key, value in state_dict.items()}, path)
    assert 'unexpected: model.stem.conv.weight, ' in error_of(load_checkpoint, make_tiny(2), path)


def test_parts_of_compiled_and_sharded_models_are_found_inside_keys(tmp_path, caplog):
    expected, path = make_tiny(1).state_dict(), tmp_path / 'x.pth'
    for wrapper in ('_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'):
        torch.save({key.replace('.blocks.0.', f'.blocks.0.{wrapper}.'): value for key, value in expected.items()}, path)
        assert wrapper in ''.join(torch.load(path))
        model, messages = load_with_messages(path, caplog)
        assert same(model.state_dict(), expected) and not messages


def test_counters_are_skipped_and_logged(tmp_path, caplog):
    averaged = AveragedModel(make_tiny(1))
    averaged.module.stem.register_buffer('total_ops', torch.ones(1, dtype=torch.float64))  # as thop does
    averaged.module.register_buffer('total_params', torch.ones(1, dtype=torch.float64))
    torch.save(averaged.state_dict(), tmp_path / 'x.pth')
    model, (message,) = load_with_messages(tmp_path / 'x.pth', caplog)
    assert same(model.state_dict(), make_tiny(1).state_dict())
    assert message.endswith('n_averaged, module.total_params, module.stem.total_ops are no weights and were skipped')


def test_any_other_key_is_still_refused(tmp_path):
    torch.save({**make_tiny(1).state_dict(), 'stem.total_steps': torch.ones(1)}, tmp_path / 'x.pth')
    assert '1 unexpected: stem.total_steps' in error_of(load_checkpoint, make_tiny(2), tmp_path / 'x.pth')


def test_prefix_of_mmpretrain_stays(tmp_path):
    """A file without a head, all of whose keys begin with `backbone.`."""
    model = make_tiny(1, 'casvit_xs', num_classes=0)
    torch.save(publish_model(model), tmp_path / 'x.pth')
    source, target = tmp_path / 'x.pth', tmp_path / 'y.pth'
    torch.save(dict(model=publish_model(model), arch='casvit_xs', model_args=TINY['casvit_xs']), source)
    convert_checkpoint(source, target, 'mmpretrain')
    assert all(key.startswith('backbone.') for key in torch.load(target)['state_dict'])
    loaded, _ = create_from_checkpoint(target, 'casvit_xs', **TINY['casvit_xs'])
    assert same(loaded.state_dict(), model.state_dict())


def test_prefixed_file_creates_its_model(tmp_path):
    source = timm.create_model('care_s0', num_classes=3)
    torch.save({f'net.{key}': value for key, value in source.state_dict().items()}, tmp_path / 'x.pth')
    model, _ = create_from_checkpoint(tmp_path / 'x.pth')
    assert model.pretrained_cfg['architecture'] == 'care_s0' and same(model.state_dict(), source.state_dict())


# Objects --------------------------------------------------------------------------------------------------------------

class Split(enum.Enum):
    TRAIN = 'train'


class Priority(enum.IntEnum):
    HIGH = 3


class Settings:
    def __init__(self):
        self.lr, self.split, self.output = 0.1, Split.TRAIN, pathlib.PurePosixPath('runs/1')


class AttributeDict(dict):
    """As Lightning and others store their settings."""


COUNTS = collections.defaultdict(list, a=[1, 2])
OBJECTS = {
    'path': (pathlib.PosixPath('/data/imagenet'), '/data/imagenet'),
    'relative': (pathlib.PurePosixPath('runs/1'), 'runs/1'),
    'windows': (pathlib.PureWindowsPath('C:\\data\\x'), 'C:\\data/x'),
    'datetime': (datetime.datetime(2025, 3, 1, 12, 30), '2025-03-01T12:30:00'),
    'zone': (datetime.datetime(2025, 3, 1, tzinfo=datetime.timezone.utc), '2025-03-01T00:00:00+00:00'),
    'date': (datetime.date(2025, 3, 1), '2025-03-01'),
    'duration': (datetime.timedelta(hours=5), '5:00:00'),
    'defaultdict': (COUNTS, {'a': [1, 2]}),
    'nested': (collections.defaultdict(dict, a=collections.defaultdict(int, b=3)), {'a': {'b': 3}}),
    'deque': (collections.deque([1, 2], maxlen=5), [1, 2]),
    'counter': (collections.Counter('aab'), collections.Counter('aab')),
    'array': (np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(6, dtype=np.float32).reshape(2, 3)),
    'columns': (np.asfortranarray(np.eye(2, 3)), np.eye(2, 3)),
    'words': (np.array(['ab', 'c']), np.array(['ab', 'c'])),
    'scalar': (np.float64(0.5), 0.5),
    'dtype': (np.float32, 'numpy.float32'),
    'any': (typing.Any, 'typing.Any'),
    'namespace': (argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath('x')), {'lr': 0.1, 'out': 'x'}),
    'simple': (types.SimpleNamespace(lr=0.1), {'lr': 0.1}),
    'enum': (Split.TRAIN, 'train'),
    'number': (Priority.HIGH, 3),
    'settings': (Settings(), {'lr': 0.1, 'split': 'train', 'output': 'runs/1'}),
    'attributes': (AttributeDict(lr=0.1, kind=Split.TRAIN), {'lr': 0.1, 'kind': 'train'}),
    'set': ({1, 2}, {1, 2}),
    'inside': ([{'args': (pathlib.PurePosixPath('x'),)}], [{'args': ('x',)}]),
}


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('kind', OBJECTS)
def test_harmless_objects_are_read_as_plain_values(tmp_path, kind, legacy, caplog):
    value, expected = OBJECTS[kind]
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': make_tiny(1).state_dict(), 'it': value, 'epoch': 3}, path,
               _use_new_zipfile_serialization=not legacy)
    model, messages = load_with_messages(path, caplog)
    assert same(model.state_dict(), make_tiny(1).state_dict())
    found = read_checkpoint(path).meta
    assert found['epoch'] == 3 and type(found['it']) is type(expected)
    assert np.array_equal(found['it'], expected) if isinstance(expected, np.ndarray) else found['it'] == expected
    silent = kind in ('any', 'counter', 'dtype', 'set') or kind == 'namespace' and not messages
    assert len(messages) == (0 if silent else 1)
    assert silent or messages[0].endswith(' were read as plain values, without their code')


def test_types_that_were_read_are_named(tmp_path, caplog):
    torch.save({'model': make_tiny(1).state_dict(), 'split': Split.TRAIN, 'out': pathlib.PosixPath('x')},
               tmp_path / 'x.pth')
    _, (message,) = load_with_messages(tmp_path / 'x.pth', caplog)
    assert f'objects of {__name__}.Split, pathlib' in message


def test_classes_of_the_file_are_not_imported(tmp_path, monkeypatch):
    """They leave a trace when they are imported."""
    (tmp_path / 'traceful.py').write_text(
        'import enum, pathlib\n'
        'pathlib.Path(__file__).with_name("trace").touch()\n'
        'class Mode(enum.Enum):\n    FAST = "fast"\n', encoding='utf-8')
    monkeypatch.syspath_prepend(tmp_path)
    traceful = importlib.import_module('traceful')
    torch.save({'model': {'w': torch.ones(1)}, 'mode': traceful.Mode.FAST}, tmp_path / 'x.pth')
    (tmp_path / 'trace').unlink()
    del sys.modules['traceful'], traceful
    assert read_checkpoint(tmp_path / 'x.pth').meta == {'mode': 'fast'}
    assert not (tmp_path / 'trace').exists() and 'traceful' not in sys.modules


class Reduced:
    """Pickles into a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('function, arguments, named', [
    (exec, ('raise SystemExit',), 'exec'), (eval, ('1',), 'eval'), (getattr, (1, 'real'), 'getattr'),
    (subprocess.Popen, (['true'],), 'commands.Popen'), (torch.nn.Linear, (2, 2), 'torch.nn.modules.linear.Linear'),
    (np.array, ([1],), 'numpy.array'), (pathlib.Path.cwd, (), 'getattr'), (error_of, (), 'checkpoints.error_of'),
], ids=lambda value: getattr(value, '__name__', ''))
def test_everything_else_is_refused(tmp_path, function, arguments, named):
    torch.save({'model': {'w': torch.ones(1)}, 'it': Reduced(function, *arguments)}, tmp_path / 'x.pth')
    assert f'wants to run code when opened ({named})' in error_of(read_checkpoint, tmp_path / 'x.pth')


def test_conversion_drops_what_it_cannot_keep(tmp_path, caplog):
    source = tmp_path / 'x.pth'
    torch.save(dict(
        model=make_tiny(1).state_dict(), arch='care_s0', model_args=TINY['care_s0'], when=datetime.date(2025, 3, 1),
        rng=np.arange(3), best_loss=float('inf')), source)
    with caplog.at_level(logging.INFO):
        convert_checkpoint(source, tmp_path / 'y.safetensors', 'caretrans')
    meta = read_checkpoint(tmp_path / 'y.safetensors').meta
    assert meta['when'] == '2025-03-01' and 'rng' not in meta and 'best_loss' not in meta
    assert 'without the entry best_loss: the result is inf' in caplog.text


def test_commands_say_once_what_they_read(tmp_path, caplog, capsys):
    """`predict` opens a file twice: it may be of a detector."""
    source = timm.create_model('care_s0', num_classes=3)
    torch.save({'model': {f'net.{key}': value for key, value in source.state_dict().items()}, 'split': Split.TRAIN},
               tmp_path / 'x.pth')
    image = next(FRUIT.glob('val/*/*.jpg'))
    with caplog.at_level(logging.INFO):
        assert main(['predict', str(image), '--checkpoint', str(tmp_path / 'x.pth'), '--img-size', '32', '--device',
                     'cpu']) == 0
    found = [message for message in caplog.messages if 'the prefix net. was removed' in message]
    assert len(found) == 1 and 'objects of test_stand_ins.Split were read as plain values' in found[0]
