"""ImageNet-ReaL: several or no labels for each validation image of ImageNet, packed with timm.

Source: Beyer et al. 2020, Are we done with ImageNet?, arXiv:2006.07159.
"""
import json
import os
from collections.abc import Sequence
import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch.utils.data import Dataset

from ..data.datasets import list_classes, name_image
from ..distributed import Processes
from ..errors import DataError
from .metrics import Accuracy

__all__ = ['RealLabels']

CHUNK = 256  # images at a time, so that their scores take little memory


class RealLabels:
    """The real labels of a data set, checked on construction.

    Args:
        dataset: ImageNet's validation images under their names, one class folder each.
        num_classes: Of the model.
        file: Labels in the layout of the authors' real.json, a list for each image; those packed with timm if ''.
    Raises:
        DataError: The data are not ImageNet's validation images, or the file holds no such labels.
    """

    def __init__(self, dataset: Dataset, num_classes: int, file: str = '') -> None:
        self.num_classes, self.file = num_classes, file or None
        classes, known = list_classes(dataset), ImageNetInfo().label_names()
        if classes is None or classes != known[:num_classes]:
            found = f'has {len(classes)} from {classes[0]!r} on' if classes else 'does not name its classes'
            raise DataError(f"--real-labels is for ImageNet's classes, from {known[0]!r} on: this data set {found}.")
        self.names = [name_image(dataset, index) for index in range(len(dataset))]
        labels = self._open(self.names).real_labels
        unknown = [name for name in self.names if os.path.basename(name) not in labels]
        if unknown:
            raise DataError(
                f"--real-labels matches the names of ImageNet's validation images, such as {next(iter(labels))}: "
                f'{unknown[0]} is not one of them.')

    def _open(self, names: Sequence[str], top_k: int = 1) -> RealLabelsImagenet:
        try:
            real = RealLabelsImagenet(list(names), self.file, topk=(1, top_k))
        except AssertionError:
            raise DataError(
                f"--real-labels is for all of ImageNet's validation images: this data set has {len(names)} images, "
                'which is not the number of real labels.') from None
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f'{self.file} cannot be read as real labels: {error}.') from None
        if not all(isinstance(labels, list) for labels in real.real_labels.values()):
            raise DataError(f'{self.file} holds no real labels: a list of labels for each image is expected.')
        return real

    def score(
            self, predictions: torch.Tensor, share: Sequence[int], unreadable: Sequence[str], processes: Processes,
    ) -> Accuracy:
        """Top-1 and top-5 by the real labels: an image counts if any of its labels is among the likeliest classes.

        Args:
            predictions: (n, k) classes for the images of this process, the likeliest first.
            share: The indices of this process's images in that order, including unreadable ones.
            unreadable: Names of the images without predictions.
        Returns:
            The accuracy over the images of all processes that have a real label.
        Raises:
            DataError: No image has a real label.
        """
        skipped, top_k = set(unreadable), predictions.shape[1]
        scored = [self.names[index] for index in share if self.names[index] not in skipped]
        if len(scored) != len(predictions):
            raise ValueError(f'{len(predictions)} predictions for {len(scored)} images.')
        others = self.names[:len(self.names) - len(scored)]  # timm's class needs one name per label
        real = self._open(scored + others, top_k)
        for chunk in predictions.split(CHUNK):
            scores = torch.zeros(len(chunk), self.num_classes)
            real.add_result(scores.scatter_(1, chunk, torch.arange(top_k, 0., -1).expand(len(chunk), -1)))
        correct = real.is_correct
        images, top1, top5 = processes.total([len(correct[1]), sum(correct[1]), sum(correct[top_k])])
        if not images:
            raise DataError('No image of the data set has a real label.')
        return Accuracy(100 * top1 / images, 100 * top5 / images, int(images))
