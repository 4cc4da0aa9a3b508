"""Train a model of caretrans or timm: python train.py DATA [--recipe NAME] [flags]. Recipes: caretrans/recipes.

With --task, a recipe of a detector or segmenter, or data for one (COCO, Pascal VOC, images with masks), train that.
"""
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import caretrans  # noqa: F401 (registers the models)
from caretrans.config import TrainConfig, parse_train_config
from caretrans.dense.config import SAMPLE_RECIPES, DenseConfig, find_dense_task
from caretrans.dense.training import DenseTrainer
from caretrans.distributed import find_processes, is_primary, shared_errors
from caretrans.errors import run_command
from caretrans.progress import show_messages
from caretrans.training.classification import ClassificationTrainer
from caretrans.training.run import TrainResult, run_training
from caretrans.training.trainer import Trainer


def parse(argv: list[str]) -> tuple[Any, type[Trainer]]:
    """The config of a command line, and the kind of training that it asks for."""
    task = find_dense_task(argv)
    if not task:
        return parse_train_config(argv, __doc__, TrainConfig), ClassificationTrainer
    return parse_train_config(argv, __doc__, DenseConfig, SAMPLE_RECIPES[task]), DenseTrainer


def report(data: str, result: TrainResult) -> Iterator[str]:
    """Lines about a finished run; `data` is what evaluating its checkpoint needs besides the file."""
    name, title = result.best_score, result.score_title.split(',')[0]
    if result.best is None or result.last.scores[name] is None:
        yield f'no {title}: the evaluation images have nothing to score'
    else:
        yield (f'best {title} {result.best.scores[name]:.1f} % after epoch {result.best.epoch}, '
               f'last {result.last.scores[name]:.1f} %')
    yield f'curves: {result.folder / "curves.png"}   table: {result.folder / "summary.csv"}'
    file = 'last.pth.tar' if result.best is None else 'best.pth.tar'
    yield f'next: bash cmd/eval.sh {shlex.join([str(result.folder / file), *([data] if data else [])])}'


def run() -> int:
    processes = find_processes()
    show_messages(processes.is_primary)
    with shared_errors():  # all processes have the same command line
        config, kind = parse(sys.argv[1:])
    return run_training('train.py', config, kind, partial(report, config.data if kind is DenseTrainer else ''))


def main() -> int:
    return run_command('train.py', run, is_primary())


if __name__ == '__main__':
    sys.exit(main())
