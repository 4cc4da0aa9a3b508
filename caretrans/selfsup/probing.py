"""Scores of a trunk on labelled data: nearest neighbours and the linear probe, with every choice stated."""
import dataclasses
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from ..checkpoint.preparation import Preparation
from ..config import TrainConfig
from ..data.datasets import check_labels, list_classes, open_dataset
from ..data.loaders import EvalLoader, build_eval_loader, build_train_loader
from ..devices import autocast, count_cores, resolve_device
from ..errors import ConfigError, list_names
from ..evaluation.metrics import Scores, evaluate
from ..flags import DEVICE_HELP, check_settings, setting
from ..progress import Progress
from ..seeds import seed_everything
from .features import Features, estimate_statistics, extract_features, load_trunk
from .knn import NEIGHBOURS, TEMPERATURE, KnnClassifier
from .probe import (
    FeatureBatches, ProbeResult, ProbeSettings, build_classifier, probe_features, train_probe)

__all__ = ['ProbeConfig', 'ProbeReport', 'describe_probe', 'probe_trunk', 'score_neighbours']

_logger = logging.getLogger(__name__)


@dataclass
class ProbeConfig:
    """Settings of `python -m caretrans probe`."""

    data: str = setting('', 'folder with train/ and val/ in ImageNet layout or as LMDB files')
    dataset: str = setting('', "data set of timm's factory instead", off='')
    train_split: str = setting('train', 'split for the classifier and the neighbours')
    val_split: str = setting('val', 'split that is scored')
    num_classes: int | None = setting(None, 'number of classes, for data that do not name them', bounds=(1, None))

    checkpoint: str = setting('', 'file of a pre-training, published or ours, or of a classifier', off='')
    entry: str | None = setting(None, 'entry of the file that contains the weights')
    model: str = setting('', 'model, if the file does not name it', off='')
    pretrained: bool = setting(False, 'use the published weights of --model')
    random_weights: bool = setting(
        False, 'use random weights instead, with BatchNorm statistics from the data, as a baseline: of --model, or of '
        'the network of a pre-training, whose images are prepared as for its weights')
    teacher: bool = setting(False, 'use the trunk of the teacher instead of that of the student')
    img_size: int | None = setting(None, 'image side in pixels (default: as in the file)', bounds=(32, None))

    linear: bool = setting(True, 'train the linear classifier')
    crops: bool = setting(
        True, 'train it on random crops and flips, as published; else on one feature per image, in seconds')
    epochs: int = setting(80, 'epochs of the classifier', bounds=(1, None))
    batch_size: int = setting(256, 'images per step', bounds=(2, None))
    lr: float = setting(.2, 'peak rate for 256 images per step', positive=True)
    batch_norm: bool = setting(True, 'BatchNorm after the linear layer, as published')
    k: int = setting(NEIGHBOURS, 'nearest neighbours that vote', bounds=(1, None))
    temperature: float = setting(TEMPERATURE, 'a neighbour votes with exp(cosine / temperature)', positive=True)

    amp: str = setting('off', 'autocast of the trunk', choices=['off', 'bf16', 'fp16'], off='off')
    workers: int | None = setting(None, 'image loading processes (default: one per core, at most 8)', bounds=(0, None))
    device: str = setting('auto', DEVICE_HELP)
    seed: int = setting(42, 'seed of random weights, classifier, order and crops', bounds=(0, None))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.workers is None:
            self.workers = min(count_cores(), 8)

    @property
    def probe(self) -> ProbeSettings:
        return ProbeSettings(self.epochs, self.batch_size, self.lr, self.batch_norm, self.seed)


@dataclass(frozen=True)
class ProbeReport:
    """Scores of a trunk, and the choices that they depend on.

    Attributes:
        preparation: Of the images.
        neighbours: Top-1 of the nearest neighbours, in percent.
        linear: None if not wanted.
    """
    weights: str
    preparation: Preparation
    bank: int
    images: int
    k: int
    temperature: float
    neighbours: float
    crops: bool
    linear: ProbeResult | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.inference_mode()
def score_neighbours(
        bank: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], num_classes: int,
        k: int = NEIGHBOURS, temperature: float = TEMPERATURE) -> Scores:
    """Scores of the nearest neighbours among labelled features; both are features (N, D) and labels (N,)."""
    model = KnnClassifier(nn.Identity(), *bank, num_classes, k, temperature).to(bank[0].device)
    return evaluate(model, FeatureBatches(*test, 1024), bank[0].device)


def _open(config: ProbeConfig) -> tuple[Dataset, Dataset, int]:
    train = open_dataset(config.data, config.train_split, config.dataset, is_training=True, seed=config.seed)
    classes = list_classes(train)
    test = open_dataset(config.data, config.val_split, config.dataset, classes, seed=config.seed)
    count = config.num_classes or len(classes or ())
    if not count:
        raise ConfigError(f'{config.data or config.dataset} does not name its classes: set --num-classes.')
    for dataset in (train, test):
        check_labels(dataset, count)
    return train, test, count


def _load(loader: EvalLoader, label: str, total: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of a loader, with progress."""
    with Progress(total, stream=sys.stderr) as progress:
        progress.describe(label)
        for images, labels in loader.run():
            yield images, labels
            progress.update(len(images))


def _train_on_crops(
        config: ProbeConfig, trunk: nn.Module, preparation: Preparation, data: Dataset, num_classes: int,
        test: tuple[torch.Tensor, torch.Tensor]) -> ProbeResult:
    """The published protocol; the features of the test images are extracted once, because the trunk is frozen."""
    device = test[0].device
    seed_everything(config.seed)
    classifier = build_classifier(test[0].shape[1], num_classes, config.batch_norm).to(device)
    crops = TrainConfig(
        img_size=preparation.size[0], interpolation='bilinear', auto_augment='', random_erasing=0., color_jitter=0.,
        batch_size=config.batch_size, epochs=config.epochs, warmup_epochs=0, workers=config.workers, seed=config.seed)
    loader = build_train_loader(
        data, crops, preparation, [(config.batch_size, 1)], device=device, num_classes=num_classes)
    network = Features(trunk).eval()
    with Progress(config.epochs * loader.steps * config.batch_size, stream=sys.stderr) as progress:
        def run(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            progress.describe(f'epoch {epoch + 1}/{config.epochs}')
            for batch in loader.run(epoch):
                with torch.no_grad(), autocast(device, config.amp):
                    features = network(batch.images).float()
                yield features, batch.targets
                progress.update(len(batch.images))

        def report(epoch: int, loss: float, scores: Scores | None) -> None:
            if scores is not None:
                progress.write(f'epoch {epoch}/{config.epochs}  loss {loss:.3f}  top-1 {scores.top1:.2f} %')

        result = train_probe(
            classifier, run, loader.steps, FeatureBatches(*test, config.batch_size), config.probe, report)
    loader.close()
    return result


def probe_trunk(config: ProbeConfig) -> ProbeReport:
    """Score a trunk by its nearest neighbours and by a linear classifier.

    Raises:
        ConfigError, CheckpointError, DataError: The settings, the weights or the data cannot be used.
    """
    device = resolve_device(config.device)
    seed_everything(config.seed)
    trunk, preparation = load_trunk(
        config.checkpoint, config.model or None, config.entry, config.pretrained, config.random_weights,
        config.teacher, img_size=config.img_size)
    trunk.to(device)
    train, test, num_classes = _open(config)
    if config.linear and 1 < len(train) < config.batch_size:
        _logger.warning(f'The {len(train)} training images do not fill a batch of {config.batch_size}: the classifier '
                        f'is trained with all of them at a time.')
        config = dataclasses.replace(config, batch_size=len(train))
    loaders = [build_eval_loader(data, preparation, config.batch_size, config.workers, device=device)
               for data in (train, test)]
    if config.random_weights:
        estimate_statistics(trunk, _load(loaders[0], 'statistics', len(train)))
    bank, queries = (
        tuple(part.to(device) for part in extract_features(trunk, _load(loader, label, len(data)), config.amp))
        for loader, label, data in zip(loaders, ('training images', 'test images'), (train, test), strict=True))
    for name, loader in (('training', loaders[0]), ('test', loaders[1])):
        if loader.unreadable:
            names = list_names({name for name, _ in loader.unreadable}, 5)
            _logger.warning(f'{len(loader.unreadable)} {name} images could not be read and are skipped: {names}')
    found = score_neighbours(bank, queries, num_classes, config.k, config.temperature)
    linear = None
    if config.linear and config.crops:
        linear = _train_on_crops(config, trunk, preparation, train, num_classes, queries)
    elif config.linear:
        linear = probe_features(bank, queries, num_classes, config.probe)
    weights = f'random weights of {config.checkpoint or config.model}' if config.random_weights else \
        config.checkpoint or f'published weights of {config.model}'
    return ProbeReport(
        weights, preparation, len(bank[0]), found.images, min(config.k, len(bank[0])), config.temperature,
        found.top1, config.crops, linear)


def describe_probe(report: ProbeReport) -> Iterator[str]:
    """The report as lines of text."""
    yield f'{report.weights}, {report.bank} training images, {report.images} test images'
    images = report.preparation
    yield (f'images of {images.size[0]} x {images.size[1]} pixels, {images.interpolation}, crop {images.crop_pct:g} '
           f'({images.crop_mode}), orientation {images.orientation}')
    yield (f'nearest neighbours: top-1 {report.neighbours:.2f} % (k {report.k}, temperature {report.temperature:g}, '
           f'cosine)')
    if report.linear:
        kind = 'random crops and flips' if report.crops else 'one feature per image'
        yield f'linear probe on {kind}: {report.linear.describe()}'
