"""Report of an export, for people."""
from collections.abc import Iterator, Sequence

from ..measure.tables import format_table
from .run import Export, Facts

__all__ = ['describe_exports']

MOST = 6  # findings that are shown
HEADER = [
    'format', 'MiB', 'operations', 'reshapes + transposes', 'of', 'max error', 'mean error', 'same top-1 %',
    'top-5 overlap %', 'top-1 %', 'ms', 'speed-up']


def _make_row(item: Export) -> list[str]:
    program, result, latency = item.program, item.verification, item.latency
    transposes = sum('transpose' in line.lower() or 'permute' in line.lower() for line in program.shape_changes)
    return [
        str(item.job), f'{item.mib:.1f}', str(sum(program.operations.values()) or '-'),
        f'{len(program.shape_changes) - transposes} + {transposes}' if program.operations else '-',
        result.compared, f'{result.max_error:.2g}', f'{result.mean_error:.2g}', f'{result.top1_agreement:.2f}',
        *('-' if share is None else f'{share:.2f}' for share in (result.top5_agreement, result.top1)),
        '-' if latency is None else f'{latency.median_ms:.3g}',
        '-' if latency is None else f'{latency.ratio:.2f}' + ' (noisy)' * bool(latency.noise)]


def _describe_details(item: Export) -> Iterator[str]:
    program, result = item.program, item.verification
    yield f'{item.path}: computed by {program.runner}'
    if program.operations:
        counts = sorted(program.operations.items(), key=lambda pair: -pair[1])
        yield '  operations: ' + ', '.join(f'{count} {name}' for name, count in counts)
    yield f'  each reshape and transpose is listed in {item.path}.json'
    for line in () if item.core_ml is None else item.core_ml.describe():
        yield f'  {line}'
    if result.exact_error is not None:
        yield f'  without rounding, error of the logits relative to the largest: {result.exact_error:.1e}'
    if result.flushed_error is not None:
        yield f'  with subnormal numbers flushed to 0, largest error of the logits: {result.flushed_error:.2g}'
    for line in [*result.findings[:MOST], *item.notes, *(item.latency.noise if item.latency else ())]:
        yield f'  {line}'
    if len(result.findings) > MOST:
        yield f'  and {len(result.findings) - MOST} more lines in {item.path}.json'


def describe_exports(facts: Facts, exports: Sequence[Export]) -> Iterator[str]:
    """Lines about the results of `run.export`: a table, then the details of each program."""
    digest = f' (SHA-256 {facts.sha256})' if facts.sha256 else ''
    yield f'{facts.model}, weights: {facts.weights}{digest}'
    done = [item for item in exports if not item.failure]
    if not done:
        return
    largest = max(item.verification.largest for item in done)
    yield (f'compared with the original network in float64 on {facts.data}; largest output {largest:.3g}; times: '
           f'{facts.device}; speed-up over eager float32 in the same run')
    yield ''
    yield from format_table(HEADER, [_make_row(item) for item in done])
    yield ''
    for item in done:
        yield from _describe_details(item)
