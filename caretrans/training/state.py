"""Train state: the progress of a run, saved in checkpoints so that a resumed run computes the same numbers.

Random numbers are not part of it: they depend only on seed, epoch and step (see `caretrans.seeds`).
"""
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.nn as nn

from ..distributed import Processes
from ..text import count_noun

__all__ = [
    'Division', 'EpochRow', 'Evaluation', 'TrainScores', 'TrainState', 'describe_world_change', 'gather_train_state',
    'restore_train_state']

OF_ONE_PROCESS = ('images', 'counted', 'loss_total', 'term_totals', 'unreadable')


@dataclass(frozen=True)
class EpochRow:
    """A row of summary.csv, and of a checkpoint.

    Attributes:
        terms: Parts of the training loss, and other figures of its steps, as `train_NAME`.
        scores: Of the evaluation, as `val_NAME`, accuracies in percent; None for what was not measured.
    """
    epoch: int
    train_loss: float
    terms: dict[str, float]
    scores: dict[str, float | None]
    lr: float
    images_per_s: float
    seconds: float
    data_wait: float

    def to_dict(self) -> dict[str, float | None]:
        """The columns."""
        return dict(
            epoch=self.epoch, train_loss=self.train_loss, **self.terms, **self.scores, lr=self.lr,
            images_per_s=self.images_per_s, seconds=self.seconds, data_wait=self.data_wait)

    @classmethod
    def from_dict(cls, columns: dict[str, Any]) -> 'EpochRow':
        own = {item.name for item in fields(cls)}
        rest = {name: value for name, value in columns.items() if name not in own}
        return cls(
            **{name: value for name, value in columns.items() if name in own},
            terms={name: value for name, value in rest.items() if name.startswith('train_')},
            scores={name: value for name, value in rest.items() if not name.startswith('train_')})


@dataclass(frozen=True)
class TrainScores:
    """Scores of the training part of an epoch over all processes; `data_wait` is a share of its seconds.

    Attributes:
        terms: Means of the parts of the loss, by name.
    """
    loss: float
    lr: float
    seconds: float
    images_per_s: float
    data_wait: float
    terms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Scores of an evaluation, by the names of their columns, its seconds, and (name, reason) of unreadable images."""
    scores: dict[str, float | None]
    seconds: float = 0.
    unreadable: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        epoch: Number of finished epochs.
        step: Number of optimizer steps in the current epoch.
        images, counted, loss_total, term_totals: Over these steps in this process: images seen, images of steps that
            were not skipped, sum of their losses, and sums of the parts of these.
        seconds, waited: Over these steps: elapsed time, and the part of it spent waiting for data.
        lr: Learning rate of the last step.
        trained: Scores of the current epoch, once only its evaluation remains.
        unreadable: (name, reason) of the training images found unreadable in the current epoch.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    counted: int = 0
    loss_total: float = 0.
    term_totals: list[float] = field(default_factory=list)
    seconds: float = 0.
    waited: float = 0.
    lr: float = 0.
    trained: TrainScores | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Division:
    """Division of an optimizer step over processes and passes; it may change when a run resumes.

    Attributes:
        streams: Whether images are read in order, without an index.
    """
    world_size: int
    device_batch: int
    accumulation: int
    streams: bool
    workers: int


def gather_train_state(state: TrainState, modules: dict[str, nn.Module], processes: Processes) -> dict[str, Any]:
    """The entry 'standing' of a checkpoint: the train state of all processes, which all call this function.

    Args:
        modules: The model, and its average if there is one, by name. Until the end of an epoch every process has its
            own running statistics of BatchNorm.
    """
    mine = {name: getattr(state, name) for name in OF_ONE_PROCESS}
    mine['statistics'] = {} if processes.is_alone else {
        name: {key: buffer.cpu() for key, buffer in module.named_buffers() if buffer.is_floating_point()}
        for name, module in modules.items()}
    common = {name: value for name, value in asdict(state).items() if name not in OF_ONE_PROCESS}
    return dict(common, world_size=processes.world_size, processes=processes.gather(mine))


def restore_train_state(saved: dict[str, Any], modules: dict[str, nn.Module], processes: Processes) -> TrainState:
    """The train state of this process from the entry of `gather_train_state`; loads the statistics into `modules`.

    If the number of processes has changed, statistics become their mean and sums go to the primary process.
    """
    parts = saved['processes']
    common = {name: value for name, value in saved.items() if name not in ('processes', 'world_size')}
    if len(parts) == processes.world_size:
        mine = parts[processes.rank]
        statistics = mine['statistics']
    else:
        mine = dict(images=0, counted=0, loss_total=0., unreadable=[])
        if processes.is_primary:
            mine = {name: sum((part[name] for part in parts), type(parts[0][name])()) for name in mine}
            mine['term_totals'] = list(map(sum, zip(*(part.get('term_totals', ()) for part in parts), strict=True)))
        statistics = {
            name: {key: torch.stack([part['statistics'][name][key] for part in parts]).mean(dim=0) for key in values}
            for name, values in parts[0]['statistics'].items()}
    for name, values in statistics.items():
        buffers = dict(modules[name].named_buffers())
        for key, value in values.items():
            buffers[key].copy_(value)
    state = TrainState(**common, **{name: mine[name] for name in OF_ONE_PROCESS if name in mine})
    state.unreadable = [tuple(entry) for entry in state.unreadable]
    state.trained = TrainScores(**state.trained) if state.trained else None
    return state


def describe_world_change(before: Division, after: Division) -> str:
    """One line on the effects of other processes, batches or, for streamed data, workers; '' if nothing changed."""
    changed = {name for name, value in asdict(before).items() if value != getattr(after, name)}
    changed -= set() if after.streams else {'workers'}
    if not changed:
        return ''
    images = 'streamed data come in another order' if after.streams and changed & {'workers', 'world_size'} else \
        'the images of each step are the same'
    seen = f'BatchNorm sees {after.device_batch} images at a time' + (
        f' instead of {before.device_batch}' if 'device_batch' in changed else ' as before')
    statistics = ', its running statistics start from their mean' if 'world_size' in changed else ''
    return (f'The run resumes with {count_noun(after.world_size, "process", "processes")} instead of '
            f'{before.world_size}: {images}, {seen}{statistics}, and sums are rounded in another order, so the result '
            f'is not bit-identical to that of an unchanged run.')
