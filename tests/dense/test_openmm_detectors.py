"""A detector of OpenMMLab's mmdet on a backbone of `caretrans.openmm`, against ours; `bash cmd/test_openmm.sh` runs it.

mmdet needs mmcv's compiled operators, which do not compile with the present PyTorch. RetinaNet calls them only for NMS,
so that here a stand-in that fails when it is called is enough.
"""
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import pytest
import torch
from golden import published_file

from caretrans.dense import create_from_checkpoint

if find_spec('mmdet') is None:
    pytest.skip('needs mmdet: run bash cmd/test_openmm.sh', allow_module_level=True)


class Operators(types.ModuleType):
    __spec__ = ModuleSpec('mmcv._ext', None)

    def __getattr__(self, name: str):
        if name.startswith('__'):
            raise AttributeError(name)
        return lambda *args, **kwargs: pytest.fail(f'mmcv._ext.{name} was called')


sys.modules['mmcv._ext'] = Operators('mmcv._ext')  # before mmcv looks for it

import mmdet.models  # noqa: E402, F401 (registers them)
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.runner import load_checkpoint, save_checkpoint  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

import caretrans.openmm  # noqa: E402, F401 (registers backbones)


def retinanet():
    """The RetinaNet of CAS-ViT, without a map of stride 4, which it does not use."""
    return MODELS.build(dict(
        type='RetinaNet', _scope_='mmdet',
        backbone=dict(type='CASViT', arch='xsmall', out_indices=(1, 2, 3), norm_eval=True),
        neck=dict(type='FPN', in_channels=[56, 112, 220], out_channels=256, add_extra_convs='on_input', num_outs=5),
        bbox_head=dict(
            type='RetinaHead', num_classes=80, in_channels=256,
            anchor_generator=dict(
                type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3, ratios=[.5, 1., 2.],
                strides=[8, 16, 32, 64, 128]),
            loss_bbox=dict(type='L1Loss')),
        train_cfg=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=.5, neg_iou_thr=.4, min_pos_iou=0, ignore_iof_thr=-1),
            sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1)))


def test_detectors_of_mmdet_load_what_ours_do_and_are_read_here(tmp_path):
    model, path = retinanet(), published_file('retinanet', tmp_path)
    load_checkpoint(model, str(path), strict=True)
    ours, x = create_from_checkpoint(path)[0], torch.randn(2, 3, 160, 224)
    with torch.no_grad():
        for kind, maps in zip(('cls', 'reg'), model.eval()(x), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(maps, ours.raw(x)[kind], strict=True))
    save_checkpoint(dict(state_dict=model.state_dict(), meta={}), str(tmp_path / 'saved.pth'))
    read, _ = create_from_checkpoint(tmp_path / 'saved.pth')
    assert torch.equal(read.raw(x)['cls'][0], ours.raw(x)['cls'][0])


def test_a_detector_of_mmdet_trains_and_uses_every_parameter():
    model = retinanet().train()
    boxes = InstanceData(bboxes=torch.tensor([[10., 20, 90, 100]]), labels=torch.tensor([3]))
    sample = DetDataSample(
        gt_instances=boxes, metainfo=dict(img_shape=(96, 128), pad_shape=(96, 128), batch_input_shape=(96, 128)))
    losses = model(torch.randn(1, 3, 96, 128), [sample], mode='loss')
    sum(value for values in losses.values() for value in values).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
