"""The folder of a training run: settings, versions, curves and checkpoints."""
import csv
import json
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from .checkpoint import save_checkpoint
from .config import ConfigError, TrainConfig

__all__ = ['RunFolder', 'describe_environment']


def describe_environment() -> Dict[str, Any]:
    """Versions, git commit, machine: what a figure needs beside it."""
    root = Path(__file__).parent.parent
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=root, capture_output=True, text=True) \
        if (root / '.git').exists() and shutil.which('git') else None
    packages = ('torch', 'torchvision', 'timm', 'numpy')
    return dict(
        command=' '.join(sys.argv), started=time.strftime('%Y-%m-%d %H:%M:%S'),
        git_commit=git.stdout.strip() or None if git is not None else None,
        python=platform.python_version(), **{name: version(name) for name in packages},
        machine=platform.machine(), threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


class RunFolder:
    """Writes config.yaml, environment.json, summary.csv, TensorBoard events, curves.png, best and last checkpoint.

    Args:
        config: Of the run; `config.output` is the folder, a new one under runs/ when empty.
        facts: What was derived from the config: batches, parameters, classes.
    Raises:
        ConfigError: The folder holds a run already, or cannot be written.
    """

    def __init__(self, config: TrainConfig, facts: Dict[str, Any]) -> None:
        name = f'{config.model}-{Path(config.data or config.dataset).name}-{time.strftime("%Y%m%d-%H%M%S")}'
        self.path = Path(config.output) if config.output else Path('runs') / name
        if (self.path / 'summary.csv').exists():
            raise ConfigError(f'{self.path} holds a run already: give another --output, or remove it.')
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / 'config.yaml').write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
        except OSError as error:
            raise ConfigError(f'{self.path} cannot be written ({error}): give another --output.') from None
        (self.path / 'environment.json').write_text(json.dumps({**describe_environment(), **facts}, indent=2) + '\n')
        self.rows: List[Dict[str, float]] = []
        self.best: Optional[Dict[str, float]] = None
        self.events = SummaryWriter(str(self.path))

    def log_epoch(self, row: Dict[str, float]) -> None:
        """Add one row, of the same names each time (None: not measured), to the table and to TensorBoard."""
        self.rows.append(row)
        with open(self.path / 'summary.csv', 'a', newline='') as file:
            writer = csv.DictWriter(file, row.keys())
            if len(self.rows) == 1:
                writer.writeheader()
            writer.writerow(row)
        for name, value in row.items():
            if name != 'epoch' and value is not None:
                self.events.add_scalar(name, value, row['epoch'])
        self.events.flush()

    def save(self, model: torch.nn.Module, row: Dict[str, float], resume: Dict[str, Any], **meta: Any) -> None:
        """Write last.pth.tar with the state of the optimizer, and best.pth.tar when top-1 is the best so far."""
        meta = dict(meta, epoch=row['epoch'], metrics={k: v for k, v in row.items() if v is not None})
        if row['val_top1'] is not None and (self.best is None or row['val_top1'] > self.best['val_top1']):
            self.best = row
            save_checkpoint(self.path / 'best.pth.tar', model, **meta)
        save_checkpoint(self.path / 'last.pth.tar', model, **meta, **resume)

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
                panel.plot(*zip(*points, strict=True), marker='.', label=name)
            panel.set(xlabel='epoch', title=title)
            panel.grid(alpha=0.3)
            panel.legend()
        path = self.path / 'curves.png'
        figure.savefig(path, dpi=120)
        return path

    def close(self) -> None:
        """Draw the curves of what was logged, and let go of the files."""
        if self.rows:
            self.draw_curves()
        self.events.close()
