"""Feature pyramid: maps of a dense backbone to maps of equal width (FPN), with extra levels where a head needs them."""
from collections import OrderedDict

import torch
import torch.nn as nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool

from .backbone import DenseBackbone

__all__ = ['ExtraLevels', 'Pyramid', 'to_full_precision']


def to_full_precision(x: torch.Tensor) -> torch.Tensor:
    """float32 for half precision, for what must not be rounded: boxes, losses, RoIAlign; else `x` itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class ExtraLevels(ExtraFPNBlock):
    """P6 by a convolution of stride 2 of the last map of the backbone, P7 by one of P6, without ReLU between.

    mmdet's `add_extra_convs='on_input'`. torchvision's own block has a ReLU, and takes P5 instead of the last map of
    the backbone wherever both have as many channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(
            self, results: list[torch.Tensor], x: list[torch.Tensor], names: list[str],
    ) -> tuple[list[torch.Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, 'p6', 'p7']


class Pyramid(nn.Module):
    """A dense backbone and FPN: (B, 3, H, W) to a dict of maps (B, out_channels, H / s, W / s), the largest first.

    Args:
        body: The dense backbone.
        out_channels: Of every map.
        extra: '' for none, 'pool' for P6 by subsampling P5, 'convs' for `ExtraLevels`.
    Attributes:
        strides: Of the maps, in pixels.
    """

    def __init__(self, body: DenseBackbone, out_channels: int = 256, extra: str = '') -> None:
        super().__init__()
        blocks: ExtraFPNBlock | None = LastLevelMaxPool() if extra == 'pool' else None
        if extra == 'convs':
            blocks = ExtraLevels(body.channels[-1], out_channels)
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(body.channels), out_channels, blocks)
        self.out_channels = out_channels
        last = body.strides[-1]
        self.strides = (*body.strides, *{'': (), 'pool': (2 * last,), 'convs': (2 * last, 4 * last)}[extra])

    def merge(self, maps: list[torch.Tensor]) -> 'OrderedDict[str, torch.Tensor]':
        """FPN of the maps of the backbone."""
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(maps)))

    def forward(self, x: torch.Tensor) -> 'OrderedDict[str, torch.Tensor]':
        return self.merge(self.body(x))
