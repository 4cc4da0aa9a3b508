"""The processes of a run: which one this is, and what they tell one another.

Started by torchrun, which sets RANK, LOCAL_RANK, WORLD_SIZE and where to meet; alone without them. Figures and flags
travel over gloo on the CPU, gradients over NCCL where the device is a GPU.
"""
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ['Processes', 'find_processes', 'join_processes', 'leave_processes']


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Every method is called by all processes at the same place, and is free when there is but one.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_primary(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    def largest(self, values: Sequence[float]) -> list[float]:
        """Each value's maximum over the processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over the processes, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.is_alone:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of their ranks, everywhere."""
        if self.is_alone:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """The value of the primary process, everywhere."""
        if self.is_alone:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def first(self, function: Callable[[], Any], keep: bool = False) -> Any:
        """Call a function on the primary process alone; its value, or what it raises, comes everywhere.

        Args:
            keep: The value stays where it is, the others get None.
        """
        value, error = _try(function) if self.is_primary else (None, None)
        shared, error = self.share((None if keep else value, error))
        return _give(value if keep else shared, error)

    def together(self, function: Callable[[], Any]) -> Any:
        """Call a function on every process; where it fails on one, all raise what the first of them did."""
        value, error = _try(function)
        return _give(value, next((found for found in self.gather(error) if found is not None), None))


def _try(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # on its way to the other processes, then raised
        return None, error


def _give(value: Any, error: Exception | None) -> Any:
    if error is not None:
        error.is_shared = True  # by all processes: one of them says it
        raise error
    return value


def find_processes() -> Processes:
    """The place of this process as torchrun set it, without talking to the others."""
    world_size = int(os.environ.get('WORLD_SIZE', 1)) if 'RANK' in os.environ else 1
    if world_size == 1:
        return Processes()
    return Processes(int(os.environ['RANK']), world_size, int(os.environ.get('LOCAL_RANK', 0)))


def join_processes(device: torch.device, timeout: float = 1800.) -> Processes:
    """Meet the other processes of the run, if there are any.

    Args:
        device: Of this process; gradients travel over NCCL for cuda.
        timeout: Seconds after which a process that does not answer is given up.
    """
    processes = find_processes()
    if not processes.is_alone and not dist.is_initialized():
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return processes


def leave_processes() -> None:
    """Let go of the other processes."""
    if dist.is_available() and dist.is_initialized():
        # The threads of gloo need the interpreter to let go of their last tensors; PyTorch 2.6 holds it, waiting for
        # them for ever.
        time.sleep(0.2)
        dist.destroy_process_group()
