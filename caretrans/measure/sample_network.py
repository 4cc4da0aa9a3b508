"""Sample weights and images for networks without a checkpoint, chosen so that an error in any layer shows.

Freshly created networks hide errors: a layer scale of 1e-6 removes the blocks, and BatchNorm does nothing yet. So
layers get random weights that preserve the scale of their input, layer scales of 0.1 to 0.4, and the BatchNorm
statistics of the images; position codes, and mixers that multiply features by features, stay small beside what they are
added to. Time and memory do not depend on the weights.
"""
from pathlib import Path

import torch
import torch.nn as nn

from ..checkpoint.preparation import Preparation, resolve_eval_config
from ..data.datasets import open_dataset
from ..data.decode import EvalTransform
from ..data.samples import load_images
from ..models.casvit import AdditiveMixer
from ..models.folding import ResidualConv

__all__ = ['SAMPLE_IMAGES', 'load_sample_images', 'randomize']

SAMPLE_IMAGES = Path(__file__).parents[2] / 'data' / 'fruit14'
POSITION_STD = 0.05  # of the weights of a position code, 3x3
# Factor of the last weights of mixers whose output grows with the square of their input: without it, an image a little
# brighter than those of the statistics would end at 1e30 after many blocks.
PRODUCT_SCALE = 0.2
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def _fill(tensor: torch.Tensor | None, mean: float, std: float, generator: torch.Generator) -> None:
    if tensor is not None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))


def _fill_module(module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, ResidualConv):  # each would double its input, and hide the branches beside it
        _fill(module.weight, 0., POSITION_STD, generator)
        _fill(module.bias, 0., 0.1, generator)
    elif isinstance(module, (nn.Conv2d, nn.Linear)):
        _fill(module.weight, 0., module.weight[0].numel() ** -0.5, generator)
        _fill(module.bias, 0., 0.1, generator)
    elif isinstance(module, NORMS):
        _fill(module.weight, 1., 0.2, generator)
        _fill(module.bias, 0.5, 0.1, generator)  # around 0, deep networks of ReLU multiply rounding errors by hundreds
    elif type(module).__name__.startswith('LayerScale'):
        for scale in module.parameters(recurse=False):
            scale.copy_(0.1 + 0.3 * torch.rand(scale.shape, generator=generator))


@torch.no_grad()
def randomize(model: nn.Module, images: torch.Tensor, seed: int = 0) -> nn.Module:
    """Randomize the weights of a network in evaluation mode so that an error in any layer shows; depends on the seed.

    Args:
        images: (B, C, H, W), from which its BatchNorm layers take their statistics.
    Returns:
        The model itself.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        _fill_module(module, generator)
    for mixer in (module for module in model.modules() if isinstance(module, AdditiveMixer)):
        mixer.project.weight.mul_(PRODUCT_SCALE)
    norms = [(m, m.momentum) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm, _ in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
        norm.train()
    model(images)
    for norm, momentum in norms:
        norm.momentum = momentum
        norm.eval()
    return model


def load_sample_images(
        model: nn.Module, size: tuple[int, int], count: int, folder: Path = SAMPLE_IMAGES,
        preparation: Preparation | None = None,
) -> torch.Tensor | None:
    """Bundled images, preprocessed for a model as in evaluation; None where they are not installed.

    Args:
        size: Height and width.
        count: Number of images, evenly spaced over the classes; repeated if there are fewer.
        preparation: By default that of the model.
    Returns:
        (count, C, height, width) float32.
    """
    if not folder.is_dir():
        return None
    preparation = (preparation or resolve_eval_config(model)).at_size(size)
    dataset = open_dataset(str(folder), 'train')
    return load_images(
        dataset, [i * len(dataset) // count for i in range(count)], EvalTransform(preparation))[0]
