"""Anchors and their assignment to objects, as mmdet computes them."""
from collections.abc import Sequence

import torch
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from ..errors import DataError

__all__ = ['FixedAnchors', 'MaxIouMatcher', 'check_targets']


class FixedAnchors(AnchorGenerator):
    """Anchors that are not rounded to whole pixels, at fixed strides, in float32 or wider.

    torchvision rounds them, and divides the size of the image by that of the map for a stride, for example 61 instead
    of 64 for P6 (13 rows) at 800 pixels.

    Args:
        strides: Of the maps, in pixels.
        scales: Side of the square anchors in strides.
        ratios: Height by width.
    """

    def __init__(self, strides: tuple[int, ...], scales: tuple[float, ...], ratios: tuple[float, ...] = (.5, 1., 2.)):
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        super().__init__(sizes, (ratios,) * len(sizes))
        self.strides = strides

    def generate_anchors(
            self, scales: tuple[float, ...], aspect_ratios: tuple[float, ...], dtype: torch.dtype = torch.float32,
            device: torch.device = torch.device('cpu')) -> torch.Tensor:  # noqa: B008
        """(R * S, 4) boxes around 0, ratio outer and scale inner."""
        ratios = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sizes = torch.tensor(scales, dtype=dtype, device=device)
        widths, heights = ((factor[:, None] * sizes).flatten() for factor in (1 / ratios, ratios))
        return torch.stack([-widths, -heights, widths, heights], 1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """The anchors (N, 4) of each image."""
        first = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(first.dtype, torch.float32), first.device)
        strides = [[torch.tensor(stride, device=first.device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(y.shape[-2:]) for y in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class MaxIouMatcher(Matcher):
    """Assign boxes to objects by IoU, as mmdet's MaxIoUAssigner.

    Each object also gets the boxes that overlap it most, from `min_iou` on, even if another object overlaps them more.
    """

    def __init__(self, high_threshold: float, low_threshold: float, min_iou: float) -> None:
        super().__init__(high_threshold, low_threshold, allow_low_quality_matches=True)
        self.min_iou = min_iou

    def set_low_quality_matches_(
            self, matches: torch.Tensor, all_matches: torch.Tensor, match_quality_matrix: torch.Tensor) -> None:
        best = match_quality_matrix.max(dim=1).values
        for i, iou in enumerate(best.tolist()):
            if iou >= self.min_iou:
                matches[match_quality_matrix[i] == best[i]] = i


def check_targets(targets: Sequence[dict[str, torch.Tensor]] | None, num_classes: int) -> None:
    """Refuse targets that would train a detector to something else, or fail far from the cause.

    Raises:
        DataError: A label is no class, a box has no width or height, or their numbers differ; names the target.
    """
    for i, target in enumerate(targets or ()):
        boxes, labels = target['boxes'], target['labels']
        if len(boxes) != len(labels):
            raise DataError(f'Target {i} has {len(boxes)} boxes and {len(labels)} labels.')
        wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
        if wrong:
            raise DataError(f'Target {i} has the label {wrong[0]}: labels are 0 to {num_classes - 1}.')
        empty = boxes[~(boxes[:, 2:] > boxes[:, :2]).all(dim=1)].tolist()  # also those with NaN
        if empty:
            raise DataError(f'Target {i} has the box {empty[0]}, which has no width or height: drop it.')
