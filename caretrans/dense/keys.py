"""Keys of published files for dense tasks (mmdet, mmseg), and how they become ours and back.

`backbone.` holds the keys of the classification file without heads, and a norm per level; `neck.` and the heads are
mmdet's and mmseg's. mmdet counts background as the last class, torchvision as the first; where torchvision has rows for
background that mmdet lacks, they are zeros, which no output depends on.
"""
import re
from collections.abc import Mapping
from os import PathLike

import torch
import torch.nn as nn

from ..checkpoint.file import MMPRETRAIN_STEM
from ..checkpoint.load import load_strictly
from ..errors import CheckpointError
from ..models.casvit import CasVit
from ..models.published_keys import rename_keys

__all__ = ['is_dense', 'load_published', 'publish', 'strip_backbone', 'translate_backbone']

Weights = Mapping[str, torch.Tensor]

DENSE_NORM = re.compile(r'norm\d+\.')
FPN = (
    *((f'^neck.lateral_convs.{i}.conv', f'^backbone.fpn.inner_blocks.{i}.0') for i in range(4)),
    *((f'^neck.fpn_convs.{i}.conv', f'^backbone.fpn.layer_blocks.{i}.0') for i in range(4)),
)
EXTRA = (
    *((f'^neck.fpn_convs.{i + 3}.conv', f'^backbone.fpn.extra_blocks.p{i + 6}') for i in range(2)),
)
HEADS = (  # (part of a key of mmdet or mmseg, part of a key of ours)
    *((f'^bbox_head.cls_convs.{i}.conv', f'^head.classification_head.conv.{i}.0') for i in range(4)),
    *((f'^bbox_head.reg_convs.{i}.conv', f'^head.regression_head.conv.{i}.0') for i in range(4)),
    ('^bbox_head.retina_cls', '^head.classification_head.cls_logits'),
    ('^bbox_head.retina_reg', '^head.regression_head.bbox_reg'),
    ('^rpn_head.rpn_conv', '^rpn.head.conv.0.0'),
    ('^rpn_head.rpn_cls', '^rpn.head.cls_logits'),
    ('^rpn_head.rpn_reg', '^rpn.head.bbox_pred'),
    ('^roi_head.bbox_head.shared_fcs.0', '^roi_heads.box_head.fc6'),
    ('^roi_head.bbox_head.shared_fcs.1', '^roi_heads.box_head.fc7'),
    ('^roi_head.bbox_head.fc_cls', '^roi_heads.box_predictor.cls_score'),
    ('^roi_head.bbox_head.fc_reg', '^roi_heads.box_predictor.bbox_pred'),
    *((f'^roi_head.mask_head.convs.{i}.conv', f'^roi_heads.mask_head.{i}.0') for i in range(8)),
    ('^roi_head.mask_head.upsample', '^roi_heads.mask_predictor.conv5_mask'),
    ('^roi_head.mask_head.conv_logits', '^roi_heads.mask_predictor.mask_fcn_logits'),
    *((f'^decode_head.scale_heads.{i}.{j}.conv', f'^branches.{i}.{j}.0') for i in range(4) for j in (0, 2, 4)),
    *((f'^decode_head.scale_heads.{i}.{j}.bn', f'^branches.{i}.{j}.1') for i in range(4) for j in (0, 2, 4)),
    ('^decode_head.conv_seg', '^classifier'),
)
ROLLED = ('roi_heads.box_predictor.cls_score.',)  # background is the first row, in mmdet the last
PADDED = {'roi_heads.box_predictor.bbox_pred.': 4, 'roi_heads.mask_predictor.mask_fcn_logits.': 1}  # rows of background


# Backbone -------------------------------------------------------------------------------------------------------------

def strip_backbone(weights: Weights) -> dict[str, torch.Tensor]:
    """The entries under `backbone.`, without it, all of them if none are; keys of mmpretrain become published ones."""
    inside = {key.removeprefix('backbone.'): value for key, value in weights.items() if key.startswith('backbone.')}
    inside = inside or dict(weights)
    full = {f'backbone.{key}': value for key, value in inside.items()}
    if not any(key.startswith(MMPRETRAIN_STEM) for key in full):
        return inside
    norms = {key: value for key, value in inside.items() if DENSE_NORM.match(key)}
    if all(key.startswith('norm3.') for key in norms):  # of a classification network
        norms = {}
    body = {key: value for key, value in full.items() if key.removeprefix('backbone.') not in norms}
    return {
        **rename_keys(body, CasVit.mmpretrain_keys, to_published=True),
        **{f'norm{2 * int(key[4])}{key[5:]}': value for key, value in norms.items()}}


def is_dense(weights: Weights) -> bool:
    """Whether a backbone under published keys has a norm per level, as for dense tasks."""
    return any(DENSE_NORM.match(key) for key in weights)


def translate_backbone(backbone: nn.Module, weights: Weights) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Published weights of a `DenseBackbone` under our keys, and the keys of those that it does not use."""
    network = backbone.network
    norms = {f'{name}.': level for level, name in enumerate(network.dense_norms)}
    own = set(backbone.state_dict())
    found, unused, body = {}, [], {}
    for key, value in weights.items():
        level = next((level for name, level in norms.items() if key.startswith(name)), None)
        if level is None:
            body[key] = value
        elif level in backbone.levels:
            found[f'norms.{backbone.levels.index(level)}.{key.partition(".")[2]}'] = value
        else:
            unused.append(key)
    later = tuple(f'stages.{level}.' for level in range(max(backbone.levels) + 1, 4))
    for key, value in rename_keys(body, network.published_keys, drop=network.computed_keys).items():
        if f'network.{key}' not in own and key.startswith(('norm.', 'head.', 'head_dist.', *later)):
            unused.append(key)
        else:
            found[f'network.{key}'] = value
    return found, unused


def publish_backbone(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under published keys; the norm of a level that is not taken is one that changes nothing."""
    network = backbone.network
    if not network.dense_norms:
        raise CheckpointError(f'{type(network).__name__} has no published layout for dense tasks: omit --to published.')
    weights = rename_keys(network.state_dict(), network.published_keys, to_published=True)
    for level, name in enumerate(network.dense_norms):
        if level in backbone.levels:
            norm = backbone.norms[backbone.levels.index(level)]
        else:
            norm = backbone.make_norm(network.feature_info[level]['num_chs'])
        weights.update({f'{name}.{key}': value for key, value in norm.state_dict().items()})
    return weights


# Whole models ---------------------------------------------------------------------------------------------------------

def _table(model: nn.Module) -> tuple[tuple[str, str], ...]:
    extra = EXTRA if hasattr(model, 'head') else ()  # of RetinaNet, before the rows of FPN that match as well
    return (*extra, *FPN, *HEADS)


def load_published(model: nn.Module, weights: Weights, path: str | PathLike = 'the weights') -> None:
    """Load a published detector or segmenter: all that it needs, or nothing.

    Args:
        weights: Under the keys of mmdet or mmseg.
        path: Of the file, for messages.
    Raises:
        CheckpointError: Keys are missing, unexpected or of wrong shape.
    """
    body, unused = translate_backbone(model.backbone.body, strip_backbone(weights))
    found = {f'backbone.body.{key}': value for key, value in body.items()}
    rest = {key: value for key, value in weights.items() if not key.startswith('backbone.')}
    for key, value in rename_keys(rest, _table(model)).items():
        if key.startswith(ROLLED):
            value = value.roll(1, 0)
        for prefix, rows in PADDED.items():
            if key.startswith(prefix):
                value = torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
        found[key] = value
    load_strictly(model, path, found, unused)


def publish(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a detector or segmenter under the keys of mmdet or mmseg.

    Raises:
        CheckpointError: Its backbone has no published layout for dense tasks.
    """
    weights = {f'backbone.{key}': value for key, value in publish_backbone(model.backbone.body).items()}
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith('backbone.body.')}
    for key, value in rest.items():
        if key.startswith(ROLLED):
            rest[key] = value.roll(-1, 0)
        for prefix, rows in PADDED.items():
            if key.startswith(prefix):
                rest[key] = value[rows:]
    return {**weights, **rename_keys(rest, _table(model), to_published=True)}
