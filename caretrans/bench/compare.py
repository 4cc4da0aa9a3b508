"""Train several models on equal terms, and compare the accuracy that they reach with their latency.

    bash cmd/compare.sh data/fruit14 --recipe care_s0_fruit14 --model care_s0 casvit_xs mlla_t

Every run is one of `train.py`, with the same data, recipe, steps and images, in a folder of its own. Finished runs are
not repeated, an unfinished one resumes. When all are done the networks are timed interleaved, as in `benchmark.py`, and
tables and a plot are written.
"""
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..devices import describe_device, list_versions, resolve_device, use_threads
from ..distributed import Processes, find_processes
from ..errors import ConfigError, Preempted, TrainingError
from ..measure.timing import free_memory
from ..progress import Progress
from ..text import escape
from ..training.folder import describe_environment, find_run
from ..training.run import train
from ..training.classification import ClassificationTrainer, build_model, check_batch, check_kernels
from .compare_plan import Plan, check_places, parse_plan, write_plan
from .compare_report import (
    Comparison, ModelFigures, RunFacts, RunFigures, describe_comparison, write_comparison)
from .config import BenchConfig, list_setups
from .infer import BUILDING, ROUNDS, Candidate, build_network, count_network, measure_group, take_batch
from .record import ModelCounts
from .train import has_second_head

__all__ = ['compare', 'main']


def _check_runs(plan: Plan, device: torch.device) -> dict[str, RunFacts]:
    """Build everything that a run of each model needs, once, before any training.

    Returns:
        What the trainer derived from the settings, by model.
    Raises:
        ConfigError, DataError: Some run cannot work, or would not be on equal terms.
    """
    configs = {model: plan.configs[model, plan.seeds[0]] for model in plan.models}
    for config in configs.values():  # all of them before a teacher is fetched
        if config.teacher != 'none' and not has_second_head(build_model(config, num_classes=2)):
            raise ConfigError(
                f'teacher {config.teacher}: {config.model} has no second head for a teacher: remove --teacher, or name '
                f'models with two heads.')
        check_kernels(config, device)
        check_batch(config, world_size=1)
    facts: dict[str, RunFacts] = {}
    for model, config in configs.items():
        trainer = ClassificationTrainer(replace(config, compile=False, kernels=False), Processes(), device)
        trainer.train_loader.close()
        facts[model] = RunFacts(trainer.describe())
    for key, config in plan.configs.items():
        if not plan.is_finished(*key):
            find_run(config)
    first = facts[plan.models[0]].budget
    for model in plan.models:
        unequal = [f'{name} {value}, {getattr(first, name)} of {plan.models[0]}'
                   for name, value in vars(facts[model].budget).items() if value != getattr(first, name)]
        if unequal:
            raise ConfigError(f'{model} would not train on equal terms ({"; ".join(unequal)}): remove it.')
    return facts


# Runs -----------------------------------------------------------------------------------------------------------------

def _train_all(plan: Plan, failures: list[str]) -> None:
    todo = [key for key in plan.configs if not plan.is_finished(*key)]
    for place, (model, seed) in enumerate(todo, 1):
        print(f'run {place} of {len(todo)}: {model}, seed {seed}', flush=True)
        try:
            train(plan.configs[model, seed])
        except TrainingError as error:
            failures.append(f'{model}, seed {seed}: {error}')
        free_memory()


def _time_all(plan: Plan, runs: Sequence[RunFigures], device: torch.device, failures: list[str]) -> list[ModelFigures]:
    """Figures of the trained networks, with latencies of the original and the fused ones, interleaved."""
    bench = BenchConfig(backend=['eager', 'fused'], kernels=['torch'], runs=plan.runs, device=str(device))
    setups, _ = list_setups(bench, device)
    counts: list[ModelCounts] = []
    candidates: list[Candidate] = []
    for model in dict.fromkeys(run.model for run in runs):
        run = next(run for run in runs if run.model == model)
        config = plan.configs[model, run.seed]
        side = config.val_img_size or config.img_size
        network = build_network(model, (side, side), str(Path(config.output) / 'last.pth.tar'))
        counts.append(count_network(model, network, (side, side)))
        candidates += [Candidate(model, setup, take_batch(network, 1)) for setup in setups]
    rounds = min(ROUNDS, plan.runs or ROUNDS)
    steps = len(candidates) * (BUILDING + rounds) + rounds
    with use_threads(bench.threads), Progress(steps, 'steps') as progress:
        records, failed = measure_group(candidates, bench, device, progress)
    failures += failed
    return [ModelFigures(
        count, [run for run in runs if run.model == count.model],
        {record.backend: record for record in records if record.model == count.model}) for count in counts]


def compare(plan: Plan) -> Comparison:
    """Train the unfinished runs, time all models, and write tables and a plot into the folder of the plan.

    Raises:
        ConfigError, DataError: Something cannot work; nothing has been trained then.
        Preempted: SIGTERM came; the checkpoint of the run is written.
    """
    if not find_processes().is_alone:
        raise ConfigError('A comparison is one process: start it without torchrun.')
    device = resolve_device(plan.config.device)
    check_places(plan)
    facts = _check_runs(plan, device)
    write_plan(plan)
    failures: list[str] = []
    _train_all(plan, failures)
    runs = [RunFigures.read(model, seed, Path(config.output)) for (model, seed), config in plan.configs.items()
            if plan.is_finished(model, seed)]
    if not runs:
        raise TrainingError(f'No run finished: {"; ".join(failures)}')
    models = _time_all(plan, runs, device, failures)
    comparison = Comparison(
        plan, models, facts, describe_device(device), list_versions(), describe_environment()['git_commit'], failures)
    write_comparison(comparison)
    return comparison


def main(argv: Sequence[str] | None = None) -> int:
    """The command: exit code 1 if a run or a timing failed.

    Raises:
        ConfigError, DataError, CheckpointError: As `compare`.
    """
    plan = parse_plan(argv)
    try:
        comparison = compare(plan)
    except Preempted as stop:
        print(stop)
        return 0
    except TrainingError as error:
        print(f'caretrans compare: {escape(error)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('caretrans compare: stopped; the same command resumes from the last checkpoint', file=sys.stderr)
        return 130
    print('\n'.join(describe_comparison(comparison)))
    print(f'written to {plan.folder}: comparison.csv, comparison.json, comparison.md, comparison.png')
    for failure in comparison.failures:
        print(f'caretrans compare: failed: {escape(failure)}', file=sys.stderr)
    return int(bool(comparison.failures))
