"""Measure models: python benchmark.py --model care_s1 [flags]. Prints parameters, GMACs, latency and memory."""
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # before torch is imported: its profiler measures memory here, quietly

try:
    import caretrans  # noqa: E402, F401 (registers the models)
except ModuleNotFoundError as error:
    print(f'benchmark.py: {error}', file=sys.stderr)
    sys.exit(2)
from caretrans.bench.config import BenchConfig, parse_bench_config  # noqa: E402
from caretrans.bench.readme import PAGE, README, RESULTS, check_readme, write_page  # noqa: E402
from caretrans.bench.report import check_folder, check_page, describe_result, write_result  # noqa: E402
from caretrans.bench.run import run_benches  # noqa: E402
from caretrans.errors import run_command  # noqa: E402
from caretrans.progress import show_messages  # noqa: E402
from caretrans.strict_json import replace_non_finite, to_json  # noqa: E402


def check(config: BenchConfig) -> int:
    """Compare the figures in the pages with new counts; return 1 if one differs."""
    code = 0
    for page in [Path(config.readme)] if config.readme else [README, PAGE]:
        number, differences = check_readme(page)
        for difference in differences:
            print(f'benchmark.py: {page}: {difference}', file=sys.stderr)
            code = 1
        if not differences:
            print(f'{page}: {number} figures match the counts')
    return code


def measure(config: BenchConfig) -> int:
    """Measure, print and write the results; return 1 if something failed."""
    page = Path(config.readme or PAGE)
    check_folder(config.output or 'runs/benchmark', '--output')  # before hours of measuring
    if config.plots:
        check_folder(str(Path(config.plots).parent) if config.plots_file else config.plots, '--plots')
    if config.update:
        check_page(page, RESULTS, '--readme' if config.readme else '--update')
    result = run_benches(config, sys.stderr if config.json else None)
    try:
        folder = write_result(result, config)
    finally:  # the results are printed even if they cannot be written
        contents = to_json(replace_non_finite(result.to_dict()), indent=2)
        print(contents if config.json else '\n'.join(describe_result(result, config.markdown)))
    if not config.json:
        tables = ', '.join(sorted(path.name for path in folder.glob('*.csv')))
        print(f'written to {folder}: results.json, {tables}')
    if config.update:
        write_page(page, describe_result(result, markdown=True))
    for failure in result.failures:
        print(f'benchmark.py: failed: {failure}', file=sys.stderr)
    return int(bool(result.failures))


def main() -> int:
    def run() -> int:
        config = parse_bench_config(description=__doc__)
        return check(config) if config.check else measure(config)

    show_messages()
    logging.getLogger('torch').setLevel(logging.ERROR)  # hides compiler warnings that do not apply to CPUs
    return run_command('benchmark.py', run)


if __name__ == '__main__':
    sys.exit(main())
