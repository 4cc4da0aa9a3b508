"""WebDataset shards: complete after any interruption, read in a repeatable order, missing images listed."""
import json
import os
import shutil
import signal
import tarfile
from collections import Counter
from pathlib import Path

import launch
import pytest
import torch
from photos import FRUIT, copy_images
from PIL import Image
from test_loader import EVAL, are_equal, evaluate, load, passes
from torch.utils.data import IterableDataset

from caretrans.__main__ import main
from caretrans.config import TrainConfig
from caretrans.data import check_labels, list_classes, open_dataset
from caretrans.data.loaders import build_train_loader
from caretrans.data.shard_reader import share_shards
from caretrans.data.shards import make_keys, write_shards
from caretrans.distributed import Processes
from caretrans.errors import DataError


@pytest.fixture
def small_data(tmp_path) -> Path:
    return copy_images(tmp_path / 'images', per_class=10)


@pytest.fixture
def shards(small_data, tmp_path) -> Path:
    write_shards(str(small_data), str(tmp_path / 'shards'), images_per_shard=4)  # 5 shards of 4 images
    return tmp_path / 'shards'


def read_shards(folder, split):
    """{key: (label, bytes)} of all shards of a split, by tarfile alone."""
    found = {}
    for path in sorted(folder.glob(f'{split}-*.tar')):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name in files:
            if not name.endswith('.cls'):
                key = name.rsplit('.', 1)[0]
                assert key not in found
                found[key] = int(files[f'{key}.cls']), files[name]
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def list_images(data, split='train', name='', workers=0, rank=0, world_size=1, epoch=0, start_step=0, **settings):
    """The last bytes of the images of an epoch, which identify them."""
    config = TrainConfig(**{'img_size': 32, 'batch_size': 4, 'workers': workers, **settings})
    processes = Processes(rank, world_size)
    loader = build_train_loader(
        open_dataset(data, split, is_training=True), config, EVAL, config.split_steps(world_size), processes)
    loader.samples.transform = lambda data: torch.frombuffer(bytearray(data[-36:]), dtype=torch.uint8).view(3, 3, 4)
    loader.samples.set_epoch(epoch, start_step * loader.splits[0][1])
    found = [bytes(image.flatten().tolist()) for batch in loader.loader for image in batch.images]
    loader.close()
    return found


def test_shards_hold_the_bytes_of_the_images_and_mix_the_classes(small_data, shards):
    dataset = open_dataset(small_data, 'train')
    wanted = {str(Path(path).relative_to(small_data / 'train').with_suffix('')): (label, Path(path).read_bytes())
              for path, label in dataset.reader.samples}
    assert read_shards(shards, 'train') == wanted
    classes = [''.join(tarfile.open(path).getnames()) for path in shards.glob('*.tar')]
    assert sum('kaiser' in names and 'orange' in names for names in classes) >= 5  # of 10; 2 if in order
    info = json.loads((shards / '_info.json').read_text(encoding='utf-8'))
    assert info['classes'] == ['kaiser', 'orange'] and info['splits']['train']['num_samples'] == 20
    assert info['splits']['train']['shard_lengths'] == [4] * 5 and len(info['splits']['val']['filenames']) == 5


def test_shards_are_opened_by_folder_or_by_name_and_name_their_classes(shards):
    for name in ('', 'wds/', 'wds/anything'):
        for split in ('train', 'val', 'validation'):
            dataset = open_dataset(shards, split, name=name)
            assert isinstance(dataset, IterableDataset) and len(dataset) == 20
            assert list_classes(dataset) == ['kaiser', 'orange']
    with pytest.raises(DataError, match='unknown kaiser, orange'):
        open_dataset(shards, 'val', classes=['apple', 'pear'])


def test_timms_own_reader_reads_them_too(shards):
    from timm.data import create_dataset
    dataset = create_dataset('wds/shards', root=str(shards), split='val')
    assert Counter(target for _, target in dataset) == {0: 10, 1: 10}


def test_shards_that_lack_something_are_refused(shards, tmp_path):
    with pytest.raises(DataError, match="no split 'test', it has train, val"):
        open_dataset(shards, 'test')
    (shards / 'val-00002.tar').unlink()
    with pytest.raises(DataError, match='lacks 1 shards of its _info.json: val-00002.tar'):
        open_dataset(shards, 'val')
    (shards / '_info.json').write_text('{"splits": 3}', encoding='utf-8')
    with pytest.raises(DataError, match='does not describe shards'):
        open_dataset(shards, 'val')
    with pytest.raises(DataError, match='has no _info.json: write the shards with'):
        open_dataset(tmp_path, 'val', name='wds/')


def test_keys_group_the_files_of_an_image():
    assert make_keys(['a/b.c.JPEG', 'a/b_c.jpg', 'a/b.png', 'a.b/x.WebP', 'a/b_c~1.jpg']) == [
        ('a/b_c', 'jpg'), ('a/b_c~1', 'jpg'), ('a/b', 'png'), ('a.b/x', 'webp'), ('a/b_c~1~1', 'jpg')]


def test_other_kinds_of_images_are_kept_and_read(small_data, tmp_path):
    for path in sorted((small_data / 'train').glob('*/*.jpg'))[::2]:
        Image.open(path).save(path.with_suffix('.png'))
        path.unlink()
    write_shards(str(small_data), str(tmp_path / 'shards'), images_per_shard=20)
    assert sum(len(images) for images, *_ in passes(load(tmp_path / 'shards'))) == 20


def test_writing_resumes_after_a_kill(tmp_path):
    """The result is the same to the last bit, and what was finished is not written again."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed' / 'whole'
    write_shards(str(FRUIT), str(whole), images_per_shard=5)
    process = launch.start(
        '-m', 'caretrans', 'shard', FRUIT, killed, '--images-per-shard', 5, '--workers', 1, log=tmp_path / 'log.txt')
    assert launch.wait_for(lambda: len(list(killed.glob('*.tar'))) >= 3, process, pause=0.001)
    assert launch.kill(process) == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in killed.glob('*.tar')}
    assert 3 <= len(finished) < len(list(whole.glob('*.tar'))) and not (killed / '_info.json').exists()
    sorted(finished)[0].write_bytes(b'damaged')
    write_shards(str(FRUIT), str(killed), images_per_shard=5)
    assert contents(killed) == contents(whole)
    assert [path.stat().st_mtime_ns == time for path, time in sorted(finished.items())] \
        == [False] + [True] * (len(finished) - 1)


def test_shards_of_other_images_or_settings_are_not_mixed(small_data, shards, tmp_path, capsys):
    before = contents(shards)
    with pytest.raises(DataError, match='made of other images or with other settings'):
        write_shards(str(small_data), str(shards), images_per_shard=5)
    shutil.copy(small_data / 'train' / 'kaiser' / os.listdir(small_data / 'train' / 'kaiser')[0],
                small_data / 'train' / 'orange' / 'new.jpg')
    assert main(['shard', str(small_data), str(shards), '--images-per-shard', '4']) == 2
    assert 'made of other images' in capsys.readouterr().err and contents(shards) == before
    (tmp_path / 'strange').mkdir()
    shutil.copy(shards / 'train-00000.tar', tmp_path / 'strange')
    with pytest.raises(DataError, match='shards of unknown origin, train-00000.tar'):
        write_shards(str(small_data), str(tmp_path / 'strange'))
    with pytest.raises(DataError, match='holds the images'):
        write_shards(str(small_data), str(small_data))
    with pytest.raises(DataError, match='is not a folder of images'):
        write_shards(str(shards), str(tmp_path / 'again'))


def test_a_full_disk_is_noticed_before_it_is_full(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda path: type('Usage', (), dict(free=1e6)))
    with pytest.raises(DataError, match='needs 0.1 GB more, 0.0 GB are free'):
        write_shards(str(small_data), str(tmp_path / 'shards'))
    assert not list((tmp_path / 'shards').glob('*.tar'))


def test_the_command_says_what_it_wrote(small_data, tmp_path, capsys):
    assert main(['shard', str(small_data), str(tmp_path / 's'), '--split', 'train', '--shard-size', '0.05']) == 0
    lines = capsys.readouterr().out.splitlines()
    shards = len(list((tmp_path / 's').glob('*.tar')))
    assert lines[-1] == f'train: 20 images in {shards} shards' and shards > 1


@pytest.mark.parametrize('shards, parts', [(7, 3), (3, 3), (3, 7), (1, 4)])
def test_readers_share_all_records_and_none_twice(shards, parts):
    found = [(shard, i) for part in range(parts) for shard, first, step in share_shards(range(shards), part, parts)
             for i in range(10) if i % step == first]
    assert sorted(found) == [(shard, i) for shard in range(shards) for i in range(10)]


def test_an_epoch_of_shards_can_be_repeated_and_started_in_the_middle(shards):
    loader = load(shards, workers=2)
    epochs = [[tuple(each) for each in loader.run(epoch)] for epoch in (0, 1)]
    assert len(epochs[0]) == loader.steps == 5
    assert are_equal(passes(loader, 0), epochs[0]) and not are_equal(epochs[0], epochs[1])
    for start in (1, 2, 3):
        assert are_equal(passes(load(shards, workers=2), 1, start), epochs[1][start:])
    for start in (0, 2):
        assert are_equal(passes(load(shards), 1, start), passes(load(shards), 1)[start:])


def test_an_interrupted_epoch_does_not_change_the_next(shards):
    loader = load(shards, workers=2)
    next(iter(loader.run(0)))
    assert are_equal(passes(loader, 1), passes(load(shards, workers=2), 1))


@pytest.mark.parametrize('workers', [0, 1])
def test_one_reader_sees_every_image_once_in_an_epoch(shards, workers):
    for epoch in (0, 1):
        assert set(Counter(list_images(shards, workers=workers, epoch=epoch)).values()) == {1}


def test_several_readers_see_the_images_about_once(shards):
    """5 shards for 4 readers: the reader of two skips some images, the others start over and see some twice."""
    found = Counter(key for rank in (0, 1) for key in list_images(shards, workers=2, rank=rank, world_size=2))
    assert sum(found.values()) == 20 and max(found.values()) <= 2 and len(found) >= 14


@pytest.mark.parametrize('workers, world_size', [(0, 1), (2, 1), (7, 1), (2, 2), (0, 3)])
def test_evaluation_reads_every_image_of_the_shards_once(small_data, shards, workers, world_size):
    found = []
    for rank in range(world_size):
        batches, loader = evaluate(shards, workers, Processes(rank, world_size))
        found += [(label, image.sum().item()) for images, labels in batches
                  for image, label in zip(images, labels.tolist(), strict=True)]
        assert not loader.unreadable
    wanted = [(label, image.sum().item()) for images, labels in evaluate(small_data)[0]
              for image, label in zip(images, labels.tolist(), strict=True)]
    assert [label for label, _ in sorted(found)] == [0] * 10 + [1] * 10
    assert sorted(total for _, total in found) == pytest.approx(sorted(total for _, total in wanted), abs=0.01)


def damage_shards(folder):
    """Damage one image, remove the label of one, and cut the last shard in its third image."""
    first, *_, last = sorted(folder.glob('val-*.tar'))
    with tarfile.open(first) as tar:
        members = {member.name: member for member in tar}
    names = [name for name in members if name.endswith('.jpg')]
    data = bytearray(first.read_bytes())
    begin = members[names[0]].offset_data
    data[begin:begin + 4] = b'html'
    place = members[names[1].replace('.jpg', '.cls')].offset_data
    data[place:place + 1] = b'?'
    first.write_bytes(data)
    with tarfile.open(last) as tar:
        third = [member for member in tar if member.name.endswith('.jpg')][2]
    last.write_bytes(last.read_bytes()[:third.offset_data + 100])
    keys = [name[:-4] for name in names]
    return [f'{first}, {keys[0]}', f'{first}, {keys[1]}', f'{last}, {third.name[:-4]}', f'{last}, image 3']


@pytest.mark.parametrize('workers', [0, 2])
def test_missing_images_of_shards_are_listed_one_by_one(shards, workers):
    lost = damage_shards(shards)
    batches, evaluated = evaluate(shards, workers)
    assert sum(len(images) for images, _ in batches) == 16
    assert sorted(name for name, _ in evaluated.unreadable) == sorted(lost)
    reasons = dict(evaluated.unreadable)
    assert 'cannot identify image' in reasons[lost[0]] and 'no label: ValueError' in reasons[lost[1]]
    assert reasons[lost[2]] == 'no image among cls' and 'unexpected end of data' in reasons[lost[3]]
    loader = load(shards, split='val', workers=workers)
    assert [len(images) for images, *_ in passes(loader)] == [4] * 5  # replaced
    if not workers:
        assert sorted(name for name, _ in loader.unreadable) == sorted(lost)
        assert are_equal(passes(load(shards, split='val'), 0, 2), passes(load(shards, split='val'))[2:])


def test_labels_of_shards_beyond_the_classes_stop_the_loader(shards):
    dataset = open_dataset(shards, 'train', is_training=True)
    check_labels(dataset, 1)  # cannot know yet
    config = TrainConfig(img_size=32, batch_size=4, workers=0)
    with pytest.raises(DataError, match='Labels 1 are not below 1'):
        passes(build_train_loader(dataset, config, EVAL, [(4, 1)], num_classes=1))


def test_more_workers_than_images_and_several_sizes_are_refused(shards):
    with pytest.raises(DataError, match='The 20 images of the shards are fewer than the 21 workers'):
        load(shards, workers=21)
    with pytest.raises(DataError, match='train_img_sizes needs images by index'):
        load(shards, train_img_sizes=[32, 64])
