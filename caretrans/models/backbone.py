"""What timm asks of a hierarchical backbone and no paper speaks of, written once for all networks."""
from typing import Any, Dict, List, Optional, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from huggingface_hub import errors as hub_errors
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, clean_state_dict, get_pretrained_cfg
from timm.models._features import feature_take_indices

from .published_keys import Table, rename_keys, rename_on_load

__all__ = ['MIN_SIDE', 'Backbone', 'build_backbone', 'check_image_size', 'init_weights']

MIN_SIDE = 32  # pixels: at 1/32 of the size, a smaller image would have no position left
FETCH_ERRORS = (OSError, hub_errors.EntryNotFoundError, getattr(hub_errors, 'HTTPError', OSError))


@torch.fx.wrap
def check_image_size(x: torch.Tensor, min_side: int = MIN_SIDE) -> torch.Tensor:
    """Return the images (B, C, H, W) unchanged; ValueError with their size when a side is below `min_side` pixels."""
    height, width = x.shape[-2], x.shape[-1]
    if height < min_side or width < min_side:
        raise ValueError(f'The image is {height} x {width} pixels, smaller than {min_side} x {min_side}: enlarge it.')
    return x


def init_weights(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for the weights of convolutions and linear layers, biases 0.

    Drawn in float32 at least: in half precision the tails of the distribution come out wrong.
    """
    if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.is_meta:  # meta: 10 times slower than the rest
        weight = torch.empty_like(module.weight, dtype=torch.promote_types(module.weight.dtype, torch.float32))
        with torch.no_grad():
            module.weight.copy_(trunc_normal_(weight, std=0.02))
        nn.init.zeros_(module.bias)


class Backbone(nn.Module):
    """A network of `stem`, `stages` (each with `downsample`, `blocks` and a flag `grad_checkpointing`) and heads.

    A subclass sets `stem`, `stages`, `feature_info`, `num_features` and `head_hidden_size`, and has
    `forward_features`, `forward_head`, `get_classifier` and `reset_classifier`. Its `published_keys` are the glossary
    from the published checkpoints to its own names; `load_state_dict` takes both.
    See timm's documentation of feature extraction for what the methods are for.
    """

    published_keys: Table = ()

    def __init__(self) -> None:
        super().__init__()
        rename_on_load(self, self.published_keys)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters of two or more dimensions to leave out of weight decay: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regular expressions that group parameters into layers, for layer-wise learning rates."""
        blocks = [(r'^stages\.(\d+)\.downsample', (0,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)]
        return dict(stem=r'^stem', blocks=r'^stages\.(\d+)' if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations.

        Outputs and gradients stay; the running statistics of BatchNorm are updated twice per step, as in all of timm.
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
            indices: The last n stages for an int, all for None, else these.
            norm: There for timm; no norm follows the stages.
            stop_early: Run no stage after the last one taken.
            output_fmt: 'NCHW' only.
            intermediates_only: Leave the final map out.
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
        if stop_early and not torch.jit.is_scripting():  # TorchScript cannot take a part of them
            stages = stages[:max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """Drop the stages after the last of `indices`, and with any of them the heads; returns the indices taken."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return take_indices


def build_backbone(model_cls: Type[Backbone], variant: str, pretrained: bool, **kwargs: Any) -> Backbone:
    """timm's `build_model_with_cfg`, for checkpoints with published keys or ours.

    Raises:
        RuntimeError: The weights could not be fetched; says from where, and what to do instead.
        TypeError: An argument that the model does not take, by name.
    """
    def prepare(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
        for wrapper in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):  # timm unwraps files, not downloads
            if isinstance(state_dict.get(wrapper), dict):
                state_dict = state_dict[wrapper]
                break
        state_dict = rename_keys(clean_state_dict(state_dict), model_cls.published_keys)
        wrong = [key for key in state_dict.keys() ^ model.state_dict().keys()
                 if not key.startswith(('head.', 'head_dist.'))]
        if wrong:  # leaving out the heads, timm would load what there is and go on with random weights
            raise RuntimeError(
                f'These weights do not fit {variant}: {len(wrong)} keys are missing or unexpected, such as {wrong[0]}.')
        return state_dict

    file = (kwargs.get('pretrained_cfg_overlay') or {}).get('file')
    try:
        return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=prepare, **kwargs)
    except RuntimeError as error:
        if 'weights_only' not in str(error):
            raise
        raise RuntimeError(  # timm's advice, to open it with weights_only=False, would run what it holds
            f'{file or variant} is no checkpoint that opens without running code: is it a web page, or cut off? '
            f'caretrans.checkpoint.read_checkpoint says what it is.') from error
    except FETCH_ERRORS as error:
        if not pretrained:
            raise
        cfg, reason = get_pretrained_cfg(variant), str(error).rstrip('.') or file  # timm's for a file is empty
        raise RuntimeError(
            f'No weights for {variant}: {type(error).__name__}: {reason}. By default they are the file '
            f'{cfg.hf_hub_filename} of the Hugging Face repository {cfg.hf_hub_id}, whose list of files could not be '
            f'checked. Download the file by hand, from there or from where the authors link to, and pass '
            f'pretrained_cfg_overlay=dict(file="{cfg.hf_hub_filename}").') from error
