"""What an export says to people."""
from typing import Any, Dict, Iterator, Sequence

from ..bench.tables import format_table
from .run import Export

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
        f'{result.max_error:.2g}', f'{result.mean_error:.2g}', f'{result.top1_agreement:.2f}',
        f'{result.top5_agreement:.2f}', '-' if result.top1 is None else f'{result.top1:.2f}',
        '-' if latency is None else f'{latency["median_ms"]:.3g}',
        '-' if latency is None else f'{latency["ratio"]:.2f}' + ' (noisy)' * bool(latency['noise'])]


HEADER = [
    'format', 'MiB', 'operations', 'reshapes + transposes', 'max error', 'mean error', 'same first answer %',
    'first five shared %', 'top-1 %', 'ms', 'times as fast']


def _describe_details(item: Export) -> Iterator[str]:
    program = item.program
    yield f'{item.path}: computed by {program.runner}'
    if program.operations:
        counts = sorted(program.operations.items(), key=lambda pair: -pair[1])
        yield '  operations: ' + ', '.join(f'{count} {name}' for name, count in counts)
    yield f'  each reshape and transpose is listed in {item.path}.json'
    for line in () if item.core_ml is None else item.core_ml.describe():
        yield f'  {line}'
    for line in [*item.verification.findings, *item.notes, *(item.latency or {}).get('noise', ())]:
        yield f'  {line}'


def describe_exports(facts: Dict[str, Any], exports: Sequence[Export]) -> Iterator[str]:
    """Lines about what `run.export` returns: a table, then the details of each program."""
    digest = f' (SHA-256 {facts["sha256"]})' if facts['sha256'] else ''
    yield f'{facts["model"]}, weights: {facts["weights"]}{digest}'
    done = [item for item in exports if not item.failure]
    if done:
        largest = max(item.verification.largest for item in done)
        yield (f'compared with the network as trained, in float64, on {facts["data"]}; largest output {largest:.3g}; '
               f'times: {facts["device"]}, beside eager float32 in the same run')
        if facts['least_attention_mass'] is not None:
            yield (f'least denominator of the attention: {facts["least_attention_mass"]:.2g}; Core ML programs leave '
                   f'out an eps of 1e-6 beside it')
        yield ''
        yield from format_table(HEADER, [_make_row(item) for item in done])
        yield ''
        for item in done:
            yield from _describe_details(item)
