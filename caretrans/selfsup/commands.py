"""Command lines of `python -m caretrans pretrain | probe | features`."""
import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ..config import parse_train_config, read_recipe
from ..devices import resolve_device
from ..distributed import shared_errors
from ..errors import DataError
from ..flags import DEVICE_HELP, FlagParser, add_checkpoint_flags, add_flags, add_weights_flags
from ..strict_json import to_json
from ..text import escape
from ..training.run import TrainResult, run_training
from .config import PretrainConfig
from .features import check_ending, extract_folder, load_trunk, write_features, write_sheet
from .probing import ProbeConfig, describe_probe, probe_trunk
from .training import PretrainTrainer

__all__ = ['run_features', 'run_pretrain', 'run_probe']

OUTPUT = 'runs/features.npz'


def run_pretrain(argv: Sequence[str]) -> int:
    """Pre-train a network on images without labels: pretrain DATA [--recipe NAME] [flags]. Recipes: selfsup_*."""
    with shared_errors():  # all processes have the same command line
        config = parse_train_config(argv, run_pretrain.__doc__, PretrainConfig)
    return run_training('pretrain', config, PretrainTrainer, partial(_report, config.model))


def _report(model: str, result: TrainResult) -> Iterator[str]:
    """Lines about a finished run."""
    last = shlex.quote(str(result.folder / 'last.pth.tar'))
    if result.best is not None:
        name = result.best_score
        yield (f'nearest neighbours: last {result.last.scores[name]:.1f} %, best {result.best.scores[name]:.1f} % '
               f'after epoch {result.best.epoch}')
    yield f'curves: {result.folder / "curves.png"}   table: {result.folder / "summary.csv"}'
    yield 'next:'
    yield f'  bash cmd/probe.sh DATA --checkpoint {last}'
    yield f'  python -m caretrans features FOLDER --checkpoint {last}'
    yield f'  bash cmd/train.sh DATA --model {model} --checkpoint {last} --new-heads'


def run_probe(argv: Sequence[str]) -> int:
    """Score a trunk by nearest neighbours and a linear classifier, and print the result."""
    parser = FlagParser(
        prog='python -m caretrans probe', description=run_probe.__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument('data_folder', nargs='?', metavar='DATA', help='same as --data')
    parser.add_argument('--recipe', help='bundled recipe or YAML file; flags override its settings')
    parser.add_argument('--json', action='store_true', default=False, help='print a JSON object')
    add_flags(parser, ProbeConfig)
    flags = vars(parser.parse_args(argv))
    as_json, folder, recipe = flags.pop('json'), flags.pop('data_folder', None), flags.pop('recipe', None)
    settings = read_recipe(recipe, ProbeConfig) if recipe else {}
    config = ProbeConfig(**{**settings, **flags, **(dict(data=folder) if folder else {})})
    report = probe_trunk(config)
    print(to_json(report.to_dict(), indent=2) if as_json else '\n'.join(map(escape, describe_probe(report))))
    return 0


def run_features(argv: Sequence[str]) -> int:
    """Write the features of images, and draw some images with those whose features are nearest."""
    parser = FlagParser(prog='python -m caretrans features', description=run_features.__doc__)
    parser.add_argument('images', nargs='+', help='image files and folders of images')
    add_weights_flags(parser)
    add_checkpoint_flags(parser)
    parser.add_argument('--teacher', action='store_true', help='use the teacher of a pre-training, not the student')
    parser.add_argument('--output', default=OUTPUT, help=f'.npz or .csv (default: {OUTPUT})')
    parser.add_argument(
        '--sheet', help='PNG of nearest neighbours (default: OUTPUT-neighbours.png; none for no sheet)')
    parser.add_argument('--device', default='auto', help=DEVICE_HELP)
    flags = vars(parser.parse_args(argv))
    images, output, sheet = flags.pop('images'), Path(flags.pop('output')), flags.pop('sheet')
    sheet = output.with_name(f'{output.stem}-neighbours.png') if sheet is None else \
        None if sheet == 'none' else Path(sheet)
    device = resolve_device(flags.pop('device'))
    if str(output) == OUTPUT:
        output.parent.mkdir(exist_ok=True)
    for path in (output, sheet):
        if path is not None and not path.parent.is_dir():
            raise DataError(f'{path} cannot be written: there is no folder {path.parent}.')
    check_ending(output)
    trunk, preparation = load_trunk(**flags)
    features, names, unreadable = extract_folder(trunk, preparation, images, device)
    write_features(output, features, names)
    print(f'{output}: {features.shape[1]} features of {len(names)} images')
    if sheet is not None and len(names) < 2:
        print(f'no {sheet.name}: one image has no neighbours')
    elif sheet is not None:
        write_sheet(sheet, features, names, preparation)
        print(f'{sheet}: images with their nearest neighbours')
    for name, reason in unreadable:
        print(f'{escape(name)}: cannot be read as an image ({reason})', file=sys.stderr)
    return int(bool(unreadable))
