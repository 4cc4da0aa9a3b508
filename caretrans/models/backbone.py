"""Base class of the networks: the interface that timm expects of a hierarchical backbone."""
import sys
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from huggingface_hub import errors as hub_errors
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SelectAdaptivePool2d, get_device_dtype, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    clean_state_dict,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices

from .folding import LinearHead
from .published_keys import Table, rename_keys, rename_on_load

__all__ = [
    'MIN_SIDE', 'Backbone', 'build_backbone', 'check_image_size', 'disable_drop_path', 'find_family', 'init_linear',
    'init_weights', 'make_cfg', 'register_alias', 'resolve_alias']

MIN_SIDE = 32  # pixels: the last map has 1/32 of the size, so a smaller image would leave it empty
FETCH_ERRORS = (OSError, hub_errors.EntryNotFoundError, getattr(hub_errors, 'HTTPError', OSError))


@torch.fx.wrap
def check_image_size(x: torch.Tensor, min_side: int = MIN_SIDE) -> torch.Tensor:
    """Return the images (B, C, H, W) unchanged; raise ValueError if a side is below `min_side` pixels."""
    height, width = x.shape[-2], x.shape[-1]
    if height < min_side or width < min_side:
        raise ValueError(f'The image is {height} x {width} pixels, smaller than {min_side} x {min_side}: enlarge it.')
    return x


def init_weights(module: nn.Module, kinds: Tuple[Type[nn.Module], ...] = (nn.Conv2d, nn.Linear)) -> None:
    """Draw weights of convolutions and linear layers from a truncated normal of std 0.02, and set biases to 0.

    Values are drawn in float32 or wider: in half precision the tails of the distribution are wrong.
    """
    if isinstance(module, kinds) and not module.weight.is_meta:  # 10 times slower on the meta device
        weight = torch.empty_like(module.weight, dtype=torch.promote_types(module.weight.dtype, torch.float32))
        with torch.no_grad():
            module.weight.copy_(trunc_normal_(weight, std=0.02))
        nn.init.zeros_(module.bias)


def init_linear(module: nn.Module) -> None:
    """Initialize linear layers like `init_weights`; convolutions keep PyTorch's initialization."""
    init_weights(module, (nn.Linear,))


class Backbone(nn.Module):
    """A network of `stem`, `stages` (of `downsample`, `blocks` and a flag `grad_checkpointing`), `norm` and heads.

    A subclass sets `stem`, `stages`, `norm` (of the last map), `feature_info`, `num_features` and `head_hidden_size`,
    and calls `set_heads`. `published_keys` maps keys of published checkpoints to keys of the class, and `computed_keys`
    lists endings of published keys whose values are computed here; `load_state_dict` accepts both layouts.
    `mmpretrain_keys` maps published keys to the keys of a converter for mmpretrain, if there is one.
    `inference_forms` maps some of `caretrans.fuse.FORMS` to the function that makes the form from the fused network
    and, for 'phone', images; see `caretrans.fuse.to_form`.
    `squash_from` is the image size, in pixels, from which the authors squash images instead of cropping them, and the
    tag of that setup; None if they always crop.
    `dense_norms` are the names of the norms after the stages in published files for detection and segmentation.
    The methods are described in timm's documentation of feature extraction.

    With two heads, `head` and `head_dist`, the output is their mean, in training and in evaluation: trained on plain
    labels both learn from that mean. For distillation `set_distilled_training(True)` makes training return the pair
    (head, head_dist); evaluation still returns the mean.

    Args:
        distilled: Whether there are two heads instead of one.
    """

    published_keys: Table = ()
    computed_keys: Tuple[str, ...] = ()
    mmpretrain_keys: Table = ()
    inference_forms: Dict[str, Callable[..., nn.Module]] = {}
    squash_from: Optional[Tuple[int, str]] = None
    dense_norms: Tuple[str, ...] = ()
    init_module = staticmethod(init_weights)

    def __init__(self, distilled: bool) -> None:
        super().__init__()
        self.distilled = distilled
        self.distilled_training = False
        rename_on_load(self, self.published_keys, self.computed_keys)

    def make_head(self, num_classes: int, **dd: Any) -> nn.Module:
        """A classifier of pooled features (B, num_features)."""
        return LinearHead(self.num_features, num_classes, **dd)

    def set_heads(self, num_classes: int, global_pool: str, **dd: Any) -> None:
        """Create pooling and new heads, or identities for 0 classes.

        Raises:
            ValueError: Heads without pooling, or pooling that changes the number of features.
        """
        if num_classes and not global_pool:
            raise ValueError(f'global_pool="" leaves nothing to classify: num_classes must be 0, not {num_classes}.')
        pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if pool.feat_mult() != 1:
            raise ValueError(f'global_pool={global_pool!r} changes the number of features: use avg, max or avgmax.')
        self.num_classes, self.global_pool = num_classes, pool
        self.head = self.make_head(num_classes, **dd) if num_classes else nn.Identity()
        if self.distilled:
            self.head_dist = self.make_head(num_classes, **dd) if num_classes else nn.Identity()
            if num_classes:
                self.head.siblings, self.head_dist.is_sibling = (self.head_dist,), True

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Make training return the pair (head, head_dist) instead of their mean.

        Raises:
            ValueError: The network has only one head.
        """
        if enable and not self.distilled:
            raise ValueError(f'This {type(self).__name__} has one head: create it with distilled=True.')
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> Union[nn.Module, Tuple[nn.Module, nn.Module]]:
        """Linear layer of the head, or of both heads; identities if there are no classes."""
        head = getattr(self.head, 'fc', self.head)
        return (head, getattr(self.head_dist, 'fc', self.head_dist)) if self.distilled else head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the heads (0 classes: none) on the same device, in the same dtype; None keeps the pooling.

        New heads for a network without pooling also enable 'avg'.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type or ('avg' if num_classes else '')
        self.set_heads(num_classes, global_pool, **get_device_dtype(self))
        for module in (self.global_pool, self.head, *([self.head_dist] if self.distilled else [])):
            module.apply(self.init_module).train(self.training)

    @torch.jit.ignore
    def compute_entries(self, height: int, width: int) -> Dict[str, torch.Tensor]:
        """Entries of a published checkpoint for images of this size under `computed_keys`: none.

        Raises:
            ValueError: The published network does not support this size.
        """
        return {}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to features (B, num_features, H', W') at 1/32 of the size."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to logits (B, num_classes), or to the pooled features (B, num_features) before the heads."""
        x = self.global_pool(x)
        if pre_logits or not self.num_classes:
            return x
        if not hasattr(self, 'head_dist') or hasattr(self.head, 'num_merged'):
            return self.head(x)
        logits, logits_dist = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return logits, logits_dist
        return (logits + logits_dist) / 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def extract_feat(self, x: torch.Tensor) -> Tuple[torch.Tensor]:
        """Images (B, in_chans, H, W) to a tuple of the pooled features (B, num_features), as in mmpretrain."""
        return (self.forward_head(self.forward_features(x), pre_logits=True),)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters of two or more dimensions that are exempt from weight decay: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regular expressions that group parameters into layers, for layer-wise learning rates."""
        blocks = [(r'^stages\.(\d+)\.downsample', (0,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)]
        return dict(stem=r'^stem', blocks=r'^stages\.(\d+)' if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations.

        Outputs and gradients are unchanged; the running statistics of BatchNorm are updated twice per step, as
        everywhere in timm.
        """
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Run the stages and return the maps after some of them.

        Args:
            x: (B, in_chans, H, W) images.
            indices: Stages to return: the last n for an int, all for None.
            norm: Also normalise the map of the last stage in the list; the final map always is.
            stop_early: Stop after the last stage in `indices`.
            output_fmt: 'NCHW' only.
            intermediates_only: Return only the list.
        Returns:
            The list of maps, or (final map, list of maps).
        Raises:
            ValueError: Another `output_fmt`.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f'output_fmt must be NCHW, not {output_fmt}.')
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        intermediates = []
        stages = self.stages
        if stop_early and not torch.jit.is_scripting():  # TorchScript cannot slice them
            stages = stages[:max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            is_last = i == len(self.stages) - 1
            final = self.norm(x) if is_last else x
            if i in take_indices:
                intermediates.append(final if norm else x)
            x = final
        if intermediates_only:
            return intermediates
        return x, intermediates

    @torch.jit.ignore
    def use_for_dense_tasks(self, last_map: Optional[str] = None) -> str:
        """Prepare for detection and segmentation, which use the maps after the stages.

        Args:
            last_map: None or 'expanded'; CARE also has 'residual'.
        Returns:
            Which last map it has now.
        Raises:
            ValueError: The network has no such map.
        """
        if last_map not in (None, 'expanded'):
            raise ValueError(f'{type(self).__name__} has no {last_map!r} map, only CARE has: omit last_map.')
        return 'expanded'

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """Drop the stages after the last of `indices`, and then also norm and heads; return the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return take_indices


def disable_drop_path(model: nn.Module) -> None:
    """Switch off the stochastic depth that some models of timm have by default."""
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.


def make_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Return timm's `pretrained_cfg` for 1,000 classes at 224 x 224, resized to 256 and cropped, with `kwargs`."""
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'min_input_size': (3, MIN_SIDE, MIN_SIDE), 'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD, 'license': 'mit', **kwargs}


def register_alias(alias: str, entrypoint: Callable[..., Backbone]) -> None:
    """Register an alias of a model with timm; `timm.list_models(name_matches_cfg=True)` omits it."""
    def create(pretrained: bool = False, **kwargs: Any) -> Backbone:
        return entrypoint(pretrained, **kwargs)

    create.__name__ = create.__qualname__ = alias
    create.__module__, create.__doc__ = entrypoint.__module__, f'Alias of {entrypoint.__name__}.'
    create.alias_of = entrypoint.__name__
    setattr(sys.modules[create.__module__], alias, register_model(create))


def resolve_alias(model_name: str) -> str:
    """Return the model name, with its tag, for which `model_name` is an alias; `model_name` itself if it is not one."""
    name, dot, tag = model_name.partition('.')
    entrypoint = model_entrypoint(name) if is_model(name) else None
    return getattr(entrypoint, 'alias_of', name) + dot + tag


def find_family(model_name: str) -> str:
    """Return the family of a model: 'care' for care_s0, 'casvit' for casvit_xs and rcvit_xs."""
    return resolve_alias(model_name).partition('.')[0].split('_')[0]


def _say_where(variant: str) -> str:
    """Advice on where to find the weights of a model and how to load them, if the download failed."""
    cfg = get_pretrained_cfg(variant)
    if not cfg.hf_hub_id:
        return (f'Download the file by hand, by the links on {cfg.origin_url}, and pass '
                f'pretrained_cfg_overlay=dict(file="FILE").')
    return (f'By default they are the file {cfg.hf_hub_filename} of the Hugging Face repository {cfg.hf_hub_id}, whose '
            f'list of files could not be checked. Download the file by hand, from there or from where the authors link '
            f'to, and pass pretrained_cfg_overlay=dict(file="{cfg.hf_hub_filename}").')


def build_backbone(model_cls: Type[Backbone], variant: str, pretrained: bool, **kwargs: Any) -> Backbone:
    """Call timm's `build_model_with_cfg`; checkpoints may have published keys or keys of this package.

    Raises:
        RuntimeError: The weights could not be downloaded; the message names the source and an alternative.
        TypeError: An argument that the model does not accept.
        ValueError: An `output_stride` other than 32, which some libraries ask for.
    """
    if kwargs.pop('output_stride', 32) != 32:
        raise ValueError(f'{variant} has an output_stride of 32 only: choose a decoder that takes all four maps.')

    def prepare(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
        for wrapper in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):  # timm unwraps only local files
            if isinstance(state_dict.get(wrapper), dict):
                state_dict = state_dict[wrapper]
                break
        state_dict = rename_keys(clean_state_dict(state_dict), model_cls.published_keys, drop=model_cls.computed_keys)
        wrong = [key for key in state_dict.keys() ^ model.state_dict().keys()
                 if not key.startswith(('head.', 'head_dist.'))]
        if wrong:  # timm would load what fits and keep random weights for the rest
            raise RuntimeError(
                f'These weights do not fit {variant}: {len(wrong)} keys are missing or unexpected, such as {wrong[0]}.')
        return state_dict

    overlay = dict(kwargs.pop('pretrained_cfg_overlay', None) or {})
    file = overlay.get('file')
    if kwargs.get('distilled'):
        overlay['classifier'] = ('head', 'head_dist')
    if overlay:
        kwargs['pretrained_cfg_overlay'] = overlay
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
        if not (cfg.has_weights or cfg.state_dict):
            raise RuntimeError(
                f"No weights for {variant}: timm cannot fetch from Google Drive or Tsinghua's cloud. "
                f'{_say_where(variant)}')
    try:
        return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=prepare, **kwargs)
    except RuntimeError as error:
        if 'weights_only' not in str(error):
            raise
        raise RuntimeError(  # timm's advice, to open it with weights_only=False, would run what it holds
            f'{file or variant} is no checkpoint that opens without running code: is it a web page, or cut off, or '
            f'does it hold more than weights? `python -m caretrans convert {file or "FILE"} weights.pth.tar --to '
            f'caretrans` says what it is, or makes one that opens.') from error
    except FETCH_ERRORS as error:
        if not pretrained:
            raise
        reason = str(error).rstrip('.') or file  # timm's for a file is empty
        raise RuntimeError(
            f'No weights for {variant}: {type(error).__name__}: {reason}. {_say_where(variant)}') from error
