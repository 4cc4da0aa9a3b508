"""Settings of `benchmark.py`: a dataclass of flags for each bench, combined in `BenchConfig`."""
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import check_settings, parse_flags, setting
from ..dense import TASKS
from ..errors import ConfigError
from ..flags import PRETRAINED_HELP, check_weights
from ..measure.names import expand_models, parse_size
from .setups import BACKENDS, DTYPES, FUSED_IN_TORCH, IN_TORCH, KERNELS, Setup, check_setup, choose_kernels

__all__ = ['BENCHES', 'BenchConfig', 'list_setups', 'parse_bench_config']

BENCHES = ('infer', 'profile', 'train')  # the benches of 'all'


@dataclass
class SetupFlags:
    """Flags for the setup in which a network runs."""

    checkpoint: str = setting(
        '', 'weights of the model (default: random weights chosen so that an error in any layer shows)')
    backend: list[str] = setting(
        ['all'], 'backends to measure; all: those available here', choices=[*BACKENDS, 'all'])
    dtype: list[str] = setting(['float32'], 'number formats; tf32 is for GPUs', choices=list(DTYPES))
    channels_last: bool | None = setting(
        None, 'memory layout in PyTorch (default: NCHW for eager, as published, else channels-last)')
    kernels: list[str] = setting(
        [], "kernels of the fused network in PyTorch: its own, or this package's in Triton; by default all that run "
        'here', choices=list(KERNELS))


@dataclass
class BatchFlags:
    """The flag for batch sizes."""

    batch_size: list[int] = setting(
        [], 'images per batch (default: 1; training steps: 128, on a CPU 16)', bounds=(1, None))


@dataclass
class ProfileFlags(SetupFlags, BatchFlags):
    """Flags of `--bench profile`."""

    published: bool = setting(
        False, 'setup of the RTX 4090 column: eager, float32 with TF32 matmuls, batch 64, mean of 40 runs after 10')


@dataclass
class RunFlags:
    """Flags for the number of runs."""

    warmup: int = setting(5, 'warm-up runs, not timed', bounds=(0, None))
    runs: int | None = setting(
        None, 'timed runs of each candidate (default: 50, or fewer if they are slow)', bounds=(1, None))


@dataclass
class InferFlags(ProfileFlags, RunFlags):
    """Flags of `--bench infer`."""


@dataclass
class DenseFlags(RunFlags):
    """Flags of `--bench dense`."""

    task: list[str] = setting(list(TASKS), 'detectors and segmenters to measure', choices=list(TASKS))


@dataclass
class TrainFlags(BatchFlags):
    """Flags of `--bench train`."""

    teacher: list[str] = setting(['none'], 'teachers: none, a model of timm with random weights, or both')
    ways: list[str] = setting(
        [], 'training modes, e.g. channels_last+bf16+compile (default: all that are available here)')


@dataclass
class AccuracyFlags(SetupFlags):
    """Flags of `--bench accuracy`."""

    pretrained: bool = setting(False, PRETRAINED_HELP)
    data: str = setting('', 'folder with val/CLASS/* (default: the data set of the checkpoint)')


@dataclass
class CommonFlags:
    """Flags of every bench."""

    model: list[str] = setting(
        ['care_s1'], "models of timm and caretrans, also with wildcards (care_*); 'paper' for the rows of the CARE "
        'paper that exist here: six models of timm, mlla_t, care_s0, care_s1 and care_s2')
    bench: str = setting(
        'infer', "what to measure; dense: detectors and segmenters with these backbones; 'all' is infer, profile and "
        'train', choices=['infer', 'profile', 'train', 'accuracy', 'dense', 'all'])
    device: str = setting('auto', 'cpu, cuda, mps or auto')
    img_size: list[str] = setting(
        [], 'pixels: a side, or HEIGHTxWIDTH (default: 224; dense: 800x1280, of segmenters 512)')
    threads: int = setting(1, 'CPU threads', bounds=(1, None))
    output: str = setting('', 'folder for results.json and CSV files (default: a new one under runs/benchmark)')
    plots: str = setting(
        '', 'folder for plots, which also measures profiles and scaling with resolution; or one file, NAME.png, for '
        'accuracy against latency only')
    json: bool = setting(False, 'print one JSON object instead of text')
    markdown: bool = setting(False, 'print tables in Markdown')
    check: bool = setting(
        False, 'recount the parameters and GMACs in README.md and docs/benchmarks.md; exit code 1 if one differs')
    update: bool = setting(False, 'also write the results to docs/benchmarks.md')
    readme: str = setting('', 'file for --check and --update, instead of the above')


FLAGS: dict[str, type] = {
    'infer': InferFlags, 'profile': ProfileFlags, 'train': TrainFlags, 'accuracy': AccuracyFlags, 'dense': DenseFlags}


@dataclass
class BenchConfig(InferFlags, TrainFlags, AccuracyFlags, DenseFlags, CommonFlags):
    """Everything that decides what `benchmark.py` measures. A flag exists for each field."""

    def __post_init__(self) -> None:
        check_settings(self)
        self.default_size = not self.img_size
        self.img_size = self.img_size or ['224']
        self._check_use()
        if self.published:
            self._follow_paper()
        if self.bench == 'accuracy':
            check_weights(self.checkpoint, self.pretrained, self.model[0])
        if self.plots_file and ('infer' not in self.list_benches() or len(self.batch_size) > 1 or len(
                self.img_size) > 1):
            raise ConfigError(
                f'--plots {self.plots}: a single plot needs --bench infer, one batch size and one image size.')
        self.sizes = [parse_size(size) for size in self.img_size]
        for name in ('backend', 'dtype', 'kernels', 'batch_size', 'img_size', 'task'):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ConfigError(f'{name} is {values}: name each once.')

    def _check_use(self) -> None:
        """Refuse a flag that none of the chosen benches uses."""
        for item in dataclasses.fields(self):
            users = [bench for bench, flags in FLAGS.items() if item.name in flags.__dataclass_fields__]
            value = getattr(self, item.name)
            default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
            if users and value != default and not set(users) & set(self.list_benches()):
                shown = '' if isinstance(value, bool) else f' {" ".join(map(str, value))}' if isinstance(
                    value, list) else f' {value}'
                raise ConfigError(
                    f'--{item.name.replace("_", "-")}{shown} with --bench {self.bench}: it is for --bench '
                    f'{", ".join(users)}; remove it.')

    def _follow_paper(self) -> None:
        fixed = ('backend', 'dtype', 'kernels', 'batch_size', 'channels_last', 'warmup', 'runs')
        defaults = InferFlags()
        changed = [f'--{name.replace("_", "-")}' for name in fixed if getattr(self, name) != getattr(defaults, name)]
        if changed:
            raise ConfigError(f'--published fixes {", ".join(changed)}: remove one of the two.')
        self.backend, self.dtype, self.batch_size, self.channels_last = ['eager'], ['tf32'], [64], False
        self.warmup, self.runs = 10, 40

    def list_models(self) -> list[str]:
        """Names of the models to measure.

        Raises:
            ConfigError: No model has such a name, or a checkpoint is given for several models.
        """
        names = expand_models(self.model)
        if (self.checkpoint or self.pretrained) and len(names) > 1:
            given = f'--checkpoint {self.checkpoint}' if self.checkpoint else '--pretrained'
            raise ConfigError(f'{given} with {len(names)} models: it fits only one, name it.')
        return names

    def list_batches(self) -> list[int]:
        """The batch sizes of inference."""
        return self.batch_size or [1]

    def list_training_batches(self) -> list[int]:
        """The batch sizes given for training steps; with `--bench all` only even ones, which mixup can pair."""
        return [batch for batch in self.batch_size if self.bench != 'all' or batch % 2 == 0]

    @property
    def plots_file(self) -> bool:
        """True if `plots` names one file instead of a folder."""
        return self.plots.endswith('.png')

    def list_benches(self) -> list[str]:
        """The benches to run, in order; a folder of plots needs profiles."""
        wanted = set(BENCHES if self.bench == 'all' else [self.bench])
        if self.plots and not self.plots_file:
            wanted.add('profile')
        return [bench for bench in FLAGS if bench in wanted]


def list_setups(config: BenchConfig, device: torch.device) -> tuple[list[Setup], list[str]]:
    """The setups that run each model, and remarks on setups that the defaults skip.

    Raises:
        ConfigError: A requested backend is not available here, or does not support a requested number format.
    """
    dtypes = ['float32' if dtype == 'tf32' and config.published and device.type != 'cuda' else dtype
              for dtype in config.dtype]
    named = config.backend != ['all']
    if named and 'all' in config.backend:
        raise ConfigError(f'backend is {config.backend}: all cannot be combined with other backends.')
    if named and config.channels_last is not None and not set(config.backend) & set(IN_TORCH):
        raise ConfigError(
            f'--channels-last with --backend {" ".join(config.backend)}: it chooses its own layout; remove it.')
    setups: list[Setup] = []
    backends = config.backend if named else BACKENDS
    kinds, skipped = choose_kernels(config.kernels, backends, device)
    for backend, dtype in itertools.product(backends, dtypes):
        last = backend in FUSED_IN_TORCH if config.channels_last is None else config.channels_last  # eager as published
        layout = 'channels_last' if last and backend in IN_TORCH else 'nchw'
        for kernels in kinds if backend in FUSED_IN_TORCH else ['torch']:
            setup = Setup(backend, dtype, layout, device, config.threads, kernels)
            try:
                check_setup(setup)
                setups.append(setup)
            except ConfigError as error:
                if named:
                    raise
                skipped.append(f'skipped: {error}')
    if not setups:
        raise ConfigError(f'--dtype {" ".join(dtypes)} with --device {device.type}: no backend supports it.')
    return setups, list(dict.fromkeys(skipped))


def parse_bench_config(argv: Sequence[str] | None = None, description: str = '') -> BenchConfig:
    """The config of a command line; see `parse_flags`."""
    return parse_flags(BenchConfig, argv, description)
