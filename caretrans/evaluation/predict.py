"""Prediction: the likeliest classes of single images."""
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data.readers.img_extensions import get_img_extensions

from ..data.datasets import build_eval_transform, describe_classes
from ..devices import autocast
from ..errors import DataError, EvaluationError
from .evaluate import CPU, load_for_evaluation
from .metrics import explain_non_finite, list_non_finite

__all__ = ['find_images', 'predict_images']


def find_images(paths: Iterable[str]) -> Iterator[Path]:
    """List the given files, and the images in the given folders at any depth, sorted.

    Raises:
        DataError: A path does not exist, or a folder has no images.
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
        pretrained: bool = False,
        **overrides: Any,
) -> Iterator[dict[str, Any]]:
    """The likeliest classes of each image.

    Args:
        images: Files and folders. Images are rotated upright according to their EXIF data.
        topk: The number of classes, capped at those of the model.
        pretrained, overrides: See `load_for_evaluation`.
    Yields:
        {'image': path, 'classes': names, 'labels': their numbers, 'probabilities': 0 to 1}, or for a file that
        cannot be read, or whose logits are not finite, {'image': path, 'error': reason}.
    Raises:
        CheckpointError, ConfigError, DataError: Before the first image.
        EvaluationError: The weights are not finite, so that no image has a prediction.
    """
    paths = list(find_images(images))
    model, loaded, eval_config = load_for_evaluation(
        checkpoint, model_name, entry, device, pretrained, **overrides)
    names = describe_classes(loaded.meta.get('class_names'), model.num_classes)
    transform = build_eval_transform(eval_config)
    for path in paths:
        try:
            with Image.open(path) as file:
                image = transform(ImageOps.exif_transpose(file).convert('RGB'))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            yield dict(image=str(path), error=f'cannot be read as an image ({type(error).__name__})')
            continue
        with torch.inference_mode(), autocast(device, amp):
            logits = model(image[None].to(device)).float()[0].cpu()
        if not logits.isfinite().all():
            if list_non_finite(model):
                raise EvaluationError(f'The logits of {path} are not finite: {explain_non_finite(model)}.')
            yield dict(image=str(path), error=f'the logits are not finite: {explain_non_finite(model, amp)}')
            continue
        probabilities = logits.softmax(dim=-1)
        best: list[int] = probabilities.topk(min(topk, len(names))).indices.tolist()
        yield dict(
            image=str(path), classes=[names[i] for i in best], labels=best,
            probabilities=[probabilities[i].item() for i in best])
