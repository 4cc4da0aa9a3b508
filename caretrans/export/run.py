"""Export a network: check everything, write, read back, prove, time, report, and only then put it in its place."""
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
from . import formats
from .apple import Examination, examine, is_available
from .config import COREML, TARGET, ExportConfig, Job
from .source import Cases, Source, load_cases, load_source
from .verify import Program, Verification, VerificationError, verify

__all__ = ['Export', 'export']

ROUNDS, RUNS = 10, 5  # of the timing

_logger = logging.getLogger(__name__)

@dataclass
class Export:
    """A program that was written, and what was measured of it.

    Attributes:
        path: The file or folder.
        mib: Its size.
        seconds: That writing it took.
        core_ml: On a Mac, of Core ML programs: what Core ML itself computes there, where and how fast.
        latency: Median, p10 and p90 in ms beside the network as trained, and how many times as fast it is.
        failure: Why nothing was kept; then the rest may be missing.
    """
    job: Job
    path: Path
    mib: float = 0.
    seconds: float = 0.
    program: Program | None = None
    verification: Verification | None = None
    latency: dict[str, Any] | None = None
    core_ml: Examination | None = None
    notes: list[str] = field(default_factory=list)
    failure: str = ''

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        program = self.program
        facts = dict(
            vars(self.job), form=self.job.get_form(), path=str(self.path), mib=self.mib, seconds=self.seconds,
            failure=self.failure, notes=self.notes, latency=self.latency,
            verification=None if self.verification is None else vars(self.verification),
            core_ml=None if self.core_ml is None else asdict(self.core_ml))
        if program is not None:
            facts.update(
                runner=program.runner, operations=program.operations, shape_changes=program.shape_changes)
        return _drop_infinite(facts)


def _check_folder(folder: Path, source: Source, jobs: Sequence[Job]) -> None:
    """Make the folder, and a file in it, before any work is done; what stands in the place of a program must be one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f'--output-dir {folder} cannot be written: {error.strerror}; name another.') from None
    for target in (folder / name_program(source, job) for job in jobs):
        report = Path(f'{target}.json')
        if target.is_symlink() or target.exists() and not report.is_file():
            raise ConfigError(f'{target} is there and was not exported: move it away, or name another --output-dir.')


def name_program(source: Source, job: Job) -> str:
    """The name of the file of a job: what is not the default is part of it."""
    parts = [source.name]
    if job.size != source.size:
        parts.append('x'.join(str(side) for side in job.size))
    if job.batch != 1:
        parts.append(f'b{job.batch}')
    if job.precision != job.kind.precisions[0]:
        parts.append(job.precision)
    if job.compress != 'none':
        parts.append(job.compress)
    if job.unfused:
        parts.append('unfused')
    parts += [value for value, usual in [
        (job.input, job.kind.inputs[0]), (job.output, job.kind.outputs[0]), (job.target, TARGET)] if value != usual]
    return '-'.join(parts) + job.kind.suffix


def _measure_size(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob('*') if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2 ** 20


def _replace(new: Path, target: Path) -> None:
    """Put a finished file or folder into its place; what was there goes, and comes back if that fails."""
    old = new.with_name('old-' + new.name)
    if target.exists():
        target.replace(old)
    try:
        new.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise


def _time(source: Source, job: Job, program: Program) -> dict[str, Any]:
    """Milliseconds of a program and of the network as trained, eager, interleaved in one process."""
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
    own = compare_rounds(times['eager'], times['eager again'])['ratio']
    summary = summarise(times['program'])
    return dict(
        summary, **compare_rounds(times['eager'], times['program']), threads=torch.get_num_threads(), batch=job.batch,
        eager_ms=summarise(times['eager'])['median_ms'], noise=judge_noise(summary, own))


def _make(source: Source, job: Job, cases: Cases, config: ExportConfig, progress: Progress, new: Path) -> Export:
    """Write a program to `new`, read it back, and prove it."""
    result = Export(job, new)
    module = job.kind.load_module()
    start = time.perf_counter()
    with redirect_stdout(sys.stderr):  # remarks of the converters
        result.notes += module.write(source, job, new)
        result.seconds, result.mib = time.perf_counter() - start, _measure_size(new)
        result.program = module.read(source, job, new)
    result.notes += result.program.notes
    result.verification = verify(source, job, result.program, cases, new.name, progress.update)
    if job.format in COREML and is_available():
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
    folder = config.get_folder()
    target = folder / name_program(source, job)
    before = progress.count
    progress.describe(str(job))
    with tempfile.TemporaryDirectory(prefix='.unfinished-', dir=folder) as unfinished:
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


def _check_channels(source: Source, jobs: Sequence[Job]) -> None:
    channels = source.eval_config['input_size'][0]
    if channels != 3 and any(job.input == 'image' for job in jobs):
        raise ConfigError(
            f'--input image: {source.name} takes {channels} channels, an RGB image has 3. Take --input tensor.')


def _list_versions(jobs: Sequence[Job]) -> dict[str, str]:
    """Of PyTorch, and of what writes and runs the programs."""
    found = list_versions(['timm', 'numpy'])
    for job in jobs:
        found.update(formats.list_versions(job.kind, job.precision))
    return found


def _drop_infinite(value: Any) -> Any:
    """Plain values with None in the place of numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _drop_infinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_drop_infinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_report(facts: dict[str, Any], item: Export) -> None:
    """As JSON beside a program that was kept."""
    if not item.failure:
        report = json.dumps({**facts, **item.to_dict()}, indent=2, allow_nan=False)
        Path(f'{item.path}.json').write_text(report + '\n')


def export(config: ExportConfig, stream: TextIO | None = None) -> tuple[dict[str, Any], list[Export]]:
    """Write and prove all programs of a config; what fails leaves nothing behind, and the others go on.

    Args:
        stream: Where progress is shown; stdout if not given.
    Returns:
        What is true of all of them (model, weights, sha256, data, device, versions, least_attention_mass), and what
        was made of each job. A report of each program, as JSON, is written beside it.
    Raises:
        CheckpointError, ConfigError, DataError: Something cannot work, found before anything was written.
    """
    source = load_source(config)
    jobs = config.list_jobs(source.size)
    _check_channels(source, jobs)
    _check_folder(config.get_folder(), source, jobs)
    with use_threads(config.threads):
        _logger.info('Computing what %s makes of the photographs in float64.', source.name)
        cases = load_cases(source, jobs[0].size, config.data, config.images)
        source.accuracy = cases.describe_accuracy()
        facts = dict(
            model=source.name, weights=source.checkpoint or 'random', sha256=source.sha256, data=cases.name,
            device=describe_device(torch.device('cpu')), versions=_list_versions(jobs),
            least_attention_mass=cases.least_mass)
        exports = []
        with Progress(len(cases) * len(jobs), 'images', stream=stream) as progress:
            for job in jobs:
                exports.append(_export_job(source, job, cases, config, progress))
                _write_report(facts, exports[-1])
    return facts, exports
