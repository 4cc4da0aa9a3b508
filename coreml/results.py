"""Check coreml/results.csv and print it as a table: python coreml/results.py [FILE]."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from caretrans.errors import ResultsError  # noqa: E402
from caretrans.export.phone_results import describe_results, read_results  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'file', nargs='?', type=Path, default=Path(__file__).with_name('results.csv'), metavar='FILE')
    file = parser.parse_args().file
    try:
        rows = read_results(file)
    except ResultsError as error:
        print(f'results.py: {error}', file=sys.stderr)
        return 2
    print('\n'.join(describe_results(rows)) if rows else f'{file}: no rows yet')
    return 0


if __name__ == '__main__':
    sys.exit(main())
