"""Errors that a user can act on, and the one place that prints them.

Every message is one line: what is wrong, where, and the remedy. `run_command` prints it and returns exit code 2; any
other exception is a bug and keeps its traceback.
"""
import os
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

from .text import escape, escape_output

__all__ = [
    'CaretransError', 'CheckpointError', 'ConfigError', 'DataError', 'EvaluationError', 'ExportError', 'PlotError',
    'Preempted', 'ResultsError', 'TrainingError', 'list_names', 'require', 'run_command']

EXTRAS = {  # import name of an optional package: the extra that installs it
    **dict.fromkeys(['matplotlib', 'simplejpeg', 'tensorboard', 'torchmetrics', 'tqdm', 'webdataset'], 'train'),
    **dict.fromkeys(['scipy'], 'imagenet'),
    **dict.fromkeys(['faster_coco_eval'], 'dense'),
    **dict.fromkeys(['lmdb', 'pyarrow'], 'lmdb'),
    **dict.fromkeys(['nncf', 'onnx', 'onnxruntime', 'onnxscript', 'openvino'], 'benchmark'),
    **dict.fromkeys(['coremltools', 'sklearn'], 'export')}


class CaretransError(Exception):
    """Base of all errors that a user can act on.

    Attributes:
        is_shared: Whether every process of the run raises it, so that the primary one alone prints it.
    """

    is_shared = False


class CheckpointError(CaretransError, ValueError):
    """A checkpoint that cannot be read, loaded or written."""


class ConfigError(CaretransError, ValueError):
    """Settings that cannot work."""


class DataError(CaretransError, ValueError):
    """Data that cannot be trained on or evaluated."""


class EvaluationError(CaretransError, ArithmeticError):
    """Logits that are not finite, so that there is no accuracy."""


class ExportError(CaretransError, RuntimeError):
    """A program that cannot be exported, read or run."""


class PlotError(CaretransError, ValueError):
    """Results that cannot be plotted."""


class ResultsError(CaretransError, ValueError):
    """Rows of measured results that cannot be used."""


class TrainingError(CaretransError, RuntimeError):
    """Training cannot continue; the message says where it stopped.

    Attributes:
        is_shared: Whether every process raises it.
        has_remedy: Whether the message says how to go on; resuming with the same command would fail again.
    """

    def __init__(self, message: str, is_shared: bool = False, has_remedy: bool = False) -> None:
        super().__init__(message)
        self.is_shared, self.has_remedy = is_shared, has_remedy


class Preempted(Exception):
    """The run was asked to stop and wrote a checkpoint, from which it can resume. Not an error."""


def list_names(names: Iterable[Any], most: int = 10) -> str:
    """The first `most` names, and how many more there are."""
    names = [escape(name) for name in names]
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def _explain_missing(package: str) -> str:
    return (f'{package} is not installed: run `pip install ".[{EXTRAS[package]}]"` in the repository, or use the '
            f'scripts in cmd/, which install everything.')


def require(package: str) -> None:
    """Check that an optional package is installed, before any work that needs it later is done.

    Raises:
        ConfigError: It is not; names the extra.
    """
    if find_spec(package) is None:
        raise ConfigError(_explain_missing(package))


def run_command(name: str, main: Callable[[], int], is_primary: bool = True) -> int:
    """Run the body of a command and return its exit code.

    Args:
        name: What the command is called in messages, e.g. 'train.py'.
        main: Returns the exit code.
        is_primary: Whether this process prints errors that all processes share.
    Returns:
        2 after a `CaretransError` or where an optional package is missing, 130 after Ctrl-C, else what `main` returns.
    """
    escape_output()
    try:
        return main()
    except CaretransError as error:
        if is_primary or not error.is_shared:
            print(f'{name}: {escape(error)}', file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        if package not in EXTRAS:
            raise
        if is_primary:
            print(f'{name}: {_explain_missing(package)}', file=sys.stderr)
        return 2
    except PermissionError as error:
        if not error.filename:
            raise
        problem = f'{escape(error.filename)}: {error.strerror}: check the path and its permissions.'
        print(f'{name}: {problem}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
