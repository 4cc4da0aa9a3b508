"""Print those of the formats asked for by --format that need the environment of coreml/requirements.txt, if any."""
import argparse
import importlib.util
from pathlib import Path

FORMATS = Path(__file__).parent.parent / 'caretrans' / 'export' / 'formats.py'


def list_own(argv=None) -> list:
    """Their names; read from the package's table without the package, which this Python may lack the libraries of."""
    spec = importlib.util.spec_from_file_location('formats', FORMATS)
    formats = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formats)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--format', nargs='*', default=[])
    asked = parser.parse_known_args(argv)[0].format
    return [name for name in asked if name in formats.FORMATS and formats.FORMATS[name].own_environment]


if __name__ == '__main__':
    print(' '.join(list_own()))
