"""The folder of a training run: settings, versions, curves and checkpoints."""
import csv
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from ..checkpoint.load import save_checkpoint
from ..config import TrainConfig
from ..errors import ConfigError, list_names

__all__ = ['RunFolder', 'describe_environment', 'find_run', 'list_checkpoints']

# What may be another when a run goes on: where things are and how they are computed, not what is computed.
FREE = {
    'data', 'dataset_download', 'workers', 'device', 'output', 'resume', 'save_steps', 'val_interval', 'on_nan',
    'max_skips', 'max_unreadable', 'compile', 'kernels', 'grad_checkpointing', 'teacher_checkpoint', 'device_batch'}
PLACES = {'data', 'teacher_checkpoint'}
CHECKPOINTS = ('next.pth.tar', 'last.pth.tar', 'previous.pth.tar')  # the first there is goes on; see RunFolder.save

_logger = logging.getLogger(__name__)


def describe_environment() -> dict[str, Any]:
    """Versions, git commit, machine: what a figure needs beside it."""
    root = Path(__file__).parents[2]
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=root, capture_output=True, text=True) \
        if (root / '.git').exists() and shutil.which('git') else None
    packages = ('torch', 'torchvision', 'timm', 'numpy')
    return dict(
        command=' '.join(sys.argv), started=time.strftime('%Y-%m-%d %H:%M:%S'),
        git_commit=git.stdout.strip() or None if git is not None else None,
        python=platform.python_version(), **{name: version(name) for name in packages},
        machine=platform.machine(), threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def list_checkpoints(path: Path) -> list[Path]:
    """The checkpoints from which a run can go on, the newest first."""
    return [path / name for name in CHECKPOINTS if (path / name).exists()]


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load((path / 'config.yaml').read_text()) or {}
    except (OSError, yaml.YAMLError):
        return {}


def _list_changes(there: dict[str, Any], config: TrainConfig, free: set) -> list[str]:
    return [f'{name} {there.get(name)!r} there, {value!r} here' for name, value in config.to_dict().items()
            if name not in free and name in there and there[name] != value]


def find_run(config: TrainConfig) -> tuple[Path, list[Path]]:
    """Where a run writes, and the checkpoints from which it goes on, the newest first; none for a new run.

    That is `config.output`; or without it, an unfinished run under runs/ of the same settings, else a new folder there.

    Raises:
        ConfigError: The folder holds a finished run, one of other settings, or any if `config.resume` is off.
    """
    if not config.output:
        stem = f'{config.model}-{Path(config.data or config.dataset).name}-'
        for path in sorted(Path('runs').glob(f'{stem}*'), reverse=True) if config.resume else ():
            settings = _read_settings(path)
            if settings and list_checkpoints(path) and not (path / 'result.json').exists() \
                    and not _list_changes(settings, config, FREE - PLACES) and not _is_locked(path):
                return path, list_checkpoints(path)
        path = Path('runs') / f'{stem}{time.strftime("%Y%m%d-%H%M%S")}'
        return path if not path.exists() else path.with_name(f'{path.name}-{os.getpid()}'), []
    path = Path(config.output)
    found, settings = list_checkpoints(path), _read_settings(path)
    if (path / 'result.json').exists():
        raise ConfigError(f'{path} holds a finished run: give another --output, or remove it.')
    if not found and (path / 'summary.csv').exists() and len((path / 'summary.csv').read_text().splitlines()) > 1:
        raise ConfigError(f'{path} holds a run without checkpoints to go on from: give another --output, or remove it.')
    if not found:
        return path, []
    if not config.resume:
        raise ConfigError(f'{path} holds a run already: give another --output, or let it go on with --resume.')
    changes = _list_changes(settings, config, FREE)
    if changes:
        raise ConfigError(
            f'{path} holds a run of other settings ({list_names(changes, 5)}): go on with those of its config.yaml, '
            f'or give another --output.')
    return path, found


def _is_locked(path: Path) -> bool:
    try:
        lock = _lock(path)
    except ConfigError:
        return True
    if lock is not None:
        os.close(lock)
    return False


def _lock(path: Path, patience: float = 0.) -> int | None:
    """Hold a folder as long as this process lives; None where the file system has no locks.

    Args:
        patience: Seconds for which another process may still hold it: one that was killed takes a moment to end.

    Raises:
        ConfigError: Another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = os.open(path / '.lock', os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.1)
    except BlockingIOError:
        holder = os.pread(file, 200, 0).decode(errors='replace') or 'unknown'
        os.close(file)
        raise ConfigError(
            f'Another process is training into {path} ({holder}): stop it, or give another --output.') from None
    except OSError:
        os.close(file)
        return None
    os.ftruncate(file, 0)
    os.pwrite(file, f'process {os.getpid()} on {platform.node()}'.encode(), 0)
    return file


class RunFolder:
    """Writes config.yaml, environment.json, summary.csv, TensorBoard events, curves.png and the checkpoints.

    Args:
        path: From `find_run`.
        config: Of the run.
        facts: What was derived from the config: batches, parameters, classes.
        is_new: Whether the run begins here; else it goes on, and `restore` follows.
    Raises:
        ConfigError: The folder cannot be written, or another process writes there.
    """

    def __init__(self, path: Path, config: TrainConfig, facts: dict[str, Any], is_new: bool = True) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []  # of summary.csv, one for each epoch
        self.best: dict[str, Any] | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = _lock(path, patience=5.)
            for part in path.glob('.*.part'):  # of a run that was killed while it wrote
                part.unlink()
            if is_new:
                (path / 'config.yaml').write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
            self._log_start({**describe_environment(), **facts}, is_new)
            self._start_table()
        except OSError as error:
            raise ConfigError(f'{path} cannot be written ({error}): give another --output.') from None

    def _log_start(self, facts: dict[str, Any], is_new: bool) -> None:
        file = self.path / 'environment.json'
        contents = facts
        if not is_new and file.exists():
            contents = json.loads(file.read_text())
            contents.setdefault('resumed', []).append(facts)
        file.write_text(json.dumps(contents, indent=2) + '\n')

    def _start_table(self) -> None:
        for file in [self.path / 'summary.csv', *self.path.glob('events.out.tfevents.*')]:
            file.unlink(missing_ok=True)
        self.events = SummaryWriter(str(self.path))

    def restore(self, rows: list[dict[str, Any]], best: dict[str, Any] | None) -> None:
        """Take up the rows of a checkpoint: table and TensorBoard hold these and no others."""
        for row in rows:
            self.rows.append(row)
            self._publish(row)
        self.best = best

    def _publish(self, row: dict[str, Any]) -> None:
        with open(self.path / 'summary.csv', 'a', newline='') as file:
            writer = csv.DictWriter(file, row.keys())
            if row is self.rows[0]:
                writer.writeheader()
            writer.writerow(row)
        for name, value in row.items():
            if name != 'epoch' and value is not None:
                self.events.add_scalar(name, value, row['epoch'])
        self.events.flush()

    def log_epoch(self, row: dict[str, Any], model: torch.nn.Module, resume: dict[str, Any], **meta: Any) -> None:
        """End an epoch: best.pth.tar if its top-1 is the best so far, last.pth.tar, then the row is published.

        Args:
            row: Of the same names each time, None for what was not measured.
            model, meta: As in `save_checkpoint`.
            resume: What going on needs besides, in last.pth.tar alone.
        """
        self.rows.append(row)
        meta = dict(meta, metrics={k: v for k, v in row.items() if v is not None})
        if self.is_best(row):
            self.best = row
            save_checkpoint(self.path / 'best.pth.tar', model, **meta)
        self.save_step(model, resume, **meta)
        self._publish(row)  # last: a row in the table is in a checkpoint too

    def is_best(self, row: dict[str, Any]) -> bool:
        return row.get('val_top1') is not None and (self.best is None or row['val_top1'] > self.best['val_top1'])

    def save_step(self, model: torch.nn.Module, resume: dict[str, Any], **meta: Any) -> None:
        """Write last.pth.tar alone; the one before it becomes previous.pth.tar once the new one is safe."""
        new, last, previous = (self.path / name for name in CHECKPOINTS)
        save_checkpoint(new, model, **meta, **resume, best=self.best, rows=self.rows)
        if last.exists():
            os.replace(last, previous)
        os.replace(new, last)

    def list_images(self, images: list[tuple[str, str]], name: str = 'unreadable.txt') -> Path:
        """Write names and reasons of images into a file."""
        path = self.path / name
        path.write_text(''.join(f'{image}\t{reason}\n' for image, reason in images))
        return path

    def finish(self) -> None:
        """Mark the run as done: the same command begins a new one."""
        (self.path / 'result.json').write_text(json.dumps(dict(last=self.rows[-1], best=self.best), indent=2) + '\n')

    def draw_curves(self) -> Path:
        """Draw loss, top-1 and learning rate over the epochs into curves.png."""
        from matplotlib.figure import Figure  # slow to import, and wanted once

        figure = Figure(figsize=(12, 3.5), layout='constrained')
        panels = figure.subplots(1, 3)
        for panel, title, names in zip(
                panels, ('loss', 'top-1, %', 'learning rate'), (('train_loss', 'val_loss'), ('val_top1',), ('lr',)),
                strict=True):
            for name in names:
                points = [(row['epoch'], row[name]) for row in self.rows if row[name] is not None]
                if points:
                    panel.plot(*zip(*points, strict=True), marker='.', label=name)
            panel.set(xlabel='epoch', title=title)
            panel.grid(alpha=0.3)
            if panel.has_data():
                panel.legend()
        path = self.path / 'curves.png'
        figure.savefig(path, dpi=120)
        return path

    def close(self) -> None:
        """Draw the curves of what was logged, and let go of the files; on a full disk without the curves."""
        try:
            if self.rows:
                self.draw_curves()
            self.events.close()
        except OSError as error:
            _logger.warning(f'{self.path}: curves and events are not complete ({error.strerror or error}).')
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
