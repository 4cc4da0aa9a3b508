"""Semantic FPN (Kirillov et al., CVPR 2019, arXiv:1901.02446), computing what mmseg computes."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize

from .backbone import DenseBackbone
from .pyramid import Pyramid, to_full_precision

__all__ = ['SemanticFpn']


class ScaleBranch(nn.Sequential):
    """One level of the pyramid to 1/4 of the image: 3x3 convolution, BatchNorm and ReLU, before each upsampling."""

    def __init__(self, in_channels: int, channels: int, upsamplings: int) -> None:
        layers: list[nn.Module] = []
        for i in range(max(1, upsamplings)):
            layers.append(nn.Sequential(
                nn.Conv2d(channels if i else in_channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels), nn.ReLU()))
            if upsamplings:
                layers.append(nn.Upsample(scale_factor=2, mode='bilinear', align_corners=False))
        super().__init__(*layers)


class SemanticFpn(nn.Module):
    """Semantic FPN: a class for each pixel.

    Called with a normalised batch (B, 3, H, W) it returns logits (B, num_classes, H, W).

    Args:
        body: Dense backbone of strides 4, 8, 16, 32.
        num_classes: Classes of pixels.
        channels: Width of the FPN.
        head_channels: Width of the head.
        drop: Dropout of whole channels before the classifier.
        min_size, max_size: Of images in `segment`, in pixels.
    """

    def __init__(
            self, body: DenseBackbone, num_classes: int, channels: int = 256, head_channels: int = 128,
            drop: float = .1, min_size: int = 512, max_size: int = 2048) -> None:
        super().__init__()
        self.num_classes, self.min_size, self.max_size = num_classes, min_size, max_size
        self.backbone = Pyramid(body, channels)
        self.branches = nn.ModuleList(ScaleBranch(channels, head_channels, level) for level in body.levels)
        self.drop = nn.Dropout2d(drop)
        self.classifier = nn.Conv2d(head_channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=.01)
        nn.init.zeros_(self.classifier.bias)

    def classify(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Maps of the FPN to logits (B, num_classes, H / 4, W / 4)."""
        total = self.branches[0](maps[0])
        for branch, y in zip(self.branches[1:], maps[1:], strict=True):
            total = total + F.interpolate(branch(y), total.shape[-2:], mode='bilinear', align_corners=False)
        return self.classifier(self.drop(total))

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes, H / 4, W / 4) for a normalised batch."""
        return self.classify(list(self.backbone(x).values()))

    def segment(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (num_classes, H, W) of one image (3, H, W) of pixels from 0 to 255, at its own size.

        As in mmseg the image is resized to a short side of `min_size`, or a long side of `max_size` if that is smaller,
        and stretched to multiples of 32.
        """
        height, width = image.shape[-2:]
        scale = min(self.min_size / min(height, width), self.max_size / max(height, width))
        size = [-(-int(side * scale + .5) // 32) * 32 for side in (height, width)]
        x = normalize(image.float() / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)[None]
        x = F.interpolate(x, size, mode='bilinear', align_corners=False)
        logits = to_full_precision(self.raw(x))
        return F.interpolate(logits, (height, width), mode='bilinear', align_corners=False)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = to_full_precision(self.raw(x))
        return F.interpolate(logits, x.shape[-2:], mode='bilinear', align_corners=False)
