"""The settings of `benchmark.py`: what is measured, and which ways of running a network are candidates."""
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import check_settings, parse_flags, setting
from ..errors import ConfigError
from .backends import BACKENDS, DTYPES, IN_TORCH, Setup, check_setup
from .kernel_choice import KERNELS, WITH_KERNELS, choose_kernels
from ..measure.names import expand_models, parse_size

__all__ = ['BENCHES', 'BenchConfig', 'list_setups', 'parse_bench_config']

BENCHES = ('infer', 'profile', 'train')  # what 'all' stands for
ALONE = ('accuracy', 'curves')  # what more there is
USED_BY = {  # benches that heed a flag; curves have refusals of their own
    'checkpoint': ('infer', 'profile', 'accuracy', 'curves'), 'channels_last': ('infer', 'profile', 'accuracy'),
    'kernels': ('infer', 'profile', 'accuracy'), 'backend': ('infer', 'profile', 'accuracy'),
    'dtype': ('infer', 'profile', 'accuracy'), 'batch_size': ('infer', 'profile', 'train', 'curves'),
    'published': ('infer', 'profile'), 'runs': ('infer',), 'warmup': ('infer',), 'teacher': ('train', 'curves'),
    'ways': ('train', 'curves'), 'steps': ('curves',),
}
README = Path(__file__).parents[2] / 'README.md'
CHANNELS_LAST = ('fused', 'compile', 'cudagraph')  # in torch they are faster so; eager is as published


@dataclass
class BenchConfig:
    """Everything that decides what `benchmark.py` measures. A flag exists for each field."""

    model: list[str] = setting(
        ['care_s1'], "models of timm and caretrans, also with wildcards (care_*); 'paper' for those of the CARE "
        "paper's table that are here: timm's, mlla_t, care_s0, care_s1 and care_s2")
    checkpoint: str = setting('', 'weights of the one model; by default random ones under which all parts count')
    bench: str = setting(
        'infer', 'what to measure; accuracy, of a checkpoint, and curves, whether faster training learns the same, are '
        'not part of all', choices=[*BENCHES, *ALONE, 'all'])
    data: str = setting(
        '', 'folder with train/ and val/ for accuracy and curves; by default of the checkpoint, or the bundled one')
    steps: int = setting(500, 'training steps of each curve', bounds=(2, None))
    device: str = setting('auto', 'cpu, cuda, mps or auto')
    backend: list[str] = setting(['all'], 'ways to run a network; all that work here', choices=[*BACKENDS, 'all'])
    dtype: list[str] = setting(['float32'], 'number formats; tf32 is for GPUs', choices=list(DTYPES))
    channels_last: bool | None = setting(
        None, 'order of images and weights in torch; by default not for eager, which is as published, else yes')
    kernels: list[str] = setting(
        [], 'of the rewritten network in torch: its own, ours in Triton, ours of the expansions too; by default all '
        'that run here', choices=list(KERNELS))
    batch_size: list[int] = setting(
        [], 'images at a time; by default 1, and 128 per training step (16 on a processor)', bounds=(1, None))
    img_size: list[str] = setting(['224'], 'pixels: a side, or HEIGHTxWIDTH')
    threads: int = setting(1, 'threads of the processor', bounds=(1, None))
    published: bool = setting(
        False, 'as the RTX 4090 column was made: eager, float32 with TF32 matrix products, batch 64, mean of 40 runs '
        'after 10')
    warmup: int = setting(5, 'runs before those that are timed', bounds=(0, None))
    runs: int | None = setting(
        None, 'timed runs of each candidate; by default 50, or fewer where they take long', bounds=(1, None))
    teacher: list[str] = setting(['none'], 'of training steps: none, a model of timm with random weights, or both')
    ways: list[str] = setting([], 'ways of training, e.g. channels_last+bf16+compile; by default all that work here')
    output: str = setting('', 'folder of results.json and results.csv; one under runs/benchmark if not given')
    plots: str = setting('', 'folder to draw plots into; measures profiles and growth with resolution for them')
    json: bool = setting(False, 'print one JSON object instead of text')
    markdown: bool = setting(False, 'print tables in Markdown')
    check: bool = setting(False, "count parameters and GMACs of the README's models again; 1 if it has others")
    update: bool = setting(False, 'write the tables into the README as well, between its markers')
    readme: str = setting(str(README), 'file of --check and --update')

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_use()
        if self.published:
            self._follow_paper()
        if self.bench == 'accuracy' and not self.checkpoint:
            raise ConfigError('--bench accuracy is of a trained network: give its file with --checkpoint.')
        if self.data and self.bench not in ALONE:
            raise ConfigError(f'--data {self.data} with --bench {self.bench}: it is for --bench accuracy and curves.')
        self.sizes = [parse_size(size) for size in self.img_size]
        for name in ('backend', 'dtype', 'kernels', 'batch_size', 'img_size'):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ConfigError(f'{name} is {values}: name each once.')

    def list_models(self) -> list[str]:
        """The models that are measured.

        Raises:
            ConfigError: Nothing has such a name, or a checkpoint is to be of several models.
        """
        names = expand_models(self.model)
        if self.checkpoint and len(names) > 1:
            raise ConfigError(f'--checkpoint {self.checkpoint} with {len(names)} models: name the one that it is of.')
        return names

    def list_batches(self) -> list[int]:
        """The batches of inference."""
        return self.batch_size or [1]

    def list_training_batches(self) -> list[int]:
        """The batches of training steps that were given: of all benches those that mixup can pair."""
        return [batch for batch in self.batch_size if self.bench != 'all' or batch % 2 == 0]

    def list_benches(self) -> list[str]:
        """What is measured, in order; plots want profiles."""
        wanted = set(BENCHES if self.bench == 'all' else [self.bench]) | ({'profile'} if self.plots else set())
        return [bench for bench in (*BENCHES, *ALONE) if bench in wanted]

    def _check_use(self) -> None:
        """Refuse flags that nothing of what is measured heeds."""
        benches = self.list_benches()
        for item in dataclasses.fields(self):
            value, used_by = getattr(self, item.name), USED_BY.get(item.name, benches)
            default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
            if value != default and not set(benches) & set(used_by):
                shown = '' if isinstance(value, bool) else f' {" ".join(map(str, value))}' if isinstance(
                    value, list) else f' {value}'
                raise ConfigError(
                    f'--{item.name.replace("_", "-")}{shown} with --bench {self.bench}: it is for --bench '
                    f'{", ".join(used_by)}; leave it out.')

    def _follow_paper(self) -> None:
        given = dict(
            backend=['all'], dtype=['float32'], kernels=[], batch_size=[], channels_last=None, warmup=5, runs=None)
        changed = [f'--{name.replace("_", "-")}' for name, default in given.items() if getattr(self, name) != default]
        if changed:
            raise ConfigError(f'--published fixes {", ".join(changed)}: leave either out.')
        self.backend, self.dtype, self.batch_size, self.channels_last = ['eager'], ['tf32'], [64], False
        self.warmup, self.runs = 10, 40


def _choose_layout(config: BenchConfig, backend: str) -> str:
    chosen = backend in CHANNELS_LAST if config.channels_last is None else config.channels_last
    return 'channels_last' if chosen and backend in IN_TORCH else 'nchw'


def list_setups(config: BenchConfig, device: torch.device) -> tuple[list[Setup], list[str]]:
    """The ways to run each model, and lines that say what the defaults leave out and why.

    Raises:
        ConfigError: A backend that was named does not work here, or not in a number format that was named.
    """
    dtypes = ['float32' if dtype == 'tf32' and config.published and device.type != 'cuda' else dtype
              for dtype in config.dtype]
    named = config.backend != ['all']
    if named and 'all' in config.backend:
        raise ConfigError(f'backend is {config.backend}: all stands alone.')
    if named and config.channels_last is not None and not set(config.backend) & set(IN_TORCH):
        raise ConfigError(
            f'--channels-last with --backend {" ".join(config.backend)}: it chooses its own order; leave it out.')
    setups: list[Setup] = []
    backends = config.backend if named else BACKENDS
    kinds, left_out = choose_kernels(config.kernels, backends, device)
    for backend, dtype in itertools.product(backends, dtypes):
        for kernels in kinds if backend in WITH_KERNELS else ['torch']:
            setup = Setup(backend, dtype, _choose_layout(config, backend), device, config.threads, kernels)
            try:
                check_setup(setup)
                setups.append(setup)
            except ConfigError as error:
                if named:
                    raise
                left_out.append(f'left out: {error}')
    if not setups:
        raise ConfigError(f'--dtype {" ".join(dtypes)} with --device {device.type}: no backend has it there.')
    return setups, list(dict.fromkeys(left_out))


def parse_bench_config(argv: Sequence[str] | None = None, description: str = '') -> BenchConfig:
    """The config of a command line; see `parse_flags`."""
    return parse_flags(BenchConfig, argv, description)
