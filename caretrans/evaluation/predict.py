"""Prediction: the likeliest classes of single images."""
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data.readers.img_extensions import get_img_extensions

from ..data.datasets import build_eval_transform, describe_classes
from ..devices import autocast
from ..errors import DataError
from .evaluate import CPU, load_for_evaluation

__all__ = ['find_images', 'predict_images']


def find_images(paths: Iterable[str]) -> Iterator[Path]:
    """The files named, and the images in the folders named, at any depth and in order.

    Raises:
        DataError: A path is not there, or a folder has no images.
    """
    endings = get_img_extensions(as_set=True)
    for path in map(Path, paths):
        if path.is_file():
            yield path
        elif path.is_dir():
            found = sorted(p for p in path.rglob('*') if p.suffix.lower() in endings)
            if not found:
                raise DataError(f'No images in {path}: {", ".join(sorted(endings))} are looked for.')
            yield from found
        else:
            raise DataError(f'No image or folder {path}: check the path.')


def predict_images(
        checkpoint: str,
        images: Iterable[str],
        topk: int = 5,
        model_name: str | None = None,
        entry: str | None = None,
        device: torch.device = CPU,
        amp: str = 'off',
        **overrides: Any,
) -> Iterator[dict[str, Any]]:
    """The likeliest classes of each image.

    Args:
        images: Files and folders. An image is turned upright as its EXIF data say.
        topk: How many classes, at most as many as there are.
        overrides: See `load_for_evaluation`.
    Yields:
        {'image': path, 'classes': names, 'labels': their numbers, 'probabilities': 0 to 1}, or for a file that is no
        image {'image': path, 'error': why}.
    Raises:
        CheckpointError, DataError: Before the first image.
    """
    paths = list(find_images(images))
    model, loaded, eval_config = load_for_evaluation(checkpoint, model_name, entry, device, **overrides)
    names = describe_classes(loaded.meta.get('class_names'), model.num_classes)
    transform = build_eval_transform(eval_config)
    for path in paths:
        try:
            with Image.open(path) as file:
                image = transform(ImageOps.exif_transpose(file).convert('RGB'))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            yield dict(image=str(path), error=f'is no image that can be read ({type(error).__name__})')
            continue
        with torch.inference_mode(), autocast(device, amp):
            probabilities = model(image[None].to(device)).float().softmax(dim=-1)[0].cpu()
        best: list[int] = probabilities.topk(min(topk, len(names))).indices.tolist()
        yield dict(
            image=str(path), classes=[names[i] for i in best], labels=best,
            probabilities=[probabilities[i].item() for i in best])
