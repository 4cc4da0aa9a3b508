"""How many images per second the training loader gives, nothing else running, against timm's default loader.

Both give the same augmentation of the same files as uint8 batches; what then happens on the device is no part of it.
They take turns in one process, with workers that stay, so that whatever else the machine does meets both.
"""
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader
from torch.utils.data import Dataset

from ..config import TrainConfig
from ..data.datasets import open_dataset
from ..data.loaders import build_train_loader
from ..devices import count_cores, describe_cpu
from ..errors import DataError

__all__ = ['bench_loader', 'describe_bench', 'make_photographs']

BUNDLED = Path(__file__).parents[2] / 'data' / 'fruit14' / 'val'
SAMPLE_IMAGES = 128  # made where none are given
TILES = 4  # along each side of a mosaic


def make_photographs(sources: Sequence[str], size: tuple[int, int], folder: Path, number: int) -> None:
    """JPEGs of one size, quality 90, 4:2:0, in two classes of folder/train, out of real photographs.

    One that is large enough is cropped to the aspect and scaled down; smaller ones make mosaics of 4 x 4, each tile a
    crop about as large as the photograph, so that the detail in the file is that of photographs and not of enlargement.

    Raises:
        DataError: There are no JPEGs in `sources`.
    """
    files = [Path(source) for source in sources if Path(source).is_file()]
    files += [path for source in sources for path in sorted(Path(source).rglob('*.jp*g')) if path.is_file()]
    if not files:
        raise DataError(f'No JPEGs in {", ".join(map(str, sources))}: name photographs with --photos.')
    tile = (size[0] // TILES, size[1] // TILES)
    photographs = cycle(files[::max(len(files) // (number * TILES ** 2), 1)])
    for i in range(number):
        with Image.open(next(photographs)) as first:
            if first.width >= size[0] and first.height >= size[1]:
                image = ImageOps.fit(first.convert('RGB'), size, Image.Resampling.BICUBIC)
            else:
                image = Image.new('RGB', size)
                for place, path in enumerate(islice(photographs, TILES ** 2)):
                    with Image.open(path) as photograph:
                        part = ImageOps.fit(photograph.convert('RGB'), tile, Image.Resampling.BICUBIC)
                    image.paste(part, (place % TILES * tile[0], place // TILES * tile[1]))
        target = folder / 'train' / f'half{i % 2}' / f'{i}.jpg'
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, quality=90, subsampling='4:2:0')


def _describe_machine() -> dict[str, Any]:
    """What the figures hang on."""
    return dict(
        processor=describe_cpu(), cores=count_cores(), torch=torch.__version__, timm=timm.__version__,
        pillow=PIL.__version__)


def _open_images(data: str, images: int) -> Dataset:
    """The training images of a folder, as often as makes `images`."""
    dataset = open_dataset(data, 'train', is_training=True)
    if not isinstance(getattr(getattr(dataset, 'reader', None), 'samples', None), list):
        raise DataError(f'{data} is no folder of images: it takes train/CLASS/IMAGE.jpg.')
    dataset.reader.samples = dataset.reader.samples * -(-images // len(dataset))
    return dataset


@contextmanager
def _open_loaders(
        data: str, config: TrainConfig, images: int) -> Iterator[dict[str, Callable[[int], Iterable[Any]]]]:
    """For each loader, what gives the uint8 batches of an epoch as they leave the workers."""
    size = (3, config.img_size, config.img_size)
    eval_config = dict(input_size=size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    ours = build_train_loader(_open_images(data, images), config, eval_config, config.split_steps(1))
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
        data: str | None = None, photos: Sequence[str] | None = None, photo_size: Sequence[int] = (500, 400),
        workers: int = 1, img_size: int = 224, batch_size: int = 64, rounds: int = 7, images: int = 1024,
        auto_augment: Sequence[str] = ('', 'rand-m9-mstd0.5-inc1'),
) -> dict[str, Any]:
    """Images per second and worker of both loaders, in turns.

    Args:
        data: Folder of images; if None, photographs of `photo_size` are made out of `photos`, and deleted afterwards.
        rounds: Of at least `images` images each; one more goes before them, not counted.
    Returns:
        The machine, the settings, and for each of `auto_augment` the figures of each round, their ratios and medians.
    """
    options = dict(workers=workers, img_size=img_size, batch_size=batch_size)
    result: dict[str, Any] = dict(machine=_describe_machine(), rounds=rounds, images=images, **options, policies=[])
    with ExitStack() as stack:
        if data is None:
            data = stack.enter_context(tempfile.TemporaryDirectory())
            make_photographs(photos or [str(BUNDLED)], tuple(photo_size), Path(data), SAMPLE_IMAGES)
        files = [path.stat().st_size for path in Path(data).rglob('*.jp*g')]
        result.update(files=len(files), mean_bytes=round(sum(files) / max(len(files), 1)))
        for policy in auto_augment:
            config = TrainConfig(data=data, auto_augment=policy, **options)
            with _open_loaders(data, config, images) as loaders:
                result['policies'].append(_summarise(policy, _take_turns(loaders, rounds, workers)))
    return result


def _take_turns(
        loaders: dict[str, Callable[[int], Iterable[Any]]], rounds: int, workers: int) -> dict[str, list[float]]:
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(rounds + 1):
        for name in sorted(loaders, reverse=turn % 2 == 1):
            speed = _measure(loaders[name](turn), workers)
            speeds[name] += [speed] if turn else []
    return speeds


def _summarise(policy: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [ours / theirs for ours, theirs in zip(speeds['ours'], speeds['timm'], strict=True)]
    figures = dict(speeds, ratio=ratios)
    return dict(auto_augment=policy, **{
        name: dict(median=statistics.median(values), least=min(values), most=max(values), rounds=values)
        for name, values in figures.items()})


def describe_bench(result: dict[str, Any]) -> str:
    """The result for people: facts, then a table."""
    machine = result['machine']
    lines = [
        f'{machine["processor"]}, {machine["cores"]} cores; PyTorch {machine["torch"]}, timm {machine["timm"]}, '
        f'Pillow {machine["pillow"]}',
        f'{result["files"]} JPEGs of {result["mean_bytes"] / 1000:.0f} kB on average, to {result["img_size"]} pixels, '
        f'{result["workers"]} workers, batches of {result["batch_size"]}',
        f'Images/s per worker as uint8 batches, median of {result["rounds"]} rounds in turns (least to most):', '',
        '| augmentation | timm | ours | ratio |', '|---|---|---|---|']
    for row in result['policies']:
        cells = [f'{row[name]["median"]:.0f} ({row[name]["least"]:.0f} to {row[name]["most"]:.0f})'
                 for name in ('timm', 'ours')]
        ratio = row['ratio']
        cells.append(f'{ratio["median"]:.2f} ({ratio["least"]:.2f} to {ratio["most"]:.2f})')
        name = 'crop, flip' + (f', {row["auto_augment"]}' if row['auto_augment'] else '')
        lines.append(f'| {" | ".join([name] + cells)} |')
    return '\n'.join(lines)
