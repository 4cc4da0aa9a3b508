"""Settings of a training run: one typed dataclass, filled from a recipe (YAML) and then from flags."""
import argparse
import dataclasses
import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .devices import count_cores
from .distributed import read_number
from .errors import ConfigError
from .flags import (
    CROP_MODES, DEVICE_HELP, ORIENTATIONS, FlagParser, add_flags, check_settings, convert_setting, number, parse_flags,
    setting)
from .models.backbone import find_family
from .text import read_text

__all__ = [
    'CROP_MODES', 'FlagParser', 'RunConfig', 'TrainConfig', 'add_flags', 'check_settings', 'choose_model_args',
    'derive_batches', 'find_task', 'number', 'parse_flags', 'parse_train_config', 'peek_flags', 'read_recipe',
    'setting']

RECIPES = Path(__file__).parent / 'recipes'
MESA_START = 0.25

_logger = logging.getLogger(__name__)


@dataclass
class RunConfig:
    """The settings that training of every kind shares: data, model, batches, optimizer, schedule, numbers, run folder.

    `train.py` has a flag for each field of a subclass.
    """

    data: str = setting('', 'folder of the data, with a training and an evaluation split')
    train_split: str = setting('train', 'training split')
    val_split: str = setting('val', 'evaluation split')
    workers: int | None = setting(
        None, 'image loading processes per device (default: one per core, at most 8)', bounds=(0, None))
    model: str = setting('care_s0', 'any model of timm or caretrans')
    model_args: dict[str, Any] = setting({}, 'extra arguments of the model, e.g. ls_init_value=0.1')
    checkpoint: str = setting('', 'file of the initial weights', off='')
    pretrained: bool = setting(
        False, 'start from the published weights of the model, from their hub or its cache; other classes get fresh '
        'heads')
    drop_path: float = setting(0.1, 'stochastic depth rate of the last block', bounds=(0, 0.99), off=0.)
    batch_size: int = setting(64, 'images per optimizer step, over all devices', bounds=(1, None))
    device_batch: int | None = setting(
        None, 'maximum images per device and forward pass; the rest is accumulated', bounds=(1, None))
    opt: str = setting('adamw', "optimizer by timm's name")
    lr: float = setting(1e-3, 'peak learning rate', positive=True)
    min_lr: float = setting(1e-5, 'final learning rate', bounds=(0, None))
    warmup_lr: float = setting(1e-6, 'initial learning rate', bounds=(0, None))
    weight_decay: float = setting(
        0.05, 'weight decay of parameters with two or more dimensions', bounds=(0, None), off=0.)
    epochs: int = setting(100, 'epochs of the cosine schedule, including warm-up', bounds=(1, None))
    warmup_epochs: int = setting(5, 'epochs of linear warm-up', bounds=(0, None), off=0)
    cooldown_epochs: int = setting(0, 'epochs at min_lr after the schedule', bounds=(0, None), off=0)
    step_schedule: bool = setting(False, 'update the learning rate every step instead of every epoch')
    val_interval: int = setting(1, 'epochs between evaluations; the last epoch is always evaluated', bounds=(1, None))
    clip_grad: float | None = setting(None, 'gradient clipping threshold', positive=True, off=None)
    clip_mode: str = setting(
        'norm', 'clip the gradient norm, each value, or adaptively (agc)', choices=['norm', 'value', 'agc'])
    ema: bool = setting(False, 'keep an exponential moving average of the weights and evaluate it')
    ema_decay: float = setting(0.9998, 'decay of the average per step', bounds=(0, 1))
    ema_warmup: bool = setting(False, 'start with a smaller ema_decay')
    amp: str = setting('off', 'autocast of the forward pass', choices=['off', 'bf16', 'fp16'], off='off')
    tf32: bool = setting(False, 'use TF32 (10-bit mantissa) in float32 matmuls and convolutions on GPUs')
    channels_last: bool = setting(False, 'keep images and weights in NHWC order')
    grad_checkpointing: bool = setting(False, 'recompute activations in the backward pass to save memory')
    sync_bn: bool = setting(False, 'BatchNorm over the images of all devices')
    device: str = setting('auto', DEVICE_HELP)
    seed: int = setting(42, 'seed of weights, image order and augmentation', bounds=(0, None))
    output: str = setting('', 'run folder (default: a new one under runs/)')
    resume: bool = setting(True, 'resume an unfinished run of the same settings')
    save_steps: int = setting(500, 'steps between checkpoints within an epoch, 0 for none', bounds=(0, None), off=0)
    on_nan: str = setting('stop', 'reaction to a loss or gradient that is not finite', choices=['stop', 'skip'])
    max_skips: int = setting(10, 'steps that on_nan=skip may skip before it stops', bounds=(0, None))
    max_unreadable: float = setting(0.01, 'share of unreadable training images that stops the run', bounds=(0, 1))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.workers is None:
            self.workers = min(max(count_cores() // max(read_number('LOCAL_WORLD_SIZE', 1), 1), 1), 8)
        if self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f'warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}: set --warmup-epochs as well.')
        if self.pretrained and self.checkpoint:
            raise ConfigError(f'checkpoint={self.checkpoint} and --pretrained exclude each other: use one of them.')

    @property
    def run_name(self) -> str:
        """Start of the name of a run folder."""
        return f'{self.model}-{Path(self.data).name}'

    def split_steps(self, world_size: int) -> list[tuple[int, int]]:
        """(Images per pass and device, passes per step), for each image size of the training."""
        return [derive_batches(self.batch_size, world_size, self.device_batch)]

    def schedule_options(self, steps_per_epoch: int) -> dict[str, Any]:
        """Arguments of timm's `create_scheduler_v2`."""
        return dict(
            sched='cosine', num_epochs=self.epochs, cooldown_epochs=self.cooldown_epochs, min_lr=self.min_lr,
            warmup_lr=self.warmup_lr, warmup_epochs=self.warmup_epochs, step_on_epochs=not self.step_schedule,
            updates_per_epoch=steps_per_epoch)

    def optimizer_options(self) -> dict[str, Any]:
        """Arguments of timm's `create_optimizer_v2`."""
        return dict(opt=self.opt, lr=self.lr, weight_decay=self.weight_decay)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML and checkpoints."""
        return dataclasses.asdict(self)


@dataclass
class TrainConfig(RunConfig):
    """Everything that decides what the training of a classifier computes.

    The defaults train care_s0 from random weights on your own folder, with the augmentation of the paper except mixup
    and cutmix, and with a batch size and a learning rate for one device.
    """

    data: str = setting('', 'folder with train/ and val/ in ImageNet layout, or the folder for --dataset')
    dataset: str = setting(
        '', "data set of timm's factory, e.g. torch/cifar10, hfds/NAME or wds/NAME; '' for image folders", off='')
    dataset_download: bool = setting(False, 'download the data set if it is missing')
    num_classes: int | None = setting(
        None, 'number of classes, for data sets that do not name them', bounds=(1, None))
    new_heads: bool = setting(False, 'initialize the heads randomly if the checkpoint has other classes')
    drop: float = setting(0., 'dropout rate', bounds=(0, 0.99), off=0.)
    img_size: int = setting(224, 'side of the training images in pixels', bounds=(32, None))
    train_img_sizes: list[int] = setting([], 'train at several image sizes, one per step', bounds=(32, None))
    size_schedule: str = setting(
        'constant', 'how train_img_sizes are sampled: uniformly, or small to large',
        choices=['constant', 'progressive'])
    val_img_size: int | None = setting(
        None, 'side of the evaluation images in pixels (default: img_size)', bounds=(32, None))
    crop_pct: float | None = setting(
        None, 'centre crop for evaluation, as a share of the image (default: that of the model, 1 with squash)',
        bounds=(0.01, 1))
    crop_mode: str | None = setting(
        None, 'evaluation: crop the centre, squash the whole image to a square, or add a border (default: that of the '
        'model)', choices=CROP_MODES)
    orientation: str = setting(
        'exif', 'rotate images upright as their EXIF data say, or ignore it', choices=ORIENTATIONS, off='ignore')
    scale: list[float] = setting([0.08, 1.0], 'smallest and largest area of random crops', size=2, bounds=(0, 1))
    ratio: list[float] = setting(
        [3 / 4, 4 / 3], 'smallest and largest aspect ratio of random crops', size=2, bounds=(0, 100))
    interpolation: str = setting('random', 'resizing of random crops', choices=['random', 'bilinear', 'bicubic'])
    hflip: float = setting(0.5, 'probability of a horizontal flip', bounds=(0, 1), off=0.)
    color_jitter: float = setting(0., 'strength of colour jitter; unused with auto_augment', bounds=(0, None), off=0.)
    auto_augment: str = setting('rand-m9-mstd0.5-inc1', "augmentation policy by timm's name, '' for none", off='')
    random_erasing: float = setting(0.25, 'probability of erasing a rectangle with noise', bounds=(0, 1), off=0.)
    mixup: float = setting(0., 'mixup alpha', bounds=(0, None), off=0.)
    cutmix: float = setting(0., 'cutmix alpha', bounds=(0, None), off=0.)
    smoothing: float = setting(0.1, 'label smoothing', bounds=(0, 0.99), off=0.)
    loss: str = setting('ce', 'ce: cross entropy; bce: binary cross entropy per class', choices=['ce', 'bce'])
    teacher: str = setting(
        'none', 'model whose predictions the second head learns, e.g. regnety_160.deit_in1k; or none', off='none')
    teacher_checkpoint: str = setting('', 'file of the teacher weights (default: from the hub)', off='')
    task_weight: float = setting(0.5, 'weight of the label loss; the distillation loss gets the rest', bounds=(0, 1))
    mesa: float = setting(
        0., 'weight of self-distillation (MESA) from the averaged weights of ema, 0 for none', bounds=(0, None), off=0.)
    mesa_start: float | None = setting(
        None, f'share of the epochs before self-distillation starts (default: {MESA_START})', bounds=(0, 1))
    compile: bool = setting(False, 'compile model and teacher with torch.compile')
    kernels: bool = setting(False, 'Triton kernels for mixers and linear attention, on GPUs')

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.train_img_sizes)) != len(self.train_img_sizes):
            raise ConfigError(f'train_img_sizes is {self.train_img_sizes}: name each size once.')
        for name in ('scale', 'ratio'):
            if not 0 < getattr(self, name)[0] <= getattr(self, name)[1]:
                raise ConfigError(
                    f'{name} is {getattr(self, name)} but must be two positive numbers, smaller first.')
        if self.teacher_checkpoint and self.teacher == 'none':
            raise ConfigError(
                f'teacher_checkpoint={self.teacher_checkpoint}, but teacher=none: name its model with --teacher.')
        if self.mesa_start is not None and not self.mesa:
            raise ConfigError(f'mesa_start={self.mesa_start:g}, but mesa=0: set --mesa as well, or omit --mesa-start.')
        if self.mesa and not self.ema:
            raise ConfigError(f'mesa={self.mesa:g} learns from the averaged weights: add --ema.')
        if self.mesa and self.teacher != 'none':
            raise ConfigError(f'mesa={self.mesa:g} and teacher={self.teacher} exclude each other: use one of them.')
        if self.mesa and self.loss != 'ce':
            raise ConfigError(f'mesa={self.mesa:g} is a cross entropy, but loss={self.loss}: use --loss ce.')
        if self.mesa and self.mesa_epoch >= self.epochs:
            raise ConfigError(
                f'mesa_start={self.mesa_start:g} of {self.epochs} epochs leaves no epochs for mesa: lower it, or set '
                f'--mesa 0.')

    @property
    def run_name(self) -> str:
        return f'{self.model}-{Path(self.data or self.dataset).name}'

    @property
    def mesa_epoch(self) -> int:
        """The first epoch, counted from 0, that distills from the averaged weights."""
        return round((MESA_START if self.mesa_start is None else self.mesa_start) * self.epochs)

    def list_sizes(self) -> list[int]:
        """Sides of the training images in pixels."""
        return self.train_img_sizes or [self.img_size]

    def split_steps(self, world_size: int) -> list[tuple[int, int]]:
        """For each size, (images per pass and device, passes per step), with no more pixels per pass than `img_size`.
        """
        even = bool(self.mixup or self.cutmix)
        at_base = derive_batches(self.batch_size, world_size, self.device_batch, even)
        if not self.train_img_sizes:
            return [at_base]
        most = self.device_batch or at_base[0]
        areas = [(self.img_size / size) ** 2 for size in self.train_img_sizes]
        return [derive_batches(self.batch_size, world_size, max(int(most * area), 1), even) for area in areas]


# Recipes --------------------------------------------------------------------------------------------------------------

def _read_chain(name_or_file: str, seen: Sequence[str] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """The files and settings of a recipe and of those that its `base` leads to, the last base first."""
    path = Path(name_or_file)
    if not path.is_file():
        bundled = {path.stem: path for path in RECIPES.rglob('*.yaml')}
        if name_or_file not in bundled:
            near = difflib.get_close_matches(name_or_file, bundled, n=8, cutoff=0.3)
            raise ConfigError(f'No recipe {name_or_file!r}: neither a file nor a bundled recipe; near: '
                              f'{", ".join(near) or "none"}.')
        path = bundled[name_or_file]
    settings = _read_yaml(path)
    base = settings.pop('base', None)
    if base in (None, False, 'none'):
        return [(path, settings)]
    if str(base) in seen:
        raise ConfigError(f'{path}: base: {base} leads back to itself: remove it.')
    return [*_read_chain(str(base), (*seen, str(name_or_file), str(base))), (path, settings)]


def read_recipe(name_or_file: str, config_type: type[RunConfig] = TrainConfig) -> dict[str, Any]:
    """The settings of a YAML file or of a bundled recipe, merged over those of the recipe named by its `base`.

    Raises:
        ConfigError: No such recipe, not YAML, an unknown setting, or a `base` that leads back to itself.
    """
    fields, merged = {item.name: item for item in dataclasses.fields(config_type)}, {}
    for path, settings in _read_chain(name_or_file):
        for key, value in settings.items():
            if key not in fields:
                near = ', '.join(difflib.get_close_matches(str(key), fields, n=1))
                raise ConfigError(f'{path}: unknown setting {key!r}' + (f', did you mean {near!r}?' if near else '.'))
            try:
                merged[key] = convert_setting(fields[key], value)
            except ConfigError as error:
                raise ConfigError(f'{path}: {error}') from None
    return merged


def find_task(recipe: str) -> str:
    """The setting `task` of a recipe; '' for a recipe of a classifier, which has none.

    Raises:
        ConfigError: See `read_recipe`.
    """
    return next((str(settings['task']) for _, settings in reversed(_read_chain(recipe)) if 'task' in settings), '')


def _read_yaml(path: Path) -> dict[Any, Any]:
    text = read_text(path, ConfigError)
    try:
        settings = yaml.load(text, _StrictLoader) or {}
    except ConfigError as error:
        raise ConfigError(f'{path}: {error}') from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f'{path} is not YAML: {" ".join(str(error).split())}') from None
    if not isinstance(settings, dict):
        raise ConfigError(f'{path} must hold "name: value" lines.')
    return settings


class _StrictLoader(yaml.SafeLoader):
    """YAML without two values for one key, of which the last would be used silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise ConfigError(
                    f'{key.value} is in line {lines[key.value]} and again in line {key.start_mark.line + 1}: keep one.')
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def choose_model_args(args: dict[str, Any], recipe: dict[str, Any], model: str) -> dict[str, Any]:
    """Drop the `args` that come from a recipe for another model family than that of `model`."""
    own = recipe.get('model_args') or {}
    if 'model' not in recipe or find_family(model) == find_family(recipe['model']):
        return args
    return {name: value for name, value in args.items() if name not in own or own[name] != value}


def peek_flags(argv: Sequence[str], *config_types: type[RunConfig]) -> dict[str, Any]:
    """The flags of a command line whose kind of training is not known yet, `data_folder` and `recipe` among them."""
    parser = FlagParser(
        add_help=False, argument_default=argparse.SUPPRESS, conflict_handler='resolve', allow_abbrev=False)
    for config_type in config_types:
        _add_arguments(parser, config_type)
    return vars(parser.parse_known_args(argv)[0])


def _add_arguments(parser: FlagParser, config_type: type[RunConfig]) -> None:
    parser.add_argument('data_folder', nargs='?', metavar='DATA', help='same as --data')
    parser.add_argument('--recipe', help='bundled recipe or YAML file; flags override its settings')
    add_flags(parser, config_type)


def parse_train_config(
        argv: Sequence[str] | None = None, description: str = '', config_type: type[RunConfig] = TrainConfig,
        recipe: str | None = None) -> Any:
    """The config of a command line: defaults, then the recipe, then flags.

    A recipe's `model_args` apply only to its own model family; other models ignore them, with a message.

    Args:
        config_type: Its class.
        recipe: Used if the command line names none.
    Raises:
        ConfigError: An unknown recipe, key or flag, or a value that cannot work.
        SystemExit: After --help.
    """
    parser = FlagParser(description=description, argument_default=argparse.SUPPRESS)
    _add_arguments(parser, config_type)
    flags = vars(parser.parse_args(argv))
    recipe, data_folder = flags.pop('recipe', recipe), flags.pop('data_folder', None)
    settings = read_recipe(recipe, config_type) if recipe else {}
    if 'model' in flags and settings.get('model_args'):
        own = settings['model_args']
        settings['model_args'] = choose_model_args(own, settings, flags['model'])
        ignored = ', '.join(f'{name}={value}' for name, value in own.items() if name not in settings['model_args'])
        if ignored:
            _logger.info(f'{flags["model"]} ignores {ignored} of the recipe {recipe}, which is for the family of '
                         f'{settings["model"]}.')
    if data_folder is not None:
        if flags.get('data', data_folder) != data_folder:
            raise ConfigError(f'Two data folders: {data_folder!r} and --data {flags["data"]!r}.')
        flags['data'] = data_folder
    if 'model_args' in flags:
        merged = dict(settings.get('model_args') or {})
        for argument in flags['model_args']:
            merged.update(argument)
        flags['model_args'] = merged
    return config_type(**{**settings, **_fit_warmup(flags, settings, config_type.warmup_epochs)})


def _fit_warmup(flags: dict[str, Any], recipe: dict[str, Any], default: int) -> dict[str, Any]:
    """The flags, with at most half of `epochs` as warm-up if they set the first alone and it is too short."""
    usual = recipe.get('warmup_epochs', default)
    if 'epochs' not in flags or 'warmup_epochs' in flags or usual < flags['epochs']:
        return flags
    _logger.info(f'warmup_epochs is {flags["epochs"] // 2} instead of {usual}, because epochs is {flags["epochs"]}.')
    return dict(flags, warmup_epochs=flags['epochs'] // 2)


# Batches --------------------------------------------------------------------------------------------------------------

def _split_batch(batch_size: int, world_size: int, most: int | None, even: bool) -> tuple[int, int] | None:
    """(Images per pass, passes) with at most `most` images per pass and at least half of that; None if impossible."""
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
    """Split the images of an optimizer step over devices and forward passes.

    Args:
        device_batch: Maximum images per device and forward pass, for its memory; None for no limit.
        even: Whether each pass needs an even number of images, which mixup pairs.
    Returns:
        (images per pass and device, passes per optimizer step); their product with `world_size` is `batch_size`.
        A pass has at least half of `device_batch` images, so that BatchNorm does not see far fewer than intended.
    Raises:
        ConfigError: There is no equal split; the message names the nearest global batches that have one.
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
            f'batch_size={batch_size} cannot be shared equally by {world_size} devices: use {nearest}, or another '
            f'number of devices.')
    images = f'at most {device_batch} images' if device_batch else 'one pass'
    raise ConfigError(
        f'batch_size={batch_size} cannot be split into equal passes on {world_size} device(s) of {images}'
        f'{", an even number for mixup and cutmix" if even else ""}: use {nearest}, or another device_batch.')
