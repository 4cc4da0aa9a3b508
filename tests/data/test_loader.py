"""Loaders: the same images after any interruption and for any number of workers; unreadable ones are listed."""
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from photos import FRUIT, copy_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch.utils.data import IterableDataset

from caretrans.checkpoint.preparation import Preparation
from caretrans.config import TrainConfig
from caretrans.data import check_labels, find_labels, list_classes, loaders, open_dataset
from caretrans.data.loaders import build_eval_loader, build_train_loader
from caretrans.distributed import Processes
from caretrans.errors import DataError
from caretrans.seeds import derive_seed, seed_sample

EVAL = Preparation([3, 32, 32], 'bilinear', crop_pct=1.)


@pytest.fixture
def small_data(tmp_path) -> Path:
    return copy_images(tmp_path, per_class=8)


def load(data, processes=Processes(), name='', split='train', **settings):  # noqa: B008 (immutable)
    config = TrainConfig(**{'img_size': 32, 'batch_size': 4, 'workers': 0, 'auto_augment': '', **settings})
    dataset = open_dataset(data, split, name=name, is_training=True)
    return build_train_loader(dataset, config, EVAL, config.split_steps(processes.world_size), processes)


def passes(loader, epoch=0, start_step=0):
    """(images, targets, step, index, passes) of each pass; ends the workers."""
    found = [tuple(each) for each in loader.run(epoch, start_step)]
    loader.close()
    return found


def are_equal(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, b) and torch.equal(c, d) and e == f for (a, c, *e), (b, d, *f) in zip(some, others, strict=True))


def evaluate(data, workers=0, processes=Processes(), name='', batch_size=4, split='val'):  # noqa: B008
    loader = build_eval_loader(open_dataset(data, split, name=name), EVAL, batch_size, workers, processes)
    return [tuple(batch) for batch in loader.run()], loader


def test_training_batches_are_whole_and_augmented_as_by_timm(small_data):
    loader = load(small_data, random_erasing=0.)
    first, second = passes(loader, 0), passes(loader, 1)
    assert loader.steps == len(first) == 4 and first[0][0].shape == (4, 3, 32, 32)
    assert not torch.equal(first[0][0], second[0][0])
    transform = create_transform(
        (3, 32, 32), is_training=True, use_prefetcher=True, interpolation='random', color_jitter=0.)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(derive_seed(42, 0))).tolist()
    dataset = open_dataset(small_data, 'train')
    dataset.transform = transform
    seed_sample(derive_seed(42, 0, 0))  # the seed of the run, the epoch, the place in it
    image, label = dataset[order[0]]
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    assert (first[0][0][0] * std + mean - image).abs().max() < 2.01 and first[0][1][0] == label
    with pytest.raises(DataError, match='16 training images do not fill a batch of 17'):
        load(small_data, batch_size=17)


@pytest.mark.parametrize('policy', ['', 'rand-m9-mstd0.5-inc1'])
def test_workers_do_not_change_the_images(small_data, policy):
    alone = passes(load(small_data, auto_augment=policy))
    for workers in (1, 2):
        assert are_equal(alone, passes(load(small_data, auto_augment=policy, workers=workers)))


def test_persistent_workers_give_the_epochs_of_new_ones(small_data):
    loader = load(small_data, workers=2)
    epochs = [[tuple(each) for each in loader.run(epoch)] for epoch in (0, 1)]
    assert are_equal(passes(loader, 0), epochs[0]) and are_equal(passes(load(small_data), 1), epochs[1])


def test_two_processes_together_load_what_one_does(small_data):
    """With the same noise of random erasing, which depends on the place of a pass in its step."""
    alone = passes(load(small_data, device_batch=2, random_erasing=1.))  # 2 passes a step
    shares = [passes(load(small_data, Processes(rank, 2), device_batch=2, random_erasing=1.)) for rank in (0, 1)]
    assert are_equal(
        [(images, targets) for images, targets, *_ in alone],
        [(images, targets) for both in zip(*shares, strict=True) for images, targets, *_ in both])
    assert [place[-2:] for place in alone] == [(0, 2), (1, 2)] * 4
    assert [place[-2:] for place in shares[0]] == [(0, 1)] * 4


def test_an_epoch_started_in_the_middle_is_the_tail_of_the_whole(small_data):
    whole = passes(load(small_data, random_erasing=1.))
    for workers in (0, 2):
        assert are_equal(passes(load(small_data, random_erasing=1., workers=workers), 0, 3), whole[3:])


def test_every_image_comes_once_in_an_epoch_and_the_rest_is_skipped(small_data):
    loader = load(small_data, batch_size=5)
    order = [sample.index for batch in loader.sampler for sample in batch]
    assert loader.steps == 3 and len(set(order)) == len(order) == 15
    loader.sampler.set_epoch(1)
    assert order != [sample.index for batch in loader.sampler for sample in batch]


def test_several_sizes_keep_the_images_of_a_step_and_limit_the_pixels(small_data):
    settings = dict(train_img_sizes=[32, 48, 64], device_batch=4, seed=2)
    plain, sized = load(small_data, seed=2), load(small_data, **settings)
    sizes = set()
    for epoch in range(8):
        found, steps = passes(sized, epoch), []
        for images, _, step, *_ in found:
            sizes.add(images.shape[-1])
            assert images.shape[0] * images.shape[-1] ** 2 <= 4 * 32 ** 2
            steps += [step] * len(images)
        assert Counter(steps) == {step: 4 for step in range(4)}
        indices = [sample.index for batch in sized.sampler for sample in batch]
        plain.sampler.set_epoch(epoch)
        wanted = [sample.index for batch in plain.sampler for sample in batch]
        assert indices == wanted
    assert sizes == {32, 48, 64}


def damage(data, split):
    first, second = sorted((data / split / 'kaiser').iterdir())[:2]
    first.write_bytes(b'<html>not found</html>')
    second.write_bytes(second.read_bytes()[:-200])
    return [str(first), str(second)]


@pytest.mark.parametrize('name', ['', 'torch/image_folder'])
def test_an_unreadable_image_is_replaced_in_training_and_skipped_in_evaluation(small_data, name):
    broken, broken_val = damage(small_data, 'train'), damage(small_data, 'val')
    loader = load(small_data, name=name, workers=1)
    assert [len(images) for images, *_ in passes(loader)] == [4] * 4
    assert {path for path, _ in loader.unreadable} == set(broken)
    assert 'cannot identify image' in dict(loader.unreadable)[broken[0]]
    assert 'truncated' in dict(loader.unreadable)[broken[1]]
    batches, evaluated = evaluate(small_data, name=name)
    assert sum(len(images) for images, _ in batches) == 14
    assert [path for path, _ in evaluated.unreadable] == broken_val


def test_too_many_unreadable_images_in_a_row_stop_the_loader(small_data):
    for path in (small_data / 'train').glob('*/*.jpg'):
        path.write_bytes(b'')
    with pytest.raises(DataError, match='50 images in a row cannot be read, the first is .*jpg'):
        passes(load(small_data))


def test_a_model_of_other_channels_is_refused(small_data):
    with pytest.raises(DataError, match='takes images of 1 channels, the loaders give 3'):
        build_eval_loader(open_dataset(small_data, 'val'), replace(EVAL, input_size=[1, 32, 32]), 4, 0)


def test_waiting_for_the_workers_is_counted(small_data):
    loader = load(small_data)
    start = time.perf_counter()
    passes(loader)
    assert 0 < loader.waited <= time.perf_counter() - start


def test_a_worker_survives_a_signal_to_all_processes_for_a_while(small_data):
    loader = load(small_data, workers=1)
    batches = loader.run(0)
    found = [tuple(next(batches))]
    worker = loader.loader._iterator._workers[0]
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    time.sleep(0.2)
    found += [tuple(each) for each in batches]
    assert worker.is_alive() and are_equal(found, passes(load(small_data)))
    loader.close()
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_reads_every_image_once_in_order(workers):
    batches, loader = evaluate(FRUIT, workers, batch_size=64)
    labels = [label for _, label in open_dataset(FRUIT, 'val').reader.samples]
    assert torch.cat([targets for _, targets in batches]).tolist() == labels and not loader.unreadable
    if workers:
        shares = [evaluate(FRUIT, workers, Processes(rank, 2), batch_size=64)[0] for rank in (0, 1)]
        shared = [shares[i % 2][i // 2] for i in range(len(batches))]
        assert are_equal(batches, shared)


def test_tars_are_loaded_as_folders_are(small_data, tmp_path):
    folders = passes(load(small_data)), evaluate(small_data)[0]
    for split in ('train', 'val'):
        with tarfile.open(small_data / f'{split}.tar', 'w') as archive:
            archive.add(small_data / split, arcname='.')
        shutil.rmtree(small_data / split)
    loader = load(small_data, workers=2)
    loader.samples.dataset.reader[0][0].read()  # nothing that the main process opened is shared with the workers
    assert are_equal(passes(loader), folders[0])
    assert are_equal(evaluate(small_data, 2)[0], folders[1])


@pytest.fixture
def hub_data(tmp_path, monkeypatch):
    """The small data set as Parquet files, as `datasets` reads them from a local folder."""
    for variable, value in (('HF_HUB_OFFLINE', '1'), ('HF_HOME', str(tmp_path / 'home'))):
        monkeypatch.setenv(variable, value)
    import datasets  # reads them at import

    images = copy_images(tmp_path / 'images', per_class=8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['kaiser', 'orange']))
    (tmp_path / 'hub' / 'data').mkdir(parents=True)
    for split in ('train', 'val'):
        paths = [path for path, _ in open_dataset(images, split).reader.samples]
        columns = dict(
            image=[dict(bytes=Path(path).read_bytes(), path=None) for path in paths],
            label=[int('orange' in path.split('/')[-2]) for path in paths])
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            tmp_path / 'hub' / 'data' / f'{split}-00000-of-00001.parquet')
    return images, tmp_path / 'hub', tmp_path / 'cache'


def test_hugging_face_data_sets_are_loaded_as_folders_are(hub_data):
    images, folder, cache = hub_data
    name = f'hfds/{folder}'
    dataset = open_dataset(cache, 'train', name=name)
    assert list_classes(dataset) == ['kaiser', 'orange'] and find_labels(dataset) == {0, 1}
    assert are_equal(passes(load(cache, name=name, workers=2)), passes(load(images)))
    split = next(split for split in ('val', 'validation') if split in dataset.reader.dataset.info.splits)
    assert are_equal(evaluate(cache, name=name, split=split)[0], evaluate(images)[0])
    with pytest.raises(DataError, match='the data has 1'):
        check_labels(dataset, 1)


def test_a_missing_package_of_hugging_face_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
    monkeypatch.delitem(__import__('sys').modules, 'timm.data.readers.reader_hfds', raising=False)
    with pytest.raises(DataError, match='pip install datasets'):
        open_dataset(tmp_path, 'train', name='hfds/some')


def test_hugging_face_streams_are_refused_with_the_name_by_index(tmp_path):
    with pytest.raises(DataError, match='hfids/some is a stream, which cannot resume: use hfds/some'):
        open_dataset(tmp_path, 'train', name='hfids/some')


class Stream(IterableDataset):
    """What timm's factory gives for data that streams, cut short."""

    def __init__(self, images, length):
        self.images, self.length, self.reader = images, length, None

    def __len__(self): return self.length  # noqa: E704
    def set_epoch(self, epoch): pass  # noqa: E704
    def set_loader_cfg(self, num_workers): pass  # noqa: E704
    def __iter__(self): return iter(self.images)  # noqa: E704


def test_streams_are_checked_while_they_are_read(small_data):
    images = list(open_dataset(small_data, 'train'))
    config = TrainConfig(img_size=32, batch_size=4, workers=0)
    for stream, classes, message in (
            (Stream(images, 16), 1, 'Labels 1 are not below 1'), (Stream(images[:9], 16), 2, 'ended after 2 of 4')):
        check_labels(stream, classes)  # cannot know yet
        with pytest.raises(DataError, match=message):
            passes(build_train_loader(stream, config, EVAL, [(4, 1)], num_classes=classes))
    with pytest.raises(DataError, match='train_img_sizes needs images by index'):
        config = TrainConfig(img_size=32, batch_size=4, workers=0, train_img_sizes=[32, 64])
        build_train_loader(Stream(images, 16), config, EVAL, config.split_steps(1))


def test_at_exit_only_the_workers_of_our_loaders_end(small_data):
    other = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,))
    other.start()
    try:
        batches = iter(load(small_data, workers=1).run(0))
        next(batches)
        ours = [child for child in multiprocessing.active_children() if child.pid != other.pid]
        previous = signal.getsignal(signal.SIGCHLD)
        loaders._end_workers()
        for child in ours:
            child.join(10)
        signal.signal(signal.SIGCHLD, previous)
        assert ours and not any(child.is_alive() for child in ours) and other.is_alive()
    finally:
        other.kill()
        other.join()
