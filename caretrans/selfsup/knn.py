"""Classification by the nearest neighbours in feature space, a measure of features that trains nothing.

Source: Wu et al. 2018, arXiv:1805.01978, section 3.4.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import DataError

__all__ = ['NEIGHBOURS', 'TEMPERATURE', 'KnnClassifier', 'find_nearest']

NEIGHBOURS, TEMPERATURE = 20, .07  # ImageNet figures in the literature: 200 neighbours, temperature 0.07 or 0.1
CHUNK = 1024  # queries at a time, to limit memory


def find_nearest(queries: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarities (Q, k) and indices (Q, k) of the nearest rows of `bank` (N, D), nearest first."""
    bank = F.normalize(bank)
    found = [(F.normalize(part) @ bank.T).topk(k) for part in queries.split(CHUNK)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


class KnnClassifier(nn.Module):
    """Votes (B, num_classes) of the nearest features, each weighted by exp(cosine / temperature).

    Args:
        features: Of the images to classify: a module, or identity for features that are given.
        bank, labels: Features (N, D) of labelled images and their labels (N,).
        num_classes: Labels are below it.
        k: At most N.
    Raises:
        DataError: The bank is empty, or a label is not below `num_classes`.
    """

    def __init__(
            self, features: nn.Module, bank: torch.Tensor, labels: torch.Tensor, num_classes: int, k: int = NEIGHBOURS,
            temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__()
        if not len(bank) or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise DataError(f'{len(bank)} labelled images, whose labels must be 0 to {num_classes - 1}.')
        self.features, self.num_classes, self.temperature = features, num_classes, temperature
        self.k = min(k, len(bank))
        self.register_buffer('bank', F.normalize(bank.float()))
        self.register_buffer('labels', labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        similarities, indices = find_nearest(self.features(x).float(), self.bank, self.k)
        votes = (similarities / self.temperature).exp()
        return votes.new_zeros(len(votes), self.num_classes).scatter_add_(1, self.labels[indices], votes)
