"""RetinaNet (Lin et al., ICCV 2017, arXiv:1708.02002) on torchvision's modules, computing what mmdet computes."""
import sys
from typing import Any

import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import permute_and_flatten
from torchvision.ops import remove_small_boxes, sigmoid_focal_loss

from .anchors import FixedAnchors, MaxIouMatcher, check_targets
from .backbone import DenseBackbone
from .pyramid import Pyramid, to_full_precision
from .resize import RoundedTransform

__all__ = ['RetinaNet']

ANCHOR_SCALES = tuple(4 * 2 ** (i / 3) for i in range(3))


class Head(RetinaNetHead):
    """torchvision's head, whose outputs are float32 or wider, with the losses of mmdet."""

    def raw(self, features: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """Logits `cls` (B, A * K, H, W) and box codes `reg` (B, A * 4, H, W) of each level."""
        classify, regress = self.classification_head, self.regression_head
        return dict(cls=[classify.cls_logits(classify.conv(y)) for y in features],
                    reg=[regress.bbox_reg(regress.conv(y)) for y in features])

    def forward(self, x: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        anchors, classes = self.classification_head.num_anchors, self.classification_head.num_classes
        flat = {name: torch.cat([
            to_full_precision(permute_and_flatten(y, len(y), anchors, size, *y.shape[-2:])) for y in levels], dim=1)
            for (name, levels), size in zip(self.raw(x).items(), (classes, 4), strict=True)}
        return dict(cls_logits=flat['cls'], bbox_regression=flat['reg'])

    def compute_loss(
            self, targets: list[dict[str, torch.Tensor]], head_outputs: dict[str, torch.Tensor],
            anchors: list[torch.Tensor], matched_idxs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Focal loss and L1 loss, over the positive anchors of the whole batch (an image without any counts as one)."""
        coder, ignored = self.regression_head.box_coder, self.classification_head.BETWEEN_THRESHOLDS
        classification, regression, positives = [], [], 0
        for i, (target, matched) in enumerate(zip(targets, matched_idxs, strict=True)):
            logits, codes = head_outputs['cls_logits'][i], head_outputs['bbox_regression'][i]
            positive = matched >= 0
            objects = matched[positive]
            one_hot = torch.zeros_like(logits)
            one_hot[positive, target['labels'][objects]] = 1.
            used = matched != ignored
            classification.append(sigmoid_focal_loss(logits[used], one_hot[used], reduction='sum'))
            wanted = coder.encode_single(target['boxes'][objects].to(anchors[i].dtype), anchors[i][positive])
            regression.append((codes[positive] - wanted).abs().sum())
            positives += max(1, len(objects))
        positives += torch.finfo(torch.float32).eps  # as in mmdet
        return dict(classification=sum(classification) / positives, bbox_regression=sum(regression) / positives)


class RetinaNet(TorchvisionRetinaNet):
    """RetinaNet: dense classification and box codes on levels P3 to P7.

    Called like torchvision's detectors: a list of images (3, H, W) from 0 to 1 and, in training, of targets with
    `boxes` (N, 4) in pixels, x0 y0 x1 y1, and `labels` (N,) from 0 to `num_classes` - 1. Training returns the losses,
    evaluation a dict of `boxes`, `scores` and `labels` for each image, in its pixels. In training the images may also
    be an ImageList of a normalised batch, which is not resized.

    Args:
        body: Dense backbone of strides 8, 16, 32.
        num_classes: Classes of objects; there is no background class.
        channels: Width of FPN and heads.
        detections_per_img: Most detections of an image.
        settings: Of torchvision's RetinaNet: min_size, max_size, image_mean, image_std, score_thresh ...
    """

    def __init__(
            self, body: DenseBackbone, num_classes: int, channels: int = 256, detections_per_img: int = 100,
            **settings: Any) -> None:
        pyramid = Pyramid(body, channels, extra='convs')
        anchors = FixedAnchors(pyramid.strides, ANCHOR_SCALES)
        head = Head(channels, anchors.num_anchors_per_location()[0], num_classes)
        settings = dict(score_thresh=.05, nms_thresh=.5, topk_candidates=1000) | settings
        super().__init__(
            pyramid, num_classes, anchor_generator=anchors, head=head,
            proposal_matcher=MaxIouMatcher(.5, .4, min_iou=0.), detections_per_img=sys.maxsize, **settings)
        self.max_detections = detections_per_img
        before = self.transform
        self.transform = RoundedTransform(before.min_size, before.max_size, before.image_mean, before.image_std)

    def postprocess_detections(self, *args: Any) -> list[dict[str, torch.Tensor]]:
        """Detections of torchvision, without boxes that lost their width or height at the edge of the image."""
        detections = super().postprocess_detections(*args)
        kept = [remove_small_boxes(found['boxes'], sys.float_info.min)[:self.max_detections] for found in detections]
        return [{name: values[keep] for name, values in found.items()}
                for found, keep in zip(detections, kept, strict=True)]

    def raw(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """Undecoded outputs of each level for a normalised batch: `cls` (B, 9 * K, H, W), `reg` (B, 36, H, W)."""
        return self.head.raw(list(self.backbone(x).values()))

    def forward(
            self, images: list[torch.Tensor] | ImageList, targets: list[dict[str, torch.Tensor]] | None = None) -> Any:
        check_targets(targets, self.head.classification_head.num_classes)
        if isinstance(images, ImageList):
            maps = list(self.backbone(images.tensors).values())
            return self.compute_loss(targets, self.head(maps), self.anchor_generator(images, maps))
        return super().forward(images, targets)
