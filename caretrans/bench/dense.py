"""Cost of whole detectors and segmenters: parameters, multiply-adds, and latency in PyTorch, eager, float32.

How many boxes a two-stage detector looks at depends on the image, and untrained weights find none. So the box head gets
`PROPOSALS` boxes and the mask head `MASKS`, as many as there can be at evaluation, and what selects boxes (decoding,
non-maximum suppression) is not part of the cost. Random weights: neither count nor time depends on them.
"""
import math
from typing import TextIO

import torch
import torch.nn as nn

from ..dense import TASKS, create_dense_model
from ..dense.rcnn import Rcnn
from ..devices import describe_device, list_versions
from ..errors import CaretransError
from ..measure.counts import count_operations, count_parameters
from ..measure.tables import format_table
from ..measure.timing import Rounds, compare_rounds, is_out_of_memory, time_block, time_interleaved
from ..progress import Progress
from ..text import count_noun
from .config import BenchConfig
from .infer import AGAIN, DEFAULT_RUNS, PATIENCE, ROUNDS
from .record import BenchResult, DenseCost, shorten

__all__ = ['CLASSES', 'SIZES', 'FixedWork', 'count_cost', 'describe_dense', 'measure_dense']

DETECTOR_SIZE, SEGMENTER_SIZE = (800, 1280), (512, 512)  # height and width of an image
SIZES = {task: SEGMENTER_SIZE if task == 'semantic_fpn' else DETECTOR_SIZE for task in TASKS}
CLASSES = {task: 150 if task == 'semantic_fpn' else 80 for task in TASKS}  # of ADE20K and of COCO
PROPOSALS, MASKS = 1000, 100
BOX_SIDES = 16, 512  # pixels


class FixedWork(nn.Module):
    """The network of a detector or segmenter on a batch, with a fixed number of boxes for each image.

    Args:
        model: Of `create_dense_model`.
        size: Height and width of the images.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('boxes', _make_boxes(size))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if not isinstance(self.model, Rcnn):
            return self.model.raw(x)
        maps, heads = self.model.backbone(x), self.model.roi_heads
        boxes = [self.boxes] * len(x)
        outputs = [self.model.rpn.head.raw(list(maps.values())), heads.classify(maps, boxes)]
        if heads.has_mask():
            outputs.append(heads.segment(maps, [some[:MASKS] for some in boxes]))
        return outputs


def _make_boxes(size: tuple[int, int]) -> torch.Tensor:
    """Boxes all over an image, of all sides between `BOX_SIDES`, (PROPOSALS, 4)."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.tensor([size[1], size[0]] * 2)
    low, high = (math.log(side) for side in BOX_SIDES)
    sides = torch.exp(low + (high - low) * torch.rand(PROPOSALS, 2, generator=generator))
    corners = torch.rand(PROPOSALS, 2, generator=generator) * (whole[:2] - sides).clamp(min=0)
    return torch.minimum(torch.cat([corners, corners + sides], 1), whole)


def count_cost(task: str, backbone: str, size: tuple[int, int]) -> tuple[FixedWork, DenseCost]:
    """A model with random weights, with its parameters and multiply-adds for an image."""
    model = create_dense_model(task, backbone, CLASSES[task]).eval()
    work = FixedWork(model, size)
    return work, DenseCost(
        task=task, model=backbone, num_classes=CLASSES[task], height=size[0], width=size[1],
        **{name: count_parameters(part)['parameters'] for name, part in (
            ('parameters', model), ('parameters_backbone', model.backbone.body))},
        gmacs=count_operations(work, size).gmacs, gmacs_backbone=count_operations(model.backbone.body, size).gmacs)


# Time -----------------------------------------------------------------------------------------------------------------

def _time_group(
        group: list[tuple[FixedWork, DenseCost]], config: BenchConfig, device: torch.device, progress: Progress,
) -> None:
    """Time the models of a task and size, interleaved, and complete their costs."""
    image = torch.randn(1, 3, group[0][1].height, group[0][1].width, generator=torch.Generator().manual_seed(0))
    image, rounds = image.to(device), min(ROUNDS, config.runs or ROUNDS)
    runs, counts = {}, {}
    for work, cost in group:
        progress.describe(f'{cost.task} {cost.model}')
        work.to(device)

        def run(work: nn.Module = work) -> None:
            with torch.inference_mode():
                work(image)
        seconds = time_block(run, max(config.warmup, 1), device)[-1]
        runs[cost.model] = run
        counts[cost.model] = math.ceil(config.runs / rounds) if config.runs else max(
            min(DEFAULT_RUNS, int(PATIENCE / seconds)) // ROUNDS, 1)
    first = group[0][1].model
    runs[AGAIN], counts[AGAIN] = runs[first], counts[first]
    times = time_interleaved(runs, device, counts, rounds, report=lambda: progress.update(1))
    self_ratio = compare_rounds(times[first], times[AGAIN])['ratio']
    for _, cost in group:
        _add_times(cost, times[cost.model], self_ratio, config, device)


def _add_times(
        cost: DenseCost, times: Rounds, self_ratio: float, config: BenchConfig, device: torch.device) -> None:
    cost.device, cost.threads, cost.versions = describe_device(device), config.threads, list_versions()
    cost.add_times(times, self_ratio)


def measure_dense(
        config: BenchConfig, names: list[str], device: torch.device, result: BenchResult, stream: TextIO | None,
) -> None:
    """Measure every task of a config with every backbone, and add the costs and a table to a result."""
    groups = [(task, size) for task in config.task
              for size in ([SIZES[task]] if config.default_size else config.sizes)]
    rounds = min(ROUNDS, config.runs or ROUNDS)
    with Progress(len(groups) * (len(names) + 1) * rounds, 'blocks', stream=stream) as progress:
        for task, size in groups:
            group = []
            for name in names:
                progress.describe(f'{task} {name}, counting')
                try:
                    group.append(count_cost(task, name, size))
                except (CaretransError, RuntimeError, ValueError) as error:  # a backbone without maps, among others
                    result.failures.append(f'{task} with {name} at {size[0]} x {size[1]}: {shorten(error)}')
            try:
                if group:
                    _time_group(group, config, device, progress)
            except RuntimeError as error:
                if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__):
                    raise
                result.failures.append(f'{task} at {size[0]} x {size[1]}: it does not fit into memory')
            result.dense += [cost for _, cost in group]
    if result.dense:
        result.texts.append('\n'.join(describe_dense(result.dense, config.markdown)))


def describe_dense(costs: list[DenseCost], markdown: bool = False) -> list[str]:
    """A table with a row for each task and backbone, and the conditions."""
    header = ['task', 'backbone', 'image', 'parameters, M', 'GMACs', 'of the backbone, M', 'GMACs of the backbone',
              'median ms', 'p10 to p90', '']
    rows = [[
        cost.task, cost.model, f'{cost.height} x {cost.width}', f'{cost.parameters / 1e6:.2f}', f'{cost.gmacs:.1f}',
        f'{cost.parameters_backbone / 1e6:.2f}', f'{cost.gmacs_backbone:.2f}', cost.median_ms,
        None if cost.median_ms is None else f'{cost.p10_ms:.0f} to {cost.p90_ms:.0f}', 'noisy' if cost.noisy else '']
        for cost in costs]
    classes = ', '.join(f'{n} ({task})' for task, n in dict.fromkeys((cost.task, cost.num_classes) for cost in costs))
    lines = ['Detectors and segmenters, one image, PyTorch eager in float32', '', *format_table(
        header, rows, markdown), '', f'classes: {classes}']
    if any('rcnn' in cost.task for cost in costs):
        lines.append(f'two-stage detectors: {PROPOSALS:,} proposals, and {MASKS} masks with mask_rcnn')
    lines.append('times without decoding and selecting boxes')
    runs = sorted({cost.runs for cost in costs if cost.runs})
    if runs:
        first = next(cost for cost in costs if cost.runs)
        number = ' to '.join(map(str, (runs[0], runs[-1])[:len(runs)]))
        lines.append(f'{first.device}, {count_noun(first.threads, "thread")}, {number} timed runs, the backbones of a '
                     f'task interleaved')
    return lines
