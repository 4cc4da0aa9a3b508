"""Exit 0 when this Python has everything in requirements.txt; otherwise print what is missing and exit 1."""
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def parse_version(text: str) -> tuple:
    return tuple(int(part) for part in re.findall(r'\d+', text.split('+')[0])[:3])


def find_missing(requirements: str) -> list:
    """The lines `name` or `name>=version` that the running Python does not satisfy."""
    missing = []
    for line in requirements.splitlines():
        line = line.split('#')[0].strip()
        if not line:
            continue
        name, _, least = line.partition('>=')
        try:
            if least and parse_version(version(name)) < parse_version(least):
                missing.append(line)
        except PackageNotFoundError:
            missing.append(line)
    return missing


if __name__ == '__main__':
    missing = find_missing((Path(__file__).parent.parent / 'requirements.txt').read_text())
    if sys.version_info < (3, 10):
        missing.append('python>=3.10')
    print(' '.join(missing) or 'complete')
    sys.exit(bool(missing))
