"""Throughput of the training loader compared with timm's default loader, in images per second and worker.

Both return the same augmentation of the same files as uint8 batches; what then happens on the device is not measured.
They take turns in one process, with persistent workers, so that other load on the machine affects both.
"""
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import PIL
import timm
import torch
from timm.data import create_loader
from torch.utils.data import Dataset

from ..checkpoint.preparation import Preparation
from ..config import TrainConfig
from ..data.datasets import open_dataset
from ..data.folders import list_images
from ..data.loaders import build_train_loader
from ..devices import count_cores, describe_cpu
from ..errors import DataError
from ..measure.sample_network import SAMPLE_IMAGES
from ..measure.tables import format_table

__all__ = ['LoaderBench', 'Policy', 'Rate', 'bench_loader', 'describe_bench']


@dataclass(frozen=True)
class Rate:
    """A figure of each round: images per second and worker, or a ratio of these."""
    median: float
    least: float
    most: float
    rounds: list[float]

    @classmethod
    def of(cls, values: list[float]) -> 'Rate':
        return cls(statistics.median(values), min(values), max(values), values)

    def show(self, digits: int) -> str:
        return f'{self.median:.{digits}f} ({self.least:.{digits}f} to {self.most:.{digits}f})'


@dataclass(frozen=True)
class Policy:
    """The rates of both loaders with one augmentation, and their ratio caretrans / timm in each round."""
    auto_augment: str
    ours: Rate
    timm: Rate
    ratio: Rate


@dataclass(frozen=True)
class Machine:
    """CPU and versions."""
    processor: str
    cores: int
    torch: str
    timm: str
    pillow: str


@dataclass(frozen=True)
class LoaderBench:
    """The machine, the settings, the number and mean size of the files, and the rates of each augmentation."""
    machine: Machine
    rounds: int
    images: int
    workers: int
    img_size: int
    batch_size: int
    files: int
    mean_bytes: int
    policies: list[Policy]


def _open_images(data: str, images: int) -> Dataset:
    """The training images of a folder, repeated until there are `images`."""
    dataset = open_dataset(data, 'train', is_training=True)
    if not isinstance(getattr(getattr(dataset, 'reader', None), 'samples', None), list):
        raise DataError(f'{data} is not a folder of images: train/CLASS/IMAGE.jpg is needed.')
    dataset.reader.samples = dataset.reader.samples * -(-images // len(dataset))
    return dataset


@contextmanager
def _open_loaders(
        data: str, config: TrainConfig, images: int) -> Iterator[dict[str, Callable[[int], Iterable[Any]]]]:
    """For each loader, a function that returns the uint8 batches of an epoch as they leave the workers."""
    size = (3, config.img_size, config.img_size)
    ours = build_train_loader(_open_images(data, images), config, Preparation(size), config.split_steps(1))
    theirs = create_loader(
        _open_images(data, images), size, config.batch_size, is_training=True, scale=tuple(config.scale),
        ratio=tuple(config.ratio), hflip=config.hflip, color_jitter=config.color_jitter,
        auto_augment=config.auto_augment or None, interpolation=config.interpolation, re_prob=config.random_erasing,
        re_mode='pixel', num_workers=config.workers, persistent_workers=config.workers > 0,
        device=torch.device('cpu'))

    def run_ours(epoch: int) -> Iterable[Any]:
        ours.sampler.set_epoch(epoch)
        return ours.loader
    try:
        yield dict(ours=run_ours, timm=lambda epoch: theirs.loader)
    finally:
        ours.close()
        theirs.loader._iterator = None


def _measure(batches: Iterable[Any], workers: int) -> float:
    """Images per second and worker, from the first batch to the last."""
    images, start = 0, None
    for batch in batches:
        if start is None:
            start = time.perf_counter()
        else:
            images += len(batch[0])
    return images / (time.perf_counter() - start) / max(workers, 1)


def bench_loader(
        data: str | None = None, workers: int = 1, img_size: int = 224, batch_size: int = 64, rounds: int = 7,
        images: int = 1024, auto_augment: Sequence[str] = ('', 'rand-m9-mstd0.5-inc1')) -> LoaderBench:
    """Measure both loaders alternately.

    Args:
        data: Folder with train/CLASS/*.jpg; the bundled images if None.
        rounds: Rounds of each loader, of at least `images` images; one more before them is not counted.
        auto_augment: timm's names of policies, '' for crop and flip alone.
    Raises:
        DataError: `data` is not such a folder.
    """
    data = str(SAMPLE_IMAGES) if data is None else data
    options = dict(workers=workers, img_size=img_size, batch_size=batch_size)
    policies = []
    for policy in auto_augment:
        speeds: dict[str, list[float]] = dict(ours=[], timm=[])
        with _open_loaders(data, TrainConfig(data=data, auto_augment=policy, **options), images) as loaders:
            for turn in range(rounds + 1):
                for name in sorted(loaders, reverse=turn % 2 == 1):
                    speed = _measure(loaders[name](turn), workers)
                    speeds[name] += [speed] * (turn > 0)
        ratios = [ours / theirs for ours, theirs in zip(speeds['ours'], speeds['timm'], strict=True)]
        policies.append(Policy(policy, Rate.of(speeds['ours']), Rate.of(speeds['timm']), Rate.of(ratios)))
    sizes = [os.path.getsize(path) for path in list_images(data).images]
    machine = Machine(describe_cpu(), count_cores(), torch.__version__, timm.__version__, PIL.__version__)
    return LoaderBench(
        machine, rounds, images, **options, files=len(sizes), mean_bytes=round(sum(sizes) / max(len(sizes), 1)),
        policies=policies)


def describe_bench(bench: LoaderBench) -> str:
    """The machine and the settings, then a Markdown table."""
    machine = bench.machine
    return '\n'.join([
        f'{machine.processor}, {machine.cores} cores; PyTorch {machine.torch}, timm {machine.timm}, '
        f'Pillow {machine.pillow}',
        f'{bench.files} images of {bench.mean_bytes / 1000:.0f} kB on average, to {bench.img_size} pixels, '
        f'{bench.workers} workers, batches of {bench.batch_size}',
        f'Images/s per worker as uint8 batches, median of {bench.rounds} alternating rounds (minimum to maximum):', '',
        *format_table(['augmentation', 'timm', 'ours', 'ratio'], [
            [f'crop, flip{", " * bool(row.auto_augment)}{row.auto_augment}', row.timm.show(0), row.ours.show(0),
             row.ratio.show(2)] for row in bench.policies], markdown=True)])
