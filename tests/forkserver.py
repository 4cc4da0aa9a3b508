"""Scripts of the repository as real processes that start in milliseconds: forked from a server with all imports done.

Each is a process of its own, with its command line, environment and output, and can be killed or stopped like any
other. Several processes of one run get the variables that torchrun sets.
"""
import atexit
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRELOADED = [
    'torch', 'torch._dynamo', 'torch.distributed', 'torch.utils.tensorboard', 'matplotlib.figure', 'timm', 'pytest',
    'caretrans.__main__', 'caretrans.evaluation', 'caretrans.training.run', 'forkserver']
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS='1', GOMP_SPINCOUNT='10000')
GRACE = 5.  # seconds that the other processes of a run get after one of them failed, and again after SIGTERM


class Running:
    """A running script: the part of the interface of `subprocess.Popen` that tests use, for one or several processes.

    Attributes:
        pid: Process ID of the first process.
        returncode: None while it runs; of several processes 0, or the code of one that failed.
    """

    def __init__(self, processes: list[multiprocessing.Process]) -> None:
        self.processes, self.returncode, self.pid = processes, None, processes[0].pid

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        if self.returncode is None and None not in codes:
            self.returncode = max(filter(None, codes), default=0)
        elif self.returncode is None and any(codes):  # torchrun ends the others
            for number in (None, signal.SIGTERM, signal.SIGKILL):
                if number:
                    self.send_signal(number)
                end = time.monotonic() + GRACE
                for process in self.processes:
                    process.join(max(end - time.monotonic(), 0))
            return self.poll()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 600)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired('script', timeout or 600)
            self.processes[0].join(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def list_children(self) -> list[int]:
        """Process IDs of the children of all processes: the workers of their loaders."""
        return [int(pid) for process in self.processes
                for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text(encoding='utf-8').split()]


def start_script(
        script: str, flags: Sequence[str], stdout: Path, stderr: Path, processes: int = 1,
        file_size: int | None = None, variables: Mapping[str, str] | None = None) -> Running:
    """Start a Python script of the repository, or '-m' and a module; both outputs are appended to files.

    Args:
        file_size: Bytes that the largest file may have, as on a full disk.
        variables: Of the environment, beside `ENVIRONMENT`.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / 'tests')]))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    environment = {**ENVIRONMENT, **(variables or {})}
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        if processes > 1:
            environment.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        process = context.Process(
            target=_run_script, args=(script, list(flags), str(stdout), str(stderr), dict(environment), file_size),
            daemon=True)
        process.start()
        started.append(process)
    return Running(started)


def _run_script(
        script: str, flags: list[str], stdout: str, stderr: str, environment: dict[str, str],
        file_size: int | None) -> None:
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    # Up to half of the time of a tiny run; test_training.py has the curves of a new interpreter.
    sys.modules['caretrans.training.folder'].RunFolder.draw_curves = lambda self: None
    gc.freeze()  # the modules of the server, which stay
    multiprocessing.current_process()._config['daemon'] = False  # so that it can have children
    multiprocessing.set_start_method(None, force=True)  # of these, as in a new interpreter
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)
    sys.argv, sys.path[0], code = [script, *flags], str((ROOT / script).parent), 0
    try:
        if script == '-m':
            sys.argv = flags
            runpy.run_module(flags[0], run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(str(ROOT / script), run_name='__main__')
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
