"""Evaluation of a checkpoint on a data set."""
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from ..checkpoint.load import Checkpoint, create_from_checkpoint
from ..checkpoint.preparation import list_sources, resolve_settings
from ..data.datasets import describe_classes, list_classes, open_dataset
from ..data.loaders import EvalLoader, build_eval_loader
from ..distributed import Processes, find_processes, join_processes, leave_processes
from ..errors import CheckpointError, ConfigError, DataError, list_names
from ..fuse import to_form
from ..progress import Progress
from .metrics import evaluate_in_detail, list_worst, tabulate_classes, write_classes
from .real_labels import RealLabels

__all__ = ['describe_result', 'evaluate_checkpoint', 'load_for_evaluation', 'open_data']

CPU = torch.device('cpu')
UNUSUAL = (('crop_mode', 'center'), ('channel_order', 'rgb'))  # named where they are not so


def load_for_evaluation(
        checkpoint: str,
        model_name: str | None = None,
        entry: str | None = None,
        device: torch.device = CPU,
        **overrides: Any,
) -> tuple[nn.Module, Checkpoint, dict[str, Any]]:
    """The model of a checkpoint in evaluation mode, the checkpoint, and how images are made ready for it.

    `overrides` (img_size, crop_pct, crop_mode, interpolation, channel_order; None is no override) go over what the
    checkpoint was evaluated with in training (see `read_settings`), which goes over the `pretrained_cfg` of the model.
    """
    model, loaded = create_from_checkpoint(checkpoint, model_name, entry)
    return model.eval().to(device), loaded, resolve_settings(model, loaded, model_name, **overrides)


# Scoring --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Evaluation:
    """What one process needs to score its share of the images; `facts` are reported with the figures."""
    model: nn.Module
    device: torch.device
    loader: EvalLoader
    images: int
    class_names: list[str]
    real_labels: RealLabels | None
    facts: dict[str, Any]


def open_data(loaded: Checkpoint, data: str, split: str, dataset: str, num_classes: int) -> tuple[Dataset, str]:
    """The images to score, those of the training if none are named; and what to call them."""
    trained = loaded.meta.get('config') or {}
    if not data and not dataset:
        data, dataset = trained.get('data', ''), trained.get('dataset', '')
        if not data and not dataset:
            raise DataError(f'{loaded.path} does not say which data it is for: name a folder.')
    images = open_dataset(
        data, split or trained.get('val_split') or 'val', dataset, classes=loaded.meta.get('class_names'))
    classes = list_classes(images)
    if classes is not None and len(classes) != num_classes:
        raise DataError(f'{data} has {len(classes)} classes, {loaded.path} has {num_classes}: take its own data.')
    return images, data or dataset


def _prepare(
        checkpoint: str, data: str, split: str, dataset: str, model_name: str | None, entry: str | None,
        device: torch.device, processes: Processes, batch_size: int, workers: int, expect: int | None,
        real_labels: str | None, form: str, **overrides: Any,
) -> _Evaluation:
    """Load, open and check everything, without talking to the other processes."""
    model, loaded, eval_config = load_for_evaluation(checkpoint, model_name, entry, device, **overrides)
    if form != 'trained':
        model = to_form(model, form)
    images, name = open_data(loaded, data, split, dataset, model.num_classes)
    if expect is not None and len(images) != expect:
        raise DataError(f'{name} has {len(images)} images, but {expect} are expected.')
    facts = dict(
        checkpoint=str(checkpoint), entry=loaded.entry, model=model.pretrained_cfg['architecture'], form=form,
        data=name, eval_config=eval_config, eval_sources=list_sources(loaded, model_name, **overrides),
        processes=processes.world_size)
    return _Evaluation(
        model, device, build_eval_loader(images, eval_config, batch_size, workers, processes, device), len(images),
        describe_classes(loaded.meta.get('class_names') or list_classes(images), model.num_classes),
        None if real_labels is None else RealLabels(images, model.num_classes, real_labels), facts)


def _score(
        work: _Evaluation, processes: Processes, amp: str, progress_stream: Any, expect: int | None, worst: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of `evaluate_checkpoint` without its file, and the rows of that."""
    stream = progress_stream if processes.is_primary else io.StringIO()
    with Progress(work.images, stream=stream) as progress:  # of this process, the others are about as far
        progress.describe('evaluation')
        result, details = evaluate_in_detail(
            work.model, work.loader, work.device, amp, processes=processes,
            report=lambda seen: progress.update(min(seen * processes.world_size, work.images) - progress.count))
    result = dict(result, **work.facts)
    left_out = [name for name, _ in result['unreadable']]
    if expect is not None and result['images'] != expect:
        raise DataError(f'{result["images"]} images were counted, but {expect} are expected: {len(left_out)} could not '
                        f'be read, {list_names(left_out)}.')
    rows = tabulate_classes(details, work.class_names)
    if worst:
        result['worst'] = list_worst(rows, worst)
    if work.real_labels is not None:
        result['real'] = work.real_labels.score(details.answers, work.loader.share, left_out, processes)
    return result, rows


def evaluate_checkpoint(
        checkpoint: str,
        data: str = '',
        split: str = '',
        dataset: str = '',
        model_name: str | None = None,
        entry: str | None = None,
        device: torch.device = CPU,
        batch_size: int = 64,
        workers: int = 2,
        amp: str = 'off',
        progress_stream: Any = None,
        expect: int | None = None,
        per_class: str = '',
        worst: int = 0,
        real_labels: str | None = None,
        form: str = 'trained',
        **overrides: Any,
) -> dict[str, Any]:
    """Top-1, top-5 and loss of a checkpoint over a data set, shared out to the processes that torchrun started.

    Args:
        data, dataset, split: As in `open_dataset`; what the checkpoint was trained with, if not given.
        batch_size, workers: Of each process.
        expect: How many images must be counted.
        per_class: CSV file to write, a row for each class.
        worst: How many of the worst classes to list with what they are taken for.
        real_labels: '' for the ImageNet-ReaL labels packed with timm, or a file of them; None for none.
        form: Of the network, see `caretrans.fuse.to_form`.
        overrides: See `load_for_evaluation`.
    Returns:
        On every process what `metrics.evaluate` returns, and checkpoint, entry, model, data, eval_config,
        eval_sources, form, processes; where asked for also per_class and worst (rows of `metrics.tabulate_classes`),
        and real (top1, top5, images).
    Raises:
        CheckpointError, ConfigError, DataError: The file, the device or the data cannot be used, their classes differ,
            or the images are not as many as expected; on every process, whichever found it.
    """
    processes, work, problem = find_processes(), None, None
    try:
        if per_class and not Path(per_class).parent.is_dir():
            raise DataError(f'{per_class} cannot be written: there is no folder {Path(per_class).parent}.')
        work = _prepare(  # before the processes meet, since timm's readers of streams would share out the images then
            checkpoint, data, split, dataset, model_name, entry, device, processes, batch_size, workers, expect,
            real_labels, form, **overrides)
    except (CheckpointError, ConfigError, DataError) as error:
        problem = error
    processes = join_processes(device)
    try:
        for found in filter(None, processes.gather(problem)):
            raise found
        result, rows = _score(work, processes, amp, progress_stream, expect, worst)
    finally:
        leave_processes()
    if per_class:
        result['per_class'] = rows
        if processes.is_primary:
            write_classes(per_class, rows)
    return result


def describe_result(result: dict[str, Any]) -> Iterator[str]:
    """Lines for people about what `evaluate_checkpoint` returns."""
    config, sources = result['eval_config'], result['eval_sources']
    size = 'x'.join(str(side) for side in config['input_size'][1:])
    yield (f'{result["model"]}' + (f', {result["form"]}' if result['form'] != 'trained' else '')
           + f' from {result["checkpoint"]}' + (f', entry {result["entry"]}' if result['entry'] else '')
           + f', on {result["data"]}' + (f', {result["processes"]} processes' if result['processes'] > 1 else ''))
    yield (f'{size} pixels (from the {sources["img_size"]}), {config["interpolation"]} ({sources["interpolation"]}), '
           f'crop_pct {config["crop_pct"]} ({sources["crop_pct"]})' + ''.join(
               f', {name} {config[name]} ({sources[name]})' for name, usual in UNUSUAL
               if config.get(name, usual) != usual))
    yield (f'top-1 {result["top1"]:.3f} %   top-5 {result["top5"]:.3f} %   loss {result["loss"]:.4f}   '
           f'{result["images"]} images   {result["images_per_s"]:.1f} images/s')
    if 'real' in result:
        real = result['real']
        yield (f'top-1 {real["top1"]:.3f} %   top-5 {real["top5"]:.3f} %   by the ImageNet-ReaL labels of '
               f'{real["images"]} images')
    if 'worst' in result:
        yield 'The worst classes by top-1, and what they are taken for:'
        for row in result['worst']:
            wrong = ', '.join(f'{other["name"]} {other["images"]}' for other in row['taken_for'][:3]) or 'nothing else'
            yield (f'  {row["name"]}  {row["top1"]:.1f} % of {row["images"]}: {wrong}')
    if result['unreadable']:
        yield (f'{len(result["unreadable"])} more image(s) could not be read and are left out of these figures, '
               f'which are of {result["images"]} images only:')
        yield from (f'  {name}: {reason}' for name, reason in result['unreadable'])
