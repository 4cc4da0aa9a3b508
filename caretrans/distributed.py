"""Processes of a run: which one this is, and the collective operations between them.

torchrun starts them and sets RANK, LOCAL_RANK, WORLD_SIZE and the rendezvous; without these variables there is one
process. Figures and flags travel over gloo on the CPU, gradients over NCCL if the device is a GPU.
"""
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import CaretransError, ConfigError

__all__ = [
    'Processes', 'find_processes', 'is_primary', 'join_processes', 'leave_processes', 'read_number', 'shared_errors']


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    All processes call every method at the same place; with one process the methods cost nothing.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_primary(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    def largest(self, values: Sequence[float]) -> list[float]:
        """The maximum of each value over the processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the processes, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.is_alone:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks, on every process."""
        if self.is_alone:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """The value of the primary process, on every process."""
        if self.is_alone:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def first(self, function: Callable[[], Any], keep: bool = False) -> Any:
        """Call a function on the primary process only; every process returns its value or raises its error.

        Args:
            keep: Whether the value stays on the primary process and the others return None.
        """
        value, error = _try(function) if self.is_primary else (None, None)
        shared, error = self.share((None if keep else value, error))
        return _settle(value if keep else shared, error)

    def together(self, function: Callable[[], Any]) -> Any:
        """Call a function on every process; if any fails, all raise the error of the lowest rank that failed."""
        value, error = _try(function)
        return _settle(value, next((found for found in self.gather(error) if found is not None), None))


def _try(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # sent to the other processes, then raised
        return None, error


def _settle(value: Any, error: Exception | None) -> Any:
    with shared_errors():
        if error is not None:
            raise error
    return value


@contextmanager
def shared_errors() -> Iterator[None]:
    """Mark errors inside the context as raised by every process, so that only the primary one prints them."""
    try:
        yield
    except CaretransError as error:
        error.is_shared = True
        raise


def read_number(variable: str, default: int) -> int:
    """The number in an environment variable that a launcher sets.

    Raises:
        ConfigError: It is no number.
    """
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f'{variable} is {text!r} in the environment but must be a number: unset it, or use torchrun.')
    return int(text)


def find_processes() -> Processes:
    """The rank of this process as set by torchrun, without contacting the others.

    Raises:
        ConfigError: The variables contradict each other, or some are missing.
    """
    world_size = read_number('WORLD_SIZE', 1) if 'RANK' in os.environ else 1
    if world_size <= 1:
        return Processes()
    rank = read_number('RANK', 0)
    if rank >= world_size:
        raise ConfigError(
            f'RANK={rank} in the environment must be below WORLD_SIZE={world_size}: unset both, or use torchrun.')
    missing = [name for name in ('MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f'RANK={rank} and WORLD_SIZE={world_size} are set in the environment, but not {" and ".join(missing)}: '
            f'start with torchrun or the scripts in cmd/, or unset RANK for one process.')
    return Processes(rank, world_size, read_number('LOCAL_RANK', 0))


def is_primary() -> bool:
    """Whether this process prints; True also where the environment is wrong, so that this can be printed."""
    try:
        return find_processes().is_primary
    except ConfigError:
        return True


def join_processes(device: torch.device, timeout: float = 1800.) -> Processes:
    """Connect to the other processes of the run, if there are any.

    Args:
        device: Device of this process; with cuda, gradients travel over NCCL.
        timeout: Seconds to wait for a process that does not answer.
    Raises:
        ConfigError: They cannot be reached.
    """
    processes = find_processes()
    if processes.is_alone or dist.is_initialized():
        return processes
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (ValueError, RuntimeError) as error:  # RuntimeError: also the errors of torch's store and backends
        reason = ' '.join(str(error).split())[:200]
        raise ConfigError(
            f'Process {processes.rank} of {processes.world_size} cannot connect to the others at '
            f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]} ({reason}): check both, and that all were '
            f'started.') from error
    return processes


def leave_processes() -> None:
    """Disconnect from the other processes."""
    if dist.is_available() and dist.is_initialized():
        # gloo's threads need the interpreter to release their last tensors, while PyTorch 2.6 holds it and waits for
        # them: a deadlock without this pause.
        time.sleep(0.2)
        dist.destroy_process_group()
