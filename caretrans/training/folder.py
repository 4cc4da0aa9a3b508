"""Run folders: settings, versions, curves and checkpoints of a training run."""
import csv
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import RunConfig, TrainConfig
from ..errors import ConfigError, list_names, require
from ..strict_json import to_json
from ..text import open_text, read_text, utf8_path, write_text
from .state import EpochRow

__all__ = ['RunFolder', 'choose_orientation', 'describe_environment', 'find_run', 'list_checkpoints']

# Settings that may change when a run resumes: where things are and how they are computed, not what is computed.
FREE = {
    'data', 'dataset_download', 'workers', 'device', 'output', 'resume', 'save_steps', 'val_interval', 'on_nan',
    'max_skips', 'max_unreadable', 'collapse', 'compile', 'kernels', 'grad_checkpointing', 'teacher_checkpoint',
    'device_batch'}
PLACES = {'data', 'teacher_checkpoint'}
CHECKPOINTS = ('next.pth.tar', 'last.pth.tar', 'previous.pth.tar')  # newest first; see RunFolder.save_step

_logger = logging.getLogger(__name__)


def describe_environment() -> dict[str, Any]:
    """Versions, git commit and machine, to report beside measured figures."""
    root = Path(__file__).parents[2]
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=root, capture_output=True, encoding='utf-8',
                         errors='replace') \
        if (root / '.git').exists() and shutil.which('git') else None
    packages = ('torch', 'torchvision', 'timm', 'numpy')
    return dict(
        command=' '.join(sys.argv), started=time.strftime('%Y-%m-%d %H:%M:%S'),
        git_commit=git.stdout.strip() or None if git is not None else None,
        python=platform.python_version(), **{name: version(name) for name in packages},
        machine=platform.machine(), threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def list_checkpoints(path: Path) -> list[Path]:
    """The checkpoints from which a run can resume, newest first."""
    return [path / name for name in CHECKPOINTS if (path / name).exists()]


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(read_text(path / 'config.yaml', ConfigError)) or {}
    except (ConfigError, yaml.YAMLError):
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    """The object of a file; empty for one that is damaged, which is only a report."""
    try:
        content = json.loads(read_text(path, ConfigError))
    except (ConfigError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def _list_changes(saved: dict[str, Any], config: RunConfig, free: set) -> list[str]:
    return [f'{name} {saved[name]!r} there, {value!r} here' for name, value in config.to_dict().items()
            if name not in free and name in saved and saved[name] != value]


def choose_orientation(path: Path, config: TrainConfig) -> str:
    """The orientation with which a run resumes: older versions ignored it, and their config.yaml lacks it."""
    if 'orientation' in _read_settings(path):
        return config.orientation
    _logger.info(f'{path}: begun by an older version, which did not rotate images as their EXIF data say; resumes so.')
    return 'ignore'


def find_run(config: RunConfig) -> tuple[Path, list[Path]]:
    """The folder of a run, and the checkpoints from which it resumes, newest first; none for a new run.

    The folder is `config.output`, or else an unfinished run of the same settings under runs/, or else a new one there.

    Raises:
        ConfigError: The folder contains a finished run, one of other settings, or any run if `config.resume` is off.
    """
    if not config.output:
        stem = f'{config.run_name}-'
        runs = Path('runs')
        candidates = sorted(path for path in runs.iterdir() if path.name.startswith(stem)) if runs.is_dir() else []
        for path in reversed(candidates) if config.resume else ():
            settings = _read_settings(path)
            if settings and list_checkpoints(path) and not (path / 'result.json').exists() \
                    and not _list_changes(settings, config, FREE - PLACES) and not _is_locked(path):
                return path, list_checkpoints(path)
        path = Path('runs') / f'{stem}{time.strftime("%Y%m%d-%H%M%S")}'
        return path if not path.exists() else path.with_name(f'{path.name}-{os.getpid()}'), []
    path = Path(config.output)
    found, settings = list_checkpoints(path), _read_settings(path)
    if (path / 'result.json').exists():
        raise ConfigError(f'{path} holds a finished run: choose another --output, or remove it.')
    table = path / 'summary.csv'
    if not found and table.exists() and len(read_text(table, ConfigError).splitlines()) > 1:
        raise ConfigError(
            f'{path} holds a run without checkpoints to resume from: choose another --output, or remove it.')
    if not found:
        return path, []
    if not config.resume:
        raise ConfigError(f'{path} already holds a run: choose another --output, or resume it with --resume.')
    changes = _list_changes(settings, config, FREE)
    if changes:
        raise ConfigError(
            f'{path} holds a run of other settings ({list_names(changes, 5)}): use those of its config.yaml, or choose '
            f'another --output.')
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
    """Lock a folder for the lifetime of this process: its file descriptor, None if the file system has no locks.

    Args:
        patience: Seconds to wait for another process to release it; a killed one takes a moment to end.
    Raises:
        ConfigError: Another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = os.open(path / '.lock', os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            holder = os.pread(file, 200, 0).decode(errors='replace') or 'unknown'
            os.close(file)
            raise ConfigError(
                f'Another process is training into {path} ({holder}): stop it, or choose another --output.') from None
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
        config: Settings of the run.
        facts: Facts derived from the settings, for environment.json.
        best_score: Column of the score by which the best epoch is chosen; more is better.
        score_title: Of the panel of curves.png with the scores.
        is_new: Whether the run starts here; else it resumes, and the caller calls `restore`.
    Raises:
        ConfigError: The folder cannot be written, or another process is training into it.
    """

    def __init__(
            self, path: Path, config: RunConfig, facts: dict[str, Any], is_new: bool = True,
            best_score: str = 'val_top1', score_title: str = 'top-1, %') -> None:
        self.path, self.best_score, self.score_title = path, best_score, score_title
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        require('matplotlib')  # draws the curves at the end

        self.rows: list[EpochRow] = []
        self.best: EpochRow | None = None
        self.open_files = ExitStack()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = _lock(path, patience=5.)
            for part in path.glob('.*.part'):  # temporary files of a run that was killed while writing
                part.unlink()
            if is_new:
                write_text(path / 'config.yaml', yaml.safe_dump(config.to_dict(), sort_keys=False))
            environment, contents = path / 'environment.json', {**describe_environment(), **facts}
            if not is_new and environment.exists():
                before = _read_json(environment)
                contents = {**before, 'resumed': [*before.get('resumed', []), contents]}
            write_text(environment, to_json(contents, indent=2) + '\n')
            for file in [path / 'summary.csv', *path.glob('events.out.tfevents.*')]:
                file.unlink(missing_ok=True)
            self.events = SummaryWriter(self.open_files.enter_context(utf8_path(path)))
        except OSError as error:
            raise ConfigError(f'{path} cannot be written ({error}): choose another --output.') from None

    def restore(self, rows: list[dict[str, Any]], best: dict[str, Any] | None) -> None:
        """Load the rows of a checkpoint; summary.csv and TensorBoard then contain exactly these."""
        for row in rows:
            self.rows.append(EpochRow.from_dict(row))
            self._publish(self.rows[-1])
        if best and math.isfinite(best.get('val_loss', 0.)):  # older versions kept scores that were not
            self.best = EpochRow.from_dict(best)

    def _publish(self, row: EpochRow) -> None:
        values = row.to_dict()
        with open_text(self.path / 'summary.csv', 'a') as file:
            writer = csv.DictWriter(file, values)
            if row is self.rows[0]:
                writer.writeheader()
            writer.writerow(values)
        for name, value in values.items():
            if name != 'epoch' and value is not None:
                self.events.add_scalar(name, value, row.epoch)
        self.events.flush()

    def log_epoch(self, row: EpochRow, write: Callable[..., None], resume: dict[str, Any]) -> None:
        """Finish an epoch: write best.pth.tar if its score is the best so far, last.pth.tar, then table and events.

        Args:
            write: See `Trainer.write_checkpoint`.
            resume: Entries needed to resume, in last.pth.tar only.
        """
        self.rows.append(row)
        score = row.scores.get(self.best_score)
        if score is not None and (self.best is None or score > self.best.scores[self.best_score]):
            self.best = row
            write(self.path / 'best.pth.tar', epoch=row.epoch, metrics=self._metrics())
        self.save_step(row.epoch, write, resume)
        self._publish(row)  # last, so that every row of the table is in a checkpoint too

    def _metrics(self) -> dict[str, float]:
        return {name: value for name, value in self.rows[-1].to_dict().items() if value is not None} \
            if self.rows else {}

    def save_step(self, epoch: int, write: Callable[..., None], resume: dict[str, Any]) -> None:
        """Write last.pth.tar; the previous one becomes previous.pth.tar once the new one is complete."""
        new, last, previous = (self.path / name for name in CHECKPOINTS)
        write(new, epoch=epoch, metrics=self._metrics(), **resume, best=self.best.to_dict() if self.best else None,
              rows=[row.to_dict() for row in self.rows])
        if last.exists():
            os.replace(last, previous)
        os.replace(new, last)

    def list_images(self, images: list[tuple[str, str]], name: str) -> Path:
        """Write the names of images, and the reasons, to a text file."""
        path = self.path / name
        write_text(path, ''.join(f'{image}\t{reason}\n' for image, reason in images))
        return path

    def finish(self) -> None:
        """Mark the run as finished with result.json."""
        result = dict(last=self.rows[-1].to_dict(), best=self.best.to_dict() if self.best else None)
        write_text(self.path / 'result.json', to_json(result, indent=2) + '\n')

    def draw_curves(self) -> Path:
        """Draw losses, scores and learning rate over the epochs into curves.png."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(12, 3.5), layout='constrained')
        panels = figure.subplots(1, 3)
        columns = [row.to_dict() for row in self.rows]
        for panel, title, names in zip(
                panels, ('loss', self.score_title, 'learning rate'),
                (('train_loss', 'val_loss'), (self.best_score,), ('lr',)), strict=True):
            for name in names:
                points = [(row['epoch'], row[name]) for row in columns if row.get(name) is not None]
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
        """Draw the curves and close the files; a full disk only causes a warning."""
        try:
            if self.rows:
                self.draw_curves()
            self.events.close()
        except OSError as error:
            _logger.warning(f'{self.path}: curves and events are incomplete ({error.strerror or error}).')
        self.open_files.close()
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
