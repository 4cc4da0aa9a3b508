"""Evaluation of a checkpoint on a data set."""
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from ..checkpoint.load import Checkpoint, create_from_checkpoint, create_pretrained
from ..checkpoint.preparation import FLAGS, Preparation, list_sources, resolve_settings
from ..data.datasets import describe_classes, list_classes, open_dataset
from ..data.loaders import EvalLoader, build_eval_loader
from ..distributed import Processes, find_processes, join_processes, leave_processes, shared_errors
from ..errors import CheckpointError, ConfigError, DataError, EvaluationError, list_names
from ..flags import check_weights
from ..fuse import to_form
from ..progress import Progress
from ..text import count_noun
from .classes import match_classes
from .metrics import (
    Accuracy, ClassScore, Scores, check_forward, evaluate_in_detail, list_non_finite, list_worst, tabulate_classes,
    write_classes)
from .real_labels import RealLabels

__all__ = [
    'EvalConfig', 'EvalData', 'EvalResult', 'describe_result', 'evaluate_checkpoint', 'load_for_evaluation',
    'open_data']

CPU = torch.device('cpu')
USUAL = dict(crop_mode='center', channel_order='rgb', orientation='ignore')  # printed only where a setting differs


@dataclass(frozen=True)
class EvalConfig:
    """The options of an evaluation, those of validate.py.

    Attributes:
        checkpoint, model_name, entry, pretrained: See `load_for_evaluation`.
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
    checkpoint: str = ''
    data: str = ''
    split: str = ''
    dataset: str = ''
    model_name: str | None = None
    entry: str | None = None
    pretrained: bool = False
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
        checkpoint: str = '',
        model_name: str | None = None,
        entry: str | None = None,
        device: torch.device = CPU,
        pretrained: bool = False,
        **overrides: Any,
) -> tuple[nn.Module, Checkpoint, Preparation]:
    """Load a model in evaluation mode; returns it, its checkpoint and the preparation of images.

    Args:
        checkpoint, model_name, entry: As in `create_from_checkpoint`.
        pretrained: Load the published weights of `model_name` instead of a file, see `create_pretrained`.
        overrides: The flags of `preparation.FLAGS`; None is no override. They take precedence over the settings in the
            checkpoint (see `read_settings`), and those over the model's `pretrained_cfg`.
    Raises:
        ConfigError: Neither a file nor published weights are named, or both.
        CheckpointError: The weights cannot be loaded.
    """
    check_weights(checkpoint, pretrained, model_name, entry)
    if pretrained:
        model, loaded = create_pretrained(model_name)
    else:
        model, loaded = create_from_checkpoint(checkpoint, model_name, entry)
    preparation = resolve_settings(model, loaded, model_name, **overrides)
    check_forward(model.eval().to(device), preparation.input_size, device)
    return model, loaded, preparation


# Scoring --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class EvalData:
    """Images to score a model on.

    Attributes:
        name: Of the data, in messages.
        classes: The model's class for each label; None if the labels are the model's classes.
        class_names: Of the model's classes, for people.
    """
    images: Dataset
    name: str
    classes: list[int] | None
    class_names: list[str]


@dataclass(frozen=True)
class EvalResult(Scores):
    """Scores of a checkpoint, and what they are scores of.

    Attributes:
        checkpoint, entry: The file and its entry with the weights.
        form, data: As in `EvalConfig`.
        eval_config, eval_sources: The image settings, and the source of each: flag, checkpoint or model.
        processes: The number of processes.
        worst, per_class: The worst classes and all of them, on request.
        real: By the ImageNet-ReaL labels, on request.
    """
    checkpoint: str
    entry: str
    model: str
    form: str
    data: str
    eval_config: dict[str, Any]
    eval_sources: dict[str, str]
    processes: int
    worst: list[ClassScore] | None = None
    real: Accuracy | None = None
    per_class: list[ClassScore] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result for JSON, without what was not requested."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class _Work:
    """A loaded model and opened data, ready to be scored.

    Attributes:
        entries: The other entries of the file with weights.
        facts: Fields of the `EvalResult`.
    """
    model: nn.Module
    entries: tuple[str, ...]
    loader: EvalLoader
    data: EvalData
    real_labels: RealLabels | None
    facts: dict[str, Any]


def open_data(loaded: Checkpoint, data: str, split: str, dataset: str, num_classes: int) -> EvalData:
    """Open the images to score, by default those of the training.

    Raises:
        DataError: They cannot be opened, or some of their classes are unknown to the model.
    """
    trained = loaded.meta.get('config')
    trained = trained if isinstance(trained, dict) else {}  # files of others have their own
    if not data and not dataset:
        data, dataset = trained.get('data', ''), trained.get('dataset', '')
        if not data and not dataset:
            raise DataError(f'{loaded.path} does not say which data it is for: name a folder.')
    name = data or dataset
    images = open_dataset(data, split or trained.get('val_split') or 'val', dataset)
    found, known = list_classes(images), loaded.get_class_names(num_classes)
    classes = None if found is None else match_classes(found, known, num_classes, name, str(loaded.path))
    if known is None and classes is None:
        known = found
    return EvalData(images, name, classes, describe_classes(known, num_classes))


def _prepare(config: EvalConfig, processes: Processes) -> _Work:
    """Load, open and check everything, without communication between the processes."""
    model, loaded, eval_config = load_for_evaluation(
        config.checkpoint, config.model_name, config.entry, config.device, config.pretrained, **config.overrides)
    sources = list_sources(model, loaded, config.model_name, **config.overrides)
    if config.form != 'trained':
        model = to_form(model, config.form)
    data = open_data(loaded, config.data, config.split, config.dataset, model.num_classes)
    if config.expect is not None and len(data.images) != config.expect:
        raise DataError(f'{data.name} has {len(data.images)} images, but {config.expect} are expected.')
    facts = dict(
        checkpoint=str(loaded.path), entry=loaded.entry, model=model.pretrained_cfg['architecture'], form=config.form,
        data=data.name, eval_config=eval_config.to_dict(), eval_sources=sources, processes=processes.world_size)
    loader = build_eval_loader(data.images, eval_config, config.batch_size, config.workers, processes, config.device)
    real_labels = None if config.real_labels is None else RealLabels(
        data.images, model.num_classes, config.real_labels)
    return _Work(model, loaded.entries, loader, data, real_labels, facts)


def _score(
        config: EvalConfig, work: _Work, processes: Processes, progress_stream: TextIO | None,
) -> tuple[EvalResult, list[ClassScore]]:
    """The result without `per_class`, and the rows for it."""
    stream = progress_stream if processes.is_primary else io.StringIO()
    total = len(work.data.images)
    with Progress(total, stream=stream) as progress:  # of this process, the others are about as far
        progress.describe('evaluation')
        try:
            scores, details = evaluate_in_detail(
                work.model, work.loader, config.device, config.amp, processes=processes, classes=work.data.classes,
                report=lambda seen: progress.update(min(seen * processes.world_size, total) - progress.count))
        except EvaluationError as error:
            if not work.entries or not list_non_finite(work.model):
                raise
            other = ' or '.join(f'--entry {name!r}' for name in work.entries)
            raise EvaluationError(f'{str(error)[:-1]}, or other weights of this file with {other}.') from error
    unreadable = [name for name, _ in scores.unreadable]
    if config.expect is not None and scores.images != config.expect:
        raise DataError(f'{scores.images} images were counted, but {config.expect} are expected: {len(unreadable)} '
                        f'could not be read, {list_names(unreadable)}.')
    rows = tabulate_classes(details, work.data.class_names)
    real = None if work.real_labels is None else work.real_labels.score(
        details.predictions, work.loader.share, unreadable, processes)
    worst = list_worst(rows, config.worst) if config.worst else None
    return EvalResult(**vars(scores), **work.facts, worst=worst, real=real), rows


def evaluate_checkpoint(config: EvalConfig, progress_stream: TextIO | None = None) -> EvalResult:
    """Top-1, top-5 and loss of a checkpoint on a data set, split between the processes that torchrun started.

    Every process returns the same result.

    Raises:
        CheckpointError, ConfigError, DataError: The file, the device or the data cannot be used, the data have classes
            that the model does not know, or the number of images is not the expected one; on every process, whichever
            found it.
        EvaluationError: Logits are not finite.
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
        with shared_errors():  # it fails on all processes, whichever found the problem
            for found in filter(None, processes.gather(problem)):
                raise found
            result, rows = _score(config, work, processes, progress_stream)
    finally:
        leave_processes()
    if config.per_class:
        result = replace(result, per_class=rows)
        if processes.is_primary:
            write_classes(config.per_class, rows)
    return result


def describe_result(result: EvalResult) -> Iterator[str]:
    """The result of `evaluate_checkpoint` as lines of text."""
    config, sources = result.eval_config, result.eval_sources
    size = 'x'.join(str(side) for side in config['input_size'][1:])
    yield (f'{result.model}' + (f', {result.form}' if result.form != 'trained' else '')
           + f' from {result.checkpoint}' + (f', entry {result.entry}' if result.entry else '')
           + f', on {result.data}' + (f', {result.processes} processes' if result.processes > 1 else ''))
    yield (f'{size} pixels (from the {sources["img_size"]}), {config["interpolation"]} ({sources["interpolation"]}), '
           f'crop_pct {config["crop_pct"]} ({sources["crop_pct"]})' + ''.join(
               f', {name} {config[name]} ({sources[name]})' for name, usual in USUAL.items()
               if config.get(name, usual) != usual))
    yield (f'top-1 {result.top1:.3f} %   top-5 {result.top5:.3f} %   loss {result.loss:.4f}   '
           f'{result.images} images   {result.images_per_s:.1f} images/s'
           + ('   among all classes of the model' if result.subset else ''))
    if result.subset:
        subset = result.subset
        yield (f'top-1 {subset.top1:.3f} %   top-5 {subset.top5:.3f} %   loss {subset.loss:.4f}   among the '
               f'{subset.classes} classes of the data')
    if result.real:
        yield (f'top-1 {result.real.top1:.3f} %   top-5 {result.real.top5:.3f} %   by the ImageNet-ReaL labels of '
               f'{result.real.images} images')
    if result.worst is not None:
        yield 'The worst classes by top-1, and what they are mistaken for:'
        for row in result.worst:
            wrong = ', '.join(f'{other.name} {other.images}' for other in row.taken_for[:3]) or 'nothing else'
            yield f'  {row.name}  {row.top1:.1f} % of {row.images}: {wrong}'
    if result.unreadable:
        yield (f'{count_noun(len(result.unreadable), "more image")} could not be read and are skipped: these figures '
               f'are of {result.images} images only:')
        yield from (f'  {name}: {reason}' for name, reason in result.unreadable)
