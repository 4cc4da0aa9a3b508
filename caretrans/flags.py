"""Command lines from typed settings, and flags that several commands share.

A settings class is a dataclass whose fields are made with `setting`. `check_settings` brings their values into the
declared types, `add_flags` adds one flag per field to a parser, and `parse_flags` does both.
"""
import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from .errors import ConfigError

__all__ = [
    'CHANNEL_ORDERS', 'CROP_MODES', 'DEVICE_HELP', 'FlagParser', 'ORIENTATIONS', 'PRETRAINED_HELP',
    'add_checkpoint_flags', 'add_flags', 'add_weights_flags', 'check_settings', 'check_weights', 'convert_setting',
    'keep_flags', 'number', 'parse_flags', 'setting']

CROP_MODES = ['center', 'squash', 'border']  # timm's names
CHANNEL_ORDERS = ['rgb', 'bgr']
ORIENTATIONS = ['exif', 'ignore']
DEVICE_HELP = 'cpu, cuda, mps or auto'
PRETRAINED_HELP = 'use the published weights of --model, from their hub, or from its cache when offline'
OFF = ('no', 'off', 'none', 'false', '')  # texts for a setting that is switched off
REMEDIES = {  # by type
    bool: ': write true or false', int: ': write a whole number', float: ': write a number',
    dict: ': write {NAME: VALUE, ...}',
    str: ': write one text, in quotes if YAML reads it as something else, such as yes, no, on and off'}


def setting(default: Any, help: str, **kwargs: Any) -> Any:
    """A field of a settings class.

    Args:
        default: Lists and dicts are copied for each instance.
        help: Help text of the flag.
        kwargs: `choices`; `bounds`, minimum and maximum, None for no limit; `positive`, whether 0 is refused; `size`,
            the length of a list of numbers; `off`, the value that no, off, none, false and an empty value mean.
    """
    metadata = dict(help=help, **kwargs)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(config: Any) -> None:
    """Convert every field of a settings class to its type, in place.

    Raises:
        ConfigError: See `convert_setting`.
    """
    for item in dataclasses.fields(config):
        setattr(config, item.name, convert_setting(item, getattr(config, item.name)))


def convert_setting(item: dataclasses.Field, value: Any) -> Any:
    """A value from YAML or a command line in the type of its field; YAML reads 1e-3 as a text, and off as False.

    Raises:
        ConfigError: It has the wrong type, is not finite, not among the choices, or out of bounds.
    """
    metadata, is_list = item.metadata, typing.get_origin(item.type) is list
    if value is None and item.default is None:
        return None
    if 'off' in metadata and (value is None or value is False or str(value).lower() in OFF):
        return metadata['off']
    if (is_list or _plain_type(item) is dict) and (value is None or value is False):
        value = [] if is_list else {}
    if metadata.get('size') and not (isinstance(value, (list, tuple)) and len(value) == metadata['size']):
        raise ConfigError(f'{item.name} is {value!r} but must be {metadata["size"]} numbers.')
    if is_list:
        return [_convert_value(item, v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return _convert_value(item, value)


def _plain_type(item: dataclasses.Field) -> Any:
    """int for `int | None`, float for `list[float]`, dict for `dict[str, Any]`."""
    origin, args = typing.get_origin(item.type), typing.get_args(item.type)
    if origin is dict:
        return dict
    return args[0] if origin in (list, types.UnionType) else item.type


def _convert_value(item: dataclasses.Field, value: Any) -> Any:
    wanted, metadata = _plain_type(item), item.metadata
    remedy = REMEDIES.get(wanted, '')
    try:
        if isinstance(value, bool) != (wanted is bool) or isinstance(value, dict) != (wanted is dict):
            raise TypeError
        if value is None or wanted in (str, int, float) and isinstance(value, (list, tuple)):
            raise TypeError
        converted = int(float(value)) if wanted is int and not isinstance(value, int) else wanted(value)
        if wanted is int and converted != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f'{item.name} is {value!r} but must be of type {wanted.__name__}{remedy}.') from None
    _check_finite(item.name, converted)
    if converted not in metadata.get('choices', [converted]):
        raise ConfigError(f'{item.name} is {value!r}, choose from {", ".join(metadata["choices"])}.')
    if metadata.get('positive') and converted <= 0:
        raise ConfigError(f'{item.name} is {converted} but must be positive.')
    least, most = metadata.get('bounds', (None, None))
    if least is not None and converted < least or most is not None and converted > most:
        raise ConfigError(
            f'{item.name} is {value!r} but must be at least {least}' + ('.' if most is None else f', at most {most}.'))
    return converted


def _check_finite(name: str, value: Any) -> None:
    """Refuse NaN and infinity, also inside lists and dicts: no comparison with a bound refuses NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f'{name} is {value} but must be a finite number.')
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        _check_finite(f'{name}.{key}', item)


def number(kind: type, least: float, most: float = float('inf')) -> Callable[[str], Any]:
    """An argparse type for finite numbers from `least` to `most`."""
    def convert(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and least <= value <= most):
            limits = f'of at least {least}' if most == float('inf') else f'between {least} and {most}'
            raise argparse.ArgumentTypeError(f'{text} is not a finite number {limits}')
        return value
    convert.__name__ = kind.__name__  # of which argparse says that a text is none
    return convert


def _parse_assignment(text: str) -> dict[str, Any]:
    name, separator, value = text.partition('=')
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f'{text!r} is not NAME=VALUE')
    try:
        return {name: yaml.safe_load(value)}
    except (yaml.YAMLError, ValueError):
        raise argparse.ArgumentTypeError(
            f'{text!r}: {value!r} is not a value: write it as in YAML, e.g. depths=[1,1,1,1], in quotes if it has '
            'spaces') from None


class FlagParser(argparse.ArgumentParser):
    """A parser that raises a one-line ConfigError instead of printing its usage and exiting."""

    def error(self, message: str) -> None:
        raise ConfigError(f'{message}; see --help.')


def add_flags(parser: argparse.ArgumentParser, config_type: type) -> None:
    """Add one flag per field of a settings class; a dict takes NAME=VALUE pairs."""
    for item in dataclasses.fields(config_type):
        wanted = _plain_type(item)
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        shown = '' if default in (None, '', [], {}) else f' (default: {default})'
        options: dict[str, Any] = dict(dest=item.name, help=item.metadata['help'].replace('%', '%%') + shown)
        if wanted is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif wanted is dict:
            options.update(type=_parse_assignment, nargs='+', metavar='NAME=VALUE')
        else:
            several = '+' if typing.get_origin(item.type) is list else None
            options.update(
                type=wanted, nargs=item.metadata.get('size', several), choices=item.metadata.get('choices'))
        parser.add_argument('--' + item.name.replace('_', '-'), **options)


def parse_flags(
        config_type: type, argv: Sequence[str] | None = None, description: str = '', prog: str | None = None) -> Any:
    """An instance of a settings class from a command line.

    Args:
        prog: The command as --help shows it, if not the script.
    Raises:
        ConfigError: An unknown flag or an invalid value.
        SystemExit: After --help.
    """
    parser = FlagParser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    add_flags(parser, config_type)
    return config_type(**vars(parser.parse_args(argv)))


def check_weights(
        checkpoint: str, pretrained: bool, model_name: str | None, entry: str | None = None,
        random_weights: bool | None = None) -> None:
    """Check that a command names its weights in exactly one way.

    Args:
        random_weights: Whether they are to be random; None if the command does not support that.
    Raises:
        ConfigError: No weights are named, or two kinds; or the model is missing for those without a file.
    """
    kinds = {'--checkpoint': bool(checkpoint), '--pretrained': pretrained, '--random-weights': bool(random_weights)}
    named = [flag for flag, given in kinds.items() if given]
    if len(named) > 1:
        raise ConfigError(f'{" and ".join(named)} exclude each other: use one of them.')
    if not named:
        third = ', and --random-weights makes random ones to measure speed' if random_weights is not None else ''
        raise ConfigError(
            f'No weights: --checkpoint FILE loads a file, --pretrained --model NAME the published weights of a model'
            f'{third}.')
    if not checkpoint and not model_name:
        raise ConfigError(f'{named[0]} needs a model: add --model, e.g. --model care_s0.')
    if pretrained and entry:
        raise ConfigError(f'--entry {entry} is for a file, not for --pretrained: omit it.')


def add_weights_flags(parser: Any) -> None:
    """Add the flags that `check_weights` checks, for commands that need trained weights."""
    parser.add_argument(
        '--checkpoint', default='', help='.pth, .pth.tar or .safetensors, published or written by train.py')
    parser.add_argument('--pretrained', action='store_true', help=PRETRAINED_HELP)


def add_checkpoint_flags(parser: Any, preparation: Any = None) -> None:
    """Add the flags of commands that read a checkpoint: its model, its entry, and how images are prepared for it.

    Args:
        parser: A parser.
        preparation: The argument group of the preparation flags; the parser itself if None.
    """
    parser.add_argument('--model', dest='model_name', help='model name, if the checkpoint does not contain it')
    parser.add_argument('--entry', help='entry of the file that contains the weights, e.g. state_dict_ema')
    group = preparation or parser
    group.add_argument('--img-size', type=number(int, 32), help='image side in pixels')
    group.add_argument('--crop-pct', type=number(float, 0.01, 1), help='centre crop as a share of the image')
    group.add_argument(
        '--crop-mode', choices=CROP_MODES,
        help='crop the centre, squash the whole image to a square (CAS-ViT from 384 pixels on), or add a border '
             '(default: as in the checkpoint)')
    group.add_argument(
        '--channel-order', choices=CHANNEL_ORDERS,
        help='default: as in the checkpoint, else rgb; published CAS-ViT files may need bgr')
    group.add_argument(
        '--orientation', choices=ORIENTATIONS,
        help='rotate images upright as their EXIF data say, or not (default: as in the checkpoint, else ignore, as '
             'published weights were trained)')
    group.add_argument(
        '--interpolation', choices=['bicubic', 'bilinear', 'nearest', 'lanczos'], help='resizing method')


def keep_flags(
        flags: dict[str, Any], names: Sequence[str], kind: str, defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The flags of these names that are given; no other may be.

    Args:
        kind: What cannot be used with others, for the message: 'a detector or segmenter'.
        defaults: Values that count as not given, besides None, False and ''.
    Raises:
        ConfigError: Another flag is given.
    """
    given = {name: value for name, value in flags.items() if value is not None and value is not False and value != ''
             and not (name not in names and (defaults or {}).get(name) == value)}
    wrong = [f'--{dict(model_name="model").get(name, name).replace("_", "-")}' for name in given if name not in names]
    if wrong:
        raise ConfigError(f'{", ".join(wrong)} cannot be used with {kind}: omit it.')
    return given
