"""Linear probe: a linear classifier on the features of a frozen trunk, by the published protocol.

SGD with a rate of 0.2 per 256 images falls to 0 along a half cosine over 80 epochs, without weight decay; a BatchNorm
follows the linear layer; the trunk stays in evaluation mode. The published figure is the best
of the evaluations during training, which is chosen on the test images; both that and the last are returned here.
"""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import ConfigError
from ..evaluation.metrics import Scores, evaluate
from ..seeds import derive_seed, seed_everything
from .optimizer import build_optimizer, build_schedule

__all__ = [
    'FeatureBatches', 'ProbeResult', 'ProbeSettings', 'build_classifier', 'probe_features',
    'train_probe']

RATE_BATCH = 256  # images that the rate is for

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class ProbeSettings:
    """The published protocol.

    Attributes:
        lr: For `RATE_BATCH` images per step; it is scaled to `batch_size`.
        batch_norm: Whether a BatchNorm follows the linear layer.
    """
    epochs: int = 80
    batch_size: int = 256
    lr: float = .2
    batch_norm: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.lr <= 0:
            raise ConfigError(f'A probe of {self.epochs} epochs, batches of {self.batch_size} and rate {self.lr:g}: '
                              f'use at least one epoch, two images and a positive rate.')

    def is_evaluated(self, epoch: int) -> bool:
        """Whether the published protocol evaluates after this epoch, counted from 1."""
        return epoch in (1, 2, 5, 7, self.epochs) or epoch % 10 == 0


@dataclass(frozen=True)
class ProbeResult:
    """Scores after the last epoch, and the best of those during training with its epoch, counted from 1."""
    last: Scores
    best: Scores
    best_epoch: int
    epochs: int

    def describe(self) -> str:
        return (f'last epoch ({self.epochs}): top-1 {self.last.top1:.2f} %, top-5 {self.last.top5:.2f} %; best of the '
                f'evaluations, chosen on the test images as published (epoch {self.best_epoch}): top-1 '
                f'{self.best.top1:.2f} %, top-5 {self.best.top5:.2f} %')


def build_classifier(features: int, num_classes: int, batch_norm: bool = True) -> nn.Sequential:
    """A linear layer, whose weights start from a normal distribution of deviation 0.01, and a BatchNorm."""
    linear = nn.Linear(features, num_classes)
    nn.init.normal_(linear.weight, std=.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, *([nn.BatchNorm1d(num_classes)] if batch_norm else []))


class FeatureBatches:
    """Features in memory in place of images, for training and for `evaluate`.

    `run` shuffles them by seed and epoch; without an epoch they come in order.

    Args:
        features, labels: (N, D) and (N,).
        batch_size: The last images of an epoch that do not fill a batch are skipped, but not in order.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, batch_size: int, seed: int = 42) -> None:
        self.features, self.labels, self.batch_size, self.seed = features, labels, batch_size, seed
        self.steps = len(features) // batch_size

    def run(self, epoch: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if epoch is None:
            yield from zip(self.features.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
            return
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(len(self.features), generator=generator)[:self.steps * self.batch_size]
        for places in order.to(self.features.device).split(self.batch_size):
            yield self.features[places], self.labels[places]


def train_probe(
        classifier: nn.Sequential, batches: Callable[[int], Batches], steps: int, test: FeatureBatches,
        settings: ProbeSettings = ProbeSettings(),  # noqa: B008 (immutable)
        report: Callable[[int, float, Scores | None], None] = lambda epoch, loss, scores: None,
) -> ProbeResult:
    """Train a classifier of `build_classifier` on the features of a frozen trunk.

    Args:
        batches: The training batches of an epoch, counted from 0: features (B, D) and labels (B,), on the device.
        steps: Batches in an epoch.
        test: Features and labels of the test images.
        report: Called after every epoch with its number, counted from 1, the mean loss, and the scores, if evaluated.
    Raises:
        ConfigError: The training images do not fill a batch.
        EvaluationError: Logits are not finite.
    """
    if steps < 1:
        raise ConfigError(f'The training images do not fill a batch of {settings.batch_size}: use a smaller '
                          f'--batch-size.')
    device, classes = classifier[0].weight.device, classifier[0].out_features
    optimizer = build_optimizer(classifier, settings.lr * settings.batch_size / RATE_BATCH, weight_decay=0.)
    schedule = build_schedule(optimizer, settings.epochs, 0, steps)
    best, best_epoch, step = None, 0, 0
    for epoch in range(1, settings.epochs + 1):
        classifier.train()
        total = torch.zeros((), device=device)
        for features, labels in batches(epoch - 1):
            loss = F.cross_entropy(classifier(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            schedule.step_update(step)
            total += loss.detach()
        scores = evaluate(classifier, test, device, num_classes=classes) if settings.is_evaluated(epoch) else None
        if scores is not None and (best is None or scores.top1 > best.top1):
            best, best_epoch = scores, epoch
        report(epoch, total.item() / steps, scores)
    return ProbeResult(scores, best, best_epoch, settings.epochs)


def probe_features(
        train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], num_classes: int,
        settings: ProbeSettings = ProbeSettings()) -> ProbeResult:  # noqa: B008 (immutable)
    """The probe on features (N, D) and labels (N,) in memory, so without crops and flips: seconds instead of hours."""
    seed_everything(settings.seed)
    classifier = build_classifier(train[0].shape[1], num_classes, settings.batch_norm).to(train[0].device)
    batches = FeatureBatches(*train, settings.batch_size, settings.seed)
    return train_probe(
        classifier, batches.run, batches.steps, FeatureBatches(*test, settings.batch_size), settings)
