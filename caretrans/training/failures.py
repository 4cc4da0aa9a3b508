"""Failures during a run, explained in one line with a remedy."""
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import CheckpointError, DataError, TrainingError, list_names
from .folder import RunFolder
from .steps import NonFiniteError
from .trainer import Trainer

__all__ = ['explain_failures']

LOST_CONNECTION = ('gloo', 'NCCL', 'Connection closed by peer', 'Connection reset by peer')
DIED = re.compile(r'DataLoader worker.*(killed by signal|exited unexpectedly)', re.DOTALL)
IN_WORKER = re.compile(r'Caught \w+ in DataLoader worker')


@contextmanager
def explain_failures(trainer: Trainer, folder: RunFolder | None) -> Iterator[None]:
    """Turn the known causes that end a run into a `TrainingError`; other errors pass unchanged.

    Args:
        folder: Run folder, on the primary process only.
    """
    try:
        yield
    except NonFiniteError as error:
        raise _explain_non_finite(error, trainer, folder) from error
    except (TrainingError, CheckpointError):
        raise
    except DataError as error:
        raise TrainingError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f'Out of memory with {trainer.device_batch} images at a time on {trainer.device}: '
            f'use --device-batch {max(trainer.device_batch // 2, 1)}.') from error
    except OSError as error:
        raise TrainingError(f'{error.filename or "A file"}: {error.strerror or error}.') from error
    except Exception as error:
        text = str(error)
        if any(sign in text for sign in LOST_CONNECTION):
            raise TrainingError(
                f'Process {trainer.processes.rank} lost its connection to another process, which ended or cannot be '
                f'reached: see the message of that process.') from error
        if DIED.search(text):
            raise TrainingError(
                f'An image loading process died ({" ".join(text.split())[:200]}). If it was killed, memory most likely '
                f'ran out: use fewer --workers. After a bus error, /dev/shm is too small.') from error
        if IN_WORKER.search(text):  # the text is the worker's traceback, and its last line the error
            raise TrainingError(text.strip().splitlines()[-1]) from error
        raise


def _explain_non_finite(error: NonFiniteError, trainer: Trainer, folder: RunFolder | None) -> TrainingError:
    """The error with the figures and images of the processes whose loss is not finite; all processes call it."""
    names = trainer.train_loader.name_images(error.step) if error.is_local else []
    found = trainer.processes.gather((str(error), error.is_local, names))
    message = next((text for text, is_local, _ in found if is_local), str(error))
    names = [name for _, _, some in found for name in some]
    if names and folder is not None:
        file = folder.list_images([(name, '') for name in names], 'nonfinite-images.txt')
        message += f' Its {len(names)} images are listed in {file}: {list_names(names, 3)}.'
    return TrainingError(message, is_shared=True)
