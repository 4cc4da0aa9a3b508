"""Average precision as Pascal VOC defines it, for data in its format."""
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from .coco import CocoData

__all__ = ['voc_average_precision']

MIN_IOU = .5

Objects = dict[tuple[int, int], list[dict[str, Any]]]  # by category and image


def voc_average_precision(data: CocoData, results: list[dict[str, Any]]) -> dict[str, float | None]:
    """The mean over classes of VOC's average precision at an IoU of 0.5, in percent.

    A detection is right if the object of its class that it overlaps most is not detected yet; it does not count if that
    object is difficult. Sides of boxes are measured from the first to the last pixel, both included, as in VOC's
    evaluation and in mmdet.

    Args:
        results: Detections as COCO defines them: image_id, category_id, bbox, score.
    Returns:
        `AP50`, the area under the precision made monotonic (VOC 2010 and later), and `AP50_11`, its mean at 11 recalls
        (VOC 2007). None without objects.
    Source: Everingham et al., IJCV 88, 2010, section 4.2, and VOC's development kits.
    """
    truth, found, counts = defaultdict(list), defaultdict(list), Counter()
    for image in data.images:
        for entry in image.objects:
            truth[entry['category_id'], image.id].append(entry)
            counts[entry['category_id']] += not entry['iscrowd']
    for entry in results:
        found[entry['category_id']].append(entry)
    curves = [_precision_curve(found[number], truth, count) for number, count in counts.items() if count]
    if not curves:
        return dict(AP50=None, AP50_11=None)
    return dict(AP50=100 * float(np.mean([_area(*curve) for curve in curves])),
                AP50_11=100 * float(np.mean([_eleven_points(*curve) for curve in curves])))


def _precision_curve(found: list[dict[str, Any]], truth: Objects, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each detection of a class that counts, best score first."""
    hits, used = [], set()
    for entry in sorted(found, key=lambda entry: -entry['score']):
        objects = truth.get((entry['category_id'], entry['image_id']), ())
        best, iou = _find_best(entry['bbox'], objects)
        if iou < MIN_IOU:
            hits.append(0)
        elif not objects[best]['iscrowd']:
            place = entry['image_id'], best
            hits.append(int(place not in used))
            used.add(place)
    right = np.cumsum(hits)
    return right / count, right / np.arange(1, len(hits) + 1)


def _find_best(box: list[float], objects: list[dict[str, Any]]) -> tuple[int, float]:
    """The object that a box overlaps most, and their IoU."""
    if not objects:
        return -1, 0.
    first, others = np.array(box, float), np.array([entry['bbox'] for entry in objects], float)
    ends, other_ends = first[:2] + first[2:] + 1, others[:, :2] + others[:, 2:] + 1
    sides = (np.minimum(ends, other_ends) - np.maximum(first[:2], others[:, :2])).clip(0)
    shared = sides.prod(1)
    iou = shared / ((first[2:] + 1).prod() + (others[:, 2:] + 1).prod(1) - shared)
    return int(iou.argmax()), float(iou.max())


def _area(recall: np.ndarray, precision: np.ndarray) -> float:
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.) * envelope).sum())


def _eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    points = np.arange(11) / 10
    return float(np.mean([precision[recall >= point].max(initial=0.) for point in points]))
