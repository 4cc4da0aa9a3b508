"""Command lines from typed settings, and flags that several commands share.

A settings class is a dataclass whose fields are made with `setting`. `check_settings` brings their values into the
declared types, `add_flags` adds one flag per field to a parser, and `parse_flags` does both.
"""
import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from .errors import ConfigError

__all__ = [
    'CHANNEL_ORDERS', 'CROP_MODES', 'DEVICE_HELP', 'FlagParser', 'ORIENTATIONS', 'add_checkpoint_flags', 'add_flags',
    'check_settings', 'number', 'parse_flags', 'setting']

CROP_MODES = ['center', 'squash', 'border']  # timm's names
CHANNEL_ORDERS = ['rgb', 'bgr']
ORIENTATIONS = ['exif', 'ignore']
DEVICE_HELP = 'cpu, cuda, mps or auto'


def setting(default: Any, help: str, **kwargs: Any) -> Any:
    """A field of a settings class.

    Args:
        default: Lists and dicts are copied for each instance.
        help: Help text of the flag.
        kwargs: `choices`; `bounds`, minimum and maximum, None for no limit; `size`, the length of a list of numbers.
    """
    metadata = dict(help=help, **kwargs)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(config: Any) -> None:
    """Convert every field of a settings class to its type, in place; YAML reads 1e-3 as a string, for example.

    Raises:
        ConfigError: A value has the wrong type, is not among the choices, or is out of bounds.
    """
    for item in dataclasses.fields(config):
        value, size = getattr(config, item.name), item.metadata.get('size')
        if value is None and item.default is None:
            continue
        if size and not (isinstance(value, (list, tuple)) and len(value) == size):
            raise ConfigError(f'{item.name} is {value!r} but must be {size} numbers.')
        if typing.get_origin(item.type) is list and isinstance(value, (list, tuple)):
            setattr(config, item.name, [_check_value(item, v) for v in value])
        else:
            setattr(config, item.name, _check_value(item, value))


def _plain_type(item: dataclasses.Field) -> Any:
    """int for `int | None`, float for `list[float]`, dict for `dict[str, Any]`."""
    origin, args = typing.get_origin(item.type), typing.get_args(item.type)
    if origin is dict:
        return dict
    return args[0] if origin in (list, types.UnionType) else item.type


def _check_value(item: dataclasses.Field, value: Any) -> Any:
    wanted = _plain_type(item)
    try:
        if wanted is bool and not isinstance(value, bool) or wanted is dict and not isinstance(value, dict):
            raise TypeError
        converted = wanted(value)
        if wanted is int and converted != float(value):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(f'{item.name} is {value!r} but must be of type {wanted.__name__}.') from None
    if converted not in item.metadata.get('choices', [converted]):
        raise ConfigError(f'{item.name} is {value!r}, choose from {", ".join(item.metadata["choices"])}.')
    least, most = item.metadata.get('bounds', (None, None))
    if least is not None and converted < least or most is not None and converted > most:
        raise ConfigError(
            f'{item.name} is {value!r} but must be at least {least}' + ('.' if most is None else f', at most {most}.'))
    return converted


def number(kind: type, least: float, most: float = float('inf')) -> Callable[[str], Any]:
    """An argparse type for numbers from `least` to `most`."""
    def convert(text: str) -> Any:
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f'{text} is not between {least} and {most}')
        return value
    return convert


def _parse_assignment(text: str) -> dict[str, Any]:
    name, separator, value = text.partition('=')
    if not separator:
        raise argparse.ArgumentTypeError(f'{text!r} is not NAME=VALUE')
    return {name: yaml.safe_load(value)}


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


def parse_flags(config_type: type, argv: Sequence[str] | None = None, description: str = '') -> Any:
    """An instance of a settings class from a command line.

    Raises:
        ConfigError: An unknown flag or an invalid value.
        SystemExit: After --help.
    """
    parser = FlagParser(description=description, argument_default=argparse.SUPPRESS)
    add_flags(parser, config_type)
    return config_type(**vars(parser.parse_args(argv)))


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
