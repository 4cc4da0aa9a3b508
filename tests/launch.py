"""Training and evaluation as real processes, as users start them: one or several, killed or stopped on the way."""
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS='1', GOMP_SPINCOUNT='10000')
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node']


def command(script: str, *flags: Any, processes: int = 1) -> list[str]:
    """The command line of a script of the repository, under torchrun for several processes."""
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, script, *map(str, flags)]


def run(script: str, *flags: Any, processes: int = 1, code: int = 0, **variables: str) -> tuple[str, str]:
    """Run it to its end, which must be `code`: (stdout, stderr)."""
    done = subprocess.run(
        command(script, *flags, processes=processes), cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=dict(ENVIRONMENT, **variables))
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def start(script: str, *flags: Any, log: Path, processes: int = 1) -> subprocess.Popen:
    """Start it, with its output in a file, and with Ctrl-C as in a terminal, where the tests run in the background."""
    with open(log, 'ab') as file:
        return subprocess.Popen(
            command(script, *flags, processes=processes), cwd=ROOT, stdout=file, stderr=file, env=ENVIRONMENT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for(condition: Callable[[], Any], process: subprocess.Popen, timeout: float = 120.) -> bool:
    """Whether `condition` came true while the process ran."""
    end = time.monotonic() + timeout
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, 'waited too long'
        time.sleep(0.0005)
    return False


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> int:
    process.send_signal(number)
    return process.wait(timeout=120)


def read_tensors(path: Path, entry: str | None = None) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or with `entry` those of another entry of it."""
    return torch.load(path, weights_only=True)[entry or 'state_dict']


def list_differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of each tensor that is not the same bit for bit."""
    assert a.keys() == b.keys()
    return {key: (a[key].double() - b[key].double()).abs().max().item() for key in a if not torch.equal(a[key], b[key])}
