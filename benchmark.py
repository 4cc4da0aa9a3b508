"""Measure models: python benchmark.py --model care_s1 [flags]. Prints parameters, GMACs, latency and memory."""
import json
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # before torch is loaded: its profiler counts memory here, silently

try:
    import caretrans  # noqa: E402, F401 (registers the models)
except ModuleNotFoundError as error:
    print(f'benchmark.py: {error}: take .venv/bin/python, which bash cmd/benchmark.sh makes.', file=sys.stderr)
    sys.exit(2)
from caretrans.bench.config import BenchConfig, parse_bench_config  # noqa: E402
from caretrans.bench.readme import check_readme, find_place, update_readme  # noqa: E402
from caretrans.bench.report import check_folder, describe_result, list_contents, write_result  # noqa: E402
from caretrans.bench.sections import run_benches  # noqa: E402
from caretrans.errors import CheckpointError  # noqa: E402
from caretrans.errors import ConfigError  # noqa: E402
from caretrans.errors import DataError  # noqa: E402
from caretrans.progress import show_messages  # noqa: E402


def check(config: BenchConfig) -> int:
    """Compare the README with what is counted: 1 if a figure differs."""
    number, differences = check_readme(Path(config.readme))
    for difference in differences:
        print(f'benchmark.py: {config.readme}: {difference}', file=sys.stderr)
    if not differences:
        print(f'{config.readme}: {number} figures are as counted')
    return int(bool(differences))


def check_places(config: BenchConfig) -> None:
    """Refuse what cannot be written to before hours of measuring."""
    check_folder(config.output or 'runs/benchmark', '--output')
    if config.plots:
        check_folder(config.plots, '--plots')
    if config.update:
        find_place(Path(config.readme))


def measure(config: BenchConfig) -> int:
    """Measure, print and write: 1 if something failed."""
    check_places(config)
    result = run_benches(config, sys.stderr if config.json else None)
    try:
        folder = write_result(result, config)
    finally:  # what was measured is shown where it cannot be written, too
        contents = json.dumps(list_contents(result), indent=2)
        print(contents if config.json else '\n'.join(describe_result(result, config.markdown)))
    if not config.json:
        tables = ', '.join(sorted(path.name for path in folder.glob('*.csv')))
        print(f'written to {folder}: results.json, {tables}')
    if config.update:
        update_readme(Path(config.readme), describe_result(result, markdown=True))
    for failure in result.failures:
        print(f'benchmark.py: failed: {failure}', file=sys.stderr)
    return int(bool(result.failures))


def main() -> int:
    show_messages()
    logging.getLogger('torch').setLevel(logging.ERROR)  # compiling warns of what a processor does not need
    try:
        config = parse_bench_config(description=__doc__)
        return check(config) if config.check else measure(config)
    except (ConfigError, CheckpointError, DataError) as error:
        print(f'benchmark.py: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
