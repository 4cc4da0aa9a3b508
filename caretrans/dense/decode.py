"""Images for exported RetinaNets, and detections from what they return, without the network or its weights.

    session = onnxruntime.InferenceSession('retinanet_care_s0.onnx')
    decoding = Decoding.from_json(session.get_modelmeta().custom_metadata_map['decoding'])
    pixels, fitted = fit_image(image, decoding.size)             # image: (3, H, W) in RGB, 0 to 255
    outputs = session.run(None, {'input_1': decoding.normalise(pixels)[None].numpy()})
    found = decode_detections(outputs, decoding, fitted, image.shape[-2:])
"""
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from ..errors import ConfigError
from .anchors import FixedAnchors
from .retinanet import ANCHOR_SCALES, RetinaNet

__all__ = ['Decoding', 'decode_detections', 'fit_image']

PADDING = (.485, .456, .406)  # of the whole scale: ImageNet's mean, which is 0 once it is normalised


@dataclass(frozen=True)
class Decoding:
    """What is needed to decode the outputs of a RetinaNet; exported programs carry it as JSON.

    Attributes:
        size: Height and width of the images that the program takes.
        mean, std: Of values from 0 to 1.
        strides, scales: Of the levels, and of the anchors in strides; see `FixedAnchors`.
        score_thresh: Least score.
        nms_thresh: Largest overlap of two boxes of one class.
        candidates: Most boxes of a level before non-maximum suppression.
        detections: Most boxes of an image.
    """
    size: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    strides: Sequence[int]
    scales: Sequence[float]
    score_thresh: float
    nms_thresh: float
    candidates: int
    detections: int

    @classmethod
    def from_model(cls, model: RetinaNet, size: Sequence[int]) -> 'Decoding':
        return cls(
            tuple(size), tuple(model.transform.image_mean), tuple(model.transform.image_std),
            tuple(model.anchor_generator.strides), ANCHOR_SCALES, model.score_thresh, model.nms_thresh,
            model.topk_candidates, model.max_detections)

    @classmethod
    def from_json(cls, text: str) -> 'Decoding':
        """Read the entry `decoding` of the metadata of a program.

        Raises:
            ConfigError: It is something else.
        """
        try:
            found = cls(**json.loads(text))
        except (TypeError, ValueError):
            names = ', '.join(item.name for item in fields(cls))
            raise ConfigError(f'{text[:80]!r} is no decoding of a RetinaNet, an object of {names}.') from None
        return found

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (..., 3, H, W) from 0 to 255 as the network takes them."""
        mean, std = (torch.tensor(values, dtype=pixels.dtype)[:, None, None] for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std


def fit_image(
        image: torch.Tensor, size: Sequence[int], mean: Sequence[float] = PADDING,
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Resize an image until it fits, and add the mean colour on the right or at the bottom.

    Args:
        image: (3, H, W) from 0 to 255.
        size: Height and width of the result.
        mean: Colour of the padding, from 0 to 1.
    Returns:
        (3, *size) float32, and the height and width that the image has in it.
    """
    sides = image.shape[-2:]
    scale = min(whole / side for whole, side in zip(size, sides, strict=True))
    fitted = tuple(max(1, min(whole, int(side * scale + .5))) for whole, side in zip(size, sides, strict=True))
    pixels = 255 * torch.tensor(mean)[:, None, None].expand(-1, *size).clone()
    pixels[:, :fitted[0], :fitted[1]] = F.interpolate(
        image[None].float(), fitted, mode='bilinear', align_corners=False)[0]
    return pixels, fitted


def decode_detections(
        outputs: Sequence[Any], decoding: Decoding, fitted: Sequence[int], size: Sequence[int],
) -> dict[str, torch.Tensor]:
    """The detections of one image, as the network itself returns them.

    Args:
        outputs: Of the program, in its order, arrays or tensors: class logits (1, 9 K, H, W) of each level, then box
            codes (1, 36, H, W).
        fitted: Height and width of the image in the input of the program; see `fit_image`.
        size: Height and width of the original image.
    Returns:
        `boxes` (N, 4), x0 y0 x1 y1 in pixels of the original, `scores` (N,) and `labels` (N,) from 0, the best first.
    """
    maps = [torch.as_tensor(y).float() for y in outputs]
    levels = len(decoding.strides)
    generator = FixedAnchors(tuple(decoding.strides), tuple(decoding.scales))
    anchors = generator(ImageList(maps[0], [tuple(fitted)]), maps[:levels])[0]
    per_position = generator.num_anchors_per_location()[0]
    boxes, scores, labels, start = [], [], [], 0
    for logits, codes in zip(maps[:levels], maps[levels:], strict=True):
        classes = logits.shape[1] // per_position
        logits, codes = (y[0].unflatten(0, (per_position, -1)).permute(2, 3, 0, 1).flatten(0, 2) for y in (
            logits, codes))
        every = logits.sigmoid().flatten()
        found = (every > decoding.score_thresh).nonzero()[:, 0]
        best, order = every[found].topk(min(decoding.candidates, len(found)))
        chosen, here = found[order], anchors[start:start + len(codes)]
        start += len(codes)
        places = chosen.div(classes, rounding_mode='floor')
        boxes.append(BoxCoder((1., 1., 1., 1.)).decode_single(codes[places], here[places]))
        scores.append(best)
        labels.append(chosen % classes)
    boxes, scores, labels = clip_boxes_to_image(torch.cat(boxes), tuple(fitted)), torch.cat(scores), torch.cat(labels)
    keep = batched_nms(boxes, scores, labels, decoding.nms_thresh)
    keep = keep[remove_small_boxes(boxes[keep], sys.float_info.min)][:decoding.detections]
    factors = torch.tensor([whole / side for whole, side in zip(size, fitted, strict=True)]).flip(0).repeat(2)
    return dict(boxes=boxes[keep] * factors, scores=scores[keep], labels=labels[keep])
