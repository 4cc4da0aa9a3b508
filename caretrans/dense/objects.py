"""Data of detectors: which reader a folder needs, and which objects a detector is trained on."""
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ..errors import DataError, list_names
from .coco import CocoData, has_coco, read_coco
from .voc import has_voc, read_voc

__all__ = ['has_objects', 'read_objects', 'select_training']


def has_objects(root: str | Path, split: str) -> bool:
    """Whether a folder has a split with annotations in the format of COCO or Pascal VOC."""
    return has_coco(root, split) or has_voc(root, split)


def read_objects(root: str | Path, split: str) -> CocoData:
    """Read a split in the format of COCO or Pascal VOC; COCO's comes first where both are there.

    Raises:
        DataError: There is neither, or it cannot be used; names the file.
    """
    if has_coco(root, split):
        return read_coco(root, split)
    if has_voc(root, split):
        return read_voc(root, split)
    raise DataError(
        f'{root} has no annotations of {split}: expected {split}.json and {split}/ or another layout of COCO, or '
        f'ImageSets/Main/{split}.txt, Annotations/ and JPEGImages/ or XML files in {split}/ as in Pascal VOC.')


def select_training(data: CocoData) -> CocoData:
    """The data to train a detector on, with notes about what is excluded and what is odd.

    Crowds (in VOC, difficult objects) are excluded. An image that has nothing else is excluded too: it would be trained
    on as if it were empty. Images without objects stay, as negatives.

    Raises:
        DataError: No object is left.
    """
    kept, crowded = [], []
    for image in data.images:
        objects = [entry for entry in image.objects if not entry['iscrowd']]
        if image.objects and not objects:
            crowded.append(image.path.name)
        else:
            kept.append(replace(image, objects=objects))
    counts = Counter(entry['category_id'] for image in kept for entry in image.objects)
    if not counts:
        raise DataError(f'{data.file} has no objects to train on.')
    total = sum(counts.values())
    crowds = sum(len(image.objects) for image in data.images) - total
    empty = [name for number, name in data.categories.items() if not counts[number]]
    negatives = sum(not image.objects for image in kept)
    small = sum(min(entry['bbox'][2:]) < 1 for image in kept for entry in image.objects)
    notes = {
        f'{crowds} {data.crowd_name} are not trained on': crowds,
        f'{len(crowded)} images have nothing but {data.crowd_name} and are not trained on: {list_names(crowded, 3)}':
            crowded,
        f'{negatives} images without objects are trained on as negatives': negatives,
        f'classes without objects, which are not learnt: {list_names(empty)}': empty,
        f'all objects have one class, {data.categories[next(iter(counts))]}': len(counts) == 1 < len(data.categories),
        f'{small} objects are narrower or lower than a pixel; they are dropped in training where resizing does not '
        f'enlarge them': small}
    return replace(data, images=kept, notes=[*data.notes, *(
        f'{data.file}: {note}' for note, holds in notes.items() if holds)])
