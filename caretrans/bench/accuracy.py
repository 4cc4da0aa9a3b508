"""Accuracy of a checkpoint in each setup, compared with the original network in float32.

bfloat16, float16 and int8 change the logits; only labelled images show whether that matters.
"""
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TextIO

import torch
import torch.nn as nn

from ..checkpoint.preparation import Preparation
from ..data.loaders import build_eval_loader
from ..devices import describe_device, list_versions
from ..evaluation.evaluate import EvalData, load_for_evaluation, open_data
from ..evaluation.metrics import Scores, evaluate_in_detail
from ..measure.sample_network import load_sample_images
from ..progress import Progress
from .backends import Network, Runner, prepare
from .record import Record, shorten
from .setups import Setup

__all__ = ['measure_accuracy']

BATCH = 16
CALIBRATION = 256  # bundled training images that calibrate int8


class RunnerModule(nn.Module):
    """A runner of a fixed batch size, for batches of up to that size: (B, C, H, W) to (B, classes)."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.runner.images[:len(images)].copy_(images)
        return self.runner.read(self.runner.run())[:len(images)].float().to(images.device)


def _score(
        model: nn.Module, data: EvalData, eval_config: Preparation, num_classes: int, device: torch.device,
        progress: Progress) -> tuple[Scores, torch.Tensor]:
    """The scores of a model, and the predicted class of each image."""
    loader = build_eval_loader(data.images, eval_config, BATCH, 0, device=device)
    before = progress.count
    result, details = evaluate_in_detail(
        model, loader, device, num_classes=num_classes, classes=data.classes,
        report=lambda seen: progress.update(before + seen - progress.count))
    return result, details.predictions[:, 0]


def measure_accuracy(
        checkpoint: str, setups: Sequence[Setup], data: str = '', model_name: str | None = None,
        img_size: int | None = None, pretrained: bool = False, stream: TextIO | None = None,
        failures: list[str] | None = None,
) -> list[Record]:
    """Evaluate the original network of a checkpoint in float32, and then each setup.

    Args:
        data: Folder with val/CLASS/*; by default the data set that the checkpoint was trained on.
        img_size: Side of square images; by default that of the checkpoint.
        pretrained: Evaluate the published weights of `model_name` instead of a file.
        stream: Output of the progress; stdout by default.
        failures: Gets a line for each setup that fails, and the others are still measured; without it the first failure
            is raised.
    Returns:
        A record for each setup: top1, top5 (%), loss, images; `agreement`, the share (%) of images with the same
        prediction as the original network; `top1_change` against it.
    Raises:
        CheckpointError, DataError: The checkpoint or the data cannot be used.
    """
    device = setups[0].device
    model, loaded, eval_config = load_for_evaluation(
        checkpoint, model_name, pretrained=pretrained, img_size=img_size)
    opened = open_data(loaded, data, '', '', model.num_classes)
    network = Network(model, torch.zeros(BATCH, *eval_config.input_size),
                      calibration=load_sample_images(model, eval_config.size, CALIBRATION, preparation=eval_config))
    records: list[Record] = []
    with Progress((len(setups) + 1) * len(opened.images), 'images', stream=stream) as progress:
        progress.describe('original')
        base, predictions = _score(model, opened, eval_config, model.num_classes, torch.device('cpu'), progress)
        for setup in setups:
            progress.describe(str(setup))
            try:
                with redirect_stdout(sys.stderr):  # messages of the runtimes
                    runner = prepare(network, setup)
                result, found = _score(
                    RunnerModule(runner), opened, eval_config, model.num_classes, device, progress)
            except Exception as error:  # backends raise many kinds
                if failures is None:
                    raise
                failures.append(f'accuracy of {setup}: {shorten(error)}')
                continue
            records.append(Record(
                model=model.pretrained_cfg['architecture'], bench='accuracy', checkpoint=str(loaded.path),
                data=opened.name, device=describe_device(device), versions=list_versions(),
                height=eval_config.size[0], width=eval_config.size[1],
                backend=setup.backend, dtype=setup.dtype, layout=setup.layout, kernels=runner.kernels,
                images=result.images, top1=result.top1, top5=result.top5, loss=result.loss,
                top1_change=result.top1 - base.top1,
                agreement=100 * (found.cpu() == predictions).double().mean().item()))
    return records
