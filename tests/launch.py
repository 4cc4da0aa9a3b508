"""Training and evaluation as real processes, as users start them: one or several, killed or stopped on the way."""
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forkserver import ENVIRONMENT, ROOT, Running, start_script

from caretrans.config import TrainConfig, parse_train_config

__all__ = [
    'ENVIRONMENT', 'ROOT', 'SHELL_ENVIRONMENT', 'command', 'configure', 'kill', 'list_differences', 'read_tensors',
    'run', 'start', 'wait_for']

# So that scripts in cmd/ find the Python of these tests.
SHELL_ENVIRONMENT = dict(ENVIRONMENT, PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')


def configure(*flags: Any) -> TrainConfig:
    """The config of a command line of train.py."""
    return parse_train_config([str(flag) for flag in flags])


def command(script: str, *flags: Any) -> list[str]:
    """The command line of a script of the repository, for a new interpreter."""
    return [sys.executable, script, *map(str, flags)]


def run(script: str, *flags: Any, processes: int = 1, code: int = 0, **variables: str) -> tuple[str, str]:
    """Run a script to its end; its exit code must be `code`. Returns (stdout, stderr).

    Code ('-c') and pytest get a new interpreter; imports may depend on their `variables` of the environment.
    """
    if script == '-c' or flags[:1] == ('pytest',):
        done = subprocess.run(
            command(script, *flags), cwd=ROOT, capture_output=True, text=True, timeout=600,
            env=dict(ENVIRONMENT, **variables), encoding='utf-8')
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ('stdout', 'stderr')]
        found = start_script(
            script, [str(flag) for flag in flags], *files, processes, variables=variables).wait(timeout=600)
        out, err = (file.read_text(encoding='utf-8') if file.exists() else '' for file in files)
    assert found == code, out + err
    return out, err


def start(script: str, *flags: Any, log: Path, processes: int = 1, file_size: int | None = None) -> Running:
    """Start a script, with both outputs appended to `log`."""
    Path(log).touch()
    return start_script(script, [str(flag) for flag in flags], log, log, processes, file_size)


def wait_for(condition: Callable[[], Any], process: Any, timeout: float = 120., pause: float = 0.005) -> bool:
    """Whether `condition`, asked every `pause` seconds, became true while the process ran."""
    end = time.monotonic() + timeout
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, 'waited too long'
        time.sleep(pause)
    return False


def kill(process: Any, number: int = signal.SIGKILL) -> int:
    """Send a signal and return the exit code."""
    process.send_signal(number)
    return process.wait(timeout=120)


def read_tensors(path: Path, entry: str | None = None) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or another of its entries."""
    return torch.load(path, weights_only=True)[entry or 'state_dict']


def list_differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of each tensor that is not bit-identical."""
    assert a.keys() == b.keys()
    return {key: (a[key].double() - b[key].double()).abs().max().item() for key in a if not torch.equal(a[key], b[key])}
