"""Objects in images, from XML in the format of Pascal VOC (http://host.robots.ox.ac.uk/pascal/VOC)."""
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.decode import ORIENTATIONS, UNREADABLE, describe_error, read_orientation
from ..data.folders import list_images
from ..errors import DataError, list_names
from ..text import read_text
from .coco import CocoData, CocoImage, add_objects

__all__ = ['VOC_CLASSES', 'has_voc', 'read_voc']

VOC_CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')


@dataclass(frozen=True)
class Place:
    """A split in a folder: a list of names with VOC's folders beside it, or images and XML files side by side.

    Attributes:
        source: The list, or the folder.
        annotations, images: Folders.
    """
    source: Path
    annotations: Path
    images: Path

    def list_annotations(self) -> list[Path]:
        if self.source.is_dir():
            return _list_xml(self.source)
        names = [line.strip() for line in read_text(self.source, DataError).splitlines() if line.strip()]
        return [self.annotations / f'{name}.xml' for name in names]


def _list_xml(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob('*.xml') if not file.name.startswith('.'))


def _find_places(root: str | Path, split: str) -> list[Place]:
    """Where a split is: several places for VOC2007 and VOC2012 side by side, of which only 2007 has a public test."""
    for base in (Path(root), Path(root) / 'VOCdevkit'):
        for folders in ([base], sorted(base.glob('VOC20[0-9][0-9]'))):
            lists = [folder / 'ImageSets' / 'Main' / f'{split}.txt' for folder in folders]
            places = [Place(file, file.parents[2] / 'Annotations', file.parents[2] / 'JPEGImages')
                      for file in lists if file.is_file()]
            if split == 'test':
                places = [place for place in places if place.annotations.parent.name == 'VOC2007'] or places
            if places:
                return places
    folder = Path(root) / split
    return [Place(folder, folder, folder)] if _list_xml(folder) else []


def has_voc(root: str | Path, split: str) -> bool:
    """Whether a folder has a split where `read_voc` looks for it."""
    return bool(_find_places(root, split))


def read_voc(root: str | Path, split: str) -> CocoData:
    """Read a split of a folder with VOC's `Annotations/`, `JPEGImages/` and `ImageSets/Main/SPLIT.txt`.

    The folder may hold `VOC2007/` and `VOC2012/`, whose splits are merged, or `VOCdevkit/` with these; or `SPLIT/` with
    images and XML files side by side. Classes are those of `classes.txt`, a line each, else VOC's 20 where a list of
    names has no others, else all names in the folder, sorted. Boxes count pixels from 1: as in mmdet, 1 is subtracted
    from all four numbers. Difficult objects are marked as crowds; boxes are dropped and clipped as by `read_coco`.

    Raises:
        DataError: There is no such split, or a file cannot be used; names it.
    """
    places = _find_places(root, split)
    if not places:
        raise DataError(f'{root} has no {split} in the format of Pascal VOC: expected ImageSets/Main/{split}.txt with '
                        f'Annotations and JPEGImages, or {split} with images and XML files.')
    source = places[0].source if len(places) == 1 else Path(root)
    pairs, notes = [], []
    for place in places:
        pairs += _pair_images(place, notes)
    parsed = [(xml, path, _parse(xml)) for xml, path in pairs]
    names = {name for xml, _, tree in parsed for name in _list_names(xml, tree)}
    categories = dict(enumerate(_order_classes(Path(root), places, names), start=1))
    images = {i: CocoImage(i, path, *_find_size(xml, path, tree))
              for i, (xml, path, tree) in enumerate(parsed, start=1)}
    numbers = {name: number for number, name in categories.items()}
    notes += add_objects(source, (
        entry for i, (xml, _, tree) in enumerate(parsed, start=1) for entry in _list_objects(xml, tree, i, numbers)),
        images, categories)
    return CocoData(source, list(images.values()), categories, notes, layout='VOC')


def _pair_images(place: Place, notes: list[str]) -> list[tuple[Path, Path]]:
    """The XML files of a place and their images."""
    found = {Path(path).with_suffix(''): Path(path) for path in list_images(place.images).images}
    files = place.list_annotations()
    keys = [place.images / file.relative_to(place.annotations).with_suffix('') for file in files]
    for what, missing in (
            ('annotations', [file.name for file in files if not file.is_file()]),
            ('images', [key.name for key in keys if key not in found])):
        if missing:
            raise DataError(
                f'{place.source} lacks the {what} of {len(missing)} of its images: {list_names(missing, 3)}.')
    if not files:
        raise DataError(f'{place.source} lists no images.')
    bare = sorted(path.name for key, path in found.items() if key not in set(keys)) if place.source.is_dir() else []
    if bare:
        notes.append(f'{place.source}: {len(bare)} images have no XML file and are skipped: {list_names(bare, 3)}')
    return [(file, found[key]) for file, key in zip(files, keys, strict=True)]


def _parse(file: Path) -> ET.Element:
    try:
        tree = ET.parse(file).getroot()
    except (OSError, ET.ParseError, LookupError, ValueError) as error:
        raise DataError(f'{file} is not XML ({describe_error(error)}): correct it.') from None
    if tree.tag != 'annotation':
        raise DataError(f'{file} is an XML file of <{tree.tag}>, not of <annotation>: it is not in the format of VOC.')
    return tree


def _find_size(file: Path, path: Path, tree: ET.Element) -> tuple[int, int]:
    """Height and width as the file states them, else those of the image, upright."""
    try:
        height, width = (int(float(tree.findtext(f'size/{side}', '0'))) for side in ('height', 'width'))
        if height > 0 and width > 0:
            return height, width
        with Image.open(path) as image:
            turned = ORIENTATIONS[read_orientation(image)][0]
            return image.size if turned else image.size[::-1]
    except ValueError:
        raise DataError(f'{file} has a <size> that is no number: correct it.') from None
    except UNREADABLE as error:
        raise DataError(f'{file} has no <size>, and {path} cannot be read ({describe_error(error)}).') from None


def _list_names(file: Path, tree: ET.Element) -> list[str]:
    """The class of each object."""
    names = [entry.findtext('name', '').strip() for entry in tree.findall('object')]
    if not all(names):
        raise DataError(f'{file}: object {names.index("") + 1} has no <name>: add it.')
    return names


def _list_objects(file: Path, tree: ET.Element, image: int, numbers: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The objects of an image as annotations of COCO."""
    for i, (name, entry) in enumerate(zip(_list_names(file, tree), tree.findall('object'), strict=True), start=1):
        try:
            left, top, right, bottom = (
                int(float(entry.findtext(f'bndbox/{side}', ''))) - 1 for side in ('xmin', 'ymin', 'xmax', 'ymax'))
        except (ValueError, OverflowError):
            raise DataError(f'{file}: object {i} has no <bndbox> with four numbers xmin, ymin, xmax, ymax: correct '
                            f'it.') from None
        yield dict(id=f'{file.stem}:{i}', image_id=image, category_id=numbers[name],
                   bbox=[left, top, right - left, bottom - top],
                   iscrowd=int(entry.findtext('difficult', '0').strip() == '1'))


def _order_classes(root: Path, places: list[Place], names: set[str]) -> list[str]:
    file = root / 'classes.txt'
    if file.is_file():
        classes = [line.strip() for line in read_text(file, DataError).splitlines() if line.strip()]
        unknown = sorted(names - set(classes))
        if unknown or len(set(classes)) < len(classes):
            raise DataError(f'{file} lacks the classes {list_names(unknown)} of the objects: add them.' if unknown else
                            f'{file} has a class twice: remove one.')
        return classes
    if names <= set(VOC_CLASSES) and not places[0].source.is_dir():
        return list(VOC_CLASSES)
    folders = {folder for place in places for folder in (
        place.source.parent.iterdir() if place.source.is_dir() else [place.annotations])}
    for other in sorted(file for folder in folders for file in _list_xml(folder)):  # other splits: one order for all
        names.update(_list_names(other, _parse(other)))
    if not names:
        raise DataError(f'{places[0].source} has no objects: list the classes in {file}, one a line.')
    return sorted(names)
