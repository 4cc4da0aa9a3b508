"""Settings of pre-training."""
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config import RunConfig, setting
from ..errors import ConfigError
from ..flags import ORIENTATIONS
from .knn import NEIGHBOURS, TEMPERATURE
from .optimizer import optimizer_options, schedule_options
from .pretraining import METHODS, Design
from .views import ViewSettings

__all__ = ['PretrainConfig']

RATE, RATE_BATCH = .05, 256  # the published peak rate is 0.05 per 256 images


@dataclass
class PretrainConfig(RunConfig):
    """Everything that decides what pre-training computes.

    The defaults are the published ones, for a ResNet-50 on one device.
    """

    data: str = setting('', 'folder of images, with or without train/ and classes, or LMDB files or shards')
    dataset: str = setting('', "data set of timm's factory, e.g. torch/cifar10; '' for folders", off='')
    dataset_download: bool = setting(False, 'download the data set if it is missing')
    val_split: str = setting('val', 'split that nearest neighbours classify, where data have labels')

    model: str = setting('resnet50', 'any model of timm or caretrans with a map before its last stage')
    method: str = setting('care', 'care, or byol: without the T-stream', choices=list(METHODS))
    img_size: int = setting(224, 'side of the views in pixels', bounds=(32, None))
    hidden: int = setting(4096, 'inner width of projectors and predictors', bounds=(1, None))
    out: int = setting(256, 'outputs of projectors and predictors', bounds=(2, None))
    blocks: int = setting(5, 'blocks of the T-stream', bounds=(1, None))
    attention_weight: float = setting(
        100., 'weight of the difference of both streams, a mean over the outputs: scale it with --out',
        bounds=(0, None))
    momentum: float = setting(.99, 'momentum of the teacher at the first step; it rises to 1', bounds=(0, 1))

    scale: list[float] = setting([.08, 1.], 'smallest and largest area of the crops', size=2, bounds=(0, 1))
    ratio: list[float] = setting(
        [3 / 4, 4 / 3], 'smallest and largest aspect ratio of the crops', size=2, bounds=(0, 100))
    brightness: float = setting(.4, 'largest change of brightness', bounds=(0, None), off=0.)
    contrast: float = setting(.4, 'largest change of contrast', bounds=(0, None), off=0.)
    saturation: float = setting(.2, 'largest change of saturation', bounds=(0, None), off=0.)
    hue: float = setting(.1, 'largest change of hue, 0.5 for half a turn', bounds=(0, .5), off=0.)
    jitter_prob: float = setting(.8, 'probability of these four', bounds=(0, 1), off=0.)
    blur_prob: list[float] = setting([1., .1], 'probability of a blur of view 1 and of view 2', size=2, bounds=(0, 1))
    blur_radius: list[float] = setting([.1, 2.], 'smallest and largest radius in pixels', size=2, bounds=(0, None))
    grayscale_prob: float = setting(.2, 'probability of grey', bounds=(0, 1), off=0.)
    hflip: float = setting(.5, 'probability of a horizontal flip', bounds=(0, 1), off=0.)
    solarize_prob: list[float] = setting(
        [0., .2], 'probability of solarizing view 1 and view 2', size=2, bounds=(0, 1))
    mean: list[float] = setting([], 'mean of the three channels, 0 to 1 (default: that of the model)')
    std: list[float] = setting([], 'deviation of the three channels (default: that of the model)', positive=True)
    orientation: str = setting(
        'exif', 'rotate images upright as their EXIF data say, or ignore it', choices=ORIENTATIONS, off='ignore')

    knn_k: int = setting(NEIGHBOURS, 'nearest neighbours that vote', bounds=(1, None))
    knn_temperature: float = setting(
        TEMPERATURE, 'a neighbour votes with exp(cosine / temperature)', positive=True)
    knn_bank: int = setting(100_000, 'most training images among which they are found', bounds=(1, None))
    val_interval: int = setting(5, 'epochs between scores of nearest neighbours; the last is scored', bounds=(1, None))
    collapse: float = setting(
        .1, 'stop if the outputs spread less in an epoch: 1 is evenly, 0 is all the same; 0 never stops',
        bounds=(0, 1), off=0.)

    drop_path: float = setting(0., 'stochastic depth rate of the last block', bounds=(0, .99), off=0.)
    batch_size: int = setting(256, 'images per optimizer step, over all devices', bounds=(2, None))
    opt: str = setting('momentum', "optimizer by timm's name; momentum is SGD without Nesterov's, lars for more than "
                       '4096 images per step')
    lr: float | None = setting(None, f'peak learning rate (default: {RATE:g} per {RATE_BATCH} images)', positive=True)
    min_lr: float = setting(0., 'final learning rate', bounds=(0, None))
    weight_decay: float = setting(1e-4, 'weight decay of all parameters', bounds=(0, None), off=0.)
    warmup_epochs: int = setting(10, 'epochs of linear warm-up', bounds=(0, None), off=0)
    step_schedule: bool = setting(True, 'update the learning rate every step instead of every epoch')

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is None:
            self.lr = RATE * self.batch_size / RATE_BATCH
        if self.ema:
            raise ConfigError('ema: the teacher is an average of the weights already: omit --ema.')
        for name in ('mean', 'std'):
            if len(getattr(self, name)) not in (0, 3):
                raise ConfigError(f'{name} is {getattr(self, name)} but must be three numbers.')
        if not self.step_schedule:
            raise ConfigError('step_schedule: pre-training changes the rate at every step: omit --no-step-schedule.')
        self.views  # noqa: B018 (refuses what cannot be used)

    @property
    def run_name(self) -> str:
        return f'{self.method}-{self.model}-{Path(self.data or self.dataset).name}'

    @property
    def views(self) -> ViewSettings:
        """The strengths and probabilities of both views."""
        values = ((item.name, getattr(self, item.name)) for item in fields(ViewSettings))
        return ViewSettings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values})

    @property
    def design(self) -> Design:
        rates = dict(drop_path_rate=self.drop_path) if self.drop_path else {}
        return Design(
            model=self.model, model_args={**rates, **self.model_args}, img_size=self.img_size, method=self.method,
            hidden=self.hidden, out=self.out, blocks=self.blocks, attention_weight=self.attention_weight,
            momentum=self.momentum)

    def schedule_options(self, steps_per_epoch: int) -> dict[str, Any]:
        return dict(super().schedule_options(steps_per_epoch), **schedule_options(
            self.epochs, self.warmup_epochs, steps_per_epoch))

    def optimizer_options(self) -> dict[str, Any]:
        return optimizer_options(self.lr, self.opt, self.weight_decay)
