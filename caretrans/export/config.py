"""Settings of `coreml/export.py`: network, formats and tolerances."""
from dataclasses import dataclass
from pathlib import Path

from ..flags import PRETRAINED_HELP, check_settings, check_weights, setting
from ..errors import ConfigError
from ..measure.names import expand_models, parse_size
from .formats.table import FORMATS, Format, find_obstacle

__all__ = ['AIMED', 'COREML', 'TARGET', 'TOLERANCES', 'ExportConfig', 'Job']

TARGET = 'iOS16'
TARGETS = ('iOS15', 'iOS16', 'iOS17', 'iOS18', 'iOS26')
COMPRESSIONS = ('none', 'int8', 'palette6', 'palette4')
COREML = ('mlpackage', 'mlmodel')
AIMED = ('mlpackage', 'executorch-coreml')  # formats with a target
FORMS = {**dict.fromkeys([*COREML, 'executorch-coreml', 'coreai'], 'phone'), 'executorch': 'bmm', 'litert': 'bmm'}

# Share of images, %, whose top-1 class must be that of PyTorch in float64. Rounding decides between classes that are
# nearly equal; any other mistake in a program changes more predictions than these.
FLOORS = {'fp32': 99.5, 'fp16': 97., 'int8': 85., 'palette6': 85., 'palette4': 50.}

# Largest error of an output, as a share of the largest output, that rounding may explain: several times the
# measured error. Formats that quantize are judged by top-1 only. Dropping any one bias of care_s0 causes at least 4e-4,
# and for a fifth of the biases changes no top-1 class of 24 images.
TOLERANCES = {'fp32': 1e-4, 'fp16': 2e-2}


@dataclass(frozen=True)
class Job:
    """One program to write, with all settings resolved.

    Attributes:
        size: Height and width of the images, pixels.
        input: 'image', pixels from 0 to 255 in RGB, or 'tensor', normalised as in evaluation.
        output: 'logits', 'probabilities', or 'classes', probabilities with labels.
        target: Oldest supported system, for Core ML.
        compress: Compression of the weights, for Core ML.
        unfused: Whether to export the original network.
        floor: Least top-1 agreement, %.
    """
    format: str
    precision: str
    input: str
    output: str
    size: tuple[int, int]
    batch: int = 1
    target: str = TARGET
    compress: str = 'none'
    unfused: bool = False
    floor: float = 99.

    @property
    def tolerance(self) -> float:
        """Largest allowed error of an output, as a share of the largest output."""
        return TOLERANCES.get(self.precision if self.compress == 'none' else self.compress, float('inf'))

    @property
    def kind(self) -> Format:
        return FORMATS[self.format]

    def get_form(self) -> str:
        """The form of the network, one of `caretrans.fuse.FORMS`."""
        return 'trained' if self.unfused else FORMS.get(self.format, 'fused')

    def __str__(self) -> str:
        compress = '' if self.compress == 'none' else f' {self.compress}'
        return f'{self.format} {self.precision}{compress}' + ' unfused' * self.unfused


@dataclass
class ExportConfig:
    """All settings of an export; each field is a flag."""

    model: str = setting('', 'model of caretrans or timm, if the checkpoint does not name it')
    checkpoint: str = setting('', 'weights: .pth, .pth.tar or .safetensors, published or written by train.py')
    entry: str = setting('', 'entry of the file that holds the weights, e.g. state_dict_ema')
    pretrained: bool = setting(False, PRETRAINED_HELP)
    random_weights: bool = setting(False, 'export random weights, to measure speed only')
    format: list[str] = setting(['mlpackage'], 'one or more output formats', choices=list(FORMATS))
    output_dir: str = setting('', 'folder for programs and reports (default: runs/export)')
    input: str = setting(
        '', 'image: RGB pixels from 0 to 255, normalised in the program; tensor: already normalised (default: image '
        'for Core ML, else tensor)', choices=['', 'image', 'tensor'])
    output: str = setting(
        '', 'output of the program (default: classes, i.e. probabilities with labels, for Core ML, else logits)',
        choices=['', 'logits', 'probabilities', 'classes'])
    precision: list[str] = setting(
        [], 'one or more precisions (default: fp16 for Core ML, else fp32)', choices=['fp16', 'fp32', 'int8'])
    labels: str = setting('', 'text file with one class per line (default: classes of the checkpoint, or ImageNet)')
    img_size: str = setting('', 'image side in pixels, or HEIGHTxWIDTH (default: as in the checkpoint)')
    batch: int = setting(1, 'batch size of the program', bounds=(1, None))
    target: str = setting(TARGET, 'oldest supported system, for Core ML programs', choices=list(TARGETS))
    compress: str = setting('none', 'compression of the weights, for Core ML programs', choices=list(COMPRESSIONS))
    unfused: bool = setting(False, 'export the original network, for comparison')
    data: str = setting(
        '', 'folder of images to verify on, with val/CLASS/* for a classifier (default: the bundled images)')
    images: int | None = setting(
        None, 'number of images to verify on (default: all; 4 for a detector or segmenter)', bounds=(1, None))
    floor: float | None = setting(
        None, 'minimum top-1 agreement with PyTorch, % (default: '
        + ', '.join(f'{value:g} for {name}' for name, value in FLOORS.items()) + ')', bounds=(0, 100))
    latency: bool = setting(True, 'time programs against PyTorch, if their runtime is available here')
    threads: int = setting(1, 'CPU threads', bounds=(1, None))
    json: bool = setting(False, 'print one JSON object instead of text')

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ('format', 'precision'):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ConfigError(f'{name} is {getattr(self, name)}: name each once.')
        if self.img_size:
            parse_size(self.img_size)
        if self.model and len(expand_models([self.model])) != 1:
            raise ConfigError(f'--model {self.model}: export one model at a time.')
        check_weights(self.checkpoint, self.pretrained, self.model, self.entry, self.random_weights)
        if self.compress != 'none' and not set(self.format) & set(COREML):
            raise ConfigError(
                f'--compress {self.compress} is for mlpackage and mlmodel; for other formats use --precision int8.')
        if self.target != TARGET and not set(self.format) & set(AIMED):
            raise ConfigError(f'--target {self.target} is for {" and ".join(AIMED)}, not for {" ".join(self.format)}.')

    def list_jobs(self, size: tuple[int, int]) -> list[Job]:
        """Programs to write, ordered by format, then precision.

        Args:
            size: Height and width of the images, unless --img-size is given.
        Raises:
            ConfigError: A setting that a format does not support, or a missing package; raised before any work.
        """
        jobs = [self._make_job(FORMATS[name], precision, size)
                for name in self.format for precision in self.precision or FORMATS[name].precisions[:1]]
        for job in jobs:
            check = getattr(job.kind.load_module(), 'check', None)
            if check is not None:
                check(job)
        return jobs

    def _make_job(self, kind: Format, precision: str, size: tuple[int, int]) -> Job:
        chosen = dict(input=self.input or kind.inputs[0], output=self.output or kind.outputs[0], precision=precision)
        for name, value in chosen.items():
            able = getattr(kind, f'{name}s')
            if value not in able:
                raise ConfigError(f'--{name} {value} with --format {kind.name}: it supports {", ".join(able)}.')
        obstacle = find_obstacle(kind, precision)
        if obstacle:
            raise ConfigError(f'--format {kind.name}: {obstacle}')
        compress = self.compress if kind.name in COREML else 'none'
        floor = FLOORS[compress if compress != 'none' else precision] if self.floor is None else self.floor
        return Job(
            kind.name, size=parse_size(self.img_size) if self.img_size else size, batch=self.batch,
            target=self.target if kind.name in AIMED else TARGET, compress=compress, unfused=self.unfused, floor=floor,
            **chosen)

    def get_folder(self) -> Path:
        return Path(self.output_dir or 'runs/export')
