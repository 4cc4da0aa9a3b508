"""Train several models on equal terms, and hold the accuracy that they reach against their latency.

    bash cmd/compare.sh data/fruit14 --recipe care_s0_fruit14 --model care_s0 casvit_xs mlla_t

Every run is one of `train.py`, with the same data, recipe, steps and images, in a folder of its own. Runs that are
finished are not repeated, an unfinished one goes on. When all are done the networks are timed interleaved, as
`benchmark.py` times them, and tables and a plot are written.
"""
import argparse
import csv
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
from ..measure.sample_network import SAMPLE_IMAGES
from ..models.backbone import find_family, resolve_alias
from ..progress import Progress
from ..training.folder import FREE, describe_environment, find_run
from ..training.run import train
from ..training.trainer import Trainer, build_model, check_kernels
from .comparison_report import Comparison, describe_comparison, summarise_models, write_comparison
from .config import BenchConfig, list_setups
from .infer import BUILDING, ROUNDS, Candidate, build_network, count_network, measure_group, take_batch
from ..measure.names import expand_models
from .readme import find_place, update_readme
from .report import check_folder

__all__ = ['Plan', 'compare', 'main', 'parse_plan']

SETTINGS = 'comparison.yaml'
OF_A_RUN = ('model', 'model_args', 'seed', 'output', 'resume')  # settings that are not those of the whole comparison
MOVABLE = FREE - {  # what a run may change, but not between runs that are compared
    'data', 'device_batch', 'val_interval', 'on_nan', 'max_skips', 'max_unreadable'}
MODELS = ('care_s0', 'casvit_xs', 'mlla_t')  # one of each family
RECIPE = 'care_s0_fruit14'  # of the bundled photographs
MACHINE = ('git_commit', 'python', 'torch', 'torchvision', 'timm', 'numpy', 'device', 'gpu', 'machine', 'threads')
WAYS = ('compile', 'kernels', 'grad_checkpointing')  # of computing the same, settings of a run
EQUAL = ('train_images', 'val_images', 'num_classes', 'batch_size', 'epochs', 'steps_per_epoch')


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        folder: Of the comparison; a run has its own in it.
        configs: Of each model and seed, in order.
        left_out: The model arguments of the recipe that a model does not take, by model.
        runs: Timed runs of each network; chosen by how long they take if None.
        update: A file with the markers of `readme`, into which the table is written as well.
    """
    folder: Path
    configs: dict[tuple[str, int], TrainConfig]
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: str = ''
    runs: int | None = None
    update: str = ''

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(model for model, _ in self.configs))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(seed for _, seed in self.configs))

    def list_unfinished(self) -> dict[tuple[str, int], TrainConfig]:
        return {key: config for key, config in self.configs.items()
                if not (Path(config.output) / 'result.json').exists()}

    def list_settings(self) -> dict[str, Any]:
        """The settings that all runs share."""
        config = next(iter(self.configs.values()))
        return {key: value for key, value in config.to_dict().items() if key not in OF_A_RUN}


# What is asked for ----------------------------------------------------------------------------------------------------

def _flag_parser() -> FlagParser:
    parser = FlagParser(
        prog='caretrans compare', allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Train models on the same data with the same budget, one after the other in one process, on one\n'
                    'GPU or the processor, and plot accuracy against latency.',
        epilog='All other flags, and the folder DATA, are settings of train.py and hold for every model:\n'
               'python train.py --help lists them. Without data and recipe: the bundled photographs.')
    parser.add_argument(
        '--model', nargs='+', default=MODELS,
        help=f'models of timm and caretrans, also with wildcards (default: {" ".join(MODELS)})')
    parser.add_argument('--recipe', default='', help='bundled recipe or YAML file; flags go over it')
    parser.add_argument(
        '--seeds', nargs='+', type=number(int, 0), help='train each model with each of these; by default --seed alone')
    parser.add_argument('--output', default='', help='folder of the comparison; one under runs/ if not given')
    parser.add_argument('--runs', type=number(int, 1), help='timed runs of each network; by default 50, or fewer')
    parser.add_argument('--update', default='', help='a page with markers, into which the table is written too')
    return parser


def _names_data(argv: Sequence[str]) -> bool:
    parser = FlagParser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument('data_folder', nargs='?')
    add_flags(parser, TrainConfig)
    given, _ = parser.parse_known_args(argv)
    return any(getattr(given, name, None) for name in ('data_folder', 'data', 'dataset'))


def _locate(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which the folder of the data is written in one way."""
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
        ConfigError: Unknown flags, models, recipes or settings, or some that cannot be those of several models.
        SystemExit: After --help.
    """
    flags, rest = _flag_parser().parse_known_args(argv)
    models = list(dict.fromkeys(map(resolve_alias, expand_models(flags.model))))
    if flags.seeds and any(argument.split('=')[0] == '--seed' for argument in rest):
        raise ConfigError('--seed and --seeds: give one of them.')
    if not flags.recipe and not _names_data(rest):
        flags.recipe, rest = RECIPE, [str(SAMPLE_IMAGES), *rest]
    config = parse_train_config([*(['--recipe', flags.recipe] if flags.recipe else []), *rest])
    seeds = flags.seeds or [config.seed]
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f'--seeds {" ".join(map(str, seeds))}: name each once.')
    if config.checkpoint:
        raise ConfigError(f'--checkpoint {config.checkpoint}: it is of one model; leave it out.')
    if not config.resume:
        raise ConfigError('--no-resume: a comparison goes on where it was; give another --output to begin anew.')
    settings = read_recipe(flags.recipe) if flags.recipe else {}
    folder = Path(flags.output) if flags.output else _name_folder(config, models, seeds)
    args = {model: choose_model_args(config.model_args, settings, model) for model in models}
    configs = {(model, seed): replace(
        config, model=model, model_args=args[model], seed=seed, output=str(folder / f'{model}-seed{seed}'))
        for model in models for seed in seeds}
    left_out = {model: {key: value for key, value in config.model_args.items() if key not in args[model]}
                for model in models}
    return Plan(folder, configs, {model: names for model, names in left_out.items() if names}, flags.recipe,
                flags.runs, flags.update)


# What cannot work, before anything is trained -------------------------------------------------------------------------

def _check_claim(plan: Plan) -> None:
    """Refuse a folder that holds something else.

    Raises:
        ConfigError: Another comparison, or anything that is none; or it cannot be written.
    """
    check_folder(str(plan.folder), '--output')
    file = plan.folder / SETTINGS
    if not file.is_file():
        if plan.folder.is_dir() and any(plan.folder.iterdir()):
            raise ConfigError(f'{plan.folder} holds something else than a comparison: give another --output.')
        return
    try:
        there = yaml.safe_load(file.read_text())
        settings, models, seeds = there['settings'], there['models'], there['seeds']
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f'{file} cannot be read ({type(error).__name__}): give another --output.') from None
    settings = _locate(settings)
    changes = [f'{name} {settings[name]!r} there, {value!r} here'
               for name, value in _locate(plan.list_settings()).items()
               if name not in MOVABLE and name in settings and settings[name] != value]
    changes += [f'{what} {" ".join(map(str, gone))} not here' for what, gone in (
        ('model', [m for m in models if m not in plan.models]), ('seed', [s for s in seeds if s not in plan.seeds]))
        if gone]
    if changes:
        raise ConfigError(
            f'{plan.folder} holds another comparison ({"; ".join(changes[:5])}): give another --output.')


def _claim(plan: Plan) -> None:
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        (plan.folder / SETTINGS).write_text(yaml.safe_dump(dict(
            models=plan.models, seeds=plan.seeds, recipe=plan.recipe, settings=plan.list_settings()), sort_keys=False))
    except OSError as error:
        raise ConfigError(f'{plan.folder} cannot be written ({error}): give another --output.') from None


def _check_heads(config: TrainConfig) -> None:
    if config.teacher == 'none':
        return
    model = build_model(config, num_classes=2)
    if not (hasattr(model, 'set_distilled_training') and getattr(model, 'distilled', True)):
        raise ConfigError(
            f'teacher {config.teacher}: {config.model} has one head, and none that learns from a teacher: leave '
            f'--teacher out, or name models with two.')


def _check_runs(plan: Plan, device: torch.device) -> dict[str, dict[str, Any]]:
    """Build everything that a run of each model needs, once.

    Returns:
        What was derived from the settings, by model.
    Raises:
        ConfigError, DataError: Some run cannot work, or would not be on equal terms.
    """
    configs = {model: plan.configs[model, plan.seeds[0]] for model in plan.models}
    for config in configs.values():  # of all before a teacher is fetched
        _check_heads(config)
        check_kernels(config, device)
    facts = {}
    for model, config in configs.items():
        trainer = Trainer(replace(config, compile=False, kernels=False), Processes(), device)
        trainer.train_loader.close()
        facts[model] = trainer.describe()
    for config in plan.list_unfinished().values():
        find_run(config)
    first = facts[plan.models[0]]
    for model, found in facts.items():
        unequal = [f'{name} {found[name]}, {first[name]} of {plan.models[0]}' for name in EQUAL
                   if found[name] != first[name]]
        if unequal:
            raise ConfigError(f'{model} would not train on equal terms ({"; ".join(unequal)}): leave it out.')
    return facts


# The runs -------------------------------------------------------------------------------------------------------------

def _train_all(plan: Plan, failures: list[str]) -> None:
    todo = plan.list_unfinished()
    for place, ((model, seed), config) in enumerate(todo.items(), 1):
        print(f'run {place} of {len(todo)}: {model}, seed {seed}', flush=True)
        try:
            train(config)
        except TrainingError as error:
            failures.append(f'{model}, seed {seed}: {error}')
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _read_run(folder: Path) -> dict[str, Any]:
    """The figures of a finished run."""
    result = json.loads((folder / 'result.json').read_text())
    environment = json.loads((folder / 'environment.json').read_text())
    config = yaml.safe_load((folder / 'config.yaml').read_text())
    with open(folder / 'summary.csv', newline='') as file:
        seconds = sum(float(row['seconds']) for row in csv.DictReader(file))
    return dict(
        top1=result['last']['val_top1'], top5=result['last']['val_top5'], val_loss=result['last']['val_loss'],
        train_loss=result['last']['train_loss'], best_top1=result['best']['val_top1'],
        best_epoch=result['best']['epoch'], seconds=seconds, folder=str(folder),
        machine={**{key: environment.get(key) for key in MACHINE}, **{key: config.get(key) for key in WAYS}})


def _time_all(
        plan: Plan, models: Sequence[str], device: torch.device, failures: list[str],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Counts of the trained networks, and their latencies as trained and fused, interleaved."""
    bench = BenchConfig(backend=['eager', 'fused'], kernels=['torch'], runs=plan.runs, device=str(device))
    setups, _ = list_setups(bench, device)
    counts, candidates = [], []
    for model in models:
        config = next(config for (name, _), config in plan.configs.items() if name == model and (
            Path(config.output) / 'result.json').exists())
        side = config.val_img_size or config.img_size
        network = build_network(model, (side, side), str(Path(config.output) / 'last.pth.tar'))
        counts.append(count_network(model, network, (side, side)))
        candidates += [Candidate(model, setup, take_batch(network, 1)) for setup in setups]
    rounds = min(ROUNDS, plan.runs or ROUNDS)
    steps = len(candidates) * (BUILDING + rounds) + rounds
    with use_threads(bench.threads), Progress(steps, 'steps') as progress:
        records, failed = measure_group(candidates, bench, device, progress)
    failures += failed
    return counts, records


def compare(plan: Plan) -> Comparison:
    """Train what is not trained yet, time all, and write the tables and the plot into the folder of the plan.

    Raises:
        ConfigError, DataError: Something cannot work; nothing has been trained then.
        Preempted: SIGTERM came; the checkpoint of the run is written.
    """
    if not find_processes().is_alone:
        raise ConfigError('A comparison is one process: start it without torchrun.')
    device = resolve_device(plan.list_settings()['device'])
    if plan.update:
        find_place(Path(plan.update))
    _check_claim(plan)
    facts = _check_runs(plan, device)
    _claim(plan)
    failures: list[str] = []
    _train_all(plan, failures)
    runs = [dict(model=model, seed=seed, **_read_run(Path(config.output)))
            for (model, seed), config in plan.configs.items() if (Path(config.output) / 'result.json').exists()]
    models = list(dict.fromkeys(run['model'] for run in runs))
    if not models:
        raise TrainingError(f'No run came to its end: {"; ".join(failures)}')
    counts, records = _time_all(plan, models, device, failures)
    comparison = Comparison(
        models=summarise_models(runs, counts, records, {model: find_family(model) for model in models}), runs=runs,
        latencies=records, facts=facts, settings=plan.list_settings(), recipe=plan.recipe, left_out=plan.left_out,
        model_args={model: plan.configs[model, plan.seeds[0]].model_args for model in models},
        device=describe_device(device), versions=list_versions(), commit=describe_environment()['git_commit'],
        failures=failures)
    write_comparison(comparison, plan.folder)
    if plan.update:
        update_readme(Path(plan.update), describe_comparison(comparison, markdown=True))
    return comparison


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 if a run or a timing failed.

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
        print('caretrans compare: stopped; the same command goes on from the last checkpoint', file=sys.stderr)
        return 130
    print('\n'.join(describe_comparison(comparison)))
    print(f'written to {plan.folder}: comparison.csv, comparison.json, comparison.md, comparison.png')
    for failure in comparison.failures:
        print(f'caretrans compare: failed: {failure}', file=sys.stderr)
    return int(bool(comparison.failures))
