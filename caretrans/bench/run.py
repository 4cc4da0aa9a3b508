"""Run all benches of a config: inference, accuracy, profiles, training steps and dense models; then draw plots."""
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TextIO

import timm
import torch

from ..devices import describe_device, resolve_device, use_threads
from ..errors import CheckpointError, ConfigError, PlotError
from ..measure.counts import make_empty
from ..measure.names import expand_models
from ..models.backbone import find_family
from ..progress import Progress
from .accuracy import measure_accuracy
from .backends import TORCH_DTYPES, Network, prepare
from .config import BenchConfig, list_setups
from .dense import measure_dense
from .device_rates import measure_rates
from .growth import SIZES, measure_growth
from .infer import build_network, run_inference, take_batch
from .plots import draw_accuracy_by_gmacs, draw_accuracy_by_latency, draw_growth, draw_parts
from .profile import describe_profile, list_profile, profile_call
from .record import BenchResult, Record, shorten
from .report import describe_accuracy
from .roofline import describe_roofline, trace_layers
from .setups import FUSED_IN_TORCH, IN_TORCH, Setup, fit_setups
from .train import TrainingBench, bench_training, describe_training, has_second_head, list_modes, parse_mode

__all__ = ['run_benches']

BATCHES = {'cuda': 128, 'mps': 128, 'cpu': 16}  # images of a training step by default
ROUNDS = 7  # of training steps
GROWTH_ROUNDS = 5


def _check_training(config: BenchConfig, names: list[str], device: torch.device) -> None:
    """Refuse settings that cannot be trained, before anything is measured."""
    for batch in config.list_training_batches():
        if batch % 2:
            raise ConfigError(
                f'--batch-size {batch} with --bench {config.bench}: mixup pairs the images, use an even number.')
    for text, (height, width) in zip(config.img_size, config.sizes, strict=True):
        if height != width:
            raise ConfigError(f'--img-size {text} with --bench {config.bench}: training needs square images.')
    teachers = expand_models([teacher for teacher in config.teacher if teacher != 'none'], '--teacher')
    for name in names if teachers else []:
        if not has_second_head(make_empty(name)):
            raise ConfigError(
                f'--teacher {teachers[0]} with --model {name}: the model has no second head for a teacher; remove it.')
    for way in config.ways:
        parse_mode(way, device)


@contextmanager
def _guard(what: str, result: BenchResult) -> Iterator[None]:
    """Report an error inside as a failure of the result, so that other measurements are kept and continue."""
    try:
        yield
    except CheckpointError:  # of the only model: nothing can be measured
        raise
    except Exception as error:
        result.failures.append(f'{what}: {shorten(error)}')


def run_benches(config: BenchConfig, stream: TextIO | None = None) -> BenchResult:
    """Measure everything in a config, and draw its plots.

    Args:
        stream: Output of the progress; stdout by default.
    Raises:
        ConfigError: The config contains something that cannot be measured; raised before any measurement.
        CheckpointError: The checkpoint does not fit the model.
    """
    names, device = config.list_models(), resolve_device(config.device)
    setups, skipped = list_setups(config, device)
    benches = config.list_benches()
    if 'train' in benches:
        _check_training(config, names, device)
    if 'accuracy' in benches and (len(config.sizes) > 1 or config.sizes[0][0] != config.sizes[0][1]):
        raise ConfigError(f'--img-size {" ".join(config.img_size)} with --bench accuracy: use one square size.')
    result = run_inference(config, stream) if 'infer' in benches else BenchResult(
        describe_device(device), remarks=skipped if 'profile' in benches else [])
    with use_threads(config.threads):
        if 'accuracy' in benches:
            size = None if config.default_size else config.sizes[0][0]
            result.accuracy = measure_accuracy(
                config.checkpoint, fit_setups(setups, timm.create_model(names[0])), config.data, names[0], size,
                config.pretrained, stream, result.failures)
            if result.accuracy:
                result.texts.append('\n'.join(describe_accuracy(result.accuracy, config.markdown)))
        if 'profile' in benches:
            _profile_all(config, names, [setup for setup in setups if setup.backend in IN_TORCH], result, stream)
        if 'train' in benches:
            _train_all(config, names, device, result, stream)
        if 'dense' in benches:
            measure_dense(config, names, device, result, stream)
        if config.plots:
            _draw_all(config, names, device, result, stream)
    return result


# Profiles -------------------------------------------------------------------------------------------------------------

def _profile_all(
        config: BenchConfig, names: list[str], setups: list[Setup], result: BenchResult, stream: TextIO | None,
) -> None:
    steps = len(names) * len(config.sizes) * len(config.list_batches()) * len(setups)
    with Progress(steps, 'profiles', stream=stream) as progress:
        for name, size in itertools.product(names, config.sizes):
            with _guard(f'profiles of {name} at {size[0]} x {size[1]}', result):
                network = build_network(name, size, config.checkpoint)
                for batch, setup in itertools.product(config.list_batches(), fit_setups(setups, network.fused)):
                    progress.describe(f'profile of {name} {setup}')
                    title = f'{name} {setup}, {batch} x {size[0]} x {size[1]}'
                    with _guard(f'profile of {title}', result):
                        _profile(title, name, take_batch(network, batch), setup, result)
                    progress.update(1)


def _profile(title: str, name: str, network: Network, setup: Setup, result: BenchResult) -> None:
    batch, _, height, width = network.images.shape
    with redirect_stdout(sys.stderr):  # messages of the runtimes
        runner = prepare(network, setup)
    profile = profile_call(runner.run, setup.device, runner.module)
    text = describe_profile(profile)
    if setup.backend in FUSED_IN_TORCH:
        trace = trace_layers(network.fused, (height, width), batch, TORCH_DTYPES[setup.dtype])
        has_parts = runner.module is not None  # otherwise no row of the roofline has a measured time
        text += '\n\n' + describe_roofline(
            trace, measure_rates(setup.device, setup.dtype), profile if has_parts else None, profile.total_ms)
    result.profiles[title] = list_profile(profile, Record(
        model=name, backend=setup.backend, device=describe_device(setup.device), dtype=setup.dtype,
        layout=setup.layout, batch=batch, height=height, width=width, threads=setup.threads, kernels=runner.kernels))
    result.texts.append(f'{title}\n{text}')


# Training -------------------------------------------------------------------------------------------------------------

def _train_all(
        config: BenchConfig, names: list[str], device: torch.device, result: BenchResult, stream: TextIO | None,
) -> None:
    batches = config.list_training_batches()
    odd = [str(batch) for batch in config.batch_size if batch not in batches]
    batches = batches or [BATCHES[device.type]]
    if odd:
        result.remarks.append(f'training steps have a batch of {", ".join(map(str, batches))}, not {", ".join(odd)}: '
                              f'mixup pairs the images')
    benches = [
        TrainingBench(name, teacher, batch, side, device, rounds=ROUNDS)
        for name, teacher, (side, _), batch in itertools.product(names, config.teacher, config.sizes, batches)]
    ways = config.ways or list(list_modes(device))
    with Progress(len(benches) * (len(ways) + 1) * ROUNDS, 'blocks', stream=stream) as progress:
        for bench in benches:
            progress.describe(f'training {bench.model}, teacher {bench.teacher}')
            with _guard(f'training of {bench.model}, teacher {bench.teacher}', result):
                records = bench_training(bench, ways, report=lambda: progress.update(1))
                result.training += records
                result.texts.append(describe_training(records))


# Plots ----------------------------------------------------------------------------------------------------------------

def _draw_growth(model: str, device: torch.device, path: Path, stream: TextIO | None) -> Path:
    with Progress(2 * GROWTH_ROUNDS * len(SIZES), 'blocks', stream=stream) as progress:
        progress.describe(f'{model}, latency by resolution')
        return draw_growth(measure_growth(
            model, device=device, rounds=GROWTH_ROUNDS, report=lambda: progress.update(1)), path)


def _draw_all(
        config: BenchConfig, names: list[str], device: torch.device, result: BenchResult, stream: TextIO | None,
) -> None:
    folder = Path(config.plots)
    plots: list[Callable[[], Path]] = []
    groups: dict[str, list[Record]] = {}
    for record in result.records:
        groups.setdefault(f'batch{record.batch}_{record.height}x{record.width}', []).append(record)
    if config.plots_file:
        plots.append(partial(draw_accuracy_by_latency, result.records, folder))
    else:
        plots += [partial(draw_accuracy_by_latency, rows, folder / f'accuracy_latency_{group}.png')
                  for group, rows in groups.items()]
        if result.counts:
            gmacs = {count.model: count.gmacs_fused for count in result.counts if (count.height, count.width) == (
                224, 224)}
            plots.append(partial(draw_accuracy_by_gmacs, gmacs, folder / 'accuracy_gmacs.png'))
        models: dict[str, dict[str, list[Record]]] = {}
        for title, rows in result.profiles.items():
            models.setdefault(rows[0].model, {})[title.removeprefix(f'{rows[0].model} ')] = rows
        plots += [partial(draw_parts, profiles, folder / f'parts_{model}.png') for model, profiles in models.items()]
        care = next((name for name in names if find_family(name) == 'care'), None)
        if care is not None:
            plots.append(partial(_draw_growth, care, device, folder / 'growth.png', stream))
    for draw in plots:
        with _guard('a plot', result):
            try:
                result.plots.append(str(draw()))
            except PlotError as error:
                result.remarks.append(f'plot skipped: {error}')
