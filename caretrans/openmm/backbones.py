"""Backbones in the registry of mmengine, which mmpretrain, mmdet and mmseg search: CARETransformer, CASViT and MLLA."""
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS

from ..checkpoint.file import WRAPPERS
from ..dense import create_dense_backbone
from ..dense.keys import strip_backbone, translate_backbone
from ..errors import CheckpointError, ConfigError, list_names
from ..get_model import CASVIT_SIZES
from ..models.published_keys import rename_keys

__all__ = ['MLLA', 'CARETransformer', 'CASViT']

SECOND_HEADS = ('dist_head.', 'head_dist.')

_logger = logging.getLogger(__name__)


class _Backbone(BaseModule):
    """Maps of a network, each with a norm of its own: (B, 3, H, W) to a tuple of (B, C, ceil(H / s), ceil(W / s)).

    Published weights load, also those of detectors and segmenters, ours, and those of `convert --to mmpretrain`: all of
    the network or none. CAS-ViT is written in the layout of mmpretrain, the others under published keys; the norms are
    norm0 to norm3. The norm before the heads of a classification file becomes norm3.

    Args:
        arch: Size of the network, as in the names of its models: 's0', 'xs', 't' ...
        out_indices: Stages of the maps, 0 (stride 4) to 3 (stride 32).
        norm: 'layer', 'batch' or 'none', of each map; that of the published networks by default.
        norm_eval: Keep the statistics of BatchNorm in training: for pretrained weights and fewer than 16 images per
            device, never for random weights.
        last_map, pad_to: See `caretrans.dense.create_dense_backbone`.
        init_cfg: Of mmengine, e.g. dict(type='Pretrained', checkpoint='rcvit_s.pth').
        model_args: For the network, e.g. drop_path_rate.
    Raises:
        ConfigError: An unknown size, stage, norm or map.
    """

    family = ''
    default_norm = 'layer'
    sizes: Mapping[str, str] = {}

    def __init__(
            self, arch: str, out_indices: Sequence[int] = (3,), norm: str | None = None, norm_eval: bool = False,
            last_map: str = 'expanded', pad_to: int = 32, init_cfg: dict | None = None, **model_args: Any) -> None:
        super().__init__(init_cfg)
        self.arch = arch
        try:
            self.out_indices = tuple(out_indices)
            self.body = create_dense_backbone(
                f'{self.family}_{self.sizes.get(arch, arch)}', out_indices=self.out_indices,
                norm=norm or self.default_norm, frozen_bn=norm_eval, last_map=last_map, pad_to=pad_to, **model_args)
        except TypeError as error:
            raise ConfigError(f'{type(self).__name__}: {error}: see its docstring for the arguments.') from None
        self.register_load_state_dict_pre_hook(_read_keys)
        self.register_state_dict_post_hook(_write_keys)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.body(x))

    def _checkpoint_filter(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Turn the weights of a classification network into those of an ImageClassifier, which calls this hook."""
        _unwrap(state_dict)
        if prefix or any(key.startswith('backbone.') for key in state_dict):
            return
        if any(key.startswith(SECOND_HEADS) for key in state_dict):
            raise CheckpointError(
                f'These weights of {type(self).__name__} have two heads, an ImageClassifier one: load the backbone '
                f"alone, by backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=FILE)).")
        for key in list(state_dict):
            name = f'head.fc.{key[5:]}' if key.startswith('head.') else f'backbone.{key}'
            state_dict[name] = state_dict.pop(key)

    def match_keys(self, weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Published weights, or ours, under the keys of `body`, and the keys that it does not use."""
        levels, norms = self.body.levels, self.body.norms
        names = self.body.network.dense_norms or ('norm0', 'norm1', 'norm2', 'norm3')
        stages = {f'{name}.': i for i, name in enumerate(names)}
        last = {key[5:] for key in weights if key.startswith('norm.')}
        if levels[-1] == 3 and last == norms[-1].state_dict().keys():  # of a classification file, of the same kind
            stages['norm.'] = 3
        found, unused = translate_backbone(
            self.body, {key: value for key, value in weights.items() if not key.startswith(tuple(stages))})
        for key, value in weights.items():
            name, _, tail = key.partition('.')
            stage = stages.get(f'{name}.')
            if stage in levels:
                found[f'norms.{levels.index(stage)}.{tail}'] = value
            elif stage is not None:
                unused.append(key)
        return found, unused


def _unwrap(state_dict: dict[str, Any]) -> None:
    """Replace the content of a file, which mmengine hands on, by the weights that it wraps."""
    weights = next((state_dict[name] for name in WRAPPERS if isinstance(state_dict.get(name), Mapping)), None)
    if weights is not None:
        state_dict.clear()
        state_dict.update(weights)


def _read_keys(module: _Backbone, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """A hook of load_state_dict: weights in any layout, all that the network needs."""
    if not prefix:
        _unwrap(state_dict)
    weights = {key[len(prefix):]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    found, unused = module.match_keys(strip_backbone(weights))
    wrong = [key for key, value in module.body.state_dict().items()
             if key.startswith('network.') and (key not in found or found[key].shape != value.shape)]
    if wrong:
        raise CheckpointError(
            f'These weights do not fit {type(module).__name__} {module.arch}: {len(wrong)} are missing or of another '
            f'shape ({list_names(wrong, 2)}): take another file, or `python -m caretrans convert` it first.')
    state_dict.update({f'{prefix}body.{key}': value for key, value in found.items()})
    if unused:
        _logger.info('%s does not use %s', type(module).__name__, list_names(unused))


def _write_keys(module: _Backbone, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """A hook of state_dict: keys of mmpretrain, or published ones."""
    network, body = module.body.network, f'{prefix}body.'
    own = {key[len(body):]: state_dict.pop(key) for key in list(state_dict) if key.startswith(body)}
    weights = rename_keys(
        {key.removeprefix('network.'): value for key, value in own.items() if key.startswith('network.')},
        network.published_keys, to_published=True)
    for key, value in rename_keys(weights, network.mmpretrain_keys).items():
        state_dict[prefix + key.removeprefix('backbone.')] = value
    for key, value in own.items():
        if key.startswith('norms.'):
            _, i, name = key.split('.')
            state_dict[f'{prefix}norm{module.body.levels[int(i)]}.{name}'] = value


@MODELS.register_module()
class CARETransformer(_Backbone):
    __doc__ = f'CARE Transformer: s0, s1, s2.\n\n{_Backbone.__doc__}'
    family = 'care'


@MODELS.register_module()
class CASViT(_Backbone):
    __doc__ = f'CAS-ViT: xsmall, small, middle, tiny, or xs, s, m, t.\n\n{_Backbone.__doc__}'
    family, default_norm, sizes = 'casvit', 'batch', CASVIT_SIZES


@MODELS.register_module()
class MLLA(_Backbone):
    __doc__ = f'MLLA: t, s, b.\n\n{_Backbone.__doc__}'
    family = 'mlla'
