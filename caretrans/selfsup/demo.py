"""Demonstration: what pre-training on the bundled images is worth, beside what needs no training.

    python -m caretrans.selfsup.demo data/fruit14 [--seeds 0 1 2] [--epochs N]

Nearest neighbours and a linear classifier score, on the validation images, the mean colour of an image, random weights
with BatchNorm statistics from the data, and the weights after pre-training with and without T-stream. Random weights
alone differ by several points between seeds, so that a single seed proves nothing.
"""
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import mean

import torch

from ..config import read_recipe
from ..data.datasets import list_classes, open_dataset
from ..data.loaders import build_eval_loader
from ..devices import count_cores
from ..errors import DataError, run_command
from ..flags import FlagParser, number
from ..progress import show_messages
from ..seeds import seed_everything
from ..text import count_noun, escape
from ..training.run import train
from .config import PretrainConfig
from .features import estimate_statistics, extract_features, load_trunk
from .pretraining import METHODS
from .probe import ProbeSettings, probe_features
from .probing import score_neighbours
from .training import PretrainTrainer

__all__ = ['Row', 'compare', 'main']

RECIPE = 'selfsup_fruit14'
COLOUR, RANDOM = 'mean colour', 'random weights'
PROBE = ProbeSettings(batch_size=64)


@dataclass(frozen=True)
class Row:
    """Top-1 in percent of the nearest neighbours and of the linear classifier (last epoch) for some features."""
    features: str
    seed: int
    neighbours: float
    linear: float


class _MeanColour(torch.nn.Module):
    """The three mean colours of an image as a trunk without weights."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
        return x


def _score(name: str, seed: int, config: PretrainConfig, checkpoint: str = '') -> Row:
    """Score the trunk of a file, random weights, or the mean colour, under equal conditions."""
    seed_everything(seed)
    trunk, preparation = load_trunk(
        checkpoint, '' if checkpoint else config.model, random_weights=not checkpoint, img_size=config.img_size,
        orientation=config.orientation)
    train_set = open_dataset(config.data, config.train_split)
    classes = list_classes(train_set)
    test_set = open_dataset(config.data, config.val_split, classes=classes)
    loaders = [build_eval_loader(data, preparation, 64, config.workers) for data in (train_set, test_set)]
    if name == RANDOM:
        estimate_statistics(trunk, loaders[0].run())
    elif name == COLOUR:
        trunk = _MeanColour()
    bank, test = (extract_features(trunk, loader.run()) for loader in loaders)
    found = score_neighbours(bank, test, len(classes), config.knn_k, config.knn_temperature)
    linear = probe_features(bank, test, len(classes), PROBE).last
    return Row(name, seed, found.top1, linear.top1)


def _make_config(data: str, folder: Path, name: str, seed: int, epochs: int | None) -> PretrainConfig:
    method = name if name in METHODS else METHODS[0]
    settings = dict(read_recipe(RECIPE, PretrainConfig), data=data, method=method, seed=seed, workers=0, device='cpu',
                    output=str(folder / f'{method}-{seed}'))
    if epochs:
        settings.update(epochs=epochs, warmup_epochs=min(settings['warmup_epochs'], epochs // 2))
    return PretrainConfig(**dict(settings, val_interval=settings['epochs']))


def _run(data: str, folder: Path, name: str, seed: int, epochs: int | None) -> Row:
    """One row, in a process with one thread; what a run prints goes to a file in its folder."""
    torch.set_num_threads(1)
    config = _make_config(data, folder, name, seed, epochs)
    with open(folder / f'{name.replace(" ", "-")}-{seed}.txt', 'w', encoding='utf-8') as log, redirect_stdout(log), \
            redirect_stderr(log):
        if name not in METHODS:
            return _score(name, seed, config)
        result = train(config, PretrainTrainer)
        return _score(name, seed, config, str(result.folder / 'last.pth.tar'))


def compare(data: str, folder: Path, seeds: Sequence[int], epochs: int | None = None) -> Iterator[Row]:
    """The rows of all features and seeds, as they are finished; two runs at a time.

    Args:
        folder: For run folders and logs, new.
        epochs: Of pre-training, if not those of the recipe.
    """
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise DataError(f'{folder} cannot be made ({error.strerror}): choose another --output.') from None
    jobs = [(COLOUR, seeds[0]), *((name, seed) for seed in seeds for name in (RANDOM, *METHODS))]
    with ProcessPoolExecutor(min(count_cores(), 2), get_context('spawn')) as pool:
        running = [pool.submit(_run, data, folder, name, seed, epochs) for name, seed in jobs]
        try:
            for job in as_completed(running):
                yield job.result()
        except BaseException:  # also a signal, whose default would leave the processes behind
            for process in active_children():
                process.terminate()
            raise


def _tabulate(rows: Sequence[Row]) -> Iterator[str]:
    """Means over the seeds, and the range."""
    yield f'{"features":16}  {"nearest neighbours":>26}  {"linear classifier":>26}'
    for name in (COLOUR, RANDOM, *METHODS):
        cells = []
        for score in ('neighbours', 'linear'):
            values = [getattr(row, score) for row in rows if row.features == name]
            spread = f' ({min(values):.1f} to {max(values):.1f})' if len(values) > 1 else ''
            cells.append(f'{mean(values):.1f} %{spread}'.rjust(26))
        yield f'{name:16}  {"  ".join(cells)}'


def _main(argv: Sequence[str]) -> int:
    parser = FlagParser(prog='python -m caretrans.selfsup.demo', description=__doc__)
    parser.add_argument('data', help='folder of the bundled images, data/fruit14')
    parser.add_argument('--seeds', type=number(int, 0), nargs='+', default=[0, 1, 2], help='(default: 0 1 2)')
    parser.add_argument('--epochs', type=number(int, 1), help='epochs of pre-training (default: as in the recipe)')
    parser.add_argument('--output', help='folder for the runs (default: a new one under runs/)')
    flags = parser.parse_args(argv)
    folder = Path(flags.output or f'runs/selfsup-demo-{time.strftime("%Y%m%d-%H%M%S")}')
    seeds = count_noun(len(flags.seeds), 'seed')
    print(escape(f'{" and ".join(METHODS)} without labels, {seeds}, into {folder}'), flush=True)
    start, rows = time.perf_counter(), []
    for row in compare(flags.data, folder, flags.seeds, flags.epochs):
        rows.append(row)
        print(f'{row.features:16}  seed {row.seed}  nearest neighbours {row.neighbours:.1f} %  linear classifier '
              f'{row.linear:.1f} %  ({time.perf_counter() - start:.0f} s)', flush=True)
    print('\n'.join(_tabulate(rows)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    show_messages()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run_command('selfsup.demo', lambda: _main(sys.argv[1:] if argv is None else argv))


if __name__ == '__main__':
    sys.exit(main())
