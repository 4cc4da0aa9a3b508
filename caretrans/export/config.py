"""The settings of `coreml/export.py`: what is exported, to which formats, and how closely it must agree."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..measure.names import expand_models, parse_size
from ..config import check_settings, parse_flags, setting
from ..errors import ConfigError
from .formats import FORMATS, Format, find_obstacle

__all__ = ['AIMED', 'COREML', 'TARGET', 'TOLERANCES', 'ExportConfig', 'Job', 'parse_export_config']

TARGET = 'iOS16'
TARGETS = ('iOS15', 'iOS16', 'iOS17', 'iOS18', 'iOS26')
COMPRESSIONS = ('none', 'int8', 'palette6', 'palette4')
COREML = ('mlpackage', 'mlmodel')
AIMED = ('mlpackage', 'executorch-coreml')  # at a system
FORMS = {**dict.fromkeys([*COREML, 'executorch-coreml', 'coreai'], 'phone'), 'executorch': 'bmm', 'litert': 'bmm'}

# Share of photographs, %, whose first answer must be that of PyTorch in float64. Rounding decides between classes that
# are nearly equal; whatever else is wrong with a program changes more answers than these.
FLOORS = {'fp32': 99.5, 'fp16': 97., 'int8': 85., 'palette6': 85., 'palette4': 50.}

# Largest error of an output, as a share of the largest output, up to which rounding may be the reason: several times
# what was measured. Formats that quantise go by the first answers alone. The least that any bias lost from care_s0
# makes is 4e-4, and a fifth of those changes no first answer of 24 photographs.
TOLERANCES = {'fp32': 1e-4, 'fp16': 2e-2}


def _accept(job: 'Job') -> None:
    """The check of formats without one."""


@dataclass(frozen=True)
class Job:
    """One program to write, everything decided.

    Attributes:
        size: Height and width of the images, pixels.
        input: 'image', pixels from 0 to 255 in RGB, or 'tensor', normalised as in evaluation.
        output: 'logits', 'probabilities', or 'classes', probabilities with labels.
        target: The oldest system it is for, of Core ML.
        compress: How the weights are stored, of Core ML.
        unfused: Whether to export the network as it is trained.
        floor: Least agreement of first answers, %.
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
        """Largest error of an output that is allowed, as a share of the largest output."""
        return TOLERANCES.get(self.precision if self.compress == 'none' else self.compress, float('inf'))

    @property
    def kind(self) -> Format:
        return FORMATS[self.format]

    def get_form(self) -> str:
        """Of the network, one of `caretrans.fuse.FORMS`."""
        return 'trained' if self.unfused else FORMS.get(self.format, 'fused')

    def __str__(self) -> str:
        parts = [self.format, self.precision] + [self.compress] * (self.compress != 'none') \
            + ['unfused'] * self.unfused
        return ' '.join(parts)


@dataclass
class ExportConfig:
    """Everything that decides what is exported. A flag exists for each field."""

    model: str = setting('', 'model of caretrans or timm, where the checkpoint does not say it')
    checkpoint: str = setting('', 'weights: .pth, .pth.tar or .safetensors, published or of train.py')
    entry: str = setting('', 'entry of the file that holds the weights, e.g. state_dict_ema')
    random_weights: bool = setting(False, 'export random weights, to look at speed; good for nothing else')
    format: list[str] = setting(['mlpackage'], 'one or more', choices=list(FORMATS))
    output_dir: str = setting('', 'where programs and reports go; runs/export if not given')
    input: str = setting(
        '', 'image: RGB pixels from 0 to 255, normalised inside; tensor: normalised already; by default image for Core '
        'ML, else tensor', choices=['', 'image', 'tensor'])
    output: str = setting(
        '', 'what comes out; by default classes (probabilities with labels) for Core ML, else logits',
        choices=['', 'logits', 'probabilities', 'classes'])
    precision: list[str] = setting(
        [], 'one or more; by default what the format is made for: fp16 for Core ML, fp32 for the others',
        choices=['fp16', 'fp32', 'int8'])
    labels: str = setting('', 'text file with a class on each line; by default those of the checkpoint, or ImageNet')
    img_size: str = setting('', 'pixels: a side, or HEIGHTxWIDTH; by default that of the checkpoint')
    batch: int = setting(1, 'images at a time', bounds=(1, None))
    target: str = setting(TARGET, 'oldest system of Core ML programs', choices=list(TARGETS))
    compress: str = setting('none', 'weights of Core ML programs', choices=list(COMPRESSIONS))
    unfused: bool = setting(False, 'the network as it is trained, for comparison')
    data: str = setting('', 'photographs to compare on, a folder with val/CLASS/*; by default the bundled ones')
    images: int | None = setting(None, 'how many of them; by default all', bounds=(1, None))
    floor: float | None = setting(
        None, 'least share of first answers equal to those of PyTorch, %%; by default '
        + ', '.join(f'{value:g} for {name}' for name, value in FLOORS.items()), bounds=(0, 100))
    latency: bool = setting(True, 'time programs beside PyTorch, where their runtime runs here')
    threads: int = setting(1, 'threads of the processor', bounds=(1, None))
    json: bool = setting(False, 'print one JSON object instead of text')

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ('format', 'precision'):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ConfigError(f'{name} is {getattr(self, name)}: name each once.')
        if self.img_size:
            parse_size(self.img_size)
        if self.model:
            if len(expand_models([self.model])) != 1:
                raise ConfigError(f'--model {self.model}: export one model at a time.')
        if bool(self.checkpoint) == self.random_weights:
            raise ConfigError(
                f'--checkpoint {self.checkpoint} with --random-weights: choose one.' if self.checkpoint else
                'No weights: give a file with --checkpoint, or ask for --random-weights (to look at speed alone).')
        if self.random_weights and not self.model:
            raise ConfigError('--random-weights needs --model, e.g. --model care_s0.')
        if self.compress != 'none' and not set(self.format) & set(COREML):
            raise ConfigError(
                f'--compress {self.compress} is for mlpackage and mlmodel; the others have --precision int8.')
        if self.target != TARGET and not set(self.format) & set(AIMED):
            raise ConfigError(f'--target {self.target} is for {" and ".join(AIMED)}, not for {" ".join(self.format)}.')

    def list_jobs(self, size: tuple[int, int]) -> list[Job]:
        """What is to be written, format by format, precision by precision.

        Args:
            size: Of the images, where no --img-size was given.
        Raises:
            ConfigError: Something that was asked for cannot be, or a package is missing; before any work.
        """
        jobs = [self._make_job(FORMATS[name], precision, size)
                for name in self.format for precision in self.precision or FORMATS[name].precisions[:1]]
        for job in jobs:
            getattr(job.kind.load_module(), 'check', _accept)(job)
        return jobs

    def _make_job(self, kind: Format, precision: str, size: tuple[int, int]) -> Job:
        chosen = dict(input=self.input or kind.inputs[0], output=self.output or kind.outputs[0], precision=precision)
        for name, value in chosen.items():
            able = getattr(kind, f'{name}s')
            if value not in able:
                raise ConfigError(f'--{name} {value} with --format {kind.name}: it has {", ".join(able)}.')
        obstacle = find_obstacle(kind, precision)
        if obstacle:
            raise ConfigError(f'--format {kind.name}: {obstacle}')
        compress = self.compress if kind.name in COREML else 'none'
        floor = FLOORS[compress if compress != 'none' else precision] if self.floor is None else self.floor
        return Job(
            kind.name, size=parse_size(self.img_size) if self.img_size else size, batch=self.batch,
            target=self.target if kind.name in AIMED else TARGET,
            compress=compress, unfused=self.unfused, floor=floor, **chosen)

    def get_folder(self) -> Path:
        return Path(self.output_dir or 'runs/export')


def parse_export_config(argv: Sequence[str] | None = None, description: str = '') -> ExportConfig:
    """The config of a command line; see `parse_flags`."""
    return parse_flags(ExportConfig, argv, description)
