"""The settings of a training run: one typed dataclass, filled from a recipe (YAML) and from flags over it."""
import argparse
import dataclasses
import difflib
import logging
import os
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .devices import count_cores
from .errors import ConfigError
from .models.backbone import find_family

__all__ = [
    'CROP_MODES', 'FlagParser', 'TrainConfig', 'add_flags', 'check_settings', 'choose_model_args',
    'derive_batches', 'number', 'parse_flags', 'parse_train_config', 'read_recipe', 'setting']

RECIPES = Path(__file__).parent / 'recipes'
CROP_MODES = ['center', 'squash', 'border']  # timm's names
MESA_START = 0.25

_logger = logging.getLogger(__name__)


def setting(default: Any, help: str, **kwargs: Any) -> Any:
    """A field of the config with its help text; lists and dicts get a fresh copy for each config."""
    metadata = dict(help=help, **kwargs)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Everything that decides what a training run computes. A flag of `train.py` exists for each field.

    The defaults train care_s0 from random weights on a folder of your own, with the augmentation of the paper but for
    mixup and cutmix, and a batch and a rate for one device.
    """

    data: str = setting('', 'folder with train/ and val/ in ImageNet layout, or what --dataset reads')
    dataset: str = setting('', "a data set of timm's factory, e.g. torch/cifar10, hfds/NAME, wds/NAME; '' for folders")
    train_split: str = setting('train', 'split to train on')
    val_split: str = setting('val', 'split to evaluate on')
    dataset_download: bool = setting(False, 'fetch the data set if it is not there and can be fetched')
    num_classes: int | None = setting(None, 'classes, where the data set does not name them', bounds=(1, None))
    workers: int | None = setting(
        None, 'processes per device that load images; by default one per core', bounds=(0, None))

    model: str = setting('care_s0', 'any model of timm or caretrans')
    model_args: dict[str, Any] = setting({}, 'further arguments of the model, e.g. ls_init_value=0.1')
    checkpoint: str = setting('', 'start from the weights of this file')
    new_heads: bool = setting(False, 'leave the heads fresh when the file has other classes')
    drop: float = setting(0., 'dropout rate', bounds=(0, 0.99))
    drop_path: float = setting(0.1, 'stochastic depth, rate at the last block', bounds=(0, 0.99))

    img_size: int = setting(224, 'side of the training images, pixels', bounds=(32, None))
    train_img_sizes: list[int] = setting([], 'a size for each step, drawn from these', bounds=(32, None))
    size_schedule: str = setting(
        'constant', 'of train_img_sizes: all as likely, or from first to last', choices=['constant', 'progressive'])
    val_img_size: int | None = setting(None, 'side of evaluated images; img_size if not given', bounds=(32, None))
    crop_pct: float | None = setting(
        None, 'evaluated share of the image; by default of the model, 1 with squash', bounds=(0.01, 1))
    crop_mode: str | None = setting(
        None, 'evaluated images: crop the centre, squash to a square, or border; by default of the model',
        choices=CROP_MODES)
    scale: list[float] = setting([0.08, 1.0], 'area of random crops, least and most', size=2)
    ratio: list[float] = setting([3 / 4, 4 / 3], 'aspect of random crops, least and most', size=2)
    interpolation: str = setting('random', 'of random crops', choices=['random', 'bilinear', 'bicubic'])
    hflip: float = setting(0.5, 'probability of a horizontal flip', bounds=(0, 1))
    color_jitter: float = setting(0., 'strength of colour jitter; unused with auto_augment', bounds=(0, None))
    auto_augment: str = setting('rand-m9-mstd0.5-inc1', "timm's name of a policy, '' for none")
    random_erasing: float = setting(0.25, 'probability of erasing a rectangle with noise', bounds=(0, 1))
    mixup: float = setting(0., 'mixup alpha', bounds=(0, None))
    cutmix: float = setting(0., 'cutmix alpha', bounds=(0, None))
    smoothing: float = setting(0.1, 'label smoothing', bounds=(0, 0.99))
    loss: str = setting('ce', 'cross entropy, or binary cross entropy of each class', choices=['ce', 'bce'])

    teacher: str = setting('none', 'model whose decisions the second head learns, e.g. regnety_160.deit_in1k; or none')
    teacher_checkpoint: str = setting('', 'weights of the teacher, instead of those from the hub')
    task_weight: float = setting(0.5, 'of the loss on labels; the rest is for the teacher', bounds=(0, 1))
    mesa: float = setting(0., 'weight of self-distillation from the average of ema, 0 for none', bounds=(0, None))
    mesa_start: float | None = setting(
        None, f'share of the epochs before mesa begins, {MESA_START} if not given', bounds=(0, 1))

    batch_size: int = setting(64, 'images per optimizer step, over all devices', bounds=(1, None))
    device_batch: int | None = setting(None, 'most images at a time per device, others accumulate', bounds=(1, None))
    opt: str = setting('adamw', "optimizer of timm's factory")
    lr: float = setting(1e-3, 'peak learning rate')
    min_lr: float = setting(1e-5, 'last learning rate', bounds=(0, None))
    warmup_lr: float = setting(1e-6, 'first learning rate', bounds=(0, None))
    weight_decay: float = setting(0.05, 'on weights of two or more dimensions', bounds=(0, None))
    epochs: int = setting(100, 'epochs of the cosine schedule, warm-up included', bounds=(1, None))
    warmup_epochs: int = setting(5, 'epochs of linear warm-up', bounds=(0, None))
    cooldown_epochs: int = setting(0, 'epochs at min_lr after the schedule', bounds=(0, None))
    step_schedule: bool = setting(False, 'change the learning rate every step instead of every epoch')
    val_interval: int = setting(1, 'evaluate every so many epochs, and after the last', bounds=(1, None))
    clip_grad: float | None = setting(None, 'clip gradients at this value', bounds=(0, None))
    clip_mode: str = setting('norm', 'what clip_grad bounds', choices=['norm', 'value', 'agc'])
    ema: bool = setting(False, 'average the weights over the steps; evaluate and keep the average too')
    ema_decay: float = setting(0.9998, 'weight of the average so far at each step', bounds=(0, 1))
    ema_warmup: bool = setting(False, 'start with a lesser ema_decay')

    amp: str = setting('off', 'autocast of the forward pass', choices=['off', 'bf16', 'fp16'])
    tf32: bool = setting(False, 'let GPUs round float32 to 10 bits of mantissa in products and convolutions')
    channels_last: bool = setting(False, 'keep images and weights in NHWC order')
    compile: bool = setting(False, 'compile model and teacher with torch.compile')
    kernels: bool = setting(False, 'Triton kernels for mixers and linear attention, on GPUs')
    grad_checkpointing: bool = setting(False, 'compute activations twice instead of keeping them')
    sync_bn: bool = setting(False, 'BatchNorm over the images of all devices instead of each its own')
    device: str = setting('auto', 'cpu, cuda, mps or auto')
    seed: int = setting(42, 'of weights, order and augmentation', bounds=(0, None))
    output: str = setting('', 'run folder; one under runs/ if not given')
    resume: bool = setting(True, 'go on with an unfinished run of the same settings')
    save_steps: int = setting(500, 'steps between checkpoints inside an epoch, 0 for none', bounds=(0, None))
    on_nan: str = setting('stop', 'at a loss or gradient that is not finite', choices=['stop', 'skip'])
    max_skips: int = setting(10, 'steps that on_nan=skip leaves out before it stops', bounds=(0, None))
    max_unreadable: float = setting(0.01, 'share of unreadable training images that stops the run', bounds=(0, 1))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.workers is None:
            self.workers = min(max(count_cores() // int(os.environ.get('LOCAL_WORLD_SIZE', 1)), 1), 8)
        if self.lr <= 0:
            raise ConfigError(f'lr is {self.lr}, it must be above 0.')
        if self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f'warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}: give --warmup-epochs as well.')
        if len(set(self.train_img_sizes)) != len(self.train_img_sizes):
            raise ConfigError(f'train_img_sizes is {self.train_img_sizes}: name each size once.')
        if self.teacher_checkpoint and self.teacher == 'none':
            raise ConfigError(f'teacher_checkpoint={self.teacher_checkpoint}, but teacher=none: name the model in it.')
        self._check_mesa()
        for name in ('scale', 'ratio'):
            if not 0 < getattr(self, name)[0] <= getattr(self, name)[1]:
                raise ConfigError(f'{name} is {getattr(self, name)}, it must be two numbers above 0, the lesser first.')

    def _check_mesa(self) -> None:
        if not self.mesa:
            if self.mesa_start is not None:
                raise ConfigError(f'mesa_start={self.mesa_start:g}, but mesa=0: give --mesa as well, or leave it out.')
            return
        if not self.ema:
            raise ConfigError(f'mesa={self.mesa:g} learns from the average of the weights: give --ema as well.')
        if self.teacher != 'none':
            raise ConfigError(f'mesa={self.mesa:g} and teacher={self.teacher}: take one of them.')
        if self.loss != 'ce':
            raise ConfigError(f'mesa={self.mesa:g} is a cross entropy, loss={self.loss}: give --loss ce.')
        if self.mesa_epoch >= self.epochs:
            raise ConfigError(
                f'mesa_start={self.mesa_start:g} of {self.epochs} epochs leaves none for mesa: lower it, or --mesa 0.')

    @property
    def mesa_epoch(self) -> int:
        """The first epoch, from 0 on, that distills from the average of the weights."""
        return round((MESA_START if self.mesa_start is None else self.mesa_start) * self.epochs)

    def list_sizes(self) -> list[int]:
        """The sides of training images, pixels."""
        return self.train_img_sizes or [self.img_size]

    def split_steps(self, world_size: int) -> list[tuple[int, int]]:
        """For each of the sizes, images per pass and device, and passes per step: no more pixels than at `img_size`."""
        even = bool(self.mixup or self.cutmix)
        at_base = derive_batches(self.batch_size, world_size, self.device_batch, even)
        if not self.train_img_sizes:
            return [at_base]
        most = self.device_batch or at_base[0]
        areas = [(self.img_size / size) ** 2 for size in self.train_img_sizes]
        return [derive_batches(self.batch_size, world_size, max(int(most * area), 1), even) for area in areas]

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML and checkpoints."""
        return dataclasses.asdict(self)


def check_settings(config: Any) -> None:
    """Bring the fields of a config, made with `setting`, into their types; ConfigError names one that cannot be."""
    for item in dataclasses.fields(config):
        setattr(config, item.name, _checked(item, getattr(config, item.name)))


def _plain_type(item: dataclasses.Field) -> Any:
    """int for `Optional[int]`, float for `List[float]`, dict for `Dict[str, Any]`."""
    origin, args = typing.get_origin(item.type), typing.get_args(item.type)
    if origin is dict:
        return dict
    return args[0] if origin in (list, types.UnionType) else item.type


def _checked(item: dataclasses.Field, value: Any) -> Any:
    """`value` in the type of the field, YAML's 1e-3 (a string to it) included; ConfigError if it is of another."""
    wanted, default = _plain_type(item), item.default
    if value is None and default is None:
        return None
    if 'size' in item.metadata:
        if not isinstance(value, (list, tuple)) or len(value) != item.metadata['size']:
            raise ConfigError(f'{item.name} is {value!r}, it must be {item.metadata["size"]} numbers.')
        return [float(v) for v in value]
    if typing.get_origin(item.type) is list and isinstance(value, (list, tuple)):
        return [_checked_value(item, wanted, v) for v in value]
    return _checked_value(item, wanted, value)


def _checked_value(item: dataclasses.Field, wanted: Any, value: Any) -> Any:
    try:
        if wanted is bool and not isinstance(value, bool) or wanted is dict and not isinstance(value, dict):
            raise TypeError
        converted = wanted(value)
        if wanted is int and converted != float(value):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(f'{item.name} is {value!r}, it must be of type {wanted.__name__}.') from None
    if converted not in item.metadata.get('choices', [converted]):
        raise ConfigError(f'{item.name} is {value!r}, choose from {", ".join(item.metadata["choices"])}.')
    least, most = item.metadata.get('bounds', (None, None))
    if least is not None and converted < least or most is not None and converted > most:
        limit = '' if most is None else f', at most {most}'
        raise ConfigError(f'{item.name} is {value!r}, it must be at least {least}{limit}.')
    return converted


def read_recipe(name_or_file: str, seen: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a YAML file, or in the bundled recipe of that name, over those of the recipe it calls `base`."""
    path = Path(name_or_file)
    if not path.is_file():
        path = RECIPES / f'{name_or_file}.yaml'
    if not path.is_file():
        known = ', '.join(sorted(p.stem for p in RECIPES.glob('*.yaml')))
        raise ConfigError(f'No recipe {name_or_file!r}: neither a file nor one of {known}.')
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f'{path} is not YAML: {" ".join(str(error).split())}') from None
    if not isinstance(settings, dict):
        raise ConfigError(f'{path} must hold "name: value" lines.')
    known = [item.name for item in dataclasses.fields(TrainConfig)]
    base = settings.pop('base', None)
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(f'{path}: unknown setting {key!r}' + (f', did you mean {near[0]!r}?' if near else '.'))
    if base is None:
        return settings
    if base in seen:
        raise ConfigError(f'{path}: base: {base} leads back to itself: take it out.')
    return {**read_recipe(str(base), (*seen, str(name_or_file), str(base))), **settings}


def number(kind: type, least: float, most: float = float('inf')) -> Callable[[str], Any]:
    """The type of a flag for numbers from `least` to `most`, for argparse."""
    def convert(text: str) -> Any:
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f'{text} is not between {least} and {most}')
        return value
    return convert


def _parse_model_arg(text: str) -> dict[str, Any]:
    name, separator, value = text.partition('=')
    if not separator:
        raise argparse.ArgumentTypeError(f'{text!r} is not NAME=VALUE')
    return {name: yaml.safe_load(value)}


class FlagParser(argparse.ArgumentParser):
    """A parser that says what is wrong in a ConfigError of one line."""

    def error(self, message: str) -> None:
        raise ConfigError(f'{message}; see --help.')


def _describe(item: dataclasses.Field) -> str:
    """The help of a flag, with the default where there is one."""
    default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
    shown = '' if default in (None, '', [], {}) else f' (default: {default})'
    return item.metadata['help'].replace('%', '%%') + shown


def add_flags(parser: argparse.ArgumentParser, config_type: type) -> None:
    """Give a parser a flag for each field of a config made with `setting`."""
    for item in dataclasses.fields(config_type):
        flag, wanted = '--' + item.name.replace('_', '-'), _plain_type(item)
        options: dict[str, Any] = dict(dest=item.name, help=_describe(item))
        if wanted is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif wanted is dict:
            options.update(type=_parse_model_arg, nargs='+', metavar='NAME=VALUE')
        else:
            several = '+' if typing.get_origin(item.type) is list else None
            options.update(
                type=wanted, nargs=item.metadata.get('size', several), choices=item.metadata.get('choices'))
        parser.add_argument(flag, **options)


def parse_flags(config_type: type, argv: Sequence[str] | None = None, description: str = '') -> Any:
    """A config, made with `setting`, from a command line with a flag for each of its fields.

    Raises:
        ConfigError: An unknown flag, or a value that cannot work.
        SystemExit: After --help.
    """
    parser = FlagParser(description=description, argument_default=argparse.SUPPRESS)
    add_flags(parser, config_type)
    return config_type(**vars(parser.parse_args(argv)))


def _flag_parser(**kwargs: Any) -> argparse.ArgumentParser:
    parser = FlagParser(argument_default=argparse.SUPPRESS, **kwargs)
    parser.add_argument('data_folder', nargs='?', metavar='DATA', help='same as --data')
    parser.add_argument('--recipe', help='bundled recipe or YAML file; flags go over it')
    add_flags(parser, TrainConfig)
    return parser


def choose_model_args(args: dict[str, Any], recipe: dict[str, Any], model: str) -> dict[str, Any]:
    """`args` without those that a recipe has for a model of another family than that of `model`."""
    own = recipe.get('model_args') or {}
    if 'model' not in recipe or find_family(model) == find_family(recipe['model']):
        return args
    return {name: value for name, value in args.items() if name not in own or own[name] != value}


def _fit_recipe(settings: dict[str, Any], recipe: str, model: str) -> dict[str, Any]:
    """The settings of a recipe for a model; what is left out is said."""
    own = settings.get('model_args') or {}
    chosen = choose_model_args(own, settings, model)
    if chosen == own:
        return settings
    _logger.info('%s of the recipe %s is for %s and its family, and not given to %s.', ', '.join(
        f'{name}={value}' for name, value in own.items() if name not in chosen), recipe, settings['model'], model)
    return {**settings, 'model_args': chosen}


def parse_train_config(argv: Sequence[str] | None = None, description: str = '') -> TrainConfig:
    """The config of a command line: defaults, then the recipe, then flags.

    The `model_args` of a recipe are for the family of its model; others do not get them.

    Raises:
        ConfigError: An unknown recipe, key or flag, or a value that cannot work.
        SystemExit: After --help.
    """
    flags = vars(_flag_parser(description=description).parse_args(argv))
    recipe = flags.pop('recipe', None)
    settings = read_recipe(recipe) if recipe else {}
    if 'model' in flags:
        settings = _fit_recipe(settings, recipe, flags['model'])
    data_folder = flags.pop('data_folder', None)
    if data_folder is not None:
        if flags.get('data', data_folder) != data_folder:
            raise ConfigError(f'Two data folders: {data_folder!r} and --data {flags["data"]!r}.')
        flags['data'] = data_folder
    if 'model_args' in flags:
        merged = dict(settings.get('model_args', {}))
        for argument in flags['model_args']:
            merged.update(argument)
        flags['model_args'] = merged
    return TrainConfig(**{**settings, **flags})


def _split_batch(batch_size: int, world_size: int, most: int | None, even: bool) -> tuple[int, int] | None:
    """Equal passes of at most `most` images, and not less than half of it; None where there are none."""
    images, rest = divmod(batch_size, world_size)
    most = most or images
    if rest or not images:
        return None
    for passes in range(-(-images // most), images + 1):
        if 2 * (images // passes) < min(most, images):
            return None
        if images % passes == 0 and not (even and images // passes % 2):
            return images // passes, passes
    return None


def derive_batches(
        batch_size: int, world_size: int, device_batch: int | None, even: bool = False) -> tuple[int, int]:
    """Split the images of an optimizer step over devices and time.

    Args:
        device_batch: The most images at a time on a device, for its memory; any number if None.
        even: An even number at a time, for mixup pairs them.
    Returns:
        (images at a time per device, forward passes per optimizer step); their product by `world_size` is
        `batch_size`. At least half of `device_batch`, so that BatchNorm does not see much less than was meant.
    Raises:
        ConfigError: It does not come out even; names the nearest global batches that do.
    """
    split = _split_batch(batch_size, world_size, device_batch, even)
    if split is not None:
        return split
    span = range(1, 4 * world_size * (device_batch or 2) + 2)
    below = next((batch_size - n for n in span if _split_batch(batch_size - n, world_size, device_batch, even)), None)
    above = next((batch_size + n for n in span if _split_batch(batch_size + n, world_size, device_batch, even)), None)
    nearest = ' or '.join(str(n) for n in (below, above) if n)
    if batch_size % world_size:
        raise ConfigError(
            f'batch_size={batch_size} cannot be shared equally by {world_size} devices: take {nearest}, or another '
            f'number of devices.')
    images = f'{device_batch} images at most' if device_batch else 'one pass'
    raise ConfigError(
        f'batch_size={batch_size} cannot be made of equal passes over {world_size} device(s) of {images}'
        f'{", an even number for mixup and cutmix" if even else ""}: take {nearest}, or another device_batch.')
