"""Models by name and file, called as in mmpretrain: `get_model(name, pretrained=path)` and `model.extract_feat(x)`."""
from os import PathLike

import timm

from .checkpoint import create_from_checkpoint, create_pretrained
from .checkpoint.layout import list_models
from .errors import ConfigError
from .models.backbone import Backbone, resolve_alias

__all__ = ['CASVIT_SIZES', 'get_model']

CASVIT_SIZES = dict(xsmall='xs', small='s', middle='m', tiny='t')  # in names of OpenMMLab: in ours
OPENMMLAB_NAMES = {f'casvit-{size}_8xb256_in1k': f'casvit_{ours}' for size, ours in CASVIT_SIZES.items()}


def get_model(name: str, pretrained: str | PathLike | bool = False) -> Backbone:
    """Create a model in evaluation mode.

    Args:
        name: A model of this package or an alias, or 'casvit-small_8xb256_in1k' (also xsmall, middle, tiny).
        pretrained: The path of a checkpoint that `caretrans.checkpoint` reads, from which all weights are loaded; True
            for published weights that can be downloaded; False for random ones.
    Returns:
        The network. Its `extract_feat(x)` returns a tuple with one tensor, the pooled features (B, num_features); of
        CAS-ViT and MLLA those after the norm.
    Raises:
        ConfigError: An unknown name.
        CheckpointError: The file cannot be read, or is not of this model.
    """
    ours = resolve_alias(OPENMMLAB_NAMES.get(name, name))
    if ours.partition('.')[0] not in list_models():
        raise ConfigError(
            f'There is no model {name!r}: choose from {", ".join([*OPENMMLAB_NAMES, *list_models()])}.')
    if pretrained is True:
        model, _ = create_pretrained(ours, 'pass the path of a downloaded file as pretrained')
    elif pretrained:
        model, _ = create_from_checkpoint(pretrained, ours)
    else:
        model = timm.create_model(ours)
    return model.eval()
