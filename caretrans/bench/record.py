"""The record of one measurement, and the result that collects all records of a benchmark.

    record = Record(model='care_s1', bench='infer', backend='fused', batch=1, height=224, width=224, median_ms=12.3)
    record.to_dict()   # the columns of its bench, in order, for JSON
    write_csv(path, [record.to_dict()])
"""
import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..measure.published import PublishedRow
from ..measure.timing import Rounds, compare_rounds, judge_noise, summarise
from ..text import open_text

__all__ = ['COLUMNS', 'BenchResult', 'DenseCost', 'ModelCounts', 'Record', 'shorten', 'write_csv']

_SETUP = ('device', 'dtype', 'layout', 'batch', 'height', 'width', 'threads')
_TIMES = ('median_ms', 'p10_ms', 'p90_ms', 'mean_ms')
_RATIOS = ('ratio', 'ratio_p10', 'ratio_p90')
COLUMNS: dict[str, tuple[str, ...]] = {  # bench: fields of its records, in the order of files
    'infer': (
        'model', 'bench', 'backend', *_SETUP, 'warmup', 'runs', *_TIMES, 'images_per_s', 'peak_mib', *_RATIOS,
        'reference', 'noisy', 'error', 'kernels', 'versions', 'notes'),
    'train': (
        'model', 'bench', 'way', 'teacher', 'backend', *_SETUP, 'warmup', 'runs', *_TIMES, 'images_per_s', *_RATIOS,
        'noisy', 'peak_mib', 'error', 'kernels', 'versions', 'notes'),
    'growth': (
        'model', 'bench', 'attention', 'backend', *_SETUP, 'warmup', 'runs', *_TIMES, *_RATIOS, 'images_per_s',
        'noisy', 'versions', 'notes'),
    'profile': (
        'model', 'backend', *_SETUP, 'kernels', 'bench', 'part', 'kind', 'ms', 'share', 'total_ms', 'profiled_ms',
        'runs'),
    'accuracy': (
        'model', 'bench', 'checkpoint', 'data', 'device', 'height', 'width', 'versions', 'backend', 'dtype', 'layout',
        'kernels', 'images', 'top1', 'top5', 'loss', 'top1_change', 'agreement'),
}


def shorten(error: BaseException) -> str:
    """An error as one line of at most 300 characters after its type, for notes and failures."""
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file: lists as text, dictionaries as JSON; no file without rows."""
    if not rows:
        return
    with open_text(path, 'w') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: '; '.join(value) if isinstance(value, list) else json.dumps(value) if isinstance(
                value, dict) else value for key, value in row.items()})


@dataclass
class Record:
    """One measurement. A field is None if it was not measured, or does not apply to the bench.

    Attributes:
        model: Name of the model in timm.
        bench: One of `COLUMNS`.
        backend, device, dtype, layout, kernels, threads: Setup of the model.
        batch, height, width: Shape of the images, (batch, channels, height, width).
        warmup, runs: Number of runs before timing, and of timed or profiled runs.
        median_ms, p10_ms, p90_ms, mean_ms: Milliseconds of one run.
        images_per_s: Throughput at the median.
        peak_mib: Peak memory in MiB; None where it cannot be measured.
        ratio, ratio_p10, ratio_p90: Speed-up over the reference: median and percentiles over the rounds.
        reference: Name of the candidate that the ratios refer to.
        noisy: True if the runs varied too much to be reliable.
        error: Relative error of the output (of the first training step) against the float64 reference.
        versions: Versions of the libraries.
        notes: Remarks on the figures, a line each.
        way, teacher: Training mode ('published', 'bf16+compile', ...) and teacher model or 'none'.
        attention: 'linear' or 'softmax', in measurements of latency by resolution.
        part, kind: Part of the network and kind of operation, in profiles.
        ms, share: Milliseconds of this part and kind, and their share of the total.
        total_ms, profiled_ms: Milliseconds of a whole call, without and with the profiler.
        checkpoint, data, images: File, data set and number of images of an evaluation.
        top1, top5, loss: Accuracy in percent and cross-entropy.
        top1_change, agreement: Against the original in float32: points of top-1, and percent of equal predictions.
    """
    model: str = ''
    bench: str = 'infer'
    backend: str = 'eager'
    device: str = ''
    dtype: str = 'float32'
    layout: str = 'nchw'
    kernels: str = 'torch'
    threads: int | None = None
    batch: int | None = None
    height: int | None = None
    width: int | None = None
    warmup: int | None = None
    runs: int | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    mean_ms: float | None = None
    images_per_s: float | None = None
    peak_mib: float | None = None
    ratio: float | None = None
    ratio_p10: float | None = None
    ratio_p90: float | None = None
    reference: str | None = None
    noisy: bool | None = None
    error: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    way: str | None = None
    teacher: str | None = None
    attention: str | None = None
    part: str | None = None
    kind: str | None = None
    ms: float | None = None
    share: float | None = None
    total_ms: float | None = None
    profiled_ms: float | None = None
    checkpoint: str | None = None
    data: str | None = None
    images: int | None = None
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    top1_change: float | None = None
    agreement: float | None = None

    def add_times(
            self, times: Rounds, reference: Rounds, reference_batch: int | None = None, self_ratio: float = 1.) -> None:
        """Fill in the milliseconds, images/s, the speed-up, the number of runs, and whether they are noisy, with notes.

        Args:
            times, reference: Seconds of each run, from `time_interleaved`.
            reference_batch: Images of a run of the reference; as many as here if None.
            self_ratio: Ratio between both timings of the candidate that was timed twice.
        """
        figures = summarise(times)
        noise = judge_noise(figures, self_ratio)
        figures.update(compare_rounds(reference, times, (reference_batch or self.batch, self.batch)))
        for name, value in figures.items():
            setattr(self, name, value)
        self.images_per_s = 1e3 * self.batch / self.median_ms
        self.runs, self.noisy, self.notes = sum(map(len, times)), bool(noise), self.notes + noise

    def to_dict(self) -> dict[str, Any]:
        """The columns of its bench, in order, for JSON and CSV; None for numbers that are not finite."""
        values = {name: getattr(self, name) for name in COLUMNS[self.bench]}
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in values.items()}


@dataclass
class ModelCounts:
    """Machine-independent counts of a model at one image size, and the figures that its authors published.

    Attributes:
        parameters, parameters_one_head, parameters_fused: With both heads, without the distillation head, fused.
        gmacs, gmacs_fused: Billions of multiply-adds of one image, original and fused.
        gmacs_by_kind: GMACs of the original model, {kind of operation: GMACs}.
        gmacs_by_part: GMACs of the original model, {part: {kind: GMACs}}.
        activations_m, activations_fused_m: Millions of elements of the outputs of these operations.
        published: Figures of the authors, None if unknown.
    """
    model: str
    height: int
    width: int
    parameters: int
    parameters_one_head: int
    parameters_fused: int
    gmacs: float
    gmacs_fused: float
    gmacs_by_kind: dict[str, float]
    gmacs_by_part: dict[str, dict[str, float]]
    activations_m: float
    activations_fused_m: float
    published: PublishedRow | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields in order, for JSON and CSV."""
        return dataclasses.asdict(self)


@dataclass
class DenseCost:
    """Cost of a detector or segmenter for one image. Times are None if they could not be measured.

    Attributes:
        model: Name of the backbone.
        parameters, parameters_backbone: Of the whole and of the backbone with its norms.
        gmacs, gmacs_backbone: Billions of multiply-adds.
        median_ms, p10_ms, p90_ms, mean_ms, runs, noisy, notes: As in `Record`.
    """
    task: str
    model: str
    num_classes: int
    height: int
    width: int
    parameters: int
    parameters_backbone: int
    gmacs: float
    gmacs_backbone: float
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    mean_ms: float | None = None
    runs: int | None = None
    noisy: bool | None = None
    device: str = ''
    threads: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_times(self, times: Rounds, self_ratio: float) -> None:
        """Fill in the milliseconds, the number of runs, and whether they are noisy; see `Record.add_times`."""
        figures = summarise(times)
        for name, value in figures.items():
            setattr(self, name, value)
        self.notes = judge_noise(figures, self_ratio)
        self.runs, self.noisy = sum(map(len, times)), bool(self.notes)

    def to_dict(self) -> dict[str, Any]:
        """All fields in order, for JSON and CSV."""
        return dataclasses.asdict(self)


@dataclass
class BenchResult:
    """Everything that one call of `benchmark.py` measured.

    Attributes:
        device: Description of the device.
        counts: Counts of each model and image size.
        records, training, accuracy: Records of the benches 'infer', 'train' and 'accuracy'.
        dense: Costs of the bench 'dense'.
        profiles: {title: records of the bench 'profile'}.
        texts: Tables of profiles, training, accuracy and dense costs, ready to print.
        plots: Files that were drawn.
        remarks: Skipped setups and other conditions, a line each.
        failures: Failures, a line each.
    """
    device: str
    counts: list[ModelCounts] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    training: list[Record] = field(default_factory=list)
    accuracy: list[Record] = field(default_factory=list)
    dense: list[DenseCost] = field(default_factory=list)
    profiles: dict[str, list[Record]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All records as plain values, for JSON."""
        def convert(values: list[Any]) -> list[Any]:
            return [value.to_dict() for value in values]

        return dict(
            device=self.device, counts=convert(self.counts), records=convert(self.records),
            training=convert(self.training), accuracy=convert(self.accuracy), dense=convert(self.dense),
            profiles={title: convert(rows) for title, rows in self.profiles.items()}, texts=self.texts,
            plots=self.plots, remarks=self.remarks, failures=self.failures)
