"""Detectors and segmenters compute what mmdet and mmseg compute, and these tests detect errors."""
from copy import deepcopy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from golden import difference, filled_maps, golden, map_error, published_model
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from caretrans.errors import DataError

BOUND = 1e-9
IMAGES = ImageList(torch.zeros(2, 3, 160, 224), [(160, 224), (150, 200)])
ORDER = [0, 1, 4, 2, 3]  # of the regions in the reference, which mixes the two images


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('published')
    return {task: published_model(task, folder) for task in ('retinanet', 'mask_rcnn', 'semantic_fpn')}


@pytest.mark.parametrize('size, expected', [
    ((480, 640), (800, 1067)), ((427, 640), (800, 1199)), ((640, 427), (1199, 800))])
def test_sides_are_rounded_as_in_mmdet(size, expected, models):
    for model in (models['retinanet'], models['mask_rcnn']):
        resized, _ = model.eval().transform.resize(torch.zeros(3, *size))
        assert resized.shape[1:] == expected


def retinanet_errors(model) -> dict:
    arrays = golden('mmdet_retina')
    features = model.backbone.merge(filled_maps()[1:])
    levels = list(features.values())
    errors = {name: map_error(arrays, name, y) for name, y in zip(('p3', 'p4', 'p5', 'p6', 'p7'), levels, strict=True)}
    raw = model.head.raw(levels)
    for i in range(5):
        errors[f'cls{i}'] = map_error(arrays, f'cls{i}', raw['cls'][i])
        errors[f'reg{i}'] = map_error(arrays, f'reg{i}', raw['reg'][i])
    anchors = model.anchor_generator(IMAGES, levels)
    counts = [int(arrays[f'anchors{i}_count']) for i in range(5)]
    for i, part in enumerate(anchors[0].split(counts)):
        errors[f'anchors{i}'] = difference(part[:18], arrays[f'anchors{i}_first'])
    outputs = model.head(levels)
    boxes, labels = torch.from_numpy(arrays['gt_boxes0']), torch.from_numpy(arrays['gt_labels0'])
    losses = model.compute_loss(  # the reference encoded boxes in float32
        [dict(boxes=boxes, labels=labels), dict(boxes=boxes[:0], labels=labels[:0])], outputs,
        [part.float() for part in anchors])
    errors['loss_cls'] = float(abs(losses['classification'] / arrays['loss_cls'].sum() - 1))
    errors['loss_bbox'] = float(abs(losses['bbox_regression'] / arrays['loss_bbox'].sum() - 1))
    detections = model.postprocess_detections(
        {name: list(values.split(counts, 1)) for name, values in outputs.items()},
        [list(a.split(counts)) for a in anchors], IMAGES.image_sizes)
    for i, found in enumerate(detections):
        for name in ('boxes', 'scores', 'labels'):
            errors[f'det{i}_{name}'] = difference(found[name], arrays[f'det{i}_{name}'])
    return errors


def mask_rcnn_errors(model) -> dict:
    arrays = golden('mmdet_mask_rcnn')
    features = model.backbone.merge(filled_maps())
    levels = list(features.values())
    errors = {name: map_error(arrays, name, y) for name, y in zip(('p2', 'p3', 'p4', 'p5', 'p6'), levels, strict=True)}
    objectness, codes = model.rpn.head.raw(levels)
    for i in range(5):
        errors[f'rpn_cls{i}'] = map_error(arrays, f'rpn_cls{i}', objectness[i])
        errors[f'rpn_reg{i}'] = map_error(arrays, f'rpn_reg{i}', codes[i])
    proposals, _ = model.rpn(IMAGES, features)
    for i, found in enumerate(proposals):
        assert len(found) == arrays[f'prop{i}_count']
        errors[f'prop{i}'] = difference(found[:50], arrays[f'prop{i}_boxes'])
    rois = torch.from_numpy(arrays['rois'])
    boxes = [rois[rois[:, 0] == i, 1:] for i in range(2)]
    pooled = model.roi_heads.box_roi_pool(features, boxes, IMAGES.image_sizes)
    errors['roi_feat'] = difference(pooled[:, :8], arrays['roi_feat_crop'][ORDER])
    logits, codes = model.roi_heads.classify(features, boxes)
    errors['box_cls'] = difference(logits.roll(-1, 1), arrays['box_cls'][ORDER])
    errors['box_reg'] = difference(codes[:, 4:], arrays['box_reg'][ORDER])
    masks = model.roi_heads.segment(features, boxes)[:, 1:]
    errors['mask'] = max(difference(masks.mean((2, 3)), arrays['mask_mean'][ORDER]),
                         difference(masks[:, :3], arrays['mask_crop'][ORDER]))
    return errors


def semantic_fpn_errors(model) -> dict:
    arrays = golden('mmseg_fpn')
    levels = list(model.backbone.merge(filled_maps()).values())
    errors = {f'p{i}': map_error(arrays, f'p{i}', y) for i, y in enumerate(levels)}
    logits = model.classify(levels)
    errors['logits'] = map_error(arrays, 'logits', logits)
    upsampled = F.interpolate(logits, scale_factor=4, mode='bilinear', align_corners=False)
    errors['logits_up'] = difference(upsampled[..., :6, :6], arrays['logits_up_crop'])
    return errors


ERRORS = {'retinanet': retinanet_errors, 'mask_rcnn': mask_rcnn_errors, 'semantic_fpn': semantic_fpn_errors}


@pytest.mark.parametrize('task', ERRORS)
@torch.no_grad()
def test_outputs_are_those_of_the_reference(task, models):
    errors = ERRORS[task](models[task])
    print(f'{task}: largest error {max(errors.values()):.1e}')
    assert {name: error for name, error in errors.items() if error > BOUND} == {}


def add_relu(model):
    """P7 from P6 after ReLU, as torchvision has it."""
    model.backbone.fpn.extra_blocks.p7 = nn.Sequential(nn.ReLU(), model.backbone.fpn.extra_blocks.p7)


def round_anchors(model):
    """Anchors of whole pixels, as torchvision has them."""
    model.anchor_generator.generate_anchors = None
    cells = [cell.round() for cell in model.anchor_generator.cell_anchors]
    model.anchor_generator.cell_anchors = cells


def divide_strides(model):
    """Strides from the sizes of image and map, as torchvision has them."""
    generator = AnchorGenerator(model.anchor_generator.sizes, model.anchor_generator.aspect_ratios)
    generator.cell_anchors = model.anchor_generator.cell_anchors
    model.anchor_generator = generator


def count_background_once_more(model):
    model.head.classification_head.cls_logits.weight.data = model.head.classification_head.cls_logits.weight.roll(1, 0)


def pool_unaligned(model):
    """torchvision's RoIAlign."""
    pool = MultiScaleRoIAlign(['0', '1', '2', '3'], 7, 2)
    model.roi_heads.box_roi_pool.forward = lambda maps, boxes, shapes=None: pool(maps, boxes, IMAGES.image_sizes)


def roll_classes(model):
    """Background last, as in the file."""
    predictor = model.roi_heads.box_predictor.cls_score
    predictor.weight.data, predictor.bias.data = predictor.weight.roll(-1, 0), predictor.bias.roll(-1, 0)


def align_corners(model):
    for layer in model.modules():
        if isinstance(layer, nn.Upsample):
            layer.align_corners = True


BREAKS = [('retinanet', add_relu, {'p7'}), ('retinanet', round_anchors, {'anchors0'}),
          ('retinanet', divide_strides, {'anchors4'}), ('retinanet', count_background_once_more, {'cls0'}),
          ('mask_rcnn', pool_unaligned, {'roi_feat'}), ('mask_rcnn', roll_classes, {'box_cls'}),
          ('semantic_fpn', align_corners, {'logits'})]


@pytest.mark.parametrize('task, change, noticed', BREAKS, ids=lambda value: getattr(value, '__name__', None))
@torch.no_grad()
def test_a_change_is_noticed(task, change, noticed, models):
    model = deepcopy(models[task])
    change(model)
    errors = ERRORS[task](model)
    assert noticed <= {name for name, error in errors.items() if error > 1e3 * BOUND}


@pytest.mark.parametrize('task', ['retinanet', 'mask_rcnn'])
def test_a_detector_is_called_like_those_of_torchvision(task, models):
    model = deepcopy(models[task]).float()
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 40)]
    targets = [dict(boxes=torch.tensor([[5., 6, 30, 40]]), labels=torch.tensor([79]),
                    masks=torch.ones(1, 50, 70, dtype=torch.uint8)),
               dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64),
                    masks=torch.zeros(0, 64, 40, dtype=torch.uint8))]
    model.transform.min_size, model.transform.max_size = (64,), 96
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert all(value.isfinite() for value in losses.values()) and unused == []
    model.zero_grad()
    with torch.no_grad():
        found = model.eval()(images)
    assert [sorted(result) for result in found] == 2 * [sorted({'boxes', 'labels', 'scores', *(
        ['masks'] if task == 'mask_rcnn' else [])})]
    for image, result in zip(images, found, strict=True):
        limits = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert (result['boxes'] >= 0).all() and (result['boxes'] <= limits).all()
        assert ((result['labels'] >= 0) & (result['labels'] < 80)).all()


@pytest.mark.parametrize('task', ['retinanet', 'mask_rcnn'])
@pytest.mark.parametrize('boxes, labels, message', [
    ([[0., 0, 9, 9]], [80], 'Target 0 has the label 80: labels are 0 to 79'),
    ([[0., 0, 9, 9]], [-1], 'has the label -1'),
    ([[5., 0, 5, 9]], [1], r'has the box \[5.0, 0.0, 5.0, 9.0\], which has no width or height'),
    ([[float('nan'), 0, 5, 9]], [1], 'has no width or height'),
    ([[0., 0, 9, 9]], [1, 2], '1 boxes and 2 labels')])
def test_targets_that_cannot_be_right_are_named(models, task, boxes, labels, message):
    target = dict(boxes=torch.tensor(boxes), labels=torch.tensor(labels))
    with pytest.raises(DataError, match=message):
        models[task]([torch.rand(3, 32, 32)], [target])


@pytest.mark.parametrize('task', ['retinanet', 'mask_rcnn'])
@torch.no_grad()
def test_boxes_are_float32_under_autocast(models, task):
    model = deepcopy(models[task]).float().eval()
    if task == 'mask_rcnn':
        model.roi_heads.score_thresh = 0.
    model.transform.min_size, model.transform.max_size = (64,), 96
    with torch.autocast('cpu', torch.bfloat16):
        found = model([torch.rand(3, 64, 80)])[0]
    assert len(found['boxes']) and found['boxes'].dtype == found['scores'].dtype == torch.float32
    assert not torch.equal(found['boxes'], found['boxes'].bfloat16().float())
