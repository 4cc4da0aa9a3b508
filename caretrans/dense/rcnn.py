"""Faster and Mask R-CNN (arXiv:1506.01497, arXiv:1703.06870) on torchvision's modules, computing what mmdet does."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align

from .anchors import FixedAnchors, MaxIouMatcher, check_targets
from .backbone import DenseBackbone
from .pyramid import Pyramid, to_full_precision
from .resize import RoundedTransform

__all__ = ['Rcnn']


class RoiAlign(nn.Module):
    """Features of boxes from the level that fits their size: (sum of N, C, size, size), aligned, adaptive sampling.

    torchvision's MultiScaleRoIAlign is not aligned and samples twice; its levels are these.
    """

    finest_scale = 56  # pixels, of the boxes of the first level

    def __init__(self, size: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.strides = size, strides

    def find_levels(self, boxes: torch.Tensor) -> torch.Tensor:
        """The level of each box (N, 4)."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        return torch.log2(sides / self.finest_scale + 1e-6).floor().clamp(0, len(self.strides) - 1).long()

    def forward(
            self, features: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: Any = None,
    ) -> torch.Tensor:
        maps = [to_full_precision(y) for y in list(features.values())[:len(self.strides)]]
        numbers = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat([numbers, torch.cat(boxes)], dim=1).to(maps[0].dtype)
        levels = self.find_levels(rois[:, 1:])
        out = rois.new_zeros(len(rois), maps[0].shape[1], self.size, self.size)
        for level, (y, stride) in enumerate(zip(maps, self.strides, strict=True)):
            here = levels == level
            part = roi_align(y, rois[here], self.size, 1 / stride, sampling_ratio=0, aligned=True)
            out = out.index_put((here.nonzero()[:, 0],), part)
        return out


class ProposalHead(RPNHead):
    """torchvision's head of proposals, whose outputs are float32 or wider."""

    def raw(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Objectness (B, A, H, W) and box codes (B, A * 4, H, W) of each level."""
        return super().forward(features)

    def forward(self, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return tuple([to_full_precision(y) for y in levels] for levels in self.raw(x))


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's network of proposals with the assignment and the L1 loss of mmdet."""

    def __init__(self, anchors: FixedAnchors, head: ProposalHead, **settings: Any) -> None:
        super().__init__(anchors, head, **settings)
        self.proposal_matcher = MaxIouMatcher(.7, .3, min_iou=.3)

    def compute_loss(
            self, objectness: torch.Tensor, pred_bbox_deltas: torch.Tensor, labels: list[torch.Tensor],
            regression_targets: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        positive, negative = (torch.where(torch.cat(mask))[0] for mask in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        wanted = torch.cat(regression_targets)[positive].to(pred_bbox_deltas.dtype)
        box_loss = (pred_bbox_deltas[positive] - wanted).abs().sum() / len(sampled)
        logits = objectness.flatten()[sampled]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(labels)[sampled].to(logits.dtype)), box_loss


class RoiHeads(RoIHeads):
    """torchvision's heads of regions with the assignment and the losses of mmdet. Label 0 is background."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            fg_iou_thresh=.5, bg_iou_thresh=.5, positive_fraction=.25,
            bbox_reg_weights=(10., 10., 5., 5.), **settings)
        self.proposal_matcher = MaxIouMatcher(.5, .5, min_iou=.5)

    def classify(
            self, features: dict[str, torch.Tensor], proposals: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, K + 1) and box codes (N, 4 (K + 1)) of the proposals of all images, background first."""
        logits, codes = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        return to_full_precision(logits), to_full_precision(codes)

    def segment(self, features: dict[str, torch.Tensor], boxes: list[torch.Tensor]) -> torch.Tensor:
        """Logits of masks (N, K + 1, 28, 28)."""
        return to_full_precision(self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))))

    def forward(
            self, features: dict[str, torch.Tensor], proposals: list[torch.Tensor], image_shapes: list[tuple[int, int]],
            targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        if self.training:
            return [], self._compute_losses(features, proposals, targets)
        boxes, scores, labels = self.postprocess_detections(
            *self.classify(features, proposals), proposals, image_shapes)
        detections = [dict(boxes=b, labels=n, scores=s) for b, n, s in zip(boxes, labels, scores, strict=True)]
        if self.has_mask():
            masks = maskrcnn_inference(self.segment(features, boxes), labels)
            detections = [dict(detection, masks=mask) for detection, mask in zip(detections, masks, strict=True)]
        return detections, {}

    def _compute_losses(
            self, features: dict[str, torch.Tensor], proposals: list[torch.Tensor],
            targets: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        proposals, objects, labels, codes = self.select_training_samples(proposals, targets)
        logits, predicted = self.classify(features, proposals)
        every, wanted = torch.cat(labels), torch.cat(codes).to(predicted.dtype)
        positive = torch.where(every > 0)[0]
        predicted = predicted.reshape(len(every), -1, 4)[positive, every[positive]]
        losses = dict(
            loss_classifier=F.cross_entropy(logits, every),
            loss_box_reg=(predicted - wanted[positive]).abs().sum() / len(every))
        if self.has_mask():
            kept = [label > 0 for label in labels]
            boxes, objects, labels = ([x[keep] for x, keep in zip(values, kept, strict=True)]
                                      for values in (proposals, objects, labels))
            losses['loss_mask'] = self._compute_mask_loss(features, boxes, objects, torch.cat(labels), targets)
        return losses

    def _compute_mask_loss(
            self, features: dict[str, torch.Tensor], boxes: list[torch.Tensor], objects: list[torch.Tensor],
            labels: torch.Tensor, targets: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Binary cross entropy of the mask of the right class; a target is the mask in the box, 28 x 28, 0 or 1."""
        logits = self.segment(features, boxes)
        if not len(labels):
            return logits.sum() * 0
        wanted = []
        for box, chosen, target in zip(boxes, objects, targets, strict=True):
            rois = torch.cat([chosen[:, None].to(box.dtype), box], dim=1)
            masks = target['masks'][:, None].to(box.dtype)
            if len(rois):
                wanted.append(roi_align(masks, rois, logits.shape[-1], sampling_ratio=0, aligned=True)[:, 0] >= .5)
        chosen = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(chosen, torch.cat(wanted).to(chosen.dtype))


class Rcnn(GeneralizedRCNN):
    """Faster R-CNN, or with `masks` Mask R-CNN: proposals on P2 to P6, then a class, a box and a mask for each.

    Called like torchvision's detectors: a list of images (3, H, W) from 0 to 1 and, in training, of targets with
    `boxes` (N, 4) in pixels, x0 y0 x1 y1, `labels` (N,) from 0 to `num_classes` - 1 and, with masks, `masks` (N, H, W)
    of 0 and 1. Training returns the losses, evaluation a dict of `boxes`, `scores`, `labels` and `masks`
    (N, 1, H, W; probabilities) for each image, in its pixels. In training the images may also be an ImageList of a
    normalised batch, which is not resized. Targets that cannot be right raise a DataError.

    Args:
        body: Dense backbone of strides 4, 8, 16, 32.
        num_classes: Classes of objects, without background.
        masks: Predict masks.
        channels: Width of FPN and heads.
        hidden: Width of the two linear layers of the box head.
        mask_convs: Convolutions of the mask head.
        proposals: Kept before NMS per level, and after NMS, at evaluation; training takes 2,000 per level.
        rois: Proposals of an image on which the heads are trained, a quarter of them on objects.
        score_thresh, nms_thresh, detections_per_img: Of the detections.
        transform: Of torchvision's GeneralizedRCNNTransform: min_size, max_size, image_mean, image_std.
    """

    def __init__(
            self, body: DenseBackbone, num_classes: int, masks: bool = False, channels: int = 256, hidden: int = 1024,
            mask_convs: int = 4, proposals: int = 1000, rois: int = 512, score_thresh: float = .05,
            nms_thresh: float = .5, detections_per_img: int = 100, **transform: Any,
    ) -> None:
        pyramid = Pyramid(body, channels, extra='pool')
        anchors = FixedAnchors(pyramid.strides, (8.,))
        head = ProposalHead(channels, anchors.num_anchors_per_location()[0])
        rpn = ProposalNetwork(
            anchors, head, fg_iou_thresh=.7, bg_iou_thresh=.3, batch_size_per_image=256, positive_fraction=.5,
            pre_nms_top_n=dict(training=2 * proposals, testing=proposals),
            post_nms_top_n=dict(training=proposals, testing=proposals), nms_thresh=.7)
        strides = pyramid.strides[:-1]
        with_masks: dict[str, nn.Module] = dict(
            mask_roi_pool=RoiAlign(14, strides), mask_head=MaskRCNNHeads(channels, (channels,) * mask_convs, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1)) if masks else {}
        heads = RoiHeads(
            box_roi_pool=RoiAlign(7, strides), box_head=TwoMLPHead(channels * 49, hidden),
            box_predictor=FastRCNNPredictor(hidden, num_classes + 1), batch_size_per_image=rois,
            score_thresh=score_thresh, nms_thresh=nms_thresh, detections_per_img=detections_per_img, **with_masks)
        transform = dict(min_size=800, max_size=1333, image_mean=IMAGENET_DEFAULT_MEAN,
                         image_std=IMAGENET_DEFAULT_STD) | transform
        super().__init__(pyramid, rpn, heads, RoundedTransform(**transform))
        self.num_classes = num_classes

    def raw(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """Undecoded proposals of each level for a normalised batch: `rpn_cls` (B, 3, H, W), `rpn_reg` (B, 12, H, W)."""
        objectness, codes = self.rpn.head.raw(list(self.backbone(x).values()))
        return dict(rpn_cls=objectness, rpn_reg=codes)

    def forward(
            self, images: list[torch.Tensor] | ImageList, targets: list[dict[str, torch.Tensor]] | None = None) -> Any:
        check_targets(targets, self.num_classes)
        if targets is not None:  # torchvision counts from 1, background is 0
            targets = [dict(target, labels=target['labels'] + 1) for target in targets]
        if isinstance(images, ImageList):
            features = self.backbone(images.tensors)
            proposals, losses = self.rpn(images, features, targets)
            return {**losses, **self.roi_heads(features, proposals, images.image_sizes, targets)[1]}
        outputs = super().forward(images, targets)
        return outputs if self.training else [dict(found, labels=found['labels'] - 1) for found in outputs]
