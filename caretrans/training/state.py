"""Where a run stands, put into a checkpoint and taken out again: all that the same numbers need.

Random numbers need nothing: they depend on seed, epoch and step alone (see randomness.py).
"""
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn as nn

from ..distributed import Processes

__all__ = ['TrainState', 'describe_world_change', 'gather_train_state', 'get_statistics', 'restore_train_state']

Statistics = dict[str, torch.Tensor]


@dataclass
class TrainState:
    """How far a run has come.

    Attributes:
        epoch: Finished epochs.
        step: Optimizer steps made in the epoch after these.
        images, counted, loss_total: In these steps and this process: images seen, those of steps that were not left
            out, sum of their losses.
        seconds, waited: In these steps: time passed, and that of it in which data were waited for.
        lr: Rate of the last step.
        trained: Figures of the training half of the epoch, when it is done and the evaluation is not.
        unreadable: (name, reason) of training images found unreadable in this epoch.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    counted: int = 0
    loss_total: float = 0.
    seconds: float = 0.
    waited: float = 0.
    lr: float = 0.
    trained: dict[str, float] | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def begin_epoch(self, epoch: int) -> None:
        """Forget the epoch before."""
        self.__init__(epoch=epoch)


OF_ONE_PROCESS = ('images', 'counted', 'loss_total', 'unreadable')


def get_statistics(module: nn.Module) -> Statistics:
    """The running statistics of BatchNorm, which are each process's own until the end of an epoch."""
    return {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def gather_train_state(standing: TrainState, modules: dict[str, nn.Module], processes: Processes) -> dict[str, Any]:
    """What a checkpoint holds of all processes; called by all of them.

    Args:
        modules: The model, and its average if there is one, by name.
    """
    mine = dict({name: getattr(standing, name) for name in OF_ONE_PROCESS}, statistics={
        name: {key: value.cpu() for key, value in get_statistics(module).items()} for name, module in modules.items()}
        if not processes.is_alone else {})
    common = {name: value for name, value in asdict(standing).items() if name not in OF_ONE_PROCESS}
    return dict(common, world_size=processes.world_size, processes=processes.gather(mine))


def restore_train_state(saved: dict[str, Any], modules: dict[str, nn.Module], processes: Processes) -> TrainState:
    """The standing of this process from what `gather_train_state` gave; puts the statistics into the modules.

    Where the number of processes is another, statistics become their mean and sums go to the first process.
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
        statistics = {
            name: {key: torch.stack([part['statistics'][name][key] for part in parts]).mean(dim=0) for key in values}
            for name, values in parts[0]['statistics'].items()}
    for name, values in statistics.items():
        buffers = dict(modules[name].named_buffers())
        for key, value in values.items():
            buffers[key].copy_(value)
    standing = TrainState(**common, **{name: mine[name] for name in OF_ONE_PROCESS})
    standing.unreadable = [tuple(entry) for entry in standing.unreadable]
    return standing


def describe_world_change(before: dict[str, Any], after: dict[str, Any]) -> str:
    """One line on what other processes, batches or, for data that stream, workers mean; '' where nothing differs.

    Args:
        before, after: world_size, device_batch, accumulation, streams and workers of both.
    """
    changed = {name for name in before if before[name] != after[name]} - (set() if after['streams'] else {'workers'})
    if not changed:
        return ''
    images = 'data that stream come in another order' if after['streams'] and changed & {'workers', 'world_size'} else \
        'the images of each step are the same'
    seen = f'BatchNorm sees {after["device_batch"]} images at a time' + (
        f' instead of {before["device_batch"]}' if 'device_batch' in changed else ' as before')
    statistics = ', its running statistics start from their mean' if 'world_size' in changed else ''
    return (f'The run goes on with {after["world_size"]} process(es) instead of {before["world_size"]}: {images}, '
            f'{seen}{statistics}, and sums are rounded in another order: the result is not bit for bit that of an '
            f'unchanged run.')
