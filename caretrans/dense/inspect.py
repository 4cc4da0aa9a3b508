"""What is in a folder of data: images, objects, classes, and odd things with what will be done about each."""
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from ..data.decode import ORIENTATIONS, UNREADABLE, read_orientation
from ..data.folders import FolderReader
from ..errors import DataError, list_names
from .coco import CocoData, encode_masks
from .masks import IGNORE, MaskData, check_masks, has_masks, read_masks
from .objects import has_objects, read_objects, select_training

__all__ = ['describe_data']

SHOWN = 3  # names of each kind of odd thing
UNREAD = 'cannot be read; training takes the next image instead, evaluation stops'


def describe_data(root: str | Path, split: str) -> Iterator[str]:
    """Lines about a split: annotations in the format of COCO or Pascal VOC, images with masks, or class folders.

    Raises:
        DataError: It is none of these, or cannot be used; names the file.
    """
    root, found = Path(root), False
    if has_objects(root, split):
        found = True
        yield from _describe_objects(read_objects(root, split))
    if has_masks(root, split):
        found = True
        yield from _describe_masks(root, split)
    if not found and (root / split).is_dir():
        found = True
        yield from _describe_classes(root / split)
    if not found:
        raise DataError(f'{root} has no {split}: neither annotations in the format of COCO or Pascal VOC, nor images '
                        f'and masks, nor folders {split}/CLASS with images. Shards and tar files are not inspected; a '
                        f'folder of images without labels is for cmd/pretrain.sh.')


def _describe_objects(data: CocoData) -> Iterator[str]:
    yield from data.describe()
    try:
        yield from select_training(data).notes[len(data.notes):]
    except DataError as error:
        yield f'refused in training: {error}'
    if any('segmentation' in entry for image in data.images for entry in image.objects):
        try:
            encode_masks(data)
            yield f'{data.file}: every object has a mask'
        except DataError as error:
            yield f'refused by Mask R-CNN: {error}'
    kinds: dict[str, list[str]] = {}
    for image in data.images:
        kinds.setdefault(_judge_size(image.path, (image.width, image.height)), []).append(image.path.name)
    yield from (f'{data.file}: {len(names)} images {kind}: {list_names(names, SHOWN)}'
                for kind, names in kinds.items() if kind)


def _judge_size(path: Path, size: tuple[int, int]) -> str:
    """What is odd about the width and height of an image that are annotated as `size`, and what is done; '' if nothing.

    Only the head of the file is read.
    """
    try:
        with Image.open(path) as image:
            stored, orientation = image.size, read_orientation(image)
    except UNREADABLE:
        return UNREAD
    upright = stored[::-1] if ORIENTATIONS[orientation][0] else stored
    if orientation != 1 and size in (stored, upright):
        how = 'seen' if size == upright else 'stored'
        return f'have an EXIF orientation; their annotations fit them as they are {how}, so they are read like that'
    return '' if size == stored else 'have another size than their annotations; they are refused'


def _describe_masks(root: Path, split: str) -> Iterator[str]:
    """Sizes are checked and values counted in every mask."""
    raw = read_masks(root, split, num_classes=IGNORE, reduce_zero_label=False)
    try:
        data = read_masks(root, split)
    except DataError:  # the classes are not known
        data = None
    pixels, images = torch.zeros(IGNORE + 1, dtype=torch.int64), Counter()
    unreadable, refused = [], []
    for i in range(len(raw)):
        try:
            counts = torch.bincount(raw.read(i)[1].flatten(), minlength=IGNORE + 1)
        except UNREADABLE:
            unreadable.append(raw.images[i].name)
        except DataError as error:
            refused.append(str(error))
        else:
            pixels += counts
            images.update(counts.nonzero()[:, 0].tolist())
    folder = raw.masks[0].parent
    yield f'{folder}: {len(raw)} images with masks, {len(images)} values'
    for value, count in sorted(images.items()):
        share = 100 * pixels[value].item() / pixels.sum().item()
        yield f'  {value} ({_name_value(value, data)}): {share:.2f} % of the pixels, in {count} images'
    yield from raw.notes if data is None else data.notes
    if unreadable:
        yield f'{folder}: {len(unreadable)} images or their masks {UNREAD}: {list_names(unreadable, SHOWN)}'
    if refused:
        yield f'{len(refused)} masks are refused, the first: {refused[0]}'
    else:
        try:
            yield from check_masks(raw if data is None else data)
        except DataError as error:
            yield f'refused: {error}'


def _name_value(value: int, data: MaskData | None) -> str:
    """What a value in the masks stands for."""
    if value == IGNORE:
        return 'ignored'
    if data is None:
        return 'a class'
    label = value - data.reduce_zero_label
    if label < 0:
        return 'no class, ignored'
    return data.classes[label] if label < data.num_classes else 'no class, refused'


def _describe_classes(folder: Path) -> Iterator[str]:
    data = FolderReader(folder)
    counts = Counter(label for _, label in data.samples)
    yield f'{folder}: {len(data)} images, {len(data.class_to_idx)} classes'
    yield from (f'  {name}: {counts[label]} images' for name, label in data.class_to_idx.items())
    yield from data.notes
