"""Objects in images, from JSON in the format of COCO (https://cocodataset.org/#format-data)."""
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import pil_to_tensor

from ..data.decode import UNREADABLE, describe_error, open_image
from ..errors import DataError, list_names, require
from ..text import read_text

__all__ = ['CocoData', 'CocoImage', 'add_objects', 'encode_masks', 'has_coco', 'read_coco']

LAYOUTS = (  # (annotations, images) of a split, below the folder
    ('{split}.json', '{split}'),
    ('annotations/instances_{split}2017.json', '{split}2017'),
    ('annotations/instances_{split}.json', '{split}'),
    ('{split}/_annotations.coco.json', '{split}'))
SYNONYMS = {'val': ('val', 'valid', 'validation')}  # names of a split
MOST_COORDINATE = 1e5  # of a polygon, in pixels; the library would run for ever on 1e30


@dataclass(frozen=True)
class CocoImage:
    """An image and its objects.

    Attributes:
        id: In the file.
        path: Of the image.
        height, width: In pixels, as the file states them.
        objects: Annotations with the keys of COCO; `id` and `category_id` as in the file, `bbox`, `area` and `iscrowd`
            always there, `segmentation` where the file has one. Crowds and difficult objects have `iscrowd` 1.
    """
    id: int
    path: Path
    height: int
    width: int
    objects: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> torch.Tensor:
        """The pixels (3, H, W) uint8, of the size that the file states: stored or rotated upright by the EXIF data.

        Raises:
            OSError, SyntaxError, EOFError, Image.DecompressionBombError: It cannot be read.
            DataError: It has another size.
        """
        data = self.path.read_bytes()
        for orientation in ('exif', 'ignore'):
            image = open_image(data, orientation)
            if image.size == (self.width, self.height):
                return pil_to_tensor(image)
        raise DataError(f'{self.path} has {image.height} x {image.width} pixels, its annotations are for {self.height} '
                        f'x {self.width}: annotate the image as it is.')

    def load(self) -> torch.Tensor:
        """The same where every image is needed.

        Raises:
            DataError: It cannot be read, or has another size.
        """
        try:
            return self.read()
        except UNREADABLE as error:
            raise DataError(f'{self.path} cannot be read as an image ({describe_error(error)}): remove it.') from None


@dataclass(frozen=True)
class CocoData:
    """A split of a data set.

    Attributes:
        file: Of the annotations.
        images: In the order of the file.
        categories: {id in the file: name}, by id. Labels count them from 0 in this order.
        notes: One line for each kind of odd thing that was found, and what was done about it.
        layout: 'COCO' or 'VOC'.
    """
    file: Path
    images: list[CocoImage]
    categories: dict[int, str]
    notes: list[str]
    layout: str = 'COCO'

    @property
    def classes(self) -> list[str]:
        return list(self.categories.values())

    @property
    def crowd_name(self) -> str:
        """What objects with `iscrowd` are called in messages."""
        return 'difficult objects' if self.layout == 'VOC' else 'crowds'

    def to_coco(self) -> dict[str, Any]:
        """The data as they are used, in COCO's format."""
        return dict(
            images=[dict(id=image.id, height=image.height, width=image.width) for image in self.images],
            categories=[dict(id=number, name=name) for number, name in self.categories.items()],
            annotations=[dict(entry, id=i, image_id=image.id) for i, (image, entry) in enumerate(
                ((image, entry) for image in self.images for entry in image.objects), start=1)])

    def describe(self) -> list[str]:
        """Lines on what is there: images, objects, classes and odd things."""
        counts = Counter(entry['category_id'] for image in self.images for entry in image.objects)
        empty = sum(not image.objects for image in self.images)
        return [
            f'{self.file}: {len(self.images)} images ({empty} without objects), {sum(counts.values())} objects, '
            f'{len(self.categories)} classes',
            *(f'  {name}: {counts[number]} objects' for number, name in self.categories.items()), *self.notes]


def _list_places(root: str | Path, split: str) -> list[tuple[Path, Path]]:
    """Annotations and folders of images that a split may have."""
    return [(Path(root) / file.format(split=name), Path(root) / folder.format(split=name))
            for name in SYNONYMS.get(split, (split,)) for file, folder in LAYOUTS]


def has_coco(root: str | Path, split: str) -> bool:
    """Whether a folder has a file of annotations where `read_coco` looks for it."""
    return any(file.is_file() for file, _ in _list_places(root, split))


def read_coco(root: str | Path, split: str) -> CocoData:
    """Read a split of a folder with `train.json` and `train/`, COCO's own layout, or that of Roboflow.

    Boxes without width or height are dropped, boxes are clipped to their image, and annotations of unknown images are
    skipped, each with a note. Regions of crowds are kept, marked `iscrowd`; images without objects are kept.

    Raises:
        DataError: There is no such file, or it lacks what cannot be done without; names the file and the key.
    """
    require('faster_coco_eval')
    file, folder = next((place for place in _list_places(root, split) if place[0].is_file()), (None, None))
    if file is None:
        expected = list_names([place[0] for place in _list_places(root, split)][:len(LAYOUTS)])
        raise DataError(f'{root} has no annotations of {split}: expected {expected}.')
    try:
        content = json.loads(read_text(file, DataError))
    except json.JSONDecodeError as error:
        raise DataError(f'{file} is not JSON: {error}.') from None
    images, categories = _read_images(file, folder, content), _read_categories(file, content)
    notes = add_objects(file, _take(file, content, 'annotations'), images, categories)
    missing = [image.path.name for image in images.values() if not image.path.is_file()]
    if missing:
        raise DataError(f'{folder} lacks {len(missing)} images of {file}: {list_names(missing, 3)}.')
    return CocoData(file, list(images.values()), categories, notes)


def _take(file: Path, content: Any, key: str) -> list[Mapping[str, Any]]:
    """The list under a key of the file."""
    entries = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise DataError(f'{file} has no list {key!r}: it is not in the format of COCO.')
    return entries


def _whole(file: Path, what: str, value: Any, least: float = -math.inf) -> int:
    """A whole number of the file.

    Raises:
        DataError: It is something else, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0 or value < least:
        raise DataError(f'{file}: {what} is {value!r}: it must be a whole number'
                        f'{"" if least == -math.inf else f" of at least {least}"}.')
    return int(value)


def _read_images(file: Path, folder: Path, content: Any) -> dict[int, CocoImage]:
    images: dict[int, CocoImage] = {}
    for i, entry in enumerate(_take(file, content, 'images')):
        missing = [key for key in ('id', 'file_name', 'height', 'width') if entry.get(key) is None]
        if missing:
            raise DataError(
                f'{file}: image {i} lacks {list_names(map(repr, missing))}: it needs id, file_name, height and width.')
        if not isinstance(entry['file_name'], str):
            raise DataError(f'{file}: file_name of image {i} is {entry["file_name"]!r}: it must be a text.')
        image = CocoImage(
            _whole(file, f'id of image {i}', entry['id']), folder / entry['file_name'],
            *(_whole(file, f'{key} of image {i}', entry[key], 1) for key in ('height', 'width')))
        if image.id in images:
            raise DataError(f'{file}: two images have the id {image.id}.')
        images[image.id] = image
    if not images:
        raise DataError(f'{file} has no images.')
    return images


def _read_categories(file: Path, content: Any) -> dict[int, str]:
    entries = _take(file, content, 'categories')
    try:
        found = {_whole(file, 'id of a category', entry['id']): str(entry['name']) for entry in entries}
    except KeyError as error:
        raise DataError(f'{file}: a category lacks {error}: it needs id and name.') from None
    if not found or len(found) < len(entries) or len(set(found.values())) < len(entries):
        raise DataError(f'{file}: categories are missing, or ids or names are repeated: {list_names(found.values())}.')
    return dict(sorted(found.items()))


def _read_area(file: Path, name: Any, area: Any) -> float:
    if area is not None and (isinstance(area, bool) or not isinstance(area, (int, float))):
        raise DataError(f'{file}: area of annotation {name} is {area!r}: it must be a number, or missing.')
    return float(area or 0)


def add_objects(
        file: Path, annotations: Iterable[Mapping[str, Any]], images: dict[int, CocoImage], categories: dict[int, str],
) -> list[str]:
    """Add annotations in the format of COCO to their images; returns notes about what was dropped or changed."""
    dropped: dict[str, list[Any]] = {}
    for i, entry in enumerate(annotations):
        name = entry.get('id', i)
        image = images.get(_whole(file, f'image_id of annotation {name}', entry.get('image_id')))
        if image is None:
            dropped.setdefault('annotations of unknown images were skipped', []).append(name)
            continue
        if _whole(file, f'category_id of annotation {name}', entry.get('category_id')) not in categories:
            raise DataError(f'{file}: annotation {name} has the category {entry.get("category_id")!r}, which is not '
                            f'among the categories: add it, or remove the annotation.')
        try:
            x, y, width, height = map(float, entry['bbox'])
            if isinstance(entry['bbox'], str):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise DataError(f'{file}: annotation {name} has no bbox [x, y, width, height].') from None
        left, top, right, bottom = max(x, 0.), max(y, 0.), min(x + width, image.width), min(y + height, image.height)
        if not (right > left and bottom > top):  # also for NaN
            dropped.setdefault('boxes without width or height in the image were dropped', []).append(name)
            continue
        if (left, top, right, bottom) != (x, y, x + width, y + height):
            dropped.setdefault('boxes were clipped to their image', []).append(name)
        shape = entry.get('segmentation')
        if isinstance(shape, list):
            long = [polygon for polygon in shape if not isinstance(polygon, list) or len(polygon) >= 6]
            if len(long) < len(shape):
                dropped.setdefault('polygons of fewer than 3 points were dropped', []).append(name)
            shape = long
        image.objects.append(dict(
            id=name, category_id=entry['category_id'], bbox=[left, top, right - left, bottom - top],
            area=_read_area(file, name, entry.get('area')) or (right - left) * (bottom - top),
            iscrowd=_whole(file, f'iscrowd of annotation {name}', entry.get('iscrowd') or 0, 0),
            **dict(segmentation=shape) if shape else {}))
    return [f'{file}: {len(names)} {what}: annotations {list_names(names, 3)}' for what, names in dropped.items()]


def encode_masks(data: CocoData) -> CocoData:
    """The data with the segmentation of every object, polygons or RLE, as a compressed RLE of the size of its image.

    Raises:
        DataError: An object has none, or one that is no mask of its image; names the file and the annotation.
    """
    bare = [entry['id'] for image in data.images for entry in image.objects if 'segmentation' not in entry]
    if bare:
        raise DataError(f'{data.file}: {len(bare)} objects have no segmentation, which masks need: annotations '
                        f'{list_names(bare, 3)}; add it, or take a detector of boxes.')
    return replace(data, images=[replace(image, objects=[
        dict(entry, segmentation=_encode_mask(data.file, image, entry)) for entry in image.objects])
        for image in data.images])


def _encode_mask(file: Path, image: CocoImage, entry: dict[str, Any]) -> dict[str, Any]:
    from faster_coco_eval.core import mask

    try:
        shape = entry['segmentation']
        if isinstance(shape, list):
            if any(len(polygon) % 2 for polygon in shape):
                raise ValueError('a polygon lacks a coordinate')
            if not all(abs(value) < MOST_COORDINATE for polygon in shape for value in polygon):
                raise ValueError('a coordinate is no number, or too large')
        encoded = mask.segmToRle(shape, image.width, image.height)
        if list(encoded['size']) != [image.height, image.width]:
            raise ValueError(f'it is for {encoded["size"]}, the image is {image.height} x {image.width}')
        if not isinstance(shape, list):
            mask.decode(encoded)  # damaged RLE raises an error
        return encoded
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        problem = str(error).partition('(#')[0].partition('\n')[0].strip().rstrip('.')
        raise DataError(f'{file}: annotation {entry["id"]} has a segmentation that is no mask of its image '
                        f'({problem}): correct it.') from None
