"""Loaders: images are decoded and augmented in workers as uint8, and normalised on the device.

The batches of a training loader depend on (seed, epoch, step) alone, because each image is augmented with a seed of its
own. So a run can resume in the middle of an epoch, with other numbers of workers and processes.
"""
import atexit
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from timm.data import create_transform
from timm.data.loader import PrefetchLoader
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler

from ..checkpoint.preparation import Preparation
from ..config import RunConfig, TrainConfig
from ..distributed import Processes
from ..errors import DataError, list_names, require
from ..seeds import derive_seed, seed_everything
from .decode import CropTransform, EvalTransform
from .samples import Batch, Sample, Samples, ShardSamples, StreamedSamples, collate, start_worker

__all__ = [
    'EvalLoader', 'Pass', 'TrainLoader', 'build_eval_loader', 'build_train_loader', 'make_samples', 'normalise']

_workers: weakref.WeakSet = weakref.WeakSet()  # processes that the loaders of this module started

# Training -------------------------------------------------------------------------------------------------------------

class PassSampler(Sampler):
    """The samples of each forward pass of this process.

    Step s of an epoch takes the images at positions s*B ... s*B+B-1 of the epoch's order, where B is the global batch,
    for any number of processes. They go to pass 0 of process 0, pass 0 of process 1, ..., pass 1 of process 0, ...
    timm's scheduled sampler draws a size for each step.

    Args:
        images: Number of images in the data set.
        batch_size: Images per step, over all processes.
        splits: For each size, (images per pass and process, passes per step).
        schedule: 'constant', all sizes equally likely in every epoch, or 'progressive', from the first to the last.
        epochs: Length of a progressive schedule.
    """

    def __init__(
            self, images: int, seed: int, batch_size: int, splits: Sequence[tuple[int, int]], processes: Processes,
            schedule: str = 'constant', epochs: int = 1,
    ) -> None:
        self.images, self.seed, self.batch_size = images, seed, batch_size
        self.splits, self.processes = list(splits), processes
        self.epoch = self.start_step = 0
        self.plan = ScheduledBatchSampler(
            SequentialSampler(range(images // batch_size)), batch_sizes=[1] * len(splits), seed=seed & 0x7fffffff,
            num_batches=images // batch_size or None,  # so drawn anew for every epoch
            choice_schedule=schedule if len(splits) > 1 else 'constant', schedule_epochs=epochs)

    def choose_sizes(self, epoch: int) -> list[int]:
        """The index of the size of each step of an epoch."""
        self.plan.set_epoch(epoch)
        return [size for (_, size), in self.plan]

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return sum(self.splits[size][1] for size in self.choose_sizes(self.epoch)[self.start_step:])

    def __iter__(self) -> Iterator[list[Sample]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        sizes = self.choose_sizes(self.epoch)
        for step in range(self.start_step, len(sizes)):
            images, passes = self.splits[sizes[step]]
            for i in range(passes):
                first = step * self.batch_size + (i * self.processes.world_size + self.processes.rank) * images
                yield [Sample(order[position], derive_seed(self.seed, self.epoch, position), sizes[step])
                       for position in range(first, first + images)]


Prefetch = Callable[[Iterable], Iterable]  # makes an iterable of batches one of batches on the device


def normalise(preparation: Preparation, device: torch.device, **erasing: Any) -> Prefetch:
    """Move batches of images of one size to the device and normalise them there, by timm's prefetcher."""
    channels = preparation.input_size[0]
    if channels != 3:
        raise DataError(f'The model takes images of {channels} channels, the loaders give 3 (RGB): in_chans=3.')
    return partial(PrefetchLoader, mean=preparation.mean, std=preparation.std, device=device, channels=channels,
                   **erasing)


class _DeviceLoader:
    """Moves batches to the device by `prefetch`; records what was unreadable.

    Attributes:
        unreadable: (name, reason) of the images that could not be read so far; the caller empties it.
        waited: Seconds spent waiting for the workers so far.
    """

    def __init__(self, prefetch: Prefetch, num_classes: int | None) -> None:
        self.unreadable: list[tuple[str, str]] = []
        self.waited = 0.
        self.num_classes = num_classes  # labels are checked against it, unless it is None
        self.prefetcher = prefetch(self)

    def _batches(self) -> Iterable[Batch]:
        raise NotImplementedError

    def _check_labels(self, targets: torch.Tensor) -> None:
        """Refuse labels of streams, which `data.check_labels` cannot see."""
        if self.num_classes is not None and not 0 <= int(targets.min()) <= int(targets.max()) < self.num_classes:
            wrong = sorted({label for label in targets.tolist() if not 0 <= label < self.num_classes})
            raise DataError(f'Labels {list_names(wrong)} are not below {self.num_classes}, the classes.')

    def _start(self) -> Iterator[Batch]:
        """An iterator over the data loader; its workers are recorded, to be ended at exit."""
        batches = iter(self.loader)
        _workers.update(getattr(batches, '_workers', ()))
        return batches

    def _prepare(self) -> None:
        """Called before each batch is moved to the device."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches = iter(self._batches())
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches, None)
            except DataError as error:  # that of a worker has its traceback before the message
                *_, line = str(error).strip().splitlines()
                raise DataError(line.removeprefix(f'{DataError.__module__}.{DataError.__name__}: ')) from error
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            self.unreadable.extend(batch.unreadable)
            if len(batch.images):
                self._check_labels(batch.targets)
                self._prepare()
                yield batch.images, batch.targets


class Pass(NamedTuple):
    """The input of a forward pass: normalised images (B, 3, H, W) and targets (B,), or what another task takes.

    It is pass `index` of the `passes` of this process in optimizer step `step` of the epoch.
    """
    images: Any
    targets: Any
    step: int
    index: int = 0
    passes: int = 1


class TrainLoader(_DeviceLoader):
    """Augmented training batches, one for each forward pass of this process.

    Args:
        prefetch: Moves batches to the device.
        splits: For each training size, (images per pass and process, passes per step).
        size_schedule: How several sizes are sampled, see `PassSampler`.
        collate: Makes a batch of items.
    Attributes:
        steps: Optimizer steps in an epoch; images that do not fill one are skipped.
    """

    def __init__(
            self, samples: Dataset, config: RunConfig, prefetch: Prefetch, splits: Sequence[tuple[int, int]],
            processes: Processes, device: torch.device, num_classes: int | None = None,
            size_schedule: str = 'constant', collate: Callable = collate,
    ) -> None:
        super().__init__(prefetch, num_classes)
        self.samples, self.seed, self.processes, self.splits = samples, config.seed, processes, list(splits)
        options: dict[str, Any] = dict(
            num_workers=config.workers, collate_fn=collate, pin_memory=device.type == 'cuda',
            worker_init_fn=start_worker)
        self.sampler: PassSampler | None = None
        if isinstance(samples, IterableDataset):
            images, passes = splits[0]
            self.generator = torch.Generator()
            sharded = isinstance(samples, ShardSamples)
            self.loader = DataLoader(
                samples, batch_size=images, drop_last=True, generator=self.generator,
                persistent_workers=sharded and config.workers > 0, **options)
            self.steps = (samples.passes if sharded else len(samples) // images) // passes
        else:
            self.sampler = PassSampler(
                len(samples), config.seed, config.batch_size, splits, processes, size_schedule, config.epochs)
            self.loader = DataLoader(
                samples, batch_sampler=self.sampler, persistent_workers=config.workers > 0, **options)
            self.steps = len(samples) // config.batch_size

    def run(self, epoch: int, start_step: int = 0) -> Iterator[Pass]:
        """The forward passes of an epoch from a step on, each with the random generators seeded for it."""
        self.epoch, self.start_step = epoch, start_step
        sizes = [0] * self.steps if self.sampler is None else self.sampler.choose_sizes(epoch)
        places = [(step, i) for step in range(start_step, self.steps) for i in range(self.splits[sizes[step]][1])]
        self._unprepared = iter(places)
        batches = iter(self.prefetcher)
        for number, (step, i) in enumerate(places):
            images, targets = next(batches, (None, None))
            if images is None:
                raise DataError(f'The data ended after {number} of {len(places)} batches of epoch {epoch}.')
            self._seed_pass(step, i, 1)
            yield Pass(images, targets, step, i, self.splits[sizes[step]][1])

    def name_images(self, step: int) -> list[str]:
        """The images of this process in a step of the current epoch; empty for a stream."""
        if self.sampler is None:
            return []
        self.sampler.set_epoch(self.epoch, step)
        passes = self.splits[self.sampler.choose_sizes(self.epoch)[step]][1]
        return [self.samples.name_image(sample.index) for samples in islice(self.sampler, passes) for sample in samples]

    def close(self) -> None:
        """End the workers; otherwise they end with the program."""
        self.loader._iterator = None

    def _seed_pass(self, step: int, i: int, purpose: int) -> None:
        place = i * self.processes.world_size + self.processes.rank  # the same places for any world size
        seed_everything(derive_seed(self.seed, self.epoch, step, place, purpose))

    def _prepare(self) -> None:
        self._seed_pass(*next(self._unprepared, (self.steps, 0)), 2)

    def _batches(self) -> Iterable[Batch]:
        if self.sampler is not None:
            self.sampler.set_epoch(self.epoch, self.start_step)
            return self._start()
        first_pass = self.start_step * self.splits[0][1]
        if isinstance(self.samples, ShardSamples):
            self.samples.set_epoch(self.epoch, first_pass)
            return self._start()
        self.samples.set_epoch(self.epoch)
        self.generator.manual_seed(derive_seed(self.seed, self.epoch))  # timm's readers draw their order from it
        return islice(self._start(), first_pass, None)


@atexit.register
def _end_workers() -> None:
    """End the workers of our loaders before the interpreter sends them SIGTERM, which they survive for a while."""
    running = [worker for worker in _workers if worker.is_alive()]
    if running and os.name == 'posix':
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in running:
        worker.kill()


def build_train_loader(
        dataset: Dataset, config: TrainConfig, preparation: Preparation, splits: Sequence[tuple[int, int]],
        processes: Processes = Processes(), device: torch.device = torch.device('cpu'),  # noqa: B008 (immutable)
        num_classes: int | None = None,
) -> TrainLoader:
    """The training loader of a data set.

    Args:
        splits: For each of the training sizes (`config.list_sizes()`), images per pass and process, and passes.
        num_classes: A label that is not below it raises a `DataError` when it is read; None for no check.
    Raises:
        DataError: The data set is smaller than a batch, or it is a stream and several sizes are wanted.
    """
    require('simplejpeg')
    transforms = [
        CropTransform(create_transform(
            (preparation.input_size[0], size, size), is_training=True, use_prefetcher=True,
            interpolation=config.interpolation, mean=preparation.mean, std=preparation.std, scale=tuple(config.scale),
            ratio=tuple(config.ratio), hflip=config.hflip, color_jitter=config.color_jitter,
            auto_augment=config.auto_augment or None), preparation.orientation)
        for size in config.list_sizes()]
    if len(dataset) < config.batch_size:
        raise DataError(
            f'The {len(dataset)} training images do not fill a batch of {config.batch_size}: use a smaller '
            f'--batch-size.')
    if isinstance(dataset, IterableDataset) and len(transforms) > 1:
        raise DataError('train_img_sizes needs images by index: shards are read in order, so give one img_size.')
    samples = make_samples(dataset, transforms, config, splits, processes)
    prefetch = normalise(preparation, device, re_prob=config.random_erasing, re_mode='pixel')
    return TrainLoader(samples, config, prefetch, splits, processes, device, num_classes, config.size_schedule)


def make_samples(
        dataset: Dataset, transforms: Sequence[Any], config: RunConfig, splits: Sequence[tuple[int, int]],
        processes: Processes,
) -> Dataset:
    """Training samples of a data set of any kind: by index, as a stream, or from shards.

    Args:
        transforms: For each training size, of what `samples.read_image` returns; streams have one size.
        splits: See `build_train_loader`.
    Raises:
        DataError: Shards have fewer images than there are workers.
    """
    if not isinstance(dataset, IterableDataset):
        return Samples(dataset, transforms, replace=True)
    if not hasattr(dataset.reader, 'read_mixed'):
        dataset.set_loader_cfg(num_workers=config.workers)
        return StreamedSamples(dataset, transforms[0], config.seed, processes.rank)
    readers = processes.world_size * max(config.workers, 1)
    if len(dataset) < readers:
        raise DataError(f'The {len(dataset)} images of the shards are fewer than the {readers} workers: use fewer.')
    images, passes = splits[0]
    return ShardSamples(
        dataset.reader, transforms[0], config.seed, processes.rank, processes.world_size, images,
        len(dataset) // config.batch_size * passes)


# Evaluation -----------------------------------------------------------------------------------------------------------

class EvalLoader(_DeviceLoader):
    """(images, targets) of this process's share of a data set, each image once, in order.

    Processes share whole batches, which are the same for any number of processes, because the last bits of an image's
    logits depend on its place in the batch and on the batch size.

    Attributes:
        share: The indices of this process's images in order; None for a stream.
    """

    def __init__(
            self, samples: Dataset, preparation: Preparation, batch_size: int, workers: int, processes: Processes,
            device: torch.device, num_classes: int | None = None,
    ) -> None:
        super().__init__(normalise(preparation, device), num_classes)
        self.share: list[int] | None = None
        options: dict[str, Any] = dict(
            num_workers=workers, collate_fn=collate, pin_memory=device.type == 'cuda', worker_init_fn=start_worker)
        if isinstance(samples, ShardSamples):
            self.loader: Any = DataLoader(samples, batch_size, **options)
        elif isinstance(samples, IterableDataset):  # timm's do not share it out evenly: one process reads it all
            self.loader = DataLoader(samples, batch_size, **options) if processes.is_primary else ()
        else:
            numbers = range(len(samples))
            batches = [numbers[first:first + batch_size] for first in range(0, len(samples), batch_size)]
            batches = batches[processes.rank::processes.world_size]
            self.share = [index for batch in batches for index in batch]
            self.loader = DataLoader(
                samples, batch_sampler=[[Sample(index) for index in batch] for batch in batches], **options)

    def _batches(self) -> Iterable[Batch]:
        return self._start()

    def run(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches, on the device."""
        return iter(self.prefetcher)


def build_eval_loader(
        dataset: Dataset, preparation: Preparation, batch_size: int, workers: int,
        processes: Processes = Processes(), device: torch.device = torch.device('cpu'),  # noqa: B008 (immutable)
        num_classes: int | None = None,
) -> EvalLoader:
    """This process's share of the images, prepared for evaluation."""
    transform = EvalTransform(preparation, as_uint8=True)
    if hasattr(getattr(dataset, 'reader', None), 'read_mixed'):
        samples: Dataset = ShardSamples(dataset.reader, transform, 0, processes.rank, processes.world_size)
    elif isinstance(dataset, IterableDataset):
        for name, alone in (('dist_rank', 0), ('dist_num_replicas', 1)):  # timm's readers take a part by themselves
            if hasattr(dataset.reader, name):
                setattr(dataset.reader, name, alone)
        dataset.set_loader_cfg(num_workers=workers)
        samples = StreamedSamples(dataset, transform, 0, 0)
    else:
        samples = Samples(dataset, [transform], replace=False)
    return EvalLoader(samples, preparation, batch_size, workers, processes, device, num_classes)
