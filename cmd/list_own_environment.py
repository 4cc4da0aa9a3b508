"""Print the formats of --format that need the environment of coreml/requirements.txt, if any."""
import argparse
import importlib.util
from pathlib import Path

TABLE = Path(__file__).parent.parent / 'caretrans' / 'export' / 'formats' / 'table.py'


def list_own(argv=None) -> list[str]:
    """Names of these formats; reads the table without importing the package, whose dependencies may be missing."""
    spec = importlib.util.spec_from_file_location('table', TABLE)
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--format', nargs='*', default=[])
    asked = parser.parse_known_args(argv)[0].format
    return [name for name in asked if name in table.FORMATS and table.FORMATS[name].own_environment]


if __name__ == '__main__':
    print(' '.join(list_own()))
