"""What an export says to people."""
from collections.abc import Iterator, Sequence
from typing import Any

from ..measure.tables import format_table
from ..models.attention import EPS
from .run import Export
from .verify import Verification

__all__ = ['describe_exports']


def _count_shape_changes(item: Export) -> str:
    """Reshapes and transposes that are left, as 'a + b'."""
    lines = item.program.shape_changes
    transposes = sum('transpose' in line.lower() or 'permute' in line.lower() for line in lines)
    return f'{len(lines) - transposes} + {transposes}'


def _make_row(item: Export) -> list:
    program, result, latency = item.program, item.verification, item.latency
    return [
        str(item.job), f'{item.mib:.1f}', str(sum(program.operations.values()) or '-'),
        _count_shape_changes(item) if program.operations else '-',
        result.compared, f'{result.max_error:.2g}', f'{result.mean_error:.2g}', f'{result.top1_agreement:.2f}',
        f'{result.top5_agreement:.2f}', '-' if result.top1 is None else f'{result.top1:.2f}',
        '-' if latency is None else f'{latency["median_ms"]:.3g}',
        '-' if latency is None else f'{latency["ratio"]:.2f}' + ' (noisy)' * bool(latency['noise'])]


MOST = 6  # findings that are shown
HEADER = [
    'format', 'MiB', 'operations', 'reshapes + transposes', 'of', 'max error', 'mean error', 'same first answer %',
    'first five shared %', 'top-1 %', 'ms', 'times as fast']


def _describe_rounding(result: Verification) -> Iterator[str]:
    if result.exact_error is not None:
        yield f'  without rounding, error of the logits relative to the largest: {result.exact_error:.1e}'
    if result.flushed_error is not None:
        yield f'  where subnormal numbers are taken for 0, largest error of the logits: {result.flushed_error:.2g}'


def _describe_details(item: Export) -> Iterator[str]:
    program = item.program
    yield f'{item.path}: computed by {program.runner}'
    if program.operations:
        counts = sorted(program.operations.items(), key=lambda pair: -pair[1])
        yield '  operations: ' + ', '.join(f'{count} {name}' for name, count in counts)
    yield f'  each reshape and transpose is listed in {item.path}.json'
    for line in () if item.core_ml is None else item.core_ml.describe():
        yield f'  {line}'
    yield from _describe_rounding(item.verification)
    findings = item.verification.findings
    for line in [*findings[:MOST], *item.notes, *(item.latency or {}).get('noise', ())]:
        yield f'  {line}'
    if len(findings) > MOST:
        yield f'  and {len(findings) - MOST} lines more in {item.path}.json'


def _describe_departure(least: float | None) -> Iterator[str]:
    if least is not None:
        share = EPS / least
        warning = 'WARNING: that may matter. ' if share > 1e-3 else ''
        yield (f'{warning}The form for phones leaves out an eps of {EPS:g} in the denominator of the attention, which '
               f'is {least:.2g} at least on these photographs: up to {100 * share:.2g} % of an output of the attention')


def describe_exports(facts: dict[str, Any], exports: Sequence[Export]) -> Iterator[str]:
    """Lines about what `run.export` returns: a table, then the details of each program."""
    digest = f' (SHA-256 {facts["sha256"]})' if facts['sha256'] else ''
    yield f'{facts["model"]}, weights: {facts["weights"]}{digest}'
    done = [item for item in exports if not item.failure]
    if done:
        largest = max(item.verification.largest for item in done)
        yield (f'compared with the network as trained, in float64, on {facts["data"]}; largest output {largest:.3g}; '
               f'times: {facts["device"]}, beside eager float32 in the same run')
        if any(item.job.get_form() == 'phone' for item in done):
            yield from _describe_departure(facts['least_attention_mass'])
        yield ''
        yield from format_table(HEADER, [_make_row(item) for item in done])
        yield ''
        for item in done:
            yield from _describe_details(item)
