"""Train several models on equal terms, and compare the accuracy that they reach with their latency.

    bash cmd/compare.sh data/fruit14 --recipe care_s0_fruit14 --model care_s0 casvit_xs mlla_t

Every run is one of `train.py`, with the same data, recipe, steps and images, in a folder of its own. Finished runs are
not repeated, an unfinished one resumes. When all are done the networks are timed interleaved, as in `benchmark.py`, and
tables and a plot are written.
"""
import argparse
import gc
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import FlagParser, TrainConfig, add_flags, choose_model_args, number, parse_train_config, read_recipe
from ..devices import describe_device, list_versions, resolve_device, use_threads
from ..distributed import Processes, find_processes
from ..errors import ConfigError, Preempted, TrainingError
from ..measure.names import expand_models
from ..measure.sample_network import SAMPLE_IMAGES
from ..models.backbone import resolve_alias
from ..progress import Progress
from ..training.folder import FREE, describe_environment, find_run
from ..training.run import train
from ..training.trainer import Trainer, build_model, check_kernels
from .compare_report import TITLE, Comparison, ModelFigures, RunFigures, describe_comparison, write_comparison
from .config import BenchConfig, list_setups
from .infer import BUILDING, ROUNDS, Candidate, build_network, count_network, measure_group, take_batch
from .record import ModelCounts
from .report import check_folder

__all__ = ['Plan', 'compare', 'main', 'parse_plan']

SETTINGS = 'comparison.yaml'
OF_A_RUN = ('model', 'model_args', 'seed', 'output', 'resume')  # settings that differ between runs
MOVABLE = FREE - {  # settings that may change in a run, but not between runs that are compared
    'data', 'device_batch', 'val_interval', 'on_nan', 'max_skips', 'max_unreadable'}
MODELS = ('care_s0', 'casvit_xs', 'mlla_t')  # one of each family
RECIPE = 'care_s0_fruit14'  # for the bundled images
EQUAL = ('train_images', 'val_images', 'num_classes', 'batch_size', 'epochs', 'steps_per_epoch')


@dataclass(frozen=True)
class Plan:
    """Plan of a comparison.

    Attributes:
        folder: Folder of the comparison; each run has its own in it.
        configs: Config of each model and seed, in order.
        skipped_args: {model: arguments of the recipe that apply only to its own family}.
        runs: Timed runs of each network; chosen by how long they take if None.
        update: A page to which the table is written as well.
    """
    folder: Path
    configs: dict[tuple[str, int], TrainConfig]
    skipped_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: str = ''
    runs: int | None = None
    update: str = ''

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(model for model, _ in self.configs))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(seed for _, seed in self.configs))

    def is_finished(self, model: str, seed: int) -> bool:
        return (Path(self.configs[model, seed].output) / 'result.json').exists()

    def list_settings(self) -> dict[str, Any]:
        """The settings that all runs share."""
        config = next(iter(self.configs.values()))
        return {key: value for key, value in config.to_dict().items() if key not in OF_A_RUN}


# Flags ----------------------------------------------------------------------------------------------------------------

def _flag_parser() -> FlagParser:
    parser = FlagParser(
        prog='caretrans compare', allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Train models on the same data with the same budget, sequentially in one process, on one\n'
                    'GPU or the CPU, and plot accuracy against latency.',
        epilog='All other flags, and the folder DATA, are settings of train.py and apply to every model:\n'
               'python train.py --help lists them. Without data and recipe: the bundled images.')
    parser.add_argument(
        '--model', nargs='+', default=MODELS,
        help=f'models of timm and caretrans, also with wildcards (default: {" ".join(MODELS)})')
    parser.add_argument('--recipe', default='', help='bundled recipe or YAML file; flags override it')
    parser.add_argument(
        '--seeds', nargs='+', type=number(int, 0), help='seeds to train each model with (default: --seed)')
    parser.add_argument('--output', default='', help='folder of the comparison (default: one under runs/)')
    parser.add_argument('--runs', type=number(int, 1), help='timed runs of each network (default: 50, or fewer)')
    parser.add_argument('--update', default='', help='Markdown page to write the table to; replaces the whole page')
    return parser


def _names_data(argv: Sequence[str]) -> bool:
    parser = FlagParser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument('data_folder', nargs='?')
    add_flags(parser, TrainConfig)
    given, _ = parser.parse_known_args(argv)
    return any(getattr(given, name, None) for name in ('data_folder', 'data', 'dataset'))


def _locate(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with an absolute data folder, so that a folder has one spelling."""
    return {**settings, 'data': os.path.abspath(settings['data'])} if settings.get('data') else settings


def _name_folder(config: TrainConfig, models: Sequence[str], seeds: Sequence[int]) -> Path:
    """A folder under runs/ that is the same for the same comparison."""
    settings = {
        key: value for key, value in _locate(config.to_dict()).items() if key not in MOVABLE | {'model', 'seed'}}
    digest = hashlib.sha256(json.dumps([settings, list(models), list(seeds)], sort_keys=True).encode()).hexdigest()
    return Path('runs') / f'compare-{Path(config.data or config.dataset).name}-{digest[:8]}'


def parse_plan(argv: Sequence[str] | None = None) -> Plan:
    """The plan of a command line.

    Raises:
        ConfigError: Unknown flags, models, recipes or settings, or some that do not apply to several models.
        SystemExit: After --help.
    """
    flags, rest = _flag_parser().parse_known_args(argv)
    models = list(dict.fromkeys(map(resolve_alias, expand_models(flags.model))))
    if flags.seeds and any(argument.split('=')[0] == '--seed' for argument in rest):
        raise ConfigError('--seed and --seeds: use one of them.')
    if not flags.recipe and not _names_data(rest):
        flags.recipe, rest = RECIPE, [str(SAMPLE_IMAGES), *rest]
    config = parse_train_config([*(['--recipe', flags.recipe] if flags.recipe else []), *rest])
    seeds = flags.seeds or [config.seed]
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f'--seeds {" ".join(map(str, seeds))}: name each once.')
    if config.checkpoint:
        raise ConfigError(f'--checkpoint {config.checkpoint} is not allowed: it fits only one model; remove it.')
    if not config.resume:
        raise ConfigError('--no-resume: a comparison always resumes; choose another --output to start again.')
    settings = read_recipe(flags.recipe) if flags.recipe else {}
    folder = Path(flags.output) if flags.output else _name_folder(config, models, seeds)
    args = {model: choose_model_args(config.model_args, settings, model) for model in models}
    configs = {(model, seed): replace(
        config, model=model, model_args=args[model], seed=seed, output=str(folder / f'{model}-seed{seed}'))
        for model in models for seed in seeds}
    skipped = {model: {key: value for key, value in config.model_args.items() if key not in args[model]}
               for model in models}
    return Plan(folder, configs, {model: names for model, names in skipped.items() if names}, flags.recipe,
                flags.runs, flags.update)


# Checks before any training -------------------------------------------------------------------------------------------

def _check_places(plan: Plan) -> None:
    """Refuse a folder or a page that cannot be written to, or holds something else.

    Raises:
        ConfigError: The folder holds another comparison or other files, or the page was not written by this command.
    """
    if plan.update:
        page = Path(plan.update)
        check_folder(str(page.parent), '--update')
        if page.exists() and not (page.is_file() and page.read_text().startswith(TITLE)):
            raise ConfigError(
                f'--update {page}: the file was not written by this command and would be replaced; choose '
                f'another file.')
    check_folder(str(plan.folder), '--output')
    file = plan.folder / SETTINGS
    if not file.is_file():
        if plan.folder.is_dir() and any(plan.folder.iterdir()):
            raise ConfigError(f'{plan.folder} contains other files than a comparison: choose another --output.')
        return
    try:
        saved = yaml.safe_load(file.read_text())
        settings, models, seeds = saved['settings'], saved['models'], saved['seeds']
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f'{file} cannot be read ({type(error).__name__}): choose another --output.') from None
    settings = _locate(settings)
    changes = [f'{name} {settings[name]!r} there, {value!r} here'
               for name, value in _locate(plan.list_settings()).items()
               if name not in MOVABLE and name in settings and settings[name] != value]
    for what, missing in (('model', [model for model in models if model not in plan.models]),
                          ('seed', [seed for seed in seeds if seed not in plan.seeds])):
        changes += [f'{what} {" ".join(map(str, missing))} not here'] * bool(missing)
    if changes:
        raise ConfigError(
            f'{plan.folder} holds another comparison ({"; ".join(changes[:5])}): choose another --output.')


def _check_runs(plan: Plan, device: torch.device) -> dict[str, dict[str, Any]]:
    """Build everything that a run of each model needs, once.

    Returns:
        What the trainer derived from the settings, by model.
    Raises:
        ConfigError, DataError: Some run cannot work, or would not be on equal terms.
    """
    configs = {model: plan.configs[model, plan.seeds[0]] for model in plan.models}
    for config in configs.values():  # all of them before a teacher is fetched
        if config.teacher != 'none':
            model = build_model(config, num_classes=2)
            if not (hasattr(model, 'set_distilled_training') and getattr(model, 'distilled', True)):
                raise ConfigError(
                    f'teacher {config.teacher}: {config.model} has no second head for a teacher: '
                    f'remove --teacher, or name models with two heads.')
        check_kernels(config, device)
    facts: dict[str, dict[str, Any]] = {}
    for model, config in configs.items():
        trainer = Trainer(replace(config, compile=False, kernels=False), Processes(), device)
        trainer.train_loader.close()
        facts[model] = trainer.describe()
    for key, config in plan.configs.items():
        if not plan.is_finished(*key):
            find_run(config)
    first = facts[plan.models[0]]
    for model, found in facts.items():
        unequal = [f'{name} {found[name]}, {first[name]} of {plan.models[0]}' for name in EQUAL
                   if found[name] != first[name]]
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
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
    device = resolve_device(plan.list_settings()['device'])
    _check_places(plan)
    facts = _check_runs(plan, device)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        (plan.folder / SETTINGS).write_text(yaml.safe_dump(dict(
            models=plan.models, seeds=plan.seeds, recipe=plan.recipe, settings=plan.list_settings()), sort_keys=False))
    except OSError as error:
        raise ConfigError(f'{plan.folder} cannot be written to ({error}): choose another --output.') from None
    failures: list[str] = []
    _train_all(plan, failures)
    runs = [RunFigures.read(model, seed, Path(config.output)) for (model, seed), config in plan.configs.items()
            if plan.is_finished(model, seed)]
    if not runs:
        raise TrainingError(f'No run finished: {"; ".join(failures)}')
    models = _time_all(plan, runs, device, failures)
    comparison = Comparison(
        models, facts, plan.list_settings(), plan.recipe, plan.skipped_args,
        {figures.model: plan.configs[figures.model, plan.seeds[0]].model_args for figures in models},
        describe_device(device), list_versions(), describe_environment()['git_commit'], failures)
    write_comparison(comparison, plan.folder, plan.update)
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
        print(f'caretrans compare: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('caretrans compare: stopped; the same command resumes from the last checkpoint', file=sys.stderr)
        return 130
    print('\n'.join(describe_comparison(comparison)))
    print(f'written to {plan.folder}: comparison.csv, comparison.json, comparison.md, comparison.png')
    for failure in comparison.failures:
        print(f'caretrans compare: failed: {failure}', file=sys.stderr)
    return int(bool(comparison.failures))
