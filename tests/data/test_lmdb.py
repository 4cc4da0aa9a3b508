"""LMDB files of the published pre-training are read, and files of the same layout are written."""
import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path

import lmdb
import pyarrow
import pytest
from photos import copy_images
from PIL import Image

from caretrans.__main__ import main
from caretrans.checkpoint.preparation import Preparation
from caretrans.data import open_dataset
from caretrans.data.decode import EvalTransform
from caretrans.data.lmdb_reader import LmdbReader, decode_value, encode_value
from caretrans.data.samples import load_image
from caretrans.errors import DataError

PUBLISHED = Path(__file__).parent / 'selfsup' / 'lmdb'
FACTS = json.loads((PUBLISHED / 'lmdb_facts.json').read_text(encoding='utf-8'))


def read_values(path) -> dict:
    """All of a file that this process has not opened yet."""
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as file, file.begin() as transaction:
        return dict(transaction.cursor())


@pytest.mark.parametrize('split', FACTS)
def test_published_files_are_read(split):
    dataset = open_dataset(str(PUBLISHED), split, is_training=split == 'train')
    assert len(dataset) == FACTS[split]['length']
    for index, record in enumerate(FACTS[split]['records']):
        file, label = dataset.reader[index]
        data = file.read()
        assert (label, hashlib.sha256(data).hexdigest()) == (record['label'], record['jpeg_sha256'])
        image = Image.open(io.BytesIO(data))
        assert (image.mode, list(image.size)) == (record['mode'], record['size'])
        pixels, target = load_image(dataset, index, EvalTransform(Preparation((3, 32, 32))))
        assert pixels.shape == (3, 32, 32) and target == record['label']


@pytest.mark.parametrize('split', FACTS)
def test_values_are_written_as_the_published_ones(split, tmp_path):
    for value in read_values(shutil.copy(PUBLISHED / f'{split}.lmdb', tmp_path)).values():
        written = encode_value(decode_value(value))
        ours, theirs = (pyarrow.ipc.open_stream(pyarrow.py_buffer(v)[16:]).read_all() for v in (written, value))
        assert ours.equals(theirs) and ours.schema.equals(theirs.schema) and written[:16] == value[:16]


def test_a_folder_becomes_a_file(tmp_path, capsys):
    source = copy_images(tmp_path / 'images', per_class=3)
    assert main(['shard', str(source), str(tmp_path / 'files'), '--lmdb']) == 0
    assert 'train: 6 images in' in capsys.readouterr().out
    folder, file = (open_dataset(str(root), 'train', is_training=True) for root in (source, tmp_path / 'files'))
    for reader in (file.reader, pickle.loads(pickle.dumps(file.reader))):
        for index in range(6):
            (wanted, label), (found, found_label) = folder.reader[index], reader[index]
            with wanted:
                assert (wanted.read(), label) == (found.read(), found_label)
    assert file.filename(4, absolute=True) == str(tmp_path / 'files' / 'train.lmdb') + ':4'
    values = read_values(shutil.copy(tmp_path / 'files' / 'train.lmdb', tmp_path))
    assert decode_value(values[b'__keys__']) == [str(i).encode() for i in range(6)]
    assert decode_value(values[b'__len__']) == 6 and len(values) == 8
    assert not list((tmp_path / 'files').glob('.*'))
    assert main(['shard', str(source), str(tmp_path / 'files'), '--lmdb']) == 2
    assert 'train.lmdb already exists' in capsys.readouterr().err


def test_files_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / 'train.lmdb'
    path.write_bytes(b'no LMDB file')
    with pytest.raises(DataError, match='train.lmdb is not a complete LMDB file'):
        open_dataset(str(tmp_path), 'train')
    shutil.copy(PUBLISHED / 'train.lmdb', path)
    with lmdb.open(str(path), subdir=False, lock=False) as file, file.begin(write=True) as transaction:
        transaction.put(b'3', b'another layout of this value')
    reader = LmdbReader(path)
    with pytest.raises(DataError, match=r'train.lmdb, key 3: not written by pyarrow.serialize'):
        reader[3]
    with pytest.raises(DataError, match='has no key 7'):
        reader[7]
