"""The objects that a detector finds in an image."""
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

__all__ = ['detect']

HEADS = ('head', 'rpn.head', 'roi_heads.box_predictor', 'roi_heads.mask_predictor')  # of torchvision's detectors


def _list_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    for item in value.values() if isinstance(value, Mapping) else value:
        yield from _list_tensors(item)


@torch.inference_mode()
def detect(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Boxes, scores, labels, and masks of Mask R-CNN, on the CPU.

    Args:
        model: A detector of torchvision in evaluation mode.
        image: (3, H, W), from 0 to 1.
    Raises:
        ValueError: Outputs of a head are not finite; torchvision drops such boxes without a word.
    """
    finite: list[torch.Tensor] = []

    def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
        finite.extend(tensor.isfinite().all() for tensor in _list_tensors(outputs))
    handles = [module.register_forward_hook(note) for name, module in model.named_modules() if name in HEADS]
    try:
        found = model([image])[0]
    finally:
        for handle in handles:
            handle.remove()
    if not torch.stack(finite).all():
        raise ValueError('the outputs of the network are not finite')
    return {name: value.cpu() for name, value in found.items()}
