"""Evaluation of detectors by COCO's average precision, and of segmenters by the mean IoU of their classes."""
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn as nn

from ..devices import autocast
from ..distributed import Processes, join_processes, leave_processes, shared_errors
from ..errors import DataError, EvaluationError, list_names
from ..progress import Progress
from .coco import CocoData, encode_masks
from .detect import detect
from .load import open_model
from .masks import MaskData, check_masks, read_masks
from .objects import read_objects
from .semantic_fpn import SemanticFpn
from .voc_metric import voc_average_precision

__all__ = [
    'DenseScores', 'average_precision', 'describe_scores', 'evaluate_dense', 'score_model', 'score_pixels']

AP_NAMES = {'AP': 'AP_all', 'AP50': 'AP_50', 'AP75': 'AP_75', 'AP_small': 'AP_small', 'AP_medium': 'AP_medium',
            'AP_large': 'AP_large', 'AR100': 'AR_third'}


@dataclass(frozen=True)
class DenseScores:
    """Scores in percent, equal on every process.

    Attributes:
        task, model, data: What was evaluated.
        images: Their number.
        notes: Odd things in the data, and what was done about them.
        seconds: Of the evaluation.
        box, mask: {AP, AP50, AP75, AP_small, AP_medium, AP_large, AR100} of a detector; None where COCO's protocol has
            no value, as without large objects. `mask` only of Mask R-CNN.
        voc: {AP50, AP50_11} by the rules of Pascal VOC, of data in its format.
        pixel: {mIoU, accuracy} of a segmenter.
        classes: {name: AP of boxes, or IoU}; None for a class that the data do not have.
    """
    task: str
    model: str
    data: str
    images: int
    notes: list[str]
    seconds: float
    classes: dict[str, float | None]
    box: dict[str, float | None] | None = None
    mask: dict[str, float | None] | None = None
    voc: dict[str, float | None] | None = None
    pixel: dict[str, float | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def _percent(value: float) -> float | None:
    return None if value < 0 or value != value else 100 * float(value)


def average_precision(
        data: CocoData, results: list[dict[str, Any]], kind: str,
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """COCO's average precision in percent, and that of each class.

    Args:
        results: Detections as COCO defines them: image_id, category_id, bbox, score, and segmentation for masks.
        kind: 'bbox' or 'segm', for data of `encode_masks`.
    """
    from faster_coco_eval import COCO, COCOeval_faster
    from faster_coco_eval.core import mask as rle

    if not results:  # the scorer needs one: of nothing, without a score
        image = data.images[0]
        nothing = rle.encode(np.zeros((image.height, image.width), np.uint8, order='F'))
        results = [dict(image_id=image.id, category_id=next(iter(data.categories)), bbox=[0., 0., 0., 0.], score=0.,
                        **dict(segmentation=nothing) if kind == 'segm' else {})]
    truth = COCO(data.to_coco())
    scorer = COCOeval_faster(truth, truth.loadRes(results), iouType=kind)
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    precision = scorer.eval['precision'][:, :, :, 0, -1]  # (IoU, recall, class), of all areas, 100 detections
    classes = {}
    for i, number in enumerate(scorer.params.catIds):
        values = precision[:, :, i]
        values = values[values > -1]
        classes[data.categories[int(number)]] = _percent(values.mean() if values.size else -1)
    return {name: _percent(scorer.stats_as_dict[key]) for name, key in AP_NAMES.items()}, classes


def score_pixels(confusion: torch.Tensor, names: Sequence[str]) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Mean IoU and accuracy of pixels in percent, and the IoU of each class.

    Args:
        confusion: (C, C) pixels; rows are the true classes. A class that is neither there nor predicted has no IoU and
            is not part of the mean.
    Raises:
        DataError: No pixel has a class.
    """
    confusion = confusion.double()
    right, total = confusion.diagonal(), confusion.sum()
    if not total:
        raise DataError('No pixel of the masks has a class, all are ignored: check the values of the masks.')
    union = confusion.sum(0) + confusion.sum(1) - right
    values = [(100 * r / u).item() if u else None for r, u in zip(right, union, strict=True)]
    present = [value for value in values if value is not None]
    scores = dict(mIoU=sum(present) / len(present), accuracy=(100 * right.sum() / total).item())
    return scores, dict(zip(names, values, strict=True))


def _share(count: int, processes: Processes) -> range:
    """The images of this process: neighbours, so that all detections together have the order of one process."""
    return range(count * processes.rank // processes.world_size, count * (processes.rank + 1) // processes.world_size)


Advance = Callable[[int], object]  # called with 1 after every image


def _detect(
        model: nn.Module, data: CocoData, device: torch.device, amp: str, share: range, advance: Advance,
) -> list[dict[str, Any]]:
    """The detections in a share of the images, as COCO defines them."""
    from faster_coco_eval.core import mask as rle

    numbers, results = list(data.categories), []
    for i in share:
        image = data.images[i]
        try:
            with autocast(device, amp):
                found = detect(model, image.load().to(device) / 255)
        except ValueError as error:
            raise EvaluationError(f'{image.path}: {error}: use --amp off, or another file.') from None
        for j, (box, score, label) in enumerate(zip(*(
                found[key].tolist() for key in ('boxes', 'scores', 'labels')), strict=True)):
            left, top, right, bottom = box
            results.append(dict(
                image_id=image.id, category_id=numbers[label], bbox=[left, top, right - left, bottom - top],
                score=score))
            if 'masks' in found:
                pixels = (found['masks'][j, 0] >= .5).to(torch.uint8).numpy()
                results[-1]['segmentation'] = rle.encode(np.asfortranarray(pixels))
        advance(1)
    return results


@torch.inference_mode()
def _segment(
        model: SemanticFpn, data: MaskData, device: torch.device, amp: str, share: range, advance: Advance,
) -> torch.Tensor:
    """Confusion of pixels (C, C) in a share of the images, at their original sizes."""
    count = model.num_classes
    confusion = torch.zeros(count, count, dtype=torch.int64)
    for i in share:
        pixels, labels = data.load(i)
        with autocast(device, amp):
            logits = model.segment(pixels.to(device))
        if not logits.isfinite().all():
            raise EvaluationError(f'The logits of {data.images[i]} are not finite: use --amp off, or another file.')
        known = labels != data.ignore
        pairs = labels[known].long() * count + logits.argmax(0).cpu()[known]
        confusion += torch.bincount(pairs, minlength=count ** 2).view(count, count)
        advance(1)
    return confusion


def _check_classes(found: list[str], known: list[str] | None, count: int, data: str, file: Path) -> None:
    """Refuse data of other classes than those of the model.

    Raises:
        DataError: Other names, or another number.
    """
    if known is not None and found != known:
        missing, extra = sorted(set(known) - set(found)), sorted(set(found) - set(known))
        raise DataError(
            f'The classes of {data} are not those of {file}: missing {list_names(missing) or "none"}; unknown '
            f'{list_names(extra) or "none"}; they must have the same order.')
    if len(found) != count:
        raise DataError(f'{data} has {len(found)} classes, {file} has {count}: use data of its classes.')


def evaluate_dense(
        checkpoint: str | PathLike, data: str, split: str = 'val', entry: str | None = None,
        device: torch.device = torch.device('cpu'),  # noqa: B008
        amp: str = 'off', progress_stream: TextIO | None = None) -> DenseScores:
    """Average precision of a detector, or mean IoU of a segmenter, shared by the processes that torchrun started.

    Args:
        checkpoint, entry: See `create_from_checkpoint`.
        data: A folder that `read_objects` reads, for a detector; `read_masks`, for a segmenter.
        split: Of the data.
        amp: Autocast of the forward pass: 'off', 'bf16' or 'fp16'.
    Raises:
        CheckpointError, DataError, EvaluationError: The file or the data cannot be used, or numbers are not finite.
    """
    with shared_errors():  # every process opens the same
        model, opened, names = _open(checkpoint, entry, data, split)
    try:
        processes = join_processes(device)
        stream = progress_stream if processes.is_primary else io.StringIO()
        with Progress(len(_share(len(opened.images), processes)), stream=stream) as progress:
            scores = score_model(model.to(device), opened, names, device, amp, processes, progress.update)
        return replace(scores, data=data)
    finally:
        leave_processes()


def score_model(
        model: nn.Module, data: CocoData | MaskData, names: Sequence[str], device: torch.device, amp: str,
        processes: Processes, advance: Advance) -> DenseScores:
    """The scores of a model in evaluation mode, whose work the processes share.

    Args:
        model: With its `dense_config`, on the device.
        data: Of `read_masks` for a segmenter, of `read_objects` for a detector, and `encode_masks` for Mask R-CNN.
        names: Of the classes.
        advance: Called after every image; what it raises ends the evaluation.
    Raises:
        DataError, EvaluationError: An image cannot be used, or outputs are not finite.
    """
    start, config = time.perf_counter(), model.dense_config
    share, run = _share(len(data.images), processes), _segment if isinstance(data, MaskData) else _detect
    found = processes.gather(processes.together(lambda: run(model, data, device, amp, share, advance)))
    box = mask = voc = pixel = None
    if isinstance(data, MaskData):
        pixel, classes = score_pixels(sum(found), names)
    else:
        results = [entry for part in found for entry in part]
        box, classes = average_precision(data, results, 'bbox')
        mask = average_precision(data, results, 'segm')[0] if config['task'] == 'mask_rcnn' else None
        voc = voc_average_precision(data, results) if data.layout == 'VOC' else None
    seconds, = processes.largest([time.perf_counter() - start])
    return DenseScores(
        config['task'], config['backbone'], '', len(data.images), data.notes, seconds, classes, box, mask, voc, pixel)


def _open(
        checkpoint: str | PathLike, entry: str | None, data: str, split: str,
) -> tuple[nn.Module, CocoData | MaskData, list[str]]:
    """The model, the data, and the names of the classes."""
    model, loaded = open_model(checkpoint, entry)
    config, known = model.dense_config, loaded.meta.get('class_names')
    if isinstance(model, SemanticFpn):
        settings = loaded.meta.get('config')
        reduce = settings.get('reduce_zero_label') if isinstance(settings, dict) else None
        opened = read_masks(data, split, config['num_classes'], reduce)
        opened = replace(opened, notes=[*opened.notes, *check_masks(opened)])
    else:
        opened = read_objects(data, split)
        if config['task'] == 'mask_rcnn':
            opened = encode_masks(opened)
    if opened.classes:
        _check_classes(opened.classes, known, config['num_classes'], data, loaded.path)
    names = opened.classes or known or [str(i) for i in range(config['num_classes'])]
    return model, opened, names


def describe_scores(scores: DenseScores) -> list[str]:
    """Lines for people."""
    def show(value: float | None) -> str:
        return '-' if value is None else f'{value:.2f}'

    lines = [f'{scores.task} with {scores.model} on {scores.images} images of {scores.data} '
             f'({scores.seconds:.1f} s)', *scores.notes]
    for name, values in (
            ('boxes', scores.box), ('masks', scores.mask), ('boxes, by VOC', scores.voc), ('pixels', scores.pixel)):
        if values is not None:
            lines.append(f'{name}: ' + ', '.join(f'{key} {show(value)}' for key, value in values.items()))
    lines += [f'  {show(value)}  {name}' for name, value in scores.classes.items()]
    return lines
