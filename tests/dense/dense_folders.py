"""Small folders of data in the layouts that detectors and segmenters read."""
import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_coco(root: Path, **changes) -> Path:
    """Four images of two categories with ids that are not contiguous; the last image has no objects."""
    (root / 'val').mkdir(parents=True)
    rng = np.random.RandomState(0)
    for i in range(4):
        Image.fromarray(rng.randint(0, 255, (64, 80, 3), np.uint8)).save(root / 'val' / f'{i}.png')
    boxes = [(0, 3, [10, 10, 30, 40]), (0, 90, [0, 0, 20, 20]), (1, 90, [40, 20, 30, 30]), (2, 3, [5, 5, 60, 50])]
    content = dict(
        images=[dict(id=10 + i, file_name=f'{i}.png', height=64, width=80) for i in range(4)],
        categories=[dict(id=90, name='pear'), dict(id=3, name='apple')],
        annotations=[dict(id=i, image_id=10 + image, category_id=category, bbox=box, segmentation=[
            [box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3], box[0], box[1] + box[3]]])
            for i, (image, category, box) in enumerate(boxes)])
    content.update(changes)
    (root / 'val.json').write_text(json.dumps(content), encoding='utf-8')
    return root


def annotation(**changes) -> dict:
    return dict(dict(id=7, image_id=10, category_id=3, bbox=[10, 10, 30, 40]), **changes)


def write_masks(root: Path, images='val', masks='val_masks') -> Path:
    for folder in (root / images, root / masks):
        folder.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for i in range(3):
        Image.fromarray(rng.randint(0, 255, (48, 40, 3), np.uint8)).save(root / images / f'{i}.jpg')
        mask = Image.fromarray(rng.choice([0, 1, 255], (48, 40)).astype(np.uint8), 'L')
        palette = mask.convert('P')
        palette.putdata(list(mask.getdata()))
        palette.putpalette([7, 8, 9] * 256)
        palette.save(root / masks / f'{i}.png')
    return root


def write_xml(file: Path, *objects: tuple, size: tuple = (80, 64), head: str = '') -> None:
    """Objects are (name, xmin, ymin, xmax, ymax, difficult); size is width and height, or None for no `<size>`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sides = f'<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>' if size else ''
    entries = ''.join(
        f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>'
        f'<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>'
        for name, left, top, right, bottom, difficult in objects)
    file.write_text(f'{head}<annotation>{sides}{entries}</annotation>', encoding='utf-8')


def write_voc(root: Path, images: dict, split: str = 'train') -> Path:
    """Pascal VOC's own layout; images are {name: objects of `write_xml`}."""
    for name, objects in images.items():
        write_xml(root / 'Annotations' / f'{name}.xml', *objects)
        (root / 'JPEGImages').mkdir(exist_ok=True)
        Image.new('RGB', (80, 64), 'red').save(root / 'JPEGImages' / f'{name}.jpg')
    lists = root / 'ImageSets' / 'Main'
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f'{split}.txt').write_text('\n'.join(images) + '\n', encoding='utf-8')
    return root
