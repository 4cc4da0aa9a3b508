"""Our networks as backbones of torchvision's detectors and of segmentation_models_pytorch, as docs/dense.md shows."""
from collections import OrderedDict

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn as nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import caretrans  # noqa: F401 (registers the models)

MODELS = ['care_s0', 'casvit_xs', 'mlla_t']


class Maps(nn.Module):
    """FPN of the maps of a network of timm."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 32)
        self.out_channels = 32

    def forward(self, x: torch.Tensor) -> OrderedDict:
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))


@pytest.mark.parametrize('name', MODELS)
def test_torchvision_detects_with_our_maps(name):
    model = FasterRCNN(
        Maps(name), 3, min_size=64, max_size=96, box_roi_pool=MultiScaleRoIAlign(['0', '1', '2'], 7, 2),
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), 3 * ((1.,),)))
    images = [torch.rand(3, 70, 90)]
    losses = model.train()(images, [dict(boxes=torch.tensor([[10., 10, 50, 60]]), labels=torch.tensor([2]))])
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert set(model.eval()(images)[0]) == {'boxes', 'labels', 'scores'}


@pytest.mark.parametrize('name', MODELS)
def test_segmentation_models_take_our_encoders(name):
    for architecture in (smp.FPN, smp.Unet):
        model = architecture(f'tu-{name}', encoder_weights=None, classes=5)
        logits = model(torch.randn(2, 3, 64, 96))
        logits.sum().backward()
        assert logits.shape == (2, 5, 64, 96)


@pytest.mark.parametrize('architecture', ['PAN', 'DeepLabV3', 'DeepLabV3Plus'])
def test_decoders_that_need_dilation_are_refused_in_one_line(architecture):
    with pytest.raises(ValueError, match='casvit_xs has an output_stride of 32 only'):
        getattr(smp, architecture)('tu-casvit_xs', encoder_weights=None)
