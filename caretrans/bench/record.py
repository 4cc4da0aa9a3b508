"""The record of one measurement, and the result that collects all records of a benchmark.

    record = Record(model='care_s1', bench='infer', backend='fused', batch=1, height=224, width=224, median_ms=12.3)
    record.to_dict()   # for JSON: the columns of its bench, in order
    record.to_row()    # for CSV: the same as plain text and numbers
"""
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ..measure.published import PublishedRow

__all__ = ['COLUMNS', 'BenchResult', 'ModelCounts', 'Record', 'flatten']

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


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Values for a CSV file: lists as text, dictionaries as JSON."""
    return {key: '; '.join(value) if isinstance(value, list) else json.dumps(value) if isinstance(value, dict)
            else value for key, value in values.items()}


@dataclass
class Record:
    """One measurement. A field is None if it was not measured, or does not apply to the bench.

    Attributes:
        model: Name of the model in timm.
        bench: One of `COLUMNS`.
        backend, device, dtype, layout, kernels, threads: How the model was run.
        batch, height, width: Shape of the images, (batch, channels, height, width).
        warmup, runs: Number of runs before timing, and of timed or profiled runs.
        median_ms, p10_ms, p90_ms, mean_ms: Milliseconds of one run.
        images_per_s: Throughput at the median.
        peak_mib: Peak memory in MiB; None where it cannot be measured.
        ratio, ratio_p10, ratio_p90: Speed-up over the reference: median and percentiles over the rounds.
        reference: Name of the candidate that the ratios refer to.
        noisy: Whether the runs varied too much to be relied on.
        error: Relative error of the output (of the first training step) against the float64 reference.
        versions: Versions of the libraries.
        notes: What a reader of the figures must know.
        way, teacher: Training mode ('published', 'bf16+compile', ...) and teacher model or 'none'.
        attention: 'linear' or 'softmax', in records of growth with resolution.
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

    def to_dict(self) -> dict[str, Any]:
        """The columns of its bench, in order, for JSON."""
        return {name: getattr(self, name) for name in COLUMNS[self.bench]}

    def to_row(self) -> dict[str, Any]:
        """The columns of its bench, in order, for CSV."""
        return flatten(self.to_dict())


@dataclass
class ModelCounts:
    """Machine-independent counts of a model at one image size, beside what its authors published.

    Attributes:
        parameters, parameters_one_head, parameters_fused: With both heads, without the distillation head, fused.
        gmacs, gmacs_fused: Billions of multiply-adds of one image, original and fused.
        gmacs_by_kind: Of the original model, {kind of operation: GMACs}.
        gmacs_by_part: Of the original model, {part: {kind: GMACs}}.
        activations_m, activations_fused_m: Millions of elements of the outputs of these operations.
        published: What the authors report, None if nothing is known.
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
        """All fields in order, for JSON."""
        return dataclasses.asdict(self)

    def to_row(self) -> dict[str, Any]:
        """All fields in order, for CSV."""
        return flatten(self.to_dict())


@dataclass
class BenchResult:
    """Everything that one call of `benchmark.py` measured.

    Attributes:
        device: Description of the device.
        counts: Counts of each model and image size.
        records, training, accuracy: Records of the benches 'infer', 'train' and 'accuracy'.
        profiles: {title: records of the bench 'profile'}.
        texts: Tables of profiles, training and accuracy, ready to print.
        plots: Files that were drawn.
        remarks: What was skipped and other conditions, a line each.
        failures: What failed, a line each.
    """
    device: str
    counts: list[ModelCounts] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    training: list[Record] = field(default_factory=list)
    accuracy: list[Record] = field(default_factory=list)
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
            training=convert(self.training), accuracy=convert(self.accuracy),
            profiles={title: convert(rows) for title, rows in self.profiles.items()}, texts=self.texts,
            plots=self.plots, remarks=self.remarks, failures=self.failures)
