"""Whether faster ways of training learn what the published way does: what `benchmark.py --bench curves` runs."""
import itertools
from collections.abc import Sequence
from typing import TextIO

import torch

from ..config import TrainConfig, choose_model_args, read_recipe
from ..errors import ConfigError, DataError
from ..measure.sample_network import SAMPLE_IMAGES
from ..progress import Progress
from .config import BenchConfig
from .inference import BenchResult, shorten
from .training_curves import compare_curves, describe_curves
from .training_ways import list_ways, parse_way

__all__ = ['bench_curves', 'list_comparisons']

RECIPE = 'care_s0_fruit14'  # of the bundled photographs, with a layer scale under which few steps show something
SEEDS = (0, 1, 2)


def list_comparisons(config: BenchConfig, names: Sequence[str], device: torch.device) -> list[tuple[TrainConfig, str]]:
    """What to train, and the way that is held against the published one; by default the one with most changes.

    Raises:
        ConfigError: Something that cannot be compared was asked for.
    """
    if config.teacher != ['none'] or config.checkpoint:
        raise ConfigError('--bench curves is of random weights and plain labels: leave --teacher and --checkpoint out.')
    oblong = [text for text, (height, width) in zip(config.img_size, config.sizes, strict=True) if height != width]
    if oblong:
        raise ConfigError(f'--img-size {oblong[0]} with --bench curves: training takes square images.')
    ways = config.ways or [list_ways(device)[-1]]
    if not all(parse_way(way, device).changes for way in ways):
        raise ConfigError(f'--ways {" ".join(ways)} with --bench curves: the published way is held against the others.')
    recipe = read_recipe(RECIPE)
    comparisons = []
    for name, way, (side, _), batch in itertools.product(
            names, ways, config.sizes, config.batch_size or [recipe['batch_size']]):
        model_args = choose_model_args(recipe['model_args'], recipe, name)
        comparisons.append((TrainConfig(**{
            **recipe, 'model': name, 'model_args': model_args, 'data': config.data or str(SAMPLE_IMAGES),
            'img_size': side, 'batch_size': batch, 'workers': None}), way))
    return comparisons


def bench_curves(
        comparisons: Sequence[tuple[TrainConfig, str]], steps: int, device: torch.device, result: BenchResult,
        stream: TextIO | None = None) -> None:
    """Train, and put what comes out into a result.

    Args:
        comparisons: From `list_comparisons`.
        steps: Of each run.
        stream: Where progress is shown; stdout if not given.
    Raises:
        ConfigError, DataError: The settings or the data cannot work.
    """
    with Progress(len(comparisons) * steps * (len(SEEDS) + 1), 'steps', stream=stream) as progress:
        for config, way in comparisons:
            progress.describe(f'{config.model}, {way}')
            try:
                comparison = compare_curves(config, way, device, steps, SEEDS, report=lambda: progress.update(1))
            except Exception as error:
                if isinstance(error, (ConfigError, DataError)) and not result.curves:
                    raise  # nothing is lost
                result.failures.append(f'curves of {config.model}, {way}: {shorten(error)}')
                continue
            result.curves.append(comparison)
            result.texts.append(describe_curves(comparison))
