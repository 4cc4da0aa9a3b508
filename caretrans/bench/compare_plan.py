"""Plan of a comparison of models: its flags, the config of each run, and the folder that it is in."""
import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..config import (
    FlagParser, TrainConfig, choose_model_args, number, parse_train_config, peek_flags, read_recipe)
from ..errors import ConfigError
from ..measure.names import expand_models
from ..measure.sample_network import SAMPLE_IMAGES
from ..models.backbone import resolve_alias
from ..text import read_text, write_text
from ..training.folder import FREE
from .report import check_folder, check_page

__all__ = ['TITLE', 'Plan', 'check_places', 'parse_plan', 'write_plan']

TITLE = '# Results of models trained on equal terms'  # heading of the pages of --update
SETTINGS = 'comparison.yaml'
OF_A_RUN = ('model', 'model_args', 'seed', 'output', 'resume')  # settings that differ between runs
MOVABLE = FREE - {  # settings that may change in a run, but not between runs that are compared
    'data', 'device_batch', 'val_interval', 'on_nan', 'max_skips', 'max_unreadable'}
MODELS = ('care_s0', 'casvit_xs', 'mlla_t')  # one of each family
RECIPE = 'care_s0_fruit14'  # for the bundled images


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

    @property
    def config(self) -> TrainConfig:
        """The config of the first run, for settings that all runs share."""
        return next(iter(self.configs.values()))

    @property
    def data_name(self) -> str:
        return Path(self.config.data or self.config.dataset).name

    def list_settings(self) -> dict[str, Any]:
        """The settings that all runs share, for files."""
        return {key: value for key, value in self.config.to_dict().items() if key not in OF_A_RUN}


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
    given = peek_flags(argv, TrainConfig)
    return any(given.get(name) for name in ('data_folder', 'data', 'dataset'))


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


# Folder ---------------------------------------------------------------------------------------------------------------

def check_places(plan: Plan) -> None:
    """Refuse a folder or a page that cannot be written to, or holds something else.

    Raises:
        ConfigError: The folder holds another comparison or other files, or the page was not written by this command.
    """
    if plan.update:
        check_page(plan.update, TITLE, '--update')
    check_folder(str(plan.folder), '--output')
    file = plan.folder / SETTINGS
    if not file.is_file():
        if plan.folder.is_dir() and any(plan.folder.iterdir()):
            raise ConfigError(f'{plan.folder} contains other files than a comparison: choose another --output.')
        return
    try:
        saved = yaml.safe_load(read_text(file, ConfigError))
        settings, models, seeds = saved['settings'], saved['models'], saved['seeds']
    except (ConfigError, yaml.YAMLError, KeyError, TypeError) as error:
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


def write_plan(plan: Plan) -> None:
    """Write the settings into the folder, which another call compares with its own.

    Raises:
        ConfigError: They cannot be written.
    """
    contents = dict(models=plan.models, seeds=plan.seeds, recipe=plan.recipe, settings=plan.list_settings())
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_text(plan.folder / SETTINGS, yaml.safe_dump(contents, sort_keys=False))
    except OSError as error:
        raise ConfigError(f'{plan.folder} cannot be written to ({error}): choose another --output.') from None
