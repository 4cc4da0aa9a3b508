"""Resizing of images by detectors, with the rounding of mmdet."""
from typing import Any

import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

__all__ = ['RoundedTransform']


class RoundedTransform(GeneralizedRCNNTransform):
    """torchvision's preparation of images, which rounds sides to the nearest pixel, as mmdet does.

    torchvision rounds down: 480 x 640 becomes 800 x 1066 instead of 800 x 1067 at a short side of 800.
    """

    def resize(
            self, image: torch.Tensor, target: dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        if self.training and self._skip_resize:
            return image, target
        height, width = image.shape[-2:]
        shorter = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        scale = min(shorter / min(height, width), self.max_size / max(height, width))
        fixed: Any = (int(width * scale + .5), int(height * scale + .5))  # as torchvision orders them
        self.fixed_size = fixed
        return super().resize(image, target)
