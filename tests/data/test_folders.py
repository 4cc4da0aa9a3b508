"""Folders and tars: what is a class, what is an image, in which order; what is skipped is said."""
import io
import logging
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from caretrans.data import find_labels, list_classes, open_dataset
from caretrans.data.folders import FolderReader, TarReader, list_endings, list_images
from caretrans.data.shards import write_shards
from caretrans.errors import DataError
from caretrans.evaluation import find_images


def write(path: Path, color=(200, 30, 60)) -> Path:
    """An image of a few pixels in the format of the ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 6), color).save(path)
    return path


@pytest.fixture
def split(tmp_path) -> Path:
    """Two classes of two images."""
    for name in ('a/1.jpg', 'a/2.jpg', 'b/3.jpg', 'b/4.jpg'):
        write(tmp_path / 'train' / name)
    return tmp_path / 'train'


def names(split: Path, **options) -> list[str]:
    reader = FolderReader(split, **options)
    return [os.path.relpath(path, split) for path, _ in reader.samples]


ORDINARY = ['a/1.jpg', 'a/2.jpg', 'b/3.jpg', 'b/4.jpg']


def test_ordinary_folders_have_the_order_of_timm(tmp_path):
    """Images, labels and their order are bit-identical to those of timm's reader."""
    for name in ('n2/x10', 'n2/x9', 'n10/a', 'n10/B', 'N3/1_2', 'N3/1_11', 'Äpfel/q', 'Zebra 7/y'):
        write(tmp_path / f'{name}.JPEG')
    expected, classes = find_images_and_targets(str(tmp_path))
    reader = FolderReader(tmp_path)
    assert reader.samples == expected and reader.class_to_idx == classes and len(classes) == 5
    assert list(reader.class_to_idx) == sorted(classes, key=classes.get) and not reader.notes


def test_names_that_differ_in_case_have_one_order(tmp_path):
    for name in ('B/1.jpg', 'b/1.jpg', 'x/²3.jpg', 'x/1²2.jpg'):
        write(tmp_path / name)
    assert list(FolderReader(tmp_path).class_to_idx) == ['B', 'b', 'x']


def test_class_is_the_first_folder_under_the_split(split):
    write(split / 'a' / 'deep' / 'deeper' / '5.jpg')
    write(split / 'b' / 'a' / '6.jpg')
    reader = FolderReader(split, is_training=True)
    assert reader.class_to_idx == {'a': 0, 'b': 1}
    found = {os.path.relpath(path, split): label for path, label in reader.samples}
    assert found == {**dict.fromkeys(['a/1.jpg', 'a/2.jpg', 'a/deep/deeper/5.jpg'], 0),
                     **dict.fromkeys(['b/3.jpg', 'b/4.jpg', 'b/a/6.jpg'], 1)}


@pytest.mark.parametrize('extra', [
    '.ipynb_checkpoints/1-checkpoint.jpg', 'a/.ipynb_checkpoints/1.jpg', 'a/._1.jpg', '@eaDir/1.jpg', 'b/@eaDir/1.jpg',
    '__MACOSX/a/1.jpg', '__MACOSX/._1.jpg', '.thumbnails/x.png', 'a/.hidden.webp', '.git/objects/1.jpg'])
def test_hidden_and_system_names_are_no_classes_and_no_images(split, extra):
    write(split / extra)
    assert names(split, is_training=True) == ORDINARY
    note, = FolderReader(split).notes
    assert note == f'{split}: skipped hidden or system names: 1 ({next(p for p in _prefixes(extra) if _odd(p))}).'


def _prefixes(path: str) -> list[str]:
    parts = path.split('/')
    return ['/'.join(parts[:i + 1]) for i in range(len(parts))]


def _odd(path: str) -> bool:
    return path.split('/')[-1].startswith(('.', '@eaDir', '__MACOSX'))


@pytest.mark.parametrize('link, target', [
    ('a/loop', '.'), ('a/loop', '..'), ('b/loop', '../..'), ('c', 'a'), ('a/other', '../b'), ('a/5.jpg', '1.jpg'),
    ('a/5.jpg', '../b/3.jpg')])
def test_each_file_is_listed_once_and_loops_end(split, link, target):
    (split / link).symlink_to(target)
    write(split.parent / 'val' / 'a' / '9.jpg')  # is above `b/loop`, and no part of the training images
    assert names(split) == ORDINARY
    assert 'links to what is listed already or to a folder above: 1 (' in FolderReader(split).notes[0]
    assert [os.path.relpath(path, split) for path in list_images(split).images] == ORDINARY


def test_links_to_folders_and_files_elsewhere_are_followed(split, tmp_path):
    write(tmp_path / 'elsewhere' / 'sub' / '6.jpg')
    write(tmp_path / 'elsewhere' / '5.jpg')
    (split / 'c').symlink_to(tmp_path / 'elsewhere')
    (split / 'b' / '7.jpg').symlink_to(write(tmp_path / 'single.jpg'))
    (split / 'b' / 'again').symlink_to(tmp_path / 'elsewhere')
    (split / 'b' / 'gone.jpg').symlink_to(tmp_path / 'gone.jpg')
    os.mkfifo(split / 'a' / 'pipe.jpg')
    reader = FolderReader(split)
    found = [os.path.relpath(path, split) for path, _ in reader.samples]
    assert sorted(found)[:2] == ['a/1.jpg', 'a/2.jpg'] and len(found) == 7 and 'b/7.jpg' in found
    assert reader.class_to_idx == {'a': 0, 'b': 1, 'c': 2}
    assert len({os.path.realpath(split / name) for name in found}) == 7
    assert 'links to nothing: 1 (b/gone.jpg)' in reader.notes[0] and 'a/pipe.jpg' in reader.notes[0]


def test_of_several_links_to_a_file_the_first_counts(split, tmp_path):
    picture = write(tmp_path / 'picture.jpg')
    for name in ('b/0.jpg', 'a/5.jpg', 'a/6.jpg', 'c/7.jpg'):
        (split / name).parent.mkdir(exist_ok=True)
        (split / name).symlink_to(picture)
    assert names(split) == ['a/1.jpg', 'a/2.jpg', 'a/5.jpg', 'b/3.jpg', 'b/4.jpg']
    assert '(a/6.jpg, b/0.jpg, c/7.jpg)' in FolderReader(split).notes[0]


def test_every_ending_that_pillow_decodes_is_an_image(split):
    Image.init()
    assert list_endings() >= {
        '.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.avif', '.ppm', '.pgm',
        '.jp2', '.ico', '.tga', '.psd', '.qoi'}
    assert not list_endings() & {'.pdf', '.eps', '.ps', '.mpg', '.mpeg', '.h5', '.hdf', '.grib', '.wmf', '.emf'}
    for ending in ('webp', 'BMP', 'tif', 'gif', 'avif', 'Jpe', 'png', 'jp2'):
        write(split / 'a' / f'x.{ending}')
    assert len(names(split)) == 12 and not FolderReader(split).notes


def test_what_is_no_image_is_counted_and_named(split):
    for name in ('a/1.txt', 'a/2.TXT', 'b/clip.mp4', 'b/IMG_1.heic', 'b/noending', 'loose.csv'):
        (split / name).write_bytes(b'')
    write(split / 'loose.png')
    note, = FolderReader(split).notes
    assert note == (
        f'{split}: skipped files that are not images: 6 (2 .txt, 1 .csv, 1 .heic, 1 .mp4, 1 no ending: '
        f'a/1.txt, a/2.TXT, b/IMG_1.heic and 3 more); images outside of class folders: 1 (loose.png).')


def test_class_without_an_image_stops_training_and_warns_in_validation(split, caplog):
    (split / 'b' / '3.jpg').rename(split / 'b' / '3.heic')
    (split / 'b' / '4.jpg').rename(split / 'b' / '4.heic')
    write(split / 'c' / '5.jpg')
    with pytest.raises(DataError, match=r'class folders without images: b. Add images, or remove .*2 \.heic'):
        open_dataset(split.parent, 'train', is_training=True)
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(split, 'train', classes=['a', 'b', 'c'])
    assert list_classes(dataset) == ['a', 'b', 'c'] and find_labels(dataset) == {0, 2}
    assert list_classes(open_dataset(split, 'train')) == ['a', 'c']
    (split / 'stray').mkdir()
    assert open_dataset(split, 'train', classes=['c', 'b', 'a']).reader.samples[0][1] == 2
    with pytest.raises(DataError, match='missing d; unknown c'):
        open_dataset(split, 'train', classes=['a', 'd'])
    assert any('class folders without images: b.' in line for line in caplog.messages)


def test_folder_that_cannot_be_read_is_named(split, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith('b'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)
    monkeypatch.setattr('os.scandir', refuse)
    with pytest.raises(DataError, match='train/b cannot be read: Permission denied'):
        open_dataset(split, 'train')


# Tars -----------------------------------------------------------------------------------------------------------------

def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, 'w') as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def picture(tmp_path) -> bytes:
    return write(tmp_path / 'picture.webp').read_bytes()


@pytest.mark.parametrize('prefix', ['', './', 'val/', 'data/val/'])
def test_tars_have_the_rules_of_folders(tmp_path, picture, prefix):
    listed = {f'{prefix}{name}': picture for name in ('a/1.webp', 'a/sub/2.webp', 'b/3.webp')}
    path = pack(tmp_path / 'val.tar', {
        **listed, **{f'{prefix}{name}': picture for name in (
            'a/._1.webp', '__MACOSX/a/1.webp', '@eaDir/1.webp', 'a/notes.txt')}})
    reader = TarReader(path)
    assert [name for name, _ in reader.samples] == [f'{path}:{name}' for name in listed]
    assert reader.class_to_idx == {'a': 0, 'b': 1} and [label for _, label in reader.samples] == [0, 0, 1]
    assert all(reader[i][0].read() == picture for i in range(3))
    assert 'hidden or system names: 3 (' in reader.notes[0] and '1 .txt' in reader.notes[0]


def test_a_tar_of_one_tar_per_class_is_read_where_it_lies(tmp_path, picture):
    """The layout of ImageNet's training images."""
    inner = {name: pack(tmp_path / name, {f'{name[:-4]}_{i}.webp': picture + bytes([i]) for i in (9, 10)})
             for name in ('n02.tar', 'n01.tar')}
    path = pack(tmp_path / 'train.tar', {name: file.read_bytes() for name, file in inner.items()})
    dataset = open_dataset(path, 'val')
    assert list_classes(dataset) == ['n01', 'n02'] and find_labels(dataset) == {0, 1}
    assert dataset.filename(0, absolute=True) == f'{path}:n01.tar:n01_9.webp'
    assert [dataset.reader[i][0].read()[-1] for i in range(4)] == [9, 10, 9, 10]


@pytest.mark.parametrize('damage', [lambda data: data[:700], lambda data: b'x' * 2000, lambda data: b''])
def test_a_damaged_tar_is_refused(tmp_path, picture, damage):
    path = pack(tmp_path / 'val.tar', {'a/1.webp': picture * 20, 'b/2.webp': picture})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match='val.tar'):
        open_dataset(path, 'val')


# Shards and prediction ------------------------------------------------------------------------------------------------

def test_shards_hold_the_images_and_classes_of_folders(split, tmp_path):
    for name in ('a/sub/5.webp', 'b/6.avif', 'a/7.tif', '.ipynb_checkpoints/1.jpg', 'a/._1.jpg'):
        write(split / name)
    (split / 'b' / 'loop').symlink_to('..')
    write_shards(str(split.parent), str(tmp_path / 'shards'), splits=['train'])
    shards = open_dataset(tmp_path / 'shards', 'train')
    assert list_classes(shards) == ['a', 'b']
    found = sorted((record.name.split(', ')[1], record.label, record.data) for record in shards.reader.read(0, 1))
    reader = FolderReader(split)
    assert found == sorted((os.path.splitext(os.path.relpath(path, split))[0], label, Path(path).read_bytes())
                           for path, label in reader.samples)
    assert len(found) == 7


def test_shards_of_a_class_without_validation_images_have_the_labels_of_training(split, tmp_path):
    write(split.parent / 'val' / 'b' / '9.jpg')
    (split.parent / 'val' / 'a').mkdir()
    write(split / 'c' / '5.jpg')
    write(split.parent / 'val' / 'c' / '9.jpg')
    write_shards(str(split.parent), str(tmp_path / 'shards'))
    shards = open_dataset(tmp_path / 'shards', 'val', classes=['a', 'b', 'c'])
    assert sorted(record.label for record in shards.reader.read(0, 1)) == [1, 2]
    (split.parent / 'val' / 'a').rename(split.parent / 'val' / 'd')
    with pytest.raises(DataError, match='missing a; unknown none'):
        write_shards(str(split.parent), str(tmp_path / 'others'))


def test_prediction_finds_the_images_of_training(split, tmp_path, caplog):
    write(split / 'a' / 'sub' / '5.webp')
    (split / 'b' / 'loop').symlink_to('..')
    (split / 'linked').symlink_to(write(tmp_path / 'far' / '6.bmp').parent)
    (split / 'a' / 'clip.mp4').write_bytes(b'')
    with caplog.at_level(logging.WARNING):
        found = list(find_images([str(split), str(split / 'a' / '1.jpg')]))
    assert found == [*(path for path, _ in FolderReader(split).samples), str(split / 'a' / '1.jpg')]
    assert len(found) == 7 and any('1 .mp4' in line for line in caplog.messages)
