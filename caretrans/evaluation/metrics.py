"""Loss, top-1 and top-5 of a model, for all images and per class, independent of the number of processes.

Every image is counted once, in whole numbers. There is no device synchronisation between the first batch and the last.
"""
import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import unwrap_model

from ..devices import autocast
from ..distributed import Processes
from ..errors import ConfigError, DataError, EvaluationError, list_names
from ..text import open_text

__all__ = [
    'Accuracy', 'ClassScore', 'Details', 'Mistake', 'Scores', 'SubsetScores', 'check_forward', 'evaluate',
    'evaluate_in_detail',
    'explain_non_finite', 'list_non_finite', 'list_worst', 'tabulate_classes', 'write_classes']

ALONE = Processes()


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent, of the images they are means of; with fewer than five classes top-5 is of all."""
    top1: float
    top5: float
    images: int


@dataclass(frozen=True)
class SubsetScores:
    """Scores with the prediction restricted to the classes of the data; the loss is the mean cross entropy."""
    classes: int
    loss: float
    top1: float
    top5: float


@dataclass(frozen=True)
class Scores:
    """Scores over the images of all processes, equal on every process.

    Attributes:
        loss: Mean cross entropy.
        top1, top5: In percent, see `Accuracy`.
        unreadable: Name and reason of each skipped image.
        subset: Only if the data have some of the model's classes; the other scores are among all its classes.
    """
    loss: float
    top1: float
    top5: float
    images: int
    unreadable: list[tuple[str, str]]
    seconds: float
    images_per_s: float
    subset: SubsetScores | None


@dataclass(frozen=True)
class Mistake:
    """Another class that images of a class were predicted as."""
    label: int
    name: str
    images: int


@dataclass(frozen=True)
class ClassScore:
    """Images of a class, top-1 and top-5 in percent (None without images), and its mistakes, most frequent first."""
    label: int
    name: str
    images: int
    top1: float | None
    top5: float | None
    taken_for: list[Mistake]


class Details(NamedTuple):
    """The counts behind the figures of an evaluation.

    Attributes:
        confusion: (C, C) images of all processes; rows are the classes by label, columns the predicted classes.
        top5_correct: (C,) images per class whose label is among the five likeliest classes.
        predictions: (n, k) classes for the images of this process in the order of its loader, the likeliest first.
    """
    confusion: torch.Tensor
    top5_correct: torch.Tensor
    predictions: torch.Tensor


class Predictions:
    """Counts on the device the predictions of a model.

    Attributes:
        top_k: 5, or the number of classes where it is smaller.
        losses, finite, labels, classes: Of the images so far, batch by batch: (n,), whether logits and loss are finite
            (n,), (n,), and the likeliest classes (n, top_k).
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes, self.top_k = num_classes, min(5, num_classes)
        options: dict[str, Any] = dict(num_classes=num_classes, validate_args=False)  # validation waits for the device
        from torchmetrics.classification import MulticlassAccuracy  # slow to import
        self.top1 = MulticlassAccuracy(average='micro', **options).to(device)
        self.top5 = MulticlassAccuracy(average='none', top_k=self.top_k, **options).to(device)
        self.losses: list[torch.Tensor] = []
        self.finite: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.classes: list[torch.Tensor] = []

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: logits (B, C) of any floating dtype, labels (B,), which `check_labels` verifies later."""
        logits, targets = logits.float(), labels.clamp(0, self.num_classes - 1)
        classes = logits.topk(self.top_k).indices
        self.top1.update(classes[:, 0], targets)
        self.top5.update(logits, targets)
        losses = F.cross_entropy(logits, targets, reduction='none')
        self.losses.append(losses)
        self.finite.append(logits.isfinite().all(dim=1) & losses.isfinite())
        self.labels.append(labels)
        self.classes.append(classes)

    def summarise(self, processes: Processes) -> tuple[float, Accuracy]:
        """The mean loss, and the accuracy, over all processes.

        Raises:
            DataError: No process has an image.
        """
        losses = _join(self.losses).double()
        counts = [self.top1.tp.sum().item(), self.top5.tp.sum().item(), len(losses)]
        loss, top1, top5, images = processes.total([losses.sum().item(), *counts])
        if not images:
            raise DataError('No image could be read, so there is nothing to evaluate.')
        return loss / images, Accuracy(100 * top1 / images, 100 * top5 / images, int(images))

    def detail(self, processes: Processes) -> Details:
        """Counts per class over all processes, and the predictions of this one."""
        classes, labels = _join(self.classes, (self.top_k,)).long(), _join(self.labels).long()
        from torchmetrics.classification import MulticlassConfusionMatrix
        metric = MulticlassConfusionMatrix(num_classes=self.num_classes, validate_args=False)
        for predicted, expected in processes.gather((classes[:, 0].clone(), labels)):
            metric.update(predicted, expected)
        top5_correct = torch.tensor(processes.total(self.top5.tp.tolist())).long()
        return Details(metric.confmat, top5_correct, classes)


def _join(parts: Sequence[torch.Tensor], shape: tuple[int, ...] = ()) -> torch.Tensor:
    """The batches in one piece on the CPU; (0, *shape) where there are none."""
    return torch.cat(list(parts)).cpu() if parts else torch.zeros(0, *shape)


def check_labels(labels: Sequence[torch.Tensor], num_classes: int, processes: Processes) -> None:
    """Raise an error on all processes if one of them has labels outside the classes of the model.

    Raises:
        DataError: Labels below 0, or `num_classes` and above; it names them.
    """
    joined = _join(labels)
    here = set(joined[(joined < 0) | (joined >= num_classes)].long().tolist())
    wrong = sorted(set().union(*processes.gather(here)))
    if wrong:
        raise DataError(
            f'The data have the labels {list_names(wrong)}, the model has the classes 0 to {num_classes - 1}: use a '
            'split with labels, and data of the classes that the model was trained for.')


@torch.no_grad()
def check_forward(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> None:
    """Run a network on one empty image, so that what it cannot take is named before any work.

    Args:
        model: Left in the mode that it is in; run in evaluation mode.
        shape: (C, H, W) of the image.
    Raises:
        ConfigError: It has no classes, does not take this size, or does not return one number per class.
    """
    name, training = type(unwrap_model(model)).__name__, model.training
    size = f'images of {shape[1]} x {shape[2]} pixels'
    if getattr(unwrap_model(model), 'num_classes', None) == 0:
        raise ConfigError(f'This {name} has no classes: train it first (train.py --checkpoint FILE --new-heads); '
                          f'`python -m caretrans features` needs none.')
    try:
        logits = model.eval()(torch.zeros(1, *shape, device=device))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f'{name} does not take {size} ({" ".join(str(error).split())[:200]}): use another size.') \
            from error
    finally:
        model.train(training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, unwrap_model(model).num_classes):
        raise ConfigError(f'{name} does not return one number per class: remove arguments such as features_only.')


def list_non_finite(model: nn.Module) -> list[str]:
    """The keys of the weights that are not finite."""
    return [key for key, value in unwrap_model(model).state_dict().items()
            if value.is_floating_point() and not value.isfinite().all()]


def explain_non_finite(model: nn.Module, amp: str = 'off') -> str:
    """The likely cause of logits that are not finite, and the remedy."""
    broken = list_non_finite(model)
    if broken:
        return (f'{len(broken)} of the {len(model.state_dict())} tensors of the weights are not finite either '
                f'({list_names(broken, 3)}): use another checkpoint')
    if amp != 'off':
        return f'the weights are finite, but numbers overflow with amp={amp}: use --amp off'
    return 'the weights are finite, but numbers overflow on the way: use a wider number format or another checkpoint'


def _check_finite(
        predictions: Predictions, model: nn.Module, amp: str, processes: Processes, of: str = 'of') -> None:
    """Raise an error on all processes if logits or losses of any of them are not finite.

    Raises:
        EvaluationError: Has the number of these images, and the likely cause.
    """
    finite = _join(predictions.finite)
    broken, images = processes.total([int((~finite.bool()).sum()), len(finite)])
    if broken:
        raise EvaluationError(
            f'The logits of {int(broken)} {of} {int(images)} images are not finite, so there is no accuracy: '
            f'{explain_non_finite(model, amp)}.')


def evaluate(*arguments: Any, **options: Any) -> Scores:
    """The scores of `evaluate_in_detail`, without the details."""
    return evaluate_in_detail(*arguments, **options)[0]


@torch.inference_mode()
def evaluate_in_detail(
        model: nn.Module,
        loader: Any,
        device: torch.device,
        amp: str = 'off',
        report: Callable[[int], None] = lambda images: None,
        processes: Processes = ALONE,
        num_classes: int | None = None,
        classes: Sequence[int] | None = None,
) -> tuple[Scores, Details]:
    """Mean cross entropy and accuracy over the images of all processes, each of which calls this with its share.

    Args:
        loader: An `EvalLoader`, or anything whose `run()` gives batches (images, labels) on the device; a process may
            have fewer batches than another, or none.
        report: Called after every batch with the number of this process's images so far.
        num_classes: Of the model; `model.num_classes` if not given.
        classes: The model's class for each label of the data; by default the label itself.
    Returns:
        The scores, and the counts behind them.
    Raises:
        DataError: No image could be read, or a label is no class of the model.
        EvaluationError: Logits are not finite; raised after the first batch or at the end.
    """
    model.eval()
    predictions = Predictions(num_classes or model.num_classes, device)
    restricted = None if classes is None else Predictions(len(classes), device)
    table = None if classes is None else torch.tensor(classes, device=device)
    labelled = restricted or predictions  # counts the labels as they are in the data
    start, seen = time.perf_counter(), 0

    def count(images: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal seen
        with autocast(device, amp):
            logits = model(images)
        if logits.shape != (len(images), predictions.num_classes):
            raise ValueError(f'{predictions.num_classes} classes, but the logits are of shape {tuple(logits.shape)}.')
        if restricted is not None:
            restricted.update(logits[:, table], labels)
            labels = table[labels.clamp(0, len(table) - 1)]
        predictions.update(logits, labels)
        seen += len(images)
        report(seen)

    batches = iter(loader.run())
    first = list(islice(batches, 1))
    check_labels([labels for _, labels in first], labelled.num_classes, processes)  # both before hours of work
    for batch in first:
        count(*batch)
    _check_finite(predictions, model, amp, processes, 'of the first')
    for batch in batches:
        count(*batch)
    check_labels(labelled.labels, labelled.num_classes, processes)
    _check_finite(predictions, model, amp, processes)
    unreadable = sorted(chain(*processes.gather(list(getattr(loader, 'unreadable', ())))))
    if unreadable and not any(processes.total([seen])):
        raise DataError(f'None of {len(unreadable)} images could be read, the first is {": ".join(unreadable[0])}.')
    loss, accuracy = predictions.summarise(processes)
    subset = None
    if restricted is not None and restricted.num_classes < predictions.num_classes:
        subset_loss, among = restricted.summarise(processes)
        subset = SubsetScores(len(classes), subset_loss, among.top1, among.top5)
    seconds, = processes.largest([time.perf_counter() - start])
    scores = Scores(
        loss, accuracy.top1, accuracy.top5, accuracy.images, unreadable, seconds, accuracy.images / seconds, subset)
    return scores, predictions.detail(processes)


# Classes --------------------------------------------------------------------------------------------------------------

def tabulate_classes(details: Details, names: Sequence[str]) -> list[ClassScore]:
    """The scores and mistakes of each class, in the order of the labels."""
    rows = []
    for label, counts in enumerate(details.confusion.tolist()):
        images, top5 = sum(counts), details.top5_correct[label].item()
        wrong = sorted((-count, other) for other, count in enumerate(counts) if count and other != label)
        rows.append(ClassScore(
            label, names[label], images,
            100 * counts[label] / images if images else None, 100 * top5 / images if images else None,
            [Mistake(other, names[other], -count) for count, other in wrong]))
    return rows


def list_worst(rows: Sequence[ClassScore], count: int) -> list[ClassScore]:
    """The `count` classes with the lowest top-1, the lowest first; ties by label."""
    return sorted((row for row in rows if row.images), key=lambda row: row.top1)[:count]


def write_classes(path: str, rows: Sequence[ClassScore]) -> None:
    """Write the scores of each class as CSV, with its most frequent mistake.

    Raises:
        DataError: The file cannot be written.
    """
    try:
        with open_text(path, 'w') as file:
            writer = csv.writer(file)
            writer.writerow(['class', 'name', 'images', 'top1', 'top5', 'taken_for', 'taken_for_images'])
            for row in rows:
                wrong = row.taken_for[0] if row.taken_for else Mistake(0, '', 0)
                scores = ['' if score is None else f'{score:.3f}' for score in (row.top1, row.top5)]
                writer.writerow([row.label, row.name, row.images, *scores, wrong.name, wrong.images])
    except OSError as error:
        raise DataError(f'{path} cannot be written: {error.strerror}.') from error
