"""What a way of running a network does to its decisions: accuracy on real images, beside the network as it is trained.

For backends and number formats that do not compute in float32: bfloat16, float16 and int8 change the logits, and only
images with labels say whether that matters.
"""
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, TextIO

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from ..data.loaders import build_eval_loader
from ..devices import describe_device, list_versions
from ..evaluation.evaluate import load_for_evaluation, open_data
from ..evaluation.metrics import evaluate_in_detail
from ..measure.sample_network import load_sample_images
from ..measure.tables import format_table
from ..progress import Progress
from .backends import Network, Runner, Setup, prepare

__all__ = ['describe_accuracy', 'measure_accuracy']

BATCH = 16
CALIBRATION = 256  # photographs of the bundled training images, for int8


class RunnerModule(nn.Module):
    """A network made ready for batches of one size, for batches of up to that size: (B, C, H, W) to (B, classes)."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.runner.images[:len(images)].copy_(images)
        return self.runner.read(self.runner.run())[:len(images)].float().to(images.device)


def _score(
        model: nn.Module, images: Dataset, eval_config: dict[str, Any], num_classes: int, device: torch.device,
        progress: Progress) -> tuple[dict[str, Any], torch.Tensor]:
    """The figures of an evaluation, and the class that each image is taken for."""
    loader = build_eval_loader(images, eval_config, BATCH, 0, device=device)
    before = progress.count
    result, details = evaluate_in_detail(
        model, loader, device, num_classes=num_classes,
        report=lambda seen: progress.update(before + seen - progress.count))
    return result, details.answers[:, 0]


def measure_accuracy(
        checkpoint: str, setups: Sequence[Setup], data: str = '', model_name: str | None = None,
        img_size: int | None = None, stream: TextIO | None = None, failures: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a checkpoint as it is trained, in float32, and then in each way of running it.

    Args:
        data: Folder with val/CLASS/*; what the checkpoint was trained on, if not given.
        img_size: Of square images; that of the checkpoint, if not given.
        stream: Where progress is shown; stdout if not given.
        failures: Gets a line for each way that fails, and the others go on; if not given, the first failure is raised.
    Returns:
        Records: top1, top5 (%), loss, images; `agreement`, the share (%) of images that are taken for the same class
        as by the network as it is trained; `top1_change` against it.
    Raises:
        CheckpointError, DataError: The checkpoint or the data cannot be used.
    """
    device = setups[0].device
    model, loaded, eval_config = load_for_evaluation(checkpoint, model_name, img_size=img_size)
    images, name = open_data(loaded, data, '', '', model.num_classes)
    prepared = {key: value for key, value in eval_config.items() if key != 'input_size'}
    photographs = load_sample_images(model, tuple(eval_config['input_size'][1:]), CALIBRATION, **prepared)
    network = Network(model, torch.zeros(BATCH, *eval_config['input_size']), photographs=photographs)
    facts = dict(
        model=model.pretrained_cfg['architecture'], bench='accuracy', checkpoint=checkpoint, data=name,
        device=describe_device(device), height=eval_config['input_size'][1], width=eval_config['input_size'][2],
        versions=list_versions())
    records: list[dict[str, Any]] = []
    with Progress((len(setups) + 1) * len(images), 'images', stream=stream) as progress:
        progress.describe('as trained')
        base, answers = _score(model, images, eval_config, model.num_classes, torch.device('cpu'), progress)
        for setup in setups:
            progress.describe(str(setup))
            try:
                with redirect_stdout(sys.stderr):  # the runtimes' own remarks
                    runner = prepare(network, setup)
                result, found = _score(
                    RunnerModule(runner), images, eval_config, model.num_classes, device, progress)
            except Exception as error:  # whatever a backend raises
                if failures is None:
                    raise
                failures.append(f'accuracy of {setup}: {type(error).__name__}: {" ".join(str(error).split())[:300]}')
                continue
            records.append(dict(
                facts, backend=setup.backend, dtype=setup.dtype, layout=setup.layout, kernels=runner.kernels,
                images=result['images'], top1=result['top1'], top5=result['top5'], loss=result['loss'],
                top1_change=result['top1'] - base['top1'],
                agreement=100 * (found.cpu() == answers).double().mean().item()))
    return records


def describe_accuracy(records: Sequence[dict[str, Any]], markdown: bool = False) -> list[str]:
    """A line for each way of running the network."""
    first = records[0]
    header = ['backend', 'format', 'layout', 'kernels', 'top-1 %', 'change', 'same answer as float32 eager, %', 'loss']
    rows = [[r['backend'], r['dtype'], r['layout'], r['kernels'], f'{r["top1"]:.2f}', f'{r["top1_change"]:+.2f}',
             f'{r["agreement"]:.2f}', f'{r["loss"]:.4f}'] for r in records]
    return [f'Accuracy of {first["model"]} from {first["checkpoint"]} on {first["images"]} images of {first["data"]}, '
            f'{first["height"]} x {first["width"]}, {first["device"]}', '', *format_table(header, rows, markdown)]
