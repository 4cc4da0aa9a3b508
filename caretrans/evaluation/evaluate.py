"""Evaluation of a checkpoint on a data set."""
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from ..checkpoint.load import Checkpoint, create_from_checkpoint
from ..checkpoint.preparation import FLAGS, Preparation, list_sources, resolve_settings
from ..data.datasets import describe_classes, list_classes, open_dataset
from ..data.loaders import EvalLoader, build_eval_loader
from ..distributed import Processes, find_processes, join_processes, leave_processes
from ..errors import CheckpointError, ConfigError, DataError, list_names
from ..fuse import to_form
from ..progress import Progress
from .metrics import evaluate_in_detail, list_worst, tabulate_classes, write_classes
from .real_labels import RealLabels

__all__ = ['EvalConfig', 'describe_result', 'evaluate_checkpoint', 'load_for_evaluation', 'open_data']

CPU = torch.device('cpu')
USUAL = dict(crop_mode='center', channel_order='rgb', orientation='ignore')  # printed only where a setting differs


@dataclass(frozen=True)
class EvalConfig:
    """The options of an evaluation, those of validate.py.

    Attributes:
        checkpoint, model_name, entry: As in `create_from_checkpoint`.
        data, dataset, split: As in `open_dataset`; by default those of the training.
        device, amp, form: Of the forward pass, see `caretrans.fuse.to_form` for the form of the network.
        batch_size, workers: Of each process.
        expect: The number of images that must be counted; None for any.
        per_class: CSV file to write, one row per class.
        worst: The number of worst classes to list with what they are mistaken for.
        real_labels: '' for the ImageNet-ReaL labels packed with timm, or a file of them; None for none.
        img_size, crop_pct, crop_mode, interpolation, channel_order, orientation: Of the images, see
            `load_for_evaluation`.
    """
    checkpoint: str
    data: str = ''
    split: str = ''
    dataset: str = ''
    model_name: str | None = None
    entry: str | None = None
    device: torch.device = CPU
    amp: str = 'off'
    form: str = 'trained'
    batch_size: int = 64
    workers: int = 2
    expect: int | None = None
    per_class: str = ''
    worst: int = 0
    real_labels: str | None = None
    img_size: int | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    channel_order: str | None = None
    orientation: str | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """The image settings, under the names that `resolve_settings` takes."""
        return {flag: getattr(self, flag) for flag in FLAGS}


def load_for_evaluation(
        checkpoint: str,
        model_name: str | None = None,
        entry: str | None = None,
        device: torch.device = CPU,
        **overrides: Any,
) -> tuple[nn.Module, Checkpoint, Preparation]:
    """Load the model of a checkpoint in evaluation mode; returns it, the checkpoint and the image settings.

    `overrides` (the flags of `preparation.FLAGS`; None is no override) take precedence over the settings in
    the checkpoint (see `read_settings`), and those over the model's `pretrained_cfg`.
    """
    model, loaded = create_from_checkpoint(checkpoint, model_name, entry)
    return model.eval().to(device), loaded, resolve_settings(model, loaded, model_name, **overrides)


# Scoring --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Evaluation:
    """What one process needs to score its share of the images; `facts` are reported with the figures."""
    model: nn.Module
    loader: EvalLoader
    images: int
    class_names: list[str]
    real_labels: RealLabels | None
    facts: dict[str, Any]


def open_data(loaded: Checkpoint, data: str, split: str, dataset: str, num_classes: int) -> tuple[Dataset, str]:
    """Open the images to score, by default those of the training; returns them and their name in messages."""
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


def _prepare(config: EvalConfig, processes: Processes) -> _Evaluation:
    """Load, open and check everything, without communication between the processes."""
    model, loaded, eval_config = load_for_evaluation(
        config.checkpoint, config.model_name, config.entry, config.device, **config.overrides)
    sources = list_sources(model, loaded, config.model_name, **config.overrides)
    if config.form != 'trained':
        model = to_form(model, config.form)
    images, name = open_data(loaded, config.data, config.split, config.dataset, model.num_classes)
    if config.expect is not None and len(images) != config.expect:
        raise DataError(f'{name} has {len(images)} images, but {config.expect} are expected.')
    facts = dict(
        checkpoint=str(config.checkpoint), entry=loaded.entry, model=model.pretrained_cfg['architecture'],
        form=config.form, data=name, eval_config=eval_config.to_dict(), eval_sources=sources,
        processes=processes.world_size)
    return _Evaluation(
        model, build_eval_loader(images, eval_config, config.batch_size, config.workers, processes, config.device),
        len(images), describe_classes(loaded.meta.get('class_names') or list_classes(images), model.num_classes),
        None if config.real_labels is None else RealLabels(images, model.num_classes, config.real_labels), facts)


def _score(
        config: EvalConfig, work: _Evaluation, processes: Processes, progress_stream: TextIO | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of `evaluate_checkpoint` without `per_class`, and the rows for it."""
    stream = progress_stream if processes.is_primary else io.StringIO()
    with Progress(work.images, stream=stream) as progress:  # of this process, the others are about as far
        progress.describe('evaluation')
        result, details = evaluate_in_detail(
            work.model, work.loader, config.device, config.amp, processes=processes,
            report=lambda seen: progress.update(min(seen * processes.world_size, work.images) - progress.count))
    result = dict(result, **work.facts)
    unreadable = [name for name, _ in result['unreadable']]
    if config.expect is not None and result['images'] != config.expect:
        raise DataError(f'{result["images"]} images were counted, but {config.expect} are expected: {len(unreadable)} '
                        f'could not be read, {list_names(unreadable)}.')
    rows = tabulate_classes(details, work.class_names)
    if config.worst:
        result['worst'] = list_worst(rows, config.worst)
    if work.real_labels is not None:
        result['real'] = work.real_labels.score(details.predictions, work.loader.share, unreadable, processes)
    return result, rows


def evaluate_checkpoint(config: EvalConfig, progress_stream: TextIO | None = None) -> dict[str, Any]:
    """Top-1, top-5 and loss of a checkpoint on a data set, split between the processes that torchrun started.

    Returns:
        On every process the figures of `metrics.evaluate`, and checkpoint, entry, model, data, eval_config,
        eval_sources, form, processes; on request also per_class and worst (rows of `metrics.tabulate_classes`), and
        real (top1, top5, images).
    Raises:
        CheckpointError, ConfigError, DataError: The file, the device or the data cannot be used, their classes differ,
            or the number of images is not the expected one; on every process, whichever found it.
    """
    processes, work, problem = find_processes(), None, None
    try:
        if config.per_class and not Path(config.per_class).parent.is_dir():
            raise DataError(
                f'{config.per_class} cannot be written: there is no folder {Path(config.per_class).parent}.')
        work = _prepare(config, processes)  # before the rendezvous: after it timm's stream readers would split the data
    except (CheckpointError, ConfigError, DataError) as error:
        problem = error
    processes = join_processes(config.device)
    try:
        for found in filter(None, processes.gather(problem)):
            raise found
        result, rows = _score(config, work, processes, progress_stream)
    finally:
        leave_processes()
    if config.per_class:
        result['per_class'] = rows
        if processes.is_primary:
            write_classes(config.per_class, rows)
    return result


def describe_result(result: dict[str, Any]) -> Iterator[str]:
    """The result of `evaluate_checkpoint` as lines of text."""
    config, sources = result['eval_config'], result['eval_sources']
    size = 'x'.join(str(side) for side in config['input_size'][1:])
    yield (f'{result["model"]}' + (f', {result["form"]}' if result['form'] != 'trained' else '')
           + f' from {result["checkpoint"]}' + (f', entry {result["entry"]}' if result['entry'] else '')
           + f', on {result["data"]}' + (f', {result["processes"]} processes' if result['processes'] > 1 else ''))
    yield (f'{size} pixels (from the {sources["img_size"]}), {config["interpolation"]} ({sources["interpolation"]}), '
           f'crop_pct {config["crop_pct"]} ({sources["crop_pct"]})' + ''.join(
               f', {name} {config[name]} ({sources[name]})' for name, usual in USUAL.items()
               if config.get(name, usual) != usual))
    yield (f'top-1 {result["top1"]:.3f} %   top-5 {result["top5"]:.3f} %   loss {result["loss"]:.4f}   '
           f'{result["images"]} images   {result["images_per_s"]:.1f} images/s')
    if 'real' in result:
        real = result['real']
        yield (f'top-1 {real["top1"]:.3f} %   top-5 {real["top5"]:.3f} %   by the ImageNet-ReaL labels of '
               f'{real["images"]} images')
    if 'worst' in result:
        yield 'The worst classes by top-1, and what they are mistaken for:'
        for row in result['worst']:
            wrong = ', '.join(f'{other["name"]} {other["images"]}' for other in row['taken_for'][:3]) or 'nothing else'
            yield (f'  {row["name"]}  {row["top1"]:.1f} % of {row["images"]}: {wrong}')
    if result['unreadable']:
        yield (f'{len(result["unreadable"])} more image(s) could not be read and are skipped: these figures are '
               f'of {result["images"]} images only:')
        yield from (f'  {name}: {reason}' for name, reason in result['unreadable'])
