"""Loss, top-1 and top-5 of a model, for all images and per class, independent of the number of processes.

Every image is counted once, in whole numbers. There is no device synchronisation between the first batch and the last.
"""
import csv
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..devices import autocast
from ..distributed import Processes
from ..errors import DataError, list_names
from ..text import open_text

__all__ = ['Details', 'evaluate', 'evaluate_in_detail', 'list_worst', 'tabulate_classes', 'write_classes']

ALONE = Processes()


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
        losses, labels, classes: Of the images so far, batch by batch; (n,), (n,) and the likeliest classes (n, top_k).
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes, self.top_k = num_classes, min(5, num_classes)
        options: dict[str, Any] = dict(num_classes=num_classes, validate_args=False)  # validation waits for the device
        from torchmetrics.classification import MulticlassAccuracy  # slow to import
        self.top1 = MulticlassAccuracy(average='micro', **options).to(device)
        self.top5 = MulticlassAccuracy(average='none', top_k=self.top_k, **options).to(device)
        self.losses: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.classes: list[torch.Tensor] = []

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: logits (B, C) of any floating dtype, labels (B,), which `check_labels` verifies later."""
        logits, targets = logits.float(), labels.clamp(0, self.num_classes - 1)
        classes = logits.topk(self.top_k).indices
        self.top1.update(classes[:, 0], targets)
        self.top5.update(logits, targets)
        self.losses.append(F.cross_entropy(logits, targets, reduction='none'))
        self.labels.append(labels)
        self.classes.append(classes)

    def summarise(self, processes: Processes) -> dict[str, float]:
        """Mean loss, top1 and top5 in percent, and images, over all processes.

        Raises:
            DataError: No process has an image.
        """
        losses = _join(self.losses).double()
        counts = [self.top1.tp.sum().item(), self.top5.tp.sum().item(), len(losses)]
        loss, top1, top5, images = processes.total([losses.sum().item(), *counts])
        if not images:
            raise DataError('No image could be read, so there is nothing to evaluate.')
        return dict(loss=loss / images, top1=100 * top1 / images, top5=100 * top5 / images, images=int(images))

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


def evaluate(*arguments: Any, **options: Any) -> dict[str, Any]:
    """The figures of `evaluate_in_detail`, without the details."""
    return evaluate_in_detail(*arguments, **options)[0]


@torch.inference_mode()
def evaluate_in_detail(
        model: nn.Module,
        loader: Any,
        device: torch.device,
        amp: str = 'off',
        report: Callable[..., None] = lambda images, **figures: None,
        processes: Processes = ALONE,
        num_classes: int | None = None,
) -> tuple[dict[str, Any], Details]:
    """Mean cross entropy and accuracy over the images of all processes, each of which calls this with its share.

    Args:
        loader: An `EvalLoader`, or anything whose `run()` gives batches (images, labels) on the device; a process may
            have fewer batches than another, or none.
        report: Called after every batch with the number of this process's images so far.
        num_classes: Of the model; `model.num_classes` if not given.
    Returns:
        The same on every process: loss, top1 and top5 in percent (top5 of at most as many classes as there are),
        images, unreadable (names and reasons of the skipped images), seconds, images_per_s; and the counts behind them.
    Raises:
        DataError: No image could be read, or a label is no class of the model.
    """
    model.eval()
    predictions = Predictions(num_classes or model.num_classes, device)
    start, seen = time.perf_counter(), 0
    batches = iter(loader.run())
    first = list(islice(batches, 1))
    check_labels([labels for _, labels in first], predictions.num_classes, processes)  # before hours of work
    for images, labels in chain(first, batches):
        with autocast(device, amp):
            logits = model(images)
        if logits.shape != (len(images), predictions.num_classes):
            raise ValueError(f'{predictions.num_classes} classes, but the logits are of shape {tuple(logits.shape)}.')
        predictions.update(logits, labels)
        seen += len(images)
        report(seen)
    check_labels(predictions.labels, predictions.num_classes, processes)
    result = predictions.summarise(processes)
    seconds, = processes.largest([time.perf_counter() - start])
    unreadable = sorted(chain(*processes.gather(list(getattr(loader, 'unreadable', ())))))
    result.update(unreadable=unreadable, seconds=seconds, images_per_s=result['images'] / seconds)
    return result, predictions.detail(processes)


# Classes --------------------------------------------------------------------------------------------------------------

def tabulate_classes(details: Details, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each class: label, name, images, top1 and top5 in percent (None without images), and what it is mistaken
    for: `taken_for` lists the wrong predictions as {label, name, images}, the most frequent first.
    """
    rows = []
    for label, counts in enumerate(details.confusion.tolist()):
        images, top5 = sum(counts), details.top5_correct[label].item()
        wrong = sorted((-count, other) for other, count in enumerate(counts) if count and other != label)
        rows.append(dict(
            label=label, name=names[label], images=images,
            top1=100 * counts[label] / images if images else None, top5=100 * top5 / images if images else None,
            taken_for=[dict(label=other, name=names[other], images=-count) for count, other in wrong]))
    return rows


def list_worst(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` classes of `tabulate_classes` with the lowest top-1, the lowest first; ties by label."""
    return sorted((row for row in rows if row['images']), key=lambda row: row['top1'])[:count]


def write_classes(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of `tabulate_classes` as CSV, with the most frequent wrong prediction of each class.

    Raises:
        DataError: The file cannot be written.
    """
    try:
        with open_text(path, 'w') as file:
            writer = csv.writer(file)
            writer.writerow(['class', 'name', 'images', 'top1', 'top5', 'taken_for', 'taken_for_images'])
            for row in rows:
                wrong = row['taken_for'][0] if row['taken_for'] else dict(name='', images=0)
                scores = ['' if row[key] is None else f'{row[key]:.3f}' for key in ('top1', 'top5')]
                writer.writerow([row['label'], row['name'], row['images'], *scores, wrong['name'], wrong['images']])
    except OSError as error:
        raise DataError(f'{path} cannot be written: {error.strerror}.') from error
