"""Check coreml/results.csv and print it as a table: python coreml/results.py [FILE]."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from caretrans.errors import run_command  # noqa: E402
from caretrans.export.coreml.phone_results import describe_results, read_results  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', nargs='?', type=Path, default=Path(__file__).with_name('results.csv'), metavar='FILE')
    file = parser.parse_args().file
    rows = read_results(file)
    print('\n'.join(describe_results(rows)) if rows else f'{file}: no rows yet')
    return 0


if __name__ == '__main__':
    sys.exit(run_command('results.py', main))
