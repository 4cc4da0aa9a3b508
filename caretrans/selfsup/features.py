"""Features of a trunk: loading one from any file, extracting them, and writing them with each image's neighbours."""
import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..checkpoint import create_from_checkpoint, create_pretrained, read_checkpoint
from ..checkpoint.preparation import Preparation, resolve_eval_config, resolve_settings
from ..data.decode import EvalTransform, describe_error
from ..devices import autocast
from ..distributed import Processes
from ..errors import ConfigError, DataError
from ..evaluation.predict import find_images
from ..flags import check_weights
from ..models.backbone import resolve_alias
from ..text import escape, open_text
from .knn import find_nearest
from .pretraining import create_trunk
from .weights import is_pretraining, load_pretraining

__all__ = [
    'CPU', 'Features', 'check_ending', 'estimate_statistics', 'extract_features', 'extract_folder', 'load_trunk',
    'write_features', 'write_sheet']

CPU = torch.device('cpu')
ENDINGS = ('.npz', '.csv')
PUBLISHED = dict(interpolation='bilinear', crop_pct=.875)  # of evaluation images of the published pre-training
THUMBNAIL = 96  # pixels

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Features(nn.Module):
    """The pooled features (B, D) of a trunk, before its classifier if it has one."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk.forward_head(self.trunk.forward_features(x), pre_logits=True)


@torch.no_grad()
def _check(trunk: nn.Module, preparation: Preparation) -> None:
    """Run a trunk on one empty image, so that what it cannot take is named before any work.

    Raises:
        ConfigError: It does not take images of this size, or has no features before its classifier.
    """
    name, shape = type(trunk).__name__, preparation.input_size
    try:
        features = Features(trunk).eval()(torch.zeros(1, *shape))
    except AttributeError:
        raise ConfigError(f'{name} has no forward_head, which returns its features: use another model.') from None
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f'{name} does not take images of {shape[1]} x {shape[2]} pixels '
                          f'({" ".join(str(error).split())[:200]}): use another size.') from error
    if features.ndim != 2:
        raise ConfigError(f'{name} does not pool its features: omit global_pool.')


def load_trunk(
        checkpoint: str = '', model_name: str | None = None, entry: str | None = None, pretrained: bool = False,
        random_weights: bool = False, teacher: bool = False, **overrides: Any) -> tuple[nn.Module, Preparation]:
    """A trunk in evaluation mode, and the preparation of its images.

    Args:
        checkpoint: A file of pre-training, published or ours, or of a classifier.
        model_name, entry, pretrained: See `caretrans.evaluation.load_for_evaluation`.
        random_weights: Initialise the model randomly instead, for comparison: `model_name`, or that of a file of
            pre-training, whose images are then prepared in the same way.
        teacher: Take the teacher's trunk of a file of pre-training instead of the student's.
        overrides: Image settings, see `load_for_evaluation`; None is no override.
    Raises:
        CheckpointError, ConfigError: The weights cannot be loaded, or do not take images of this size.
    """
    check_weights(checkpoint, pretrained, model_name, entry, False if checkpoint else random_weights)
    given = {name: value for name, value in overrides.items() if value is not None}
    loaded = read_checkpoint(checkpoint, entry) if checkpoint else None
    module = load_pretraining(checkpoint, entry) if loaded is not None and is_pretraining(loaded) else None
    if teacher and (module is None or random_weights):
        raise ConfigError(f'{"random weights" if random_weights else checkpoint or model_name} have no teacher: omit '
                          f'--teacher.')
    if module is not None:
        design = module.design
        if model_name and resolve_alias(model_name).partition('.')[0] != design.model.partition('.')[0]:
            raise ConfigError(f'{checkpoint} was pre-trained with {design.model}, not with {model_name}: omit --model.')
        trunk = create_trunk(design.model, **design.model_args) if random_weights else \
            (module.teacher if teacher else module.student).trunk
        usual = {} if 'eval_config' in loaded.meta else dict(PUBLISHED, img_size=design.img_size)
        preparation = resolve_settings(trunk, loaded, None, **{**usual, **given})
    elif random_weights and loaded is not None:
        raise ConfigError(f'{checkpoint} is of no pre-training: name its network with --model, without --checkpoint.')
    elif random_weights:  # prepared as in pre-training
        trunk = create_trunk(model_name)
        preparation = resolve_eval_config(trunk, **{**PUBLISHED, 'orientation': 'exif', **given})
    else:
        trunk, loaded = create_pretrained(model_name) if pretrained else \
            create_from_checkpoint(checkpoint, model_name, entry)
        preparation = resolve_settings(trunk, loaded, model_name, **given)
    _check(trunk.eval(), preparation)
    return trunk, preparation


@torch.no_grad()
def extract_features(
        trunk: nn.Module, batches: Batches, amp: str = 'off', processes: Processes = Processes(),  # noqa: B008
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) in float32 and labels (N,) of the images of all processes, on the CPU, on every process.

    Args:
        batches: Images on the device of the trunk, and labels; this process's share.
    Raises:
        DataError: There are no images.
    """
    network, features, labels = Features(trunk).eval(), [], []
    for images, targets in batches:
        with autocast(images.device, amp):
            features.append(network(images).float().cpu())
        labels.append(targets.cpu())
    parts = processes.gather((torch.cat(features), torch.cat(labels)) if features else None)
    parts = [part for part in parts if part is not None]
    if not parts:
        raise DataError('No image could be read, so there are no features.')
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


@torch.no_grad()
def estimate_statistics(trunk: nn.Module, batches: Batches) -> None:
    """Set the running statistics of every BatchNorm to their mean over the batches; the weights stay the same.

    Batches of less than half the images of the first are skipped: a few images would count as much as many.

    Random weights need it before they are compared with trained ones: at 0 and 1 they score several points lower, and
    the difference would be taken for something learned.
    """
    norms = [module for module in trunk.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta, training = [norm.momentum for norm in norms], trunk.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    network, first = Features(trunk).train(), 0
    for images, _ in batches:
        first = first or len(images)
        if 2 * len(images) >= first:
            network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    trunk.train(training)


# Files ----------------------------------------------------------------------------------------------------------------

def extract_folder(
        trunk: nn.Module, preparation: Preparation, images: Iterable[str], device: torch.device = CPU,
        batch_size: int = 32) -> tuple[torch.Tensor, list[str], list[tuple[str, str]]]:
    """Features (N, D) of image files and folders, the paths of those that were read, and (path, reason) of the others.

    Raises:
        DataError: There are no images, or none can be read.
    """
    transform, read, unreadable = EvalTransform(preparation), [], []

    def load() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batch: list[torch.Tensor] = []
        for path in find_images(images):
            try:
                batch.append(transform(Path(path).read_bytes()))
                read.append(str(path))
            except Exception as error:  # one damaged file must not cost the others
                unreadable.append((str(path), describe_error(error)))
            if len(batch) == batch_size:
                yield torch.stack(batch).to(device), torch.zeros(len(batch))
                batch.clear()
        if batch:
            yield torch.stack(batch).to(device), torch.zeros(len(batch))

    features, _ = extract_features(trunk.to(device), load())
    return features, read, unreadable


def check_ending(path: str | Path) -> None:
    """Refuse a file of features that `write_features` cannot write.

    Raises:
        ConfigError: Another ending.
    """
    if Path(path).suffix not in ENDINGS:
        raise ConfigError(f'{path}: let the name end in {" or ".join(ENDINGS)}.')


def write_features(path: str | Path, features: torch.Tensor, names: Sequence[str]) -> None:
    """Write features and the names of their images.

    Args:
        path: .npz, with the arrays `features` (N, D) float32 and `names` (N,); or .csv, a row per image.
    Raises:
        ConfigError: Another ending.
        DataError: The file cannot be written.
    """
    check_ending(path)
    path = Path(path)
    names = [escape(name) for name in names]
    try:
        if path.suffix == '.npz':
            with open(path, 'wb') as file:  # savez would append the ending to other names
                np.savez(file, features=features.numpy(), names=np.array(names))
            return
        with open_text(path, 'w') as file:
            writer = csv.writer(file)
            writer.writerow(['name', *(f'f{i}' for i in range(features.shape[1]))])
            writer.writerows([name, *map(repr, row)] for name, row in zip(names, features.tolist(), strict=True))
    except OSError as error:
        raise DataError(f'{path} cannot be written ({error.strerror or error}): check the folder.') from None


def write_sheet(
        path: str | Path, features: torch.Tensor, names: Sequence[str], preparation: Preparation, rows: int = 12,
        neighbours: int = 7) -> None:
    """Draw some images, each at the left of a row, and at its right those with the nearest features, nearest first.

    Args:
        path: PNG.
        preparation: Crops the images as the network sees them.
        rows: The images drawn are spread evenly over all.
    Raises:
        DataError: There is only one image, or the file cannot be written.
    """
    if len(features) < 2:
        raise DataError(f'{list(names)} have no neighbours: name more images.')
    queries = [i * len(features) // min(rows, len(features)) for i in range(min(rows, len(features)))]
    count = min(neighbours, len(features) - 1)
    order = find_nearest(features[queries], features, count + 1)[1]
    transform = EvalTransform(replace(preparation, mean=(0, 0, 0), std=(1, 1, 1), channel_order='rgb').at_size(
        (THUMBNAIL, THUMBNAIL)))
    tiles = []
    for query, found in zip(queries, order.tolist(), strict=True):
        others = [index for index in found if index != query][:count]
        tiles += [transform(Path(names[index]).read_bytes()) for index in (query, *others)]
    image: Image.Image = to_pil_image(make_grid(torch.stack(tiles).clamp(0, 1), nrow=count + 1, pad_value=1.))
    try:
        image.save(path, 'PNG')
    except OSError as error:
        raise DataError(f'{path} cannot be written ({error.strerror or error}): check the folder.') from None
