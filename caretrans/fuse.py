"""Fuse a network for inference: the same function with fewer operations and parameters."""
import copy

import torch
import torch.nn as nn
from timm.utils import reparameterize_model

from .models.backbone import Backbone
from .models.folding import InferenceModule

__all__ = ['FORMS', 'fuse', 'is_fused', 'measure_fusion_error', 'to_form']

FORMS = ('trained', 'fused', 'phone', 'bmm')  # see `to_form`


def is_fused(model: nn.Module) -> bool:
    """Whether `model`, or a part of it, has been fused."""
    return any(isinstance(module, InferenceModule) for module in model.modules())


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference only, by exact algebra; `model` is not changed.

    `caretrans.models.folding` and, for CARE, `models.inference.care_fused` explain what is fused and why that is exact.
    timm's `reparameterize_model(model)` returns the same network, without the checks.

    Args:
        model: A network of this package in evaluation mode, on any device, in any dtype.
    Returns:
        The fused copy, in evaluation mode, without gradients; its training mode is refused.
    Raises:
        ValueError: The network is in training mode, is fused already, is wrapped (by torch.compile or for several
            processes) or has nothing to fuse; the message says which.
    """
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, '_orig_mod') or hasattr(model, 'module'):
        raise ValueError(f'{name} wraps a network: fuse the network itself, and compile or script what comes out.')
    if is_fused(model):
        raise ValueError(f'This {name} is fused already.')
    if any(module.training for module in model.modules()):
        raise ValueError(
            f'This {name} is in training mode: its BatchNorms still change, and fused ones cannot. Train to the end, '
            f'call eval(), then fuse.')
    if not any(hasattr(module, 'fuse') for module in model.modules()):
        raise ValueError(f'{name} has no parts to fuse: it is none of the networks of this package.')
    modules = set(model.modules())
    for module in modules:
        if not modules.issuperset(getattr(module, 'siblings', ())):
            raise ValueError(
                f'A head of this {name} was replaced from outside: call reset_classifier, or put the heads back, so '
                f'that it is known which outputs are averaged.')
    return reparameterize_model(model).eval().requires_grad_(False)


def to_form(model: nn.Module, form: str = 'fused', images: torch.Tensor | None = None) -> nn.Module:
    """Return an equivalent copy of a network for inference.

    Args:
        form: 'trained', a plain copy; 'fused', networks of this package by `fuse`, others reparameterised as their
            authors do; 'phone', fused with operations that phones prefer (`models.inference.*phone`); 'bmm', the
            CARE Transformer with operations that XNNPACK prefers (`models.inference.care_bmm`), others fused.
        images: (B, C, H, W), normalised, for which the phone form chooses scales that suit float16.
    """
    if form not in FORMS:
        raise ValueError(f'form is {form!r}, choose from {", ".join(FORMS)}.')
    if form == 'trained':
        return copy.deepcopy(model)
    if not isinstance(model, Backbone):
        return reparameterize_model(model)
    convert = model.inference_forms.get(form)
    if not convert:
        return fuse(model)
    return convert(fuse(model), images) if form == 'phone' else convert(fuse(model))


@torch.no_grad()
def measure_fusion_error(model: nn.Module, fused: nn.Module, images: torch.Tensor | None = None) -> float:
    """Largest difference between the outputs of `fused` and `model` in float64, relative to the largest.

    Args:
        model: The network before fusing.
        images: (B, in_chans, H, W); by default two of random pixels, 224 x 224.
    """
    if images is None:
        images = torch.randn(2, model.in_chans, 224, 224, generator=torch.Generator().manual_seed(0))
    weight = next(fused.parameters())
    expected = copy.deepcopy(model).cpu().double()(images.cpu().double())
    found = fused(images.to(weight.device, weight.dtype)).cpu().double()
    return ((found - expected).abs().max() / expected.abs().max()).item()
