"""Export of a network: check everything, write, read back, verify, time, report, and only then keep the file."""
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from ..devices import describe_device, list_versions, use_threads
from ..errors import ConfigError, ExportError
from ..measure.timing import compare_rounds, judge_noise, summarise, time_interleaved
from ..progress import Progress
from ..text import utf8_path, write_text
from .config import COREML, TARGET, ExportConfig, Job
from .coreml.apple import Examination, examine, is_available
from .dense import DenseSource, is_dense_config, load_dense_cases, load_dense_source, restrict_config
from .dense_verify import verify_dense
from .formats.table import list_versions as list_format_versions
from .program import FormatModule, Program
from .shapes import describe_shapes
from .source import Cases, Source, load_cases, load_source
from .verify import Verification, VerificationError, verify

__all__ = ['Export', 'Facts', 'Timing', 'export', 'make_folder', 'name_program']

ROUNDS, RUNS = 10, 5  # of the timing

_logger = logging.getLogger(__name__)


@dataclass
class Facts:
    """Facts shared by all programs of an export.

    Attributes:
        weights: The checkpoint, or 'random'.
        sha256: Of the checkpoint; '' for random weights.
        data: The images that programs are compared on.
    """
    model: str
    weights: str
    sha256: str
    data: str
    device: str
    versions: dict[str, str]


@dataclass
class Timing:
    """Milliseconds of a program, and its speed-up over the original network in eager mode, interleaved with it.

    Attributes:
        ratio, ratio_p10, ratio_p90: Of the speed-up over rounds.
        noise: Reasons not to rely on it.
    """
    median_ms: float
    p10_ms: float
    p90_ms: float
    mean_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    threads: int
    batch: int
    eager_ms: float
    noise: list[str]


@dataclass
class Export:
    """A program that was written, and its measurements.

    Attributes:
        path: The file or folder.
        mib: Its size.
        seconds: Time to write it.
        core_ml: On a Mac, for Core ML programs: the results of Core ML itself.
        failure: Why nothing was kept; then the rest may be missing.
    """
    job: Job
    path: Path
    mib: float = 0.
    seconds: float = 0.
    program: Program | None = None
    verification: Verification | None = None
    latency: Timing | None = None
    core_ml: Examination | None = None
    notes: list[str] = field(default_factory=list)
    failure: str = ''

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; None for numbers that are not finite."""
        facts = dict(
            vars(self.job), form=self.job.get_form(), path=str(self.path), mib=self.mib, seconds=self.seconds,
            failure=self.failure, notes=self.notes)
        for name in ('latency', 'verification', 'core_ml'):
            result = getattr(self, name)
            facts[name] = None if result is None else asdict(result)
        if self.program is not None:
            facts.update({name: getattr(self.program, name) for name in ('runner', 'operations', 'shape_changes')})
        return _drop_infinite(facts)


def _drop_infinite(value: Any) -> Any:
    """Plain values, with None for numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {key: _drop_infinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_drop_infinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Files ----------------------------------------------------------------------------------------------------------------

def name_program(source: Source, job: Job) -> str:
    """The file name of a job: settings other than the default are part of it."""
    kind = job.kind
    named = [
        (job.size != source.size, 'x'.join(str(side) for side in job.size)), (job.batch != 1, f'b{job.batch}'),
        (job.precision != kind.precisions[0], job.precision), (job.compress != 'none', job.compress),
        (job.unfused, 'unfused'), (job.input != kind.inputs[0], job.input), (job.output != kind.outputs[0], job.output),
        (job.target != TARGET, job.target)]
    return '-'.join([source.name, *(text for differs, text in named if differs)]) + kind.suffix


def make_folder(folder: Path, flag: str) -> None:
    """Create the folder that a flag names, and a file in it, before any work.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f'{flag} {folder} cannot be written: {error.strerror}; name another.') from None


def _check_folder(folder: Path, source: Source, jobs: Sequence[Job]) -> None:
    """Create the folder; refuse to replace anything but an exported program."""
    make_folder(folder, '--output-dir')
    for target in (folder / name_program(source, job) for job in jobs):
        if target.is_symlink() or target.exists() and not Path(f'{target}.json').is_file():
            raise ConfigError(
                f'{target} already exists and was not exported: move it away, or name another --output-dir.')


def _replace(new: Path, target: Path) -> None:
    """Move a finished file or folder to its place; an earlier one is removed, and restored if that fails."""
    old = new.with_name('old-' + new.name)
    if target.exists():
        target.replace(old)
    try:
        new.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise


# Programs -------------------------------------------------------------------------------------------------------------

def _time(source: Source, job: Job, program: Program) -> Timing:
    """Time a program and the original network, eager, interleaved in one process."""
    images = source.make_example(job)
    eager = source.normalise(torch.zeros_like(images, dtype=torch.uint8)) if job.input == 'image' else images

    def run_eager() -> torch.Tensor:
        with torch.inference_mode():
            return source.model(eager)
    runs = {'eager': run_eager, 'eager again': run_eager, 'program': lambda: program.run(images)}
    for run in runs.values():
        for _ in range(3):
            run()
    times = time_interleaved(runs, torch.device('cpu'), {name: RUNS for name in runs}, ROUNDS)
    summary, own = summarise(times['program']), compare_rounds(times['eager'], times['eager again'])['ratio']
    return Timing(
        **summary, **compare_rounds(times['eager'], times['program']), threads=torch.get_num_threads(), batch=job.batch,
        eager_ms=summarise(times['eager'])['median_ms'], noise=judge_noise(summary, own))


def _make(source: Source, job: Job, cases: Cases, config: ExportConfig, progress: Progress, new: Path) -> Export:
    """Write a program to `new`, read it back, and verify it."""
    result = Export(job, new)
    module: FormatModule = job.kind.load_module()
    start = time.perf_counter()
    with redirect_stdout(sys.stderr):  # remarks of the converters
        result.notes += module.write(source, job, new)
        result.seconds = time.perf_counter() - start
        files = [new] if new.is_file() else [file for file in new.rglob('*') if file.is_file()]
        result.mib = sum(file.stat().st_size for file in files) / 2 ** 20
        result.program = module.read(job, new)
    result.notes += result.program.notes
    check = verify_dense if isinstance(source, DenseSource) else verify
    result.verification = check(source, job, result.program, cases, new.name, progress.update)
    result.notes.append(describe_shapes(source, job, result.program, cases))
    if job.format in COREML and is_available() and not isinstance(source, DenseSource):
        try:
            result.core_ml = examine(source, job, new, cases)
        except VerificationError:
            raise
        except ExportError as error:  # an older system than the program is for, among others
            result.notes.append(f'not examined by Core ML: {error}')
    if config.latency and result.program.timed:
        result.latency = _time(source, job, result.program)
    return result


def _export_job(source: Source, job: Job, cases: Cases, config: ExportConfig, progress: Progress) -> Export:
    """Make a program under a temporary name, then move it to its place."""
    folder = config.get_folder()
    target = folder / name_program(source, job)
    before = progress.count
    progress.describe(str(job))
    with utf8_path(folder) as place, tempfile.TemporaryDirectory(prefix='.unfinished-', dir=place) as unfinished:
        try:
            result = _make(source, job, cases, config, progress, Path(unfinished) / target.name)
            _replace(result.path, target)
            result.path = target
        except ExportError as error:
            result = Export(job, target, failure=str(error), verification=getattr(error, 'verification', None))
        except Exception as error:  # whatever a converter raises
            text = ' '.join(str(error).split())[:500]
            result = Export(job, target, failure=f'{job} could not be made: {type(error).__name__}: {text}')
    progress.update(before + len(cases) - progress.count)
    return result


def export(
        config: ExportConfig, stream: TextIO | None = None, source: Source | None = None) -> tuple[Facts, list[Export]]:
    """Write and verify all programs of a config; one that fails leaves no file, and the others continue.

    Args:
        stream: For progress; stdout if not given.
        source: The result of `load_source(config)`, if it is loaded already.
    Returns:
        What all programs share, and the result of each. A report, as JSON, is written beside each program.
    Raises:
        CheckpointError, ConfigError, DataError: Something cannot work, found before anything was written.
    """
    dense = is_dense_config(config)
    config = restrict_config(config) if dense else config
    source = source or (load_dense_source(config) if dense else load_source(config))
    jobs = config.list_jobs(source.size)
    channels = source.eval_config.input_size[0]
    if channels != 3 and any(job.input == 'image' for job in jobs):
        raise ConfigError(
            f'--input image: {source.name} has {channels} input channels, but an RGB image has 3. Use --input tensor.')
    _check_folder(config.get_folder(), source, jobs)
    versions = list_versions(['timm', 'numpy'])
    for job in jobs:
        versions.update(list_format_versions(job.kind, job.precision))
    with use_threads(config.threads):
        _logger.info('Computing the float64 outputs of %s.', source.name)
        load = load_dense_cases if dense else load_cases
        cases = load(source, jobs[0].size, config.data, config.images)
        source.accuracy = cases.describe_accuracy()
        facts = Facts(
            source.name, source.checkpoint or 'random', source.sha256, cases.name,
            describe_device(torch.device('cpu')), versions)
        exports = []
        with Progress(len(cases) * len(jobs), 'images', stream=stream) as progress:
            for job in jobs:
                result = _export_job(source, job, cases, config, progress)
                exports.append(result)
                if not result.failure:
                    report = json.dumps({**vars(facts), **result.to_dict()}, indent=2, allow_nan=False)
                    write_text(f'{result.path}.json', report + '\n')
    return facts, exports
