"""Work of the loader processes: read, decode and augment images, and report unreadable ones."""
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.dataset import ImageDataset
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info
from torchvision.datasets import DatasetFolder

from ..errors import DataError
from ..seeds import derive_seed, seed_sample
from .datasets import name_image
from .decode import UNREADABLE, describe_error

__all__ = [
    'Batch', 'Item', 'Sample', 'Samples', 'SeededSamples', 'ShardSamples', 'StreamedSamples', 'collate', 'load_images',
    'start_worker']

MAX_TRIES = 50  # images in a row that cannot be read
GRACE = 20.  # seconds that a worker stays after SIGTERM, for the last step and its checkpoint


class Sample(NamedTuple):
    """A request to a worker: the index of an image, the seed of its augmentation, and the index of its size."""
    index: int
    seed: int = 0
    size: int = 0


class Batch(NamedTuple):
    """images (B, 3, H, W) uint8, targets (B,) int64, and (name, reason) of images that could not be read."""
    images: torch.Tensor
    targets: torch.Tensor
    unreadable: list[tuple[str, str]]


Item = tuple[torch.Tensor | None, Any, list[tuple[str, str]]]  # image, target, and what was unreadable


def collate(items: Sequence[Item]) -> Batch:
    """Make a batch of items; an item without an image only has reasons."""
    unreadable = [entry for item in items for entry in item[2]]
    items = [item for item in items if item[0] is not None]
    if not items:
        return Batch(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), unreadable)
    return Batch(  # in a worker, straight into shared memory
        default_collate([item[0] for item in items]), torch.tensor([item[1] for item in items]), unreadable)


def read_image(dataset: Dataset, index: int) -> tuple[bytes | Image.Image, int]:
    """Image `index` of a data set of timm's factory, as the bytes of its file where there is one, and its label.

    Raises:
        OSError, SyntaxError, EOFError, Image.DecompressionBombError: It cannot be read.
    """
    if isinstance(dataset, DatasetFolder):  # torchvision's would decode it
        path, target = dataset.samples[index]
        return Path(path).read_bytes(), target
    if not isinstance(dataset, ImageDataset):  # torchvision's others have images in memory, or open them themselves
        return dataset[index][:2]
    try:
        file, target = dataset.reader[index][:2]
    except (AssertionError, TypeError) as error:  # of timm's reader of Hugging Face data, for an entry without image
        raise OSError(f'no image: {error}') from None
    with file:
        return file.read(), target


def load_image(dataset: Dataset, index: int, transform: Callable) -> tuple[torch.Tensor, int]:
    """Image `index`, transformed, and its label.

    Raises:
        OSError, SyntaxError, EOFError, Image.DecompressionBombError: It cannot be read.
        DataError: Anything else went wrong; names the image.
    """
    try:
        source, target = read_image(dataset, index)
        return transform(source), int(target)
    except (DataError, *UNREADABLE):
        raise
    except Exception as error:
        raise DataError(f'{name_image(dataset, index)}: {describe_error(error)}.') from error


def load_images(dataset: Dataset, indices: Iterable[int], transform: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Some images of a data set, transformed, and their labels.

    Raises:
        DataError: One of them cannot be read; names it.
    """
    indices, loaded = list(indices), {}
    for index in set(indices):
        try:
            loaded[index] = load_image(dataset, index, transform)
        except UNREADABLE as error:
            name = name_image(dataset, index)
            raise DataError(f'{name} cannot be read as an image ({describe_error(error)}): remove it.') from None
    return torch.stack([loaded[i][0] for i in indices]), torch.tensor([loaded[i][1] for i in indices])


class SeededSamples(Dataset):
    """Images by `Sample`, each loaded and augmented with its own seed; subclasses say how.

    Args:
        replace: Replace an unreadable image by the next readable one; otherwise skip it.
    """

    def __init__(self, replace: bool) -> None:
        self.replace = replace

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int, size: int) -> tuple[torch.Tensor, Any]:
        """Image `index`, transformed to size `size`, and its target; raises one of UNREADABLE if it cannot be read."""
        raise NotImplementedError

    def name_image(self, index: int) -> str:
        """Image `index` in messages."""
        raise NotImplementedError

    def __getitem__(self, sample: Sample) -> Item:
        unreadable: list[tuple[str, str]] = []
        index = sample.index
        for _ in range(MAX_TRIES):
            try:
                seed_sample(sample.seed)
                return *self.load(index, sample.size), unreadable
            except UNREADABLE as error:
                unreadable.append((self.name_image(index), describe_error(error)))
            if not self.replace:
                return None, -1, unreadable
            index = (index + 1) % len(self)
        raise DataError(f'{MAX_TRIES} images in a row cannot be read, the first is {": ".join(unreadable[0])}.')


class Samples(SeededSamples):
    """Transformed images of a data set by `Sample`.

    Args:
        dataset: Of timm's factory; its own transform is not used.
        transforms: For each size, a function of what `read_image` returns.
        replace: See `SeededSamples`.
    """

    def __init__(self, dataset: Dataset, transforms: Sequence[Callable], replace: bool) -> None:
        super().__init__(replace)
        dataset.transform = None
        self.dataset, self.transforms = dataset, list(transforms)

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int, size: int) -> tuple[torch.Tensor, int]:
        return load_image(self.dataset, index, self.transforms[size])

    def name_image(self, index: int) -> str:
        return name_image(self.dataset, index)


class StreamedSamples(IterableDataset):
    """Transformed images of a reader of timm's that streams (TensorFlow Datasets), in its order."""

    def __init__(self, dataset: IterableDataset, transform: Callable, seed: int, rank: int) -> None:
        dataset.transform = None
        self.dataset, self.transform, self.seed, self.rank = dataset, transform, seed, rank
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        place = (self.seed, self.epoch, self.rank, worker.id if worker else 0)
        for number, (image, target) in enumerate(self.dataset):
            seed_sample(derive_seed(*place, number))
            yield self.transform(image), int(target), []


class ShardSamples(IterableDataset):
    """This process's share of the images of shards, transformed.

    In evaluation, each image once. In training, the images of `passes` forward passes: the workers take turns with
    whole batches, so that an epoch can start in the middle. The order depends on the number of workers and processes. A
    reader that runs out of images starts over, so some images may come twice in an epoch and others not at all.

    Args:
        reader: A `ShardReader`.
        images: Images per pass, 0 in evaluation.
        passes: Passes per epoch.
    """

    def __init__(
            self, reader: Any, transform: Callable, seed: int, rank: int, world_size: int, images: int = 0,
            passes: int = 0,
    ) -> None:
        self.reader, self.transform, self.seed = reader, transform, seed
        self.rank, self.world_size, self.images, self.passes = rank, world_size, images, passes
        self.place = torch.zeros(2, dtype=torch.int64).share_memory_()  # epoch and first pass, for persistent workers

    def __len__(self) -> int:
        return len(self.reader)

    def set_epoch(self, epoch: int, first_pass: int = 0) -> None:
        self.place.copy_(torch.tensor([epoch, first_pass]))

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return self._train(worker, workers) if self.images else self._evaluate(worker, workers)

    def _evaluate(self, worker: int, workers: int) -> Iterator[Item]:
        for record in self.reader.read(self.rank * workers + worker, self.world_size * workers):
            yield self._transform(record, 0)

    def _train(self, worker: int, workers: int) -> Iterator[Item]:
        epoch, first = self.place.tolist()
        first += worker  # the first pass of this worker
        turn = first % workers  # the worker that would have this pass if the epoch started at 0
        records = self.reader.read_mixed(
            self.rank * workers + turn, self.world_size * workers, derive_seed(self.seed, 1), epoch)
        records = islice(records, first // workers * self.images, None)
        ahead: deque[Any] = deque()
        for number in range(first, self.passes, workers):
            for i in range(self.images):
                yield self._next(records, ahead, derive_seed(self.seed, epoch, self.rank, number, i))

    def _next(self, records: Iterator[Any], ahead: deque[Any], seed: int) -> Item:
        """The next record, or if it is unreadable the first readable one after it, which is then used twice."""
        unreadable: list[tuple[str, str]] = []
        for i in range(MAX_TRIES):
            if i == len(ahead):
                ahead.append(next(records))
            image, target, problem = self._transform(ahead[i], seed)
            unreadable = unreadable or problem  # those after it are reported in their own place
            if image is not None:
                ahead.popleft()
                return image, target, unreadable
        raise DataError(f'{MAX_TRIES} images in a row cannot be read, the first is {": ".join(unreadable[0])}.')

    def _transform(self, record: Any, seed: int) -> Item:
        if record.data is None:
            return None, -1, [(record.name, record.reason)]
        seed_sample(seed)
        try:
            return self.transform(record.data), record.label, []
        except UNREADABLE as error:
            return None, -1, [(record.name, describe_error(error))]
        except Exception as error:
            raise DataError(f'{record.name}: {describe_error(error)}.') from error


def start_worker(worker_id: int) -> None:
    """Survive a SIGTERM to all processes of the run by some seconds, until the main process has finished its step."""
    def stay(*_: Any) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, GRACE)
    if os.name == 'posix':
        signal.signal(signal.SIGTERM, stay)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
