"""Prediction: the likeliest classes of single images."""
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
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

__all__ = ['Prediction', 'find_images', 'predict_images']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, the likeliest first, or the reason why it has none.

    Attributes:
        image: The file.
        classes, labels, probabilities: Names of the classes, their numbers, and values from 0 to 1.
        error: '' if there are classes.
    """
    image: str
    classes: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    error: str = ''

    def to_dict(self) -> dict[str, Any]:
        """The prediction for JSON: without `error`, or with nothing else."""
        values = asdict(self)
        error = values.pop('error')
        return dict(image=self.image, error=error) if error else values


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
) -> Iterator[Prediction]:
    """The likeliest classes of each image.

    Args:
        images: Files and folders.
        topk: The number of classes, capped at those of the model.
        pretrained, overrides: See `load_for_evaluation`.
    Yields:
        For each image; one that cannot be read, or whose logits are not finite, has an error.
    Raises:
        CheckpointError, ConfigError, DataError: Before the first image.
        EvaluationError: The weights are not finite, so that no image has a prediction.
    """
    paths = list(find_images(images))
    model, loaded, preparation = load_for_evaluation(
        checkpoint, model_name, entry, device, pretrained, **overrides)
    names = describe_classes(loaded.get_class_names(model.num_classes), model.num_classes)
    transform = EvalTransform(preparation)
    for path in paths:
        try:
            image = transform(Path(path).read_bytes())
        except Exception as error:  # one damaged file must not cost the answers for the others
            yield Prediction(path, error=f'cannot be read as an image ({describe_error(error)})')
            continue
        with torch.inference_mode(), autocast(device, amp):
            logits = model(image[None].to(device)).float()[0].cpu()
        if not logits.isfinite().all():
            if list_non_finite(model):
                raise EvaluationError(f'The logits of {path} are not finite: {explain_non_finite(model)}.')
            yield Prediction(path, error=f'the logits are not finite: {explain_non_finite(model, amp)}')
            continue
        probabilities = logits.softmax(dim=-1)
        best: list[int] = probabilities.topk(min(topk, len(names))).indices.tolist()
        yield Prediction(path, [names[i] for i in best], best, [probabilities[i].item() for i in best])
