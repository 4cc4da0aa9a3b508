"""All that `benchmark.py` measures: inference, where its time goes, training steps; and plots of it."""
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import timm
import torch

from ..devices import describe_device, resolve_device, use_threads
from ..errors import CheckpointError, ConfigError, PlotError
from ..measure.counts import make_empty
from ..models.backbone import find_family
from ..progress import Progress
from .accuracy import describe_accuracy, measure_accuracy
from .backends import IN_TORCH, TORCH_DTYPES, Network, Setup, fit_setups, prepare
from .bounds import describe_bounds, trace_operations
from .config import BenchConfig, list_setups
from .device_rates import measure_rates
from .growth import SIZES, measure_growth
from .inference import BenchResult, build_network, run_inference, shorten, take_batch
from .learning import bench_curves, list_comparisons
from ..measure.names import expand_models
from .plots import draw_accuracy_by_gmacs, draw_accuracy_by_latency, draw_growth, draw_parts
from .profiling import describe_profile, list_profile, profile_call
from .training import TrainingBench, bench_training, describe_training
from .training_ways import list_ways, parse_way

__all__ = ['run_benches']

BATCHES = {'cuda': 128, 'mps': 128, 'cpu': 16}  # images of a training step where none are given
ROUNDS = 7  # of training steps
GROWTH_ROUNDS = 5
BOUNDED = ('fused', 'compile', 'cudagraph')  # they run the rewritten network in PyTorch


def _check_batches(config: BenchConfig) -> None:
    odd = [batch for batch in config.list_training_batches() if batch % 2]
    if odd:
        raise ConfigError(
            f'--batch-size {odd[0]} with --bench {config.bench}: mixup pairs the images, give an even number.')


def _check_training(config: BenchConfig, names: list[str], device: torch.device) -> None:
    """Refuse what cannot be trained before anything is measured."""
    _check_batches(config)
    oblong = [text for text, (height, width) in zip(config.img_size, config.sizes, strict=True) if height != width]
    if oblong:
        raise ConfigError(f'--img-size {oblong[0]} with --bench {config.bench}: training takes square images.')
    teachers = expand_models([teacher for teacher in config.teacher if teacher != 'none'], '--teacher')
    for name in names if teachers else []:
        model = make_empty(name)
        if not (hasattr(model, 'set_distilled_training') and getattr(model, 'distilled', True)):
            raise ConfigError(
                f'--teacher {teachers[0]} with --model {name}: it has no head that learns from one; leave it out.')
    for way in config.ways:
        parse_way(way, device)


def _describe_odd_batches(config: BenchConfig, device: torch.device) -> list[str]:
    """A line on the batches that are for inference alone."""
    batches = config.list_training_batches()
    odd = [str(batch) for batch in config.batch_size if batch not in batches]
    taken = ', '.join(map(str, batches or [BATCHES[device.type]]))
    return [f'training steps have a batch of {taken}, not {", ".join(odd)}: mixup pairs the images'] if odd else []


def _check_scoring(config: BenchConfig) -> None:
    height, width = config.sizes[0]
    if len(config.sizes) > 1 or height != width:
        raise ConfigError('--bench accuracy takes one square --img-size.')


@contextmanager
def _guard(what: str, result: BenchResult) -> Iterator[None]:
    """Whatever fails inside becomes a failure of the result: what is measured already is kept, and the rest goes on."""
    try:
        yield
    except CheckpointError:  # of the one model that there is then: nothing can be measured
        raise
    except Exception as error:
        result.failures.append(f'{what}: {shorten(error)}')


def run_benches(config: BenchConfig, stream: TextIO | None = None) -> BenchResult:
    """Measure what a config asks for, and draw its plots.

    Args:
        stream: Where progress is shown; stdout if not given.
    Raises:
        ConfigError: Something that cannot be measured was asked for; nothing has been measured then.
        CheckpointError: The checkpoint does not fit the model.
    """
    names, device = config.list_models(), resolve_device(config.device)
    setups, left_out = list_setups(config, device)
    benches = config.list_benches()
    if 'train' in benches:
        _check_training(config, names, device)
    if 'accuracy' in benches:
        _check_scoring(config)
    if 'curves' in benches:
        _check_batches(config)
    comparisons = list_comparisons(config, names, device) if 'curves' in benches else []
    result = run_inference(config, stream) if 'infer' in benches else BenchResult(
        describe_device(device), remarks=left_out if 'profile' in benches else [])
    if 'train' in benches:
        result.remarks += _describe_odd_batches(config, device)
    with use_threads(config.threads):
        if 'accuracy' in benches:
            _score_all(config, names, setups, result, stream)
        if comparisons:
            bench_curves(comparisons, config.steps, device, result, stream)
        if 'profile' in benches:
            _profile_all(config, names, setups, result, stream)
        if 'train' in benches:
            _train_all(config, names, device, result, stream)
        if config.plots:
            _draw_all(config, names, device, result, stream)
    return result


# Profiles -------------------------------------------------------------------------------------------------------------

def _profile_all(
        config: BenchConfig, names: list[str], setups: list[Setup], result: BenchResult, stream: TextIO | None,
) -> None:
    setups = [setup for setup in setups if setup.backend in IN_TORCH]
    steps = len(names) * len(config.sizes) * len(config.list_batches()) * len(setups)
    with Progress(steps, 'profiles', stream=stream) as progress:
        for name, size in itertools.product(names, config.sizes):
            with _guard(f'profiles of {name} at {size[0]} x {size[1]}', result):
                _profile_model(name, size, config, setups, result, progress)


def _profile_model(
        name: str, size: tuple[int, int], config: BenchConfig, setups: list[Setup], result: BenchResult,
        progress: Progress) -> None:
    network = build_network(name, size, config.checkpoint)
    for batch in config.list_batches():
        for setup in fit_setups(setups, network.fused):
            progress.describe(f'profile of {name} {setup}')
            _profile(name, take_batch(network, batch), setup, result)
            progress.update(1)


def _profile(name: str, network: Network, setup: Setup, result: BenchResult) -> None:
    batch, _, height, width = network.images.shape
    title = f'{name} {setup}, {batch} x {height} x {width}'
    try:
        with redirect_stdout(sys.stderr):  # the runtimes' own remarks
            runner = prepare(network, setup)
        profile = profile_call(runner.run, setup.device, runner.module)
        text = describe_profile(profile)
        if setup.backend in BOUNDED:
            operations = trace_operations(network.fused, (height, width), batch, TORCH_DTYPES[setup.dtype])
            has_parts = runner.module is not None  # else the rows of the bound have nothing beside them
            text += '\n\n' + describe_bounds(
                operations, measure_rates(setup.device, setup.dtype), profile if has_parts else None, profile.total_ms)
    except Exception as error:  # whatever a backend raises: the others go on
        result.failures.append(f'profile of {title}: {shorten(error)}')
        return
    result.profiles[title] = list_profile(
        profile, model=name, backend=setup.backend, device=describe_device(setup.device), dtype=setup.dtype,
        layout=setup.layout, batch=batch, height=height, width=width, threads=setup.threads, kernels=runner.kernels)
    result.texts.append(f'{title}\n{text}')


# Accuracy -------------------------------------------------------------------------------------------------------------

def _score_all(
        config: BenchConfig, names: list[str], setups: list[Setup], result: BenchResult, stream: TextIO | None,
) -> None:
    size = config.sizes[0][0] if config.img_size != BenchConfig().img_size else None
    setups = fit_setups(setups, timm.create_model(names[0]))
    result.accuracy = measure_accuracy(config.checkpoint, setups, config.data, names[0], size, stream, result.failures)
    if result.accuracy:
        result.texts.append('\n'.join(describe_accuracy(result.accuracy, config.markdown)))


# Training -------------------------------------------------------------------------------------------------------------

def _train_all(
        config: BenchConfig, names: list[str], device: torch.device, result: BenchResult, stream: TextIO | None,
) -> None:
    benches = [
        TrainingBench(name, teacher, batch, size[0], device, rounds=ROUNDS)
        for name in names for teacher in config.teacher for size in config.sizes
        for batch in config.list_training_batches() or [BATCHES[device.type]]]
    ways = config.ways or list(list_ways(device))
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
        progress.describe(f'{model}, growth with resolution')
        return draw_growth(measure_growth(
            model, device=device, rounds=GROWTH_ROUNDS, report=lambda: progress.update(1)), path)


def _list_parts_plots(result: BenchResult, folder: Path) -> Iterator[Callable[[], Path]]:
    """A plot for each model that was profiled."""
    models: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for title, rows in result.profiles.items():
        model = rows[0]['model']
        models.setdefault(model, {})[title.removeprefix(f'{model} ')] = rows
    for model, profiles in models.items():
        yield lambda profiles=profiles, model=model: draw_parts(profiles, folder / f'parts_{model}.png')


def _draw_all(
        config: BenchConfig, names: list[str], device: torch.device, result: BenchResult, stream: TextIO | None,
) -> None:
    folder = Path(config.plots)
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in result.records:
        groups.setdefault(f'batch{record["batch"]}_{record["height"]}x{record["width"]}', []).append(record)
    plots: list[Callable[[], Path]] = [
        lambda group=group, rows=rows: draw_accuracy_by_latency(rows, folder / f'accuracy_latency_{group}.png')
        for group, rows in groups.items()]
    gmacs = {count['model']: count['gmacs_fused'] for count in result.counts if (count['height'], count['width']) == (
        224, 224)}
    if result.counts:
        plots.append(lambda: draw_accuracy_by_gmacs(gmacs, folder / 'accuracy_gmacs.png'))
    plots += _list_parts_plots(result, folder)
    care = next((name for name in names if find_family(name) == 'care'), None)
    if care is not None:
        plots.append(lambda: _draw_growth(care, device, folder / 'growth.png', stream))
    for draw in plots:
        with _guard('a plot', result):
            try:
                result.plots.append(str(draw()))
            except PlotError as error:
                result.remarks.append(f'plot left out: {error}')
