"""Prediction: the likeliest classes of single images."""
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..data.datasets import describe_classes
from ..data.decode import EvalTransform, describe_error
from ..data.folders import list_images
from ..devices import autocast
from ..errors import DataError, EvaluationError
from .evaluate import CPU, load_for_evaluation
from .metrics import explain_non_finite, list_non_finite

__all__ = ['find_images', 'predict_images']

_logger = logging.getLogger(__name__)


def find_images(paths: Iterable[str]) -> Iterator[str]:
    """List the given files, and the images in the given folders at any depth, in order.

    Raises:
        DataError: A path does not exist, or a folder has no images.
    """
    for name in paths:
        path = Path(name)
        if name and path.is_dir():
            found = list_images(path)
            if not found.images:
                raise DataError(f'No images in {path}. {found.describe_skipped()}'.strip())
            if found.skipped:
                _logger.warning(found.describe_skipped())
            yield from found.images
        elif name and path.exists():
            yield str(path)
        else:
            raise DataError(f'No image or folder {str(name)!r}: check the path.')


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
        images: Files and folders.
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
    model, loaded, preparation = load_for_evaluation(
        checkpoint, model_name, entry, device, pretrained, **overrides)
    names = describe_classes(loaded.meta.get('class_names'), model.num_classes)
    transform = EvalTransform(preparation)
    for path in paths:
        try:
            image = transform(Path(path).read_bytes())
        except Exception as error:  # one damaged file must not cost the answers for the others
            yield dict(image=path, error=f'cannot be read as an image ({describe_error(error)})')
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
            image=path, classes=[names[i] for i in best], labels=best,
            probabilities=[probabilities[i].item() for i in best])
