"""Check that this Python satisfies a requirements file: exit code 0, or 1 after printing the missing packages."""
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def find_missing(requirements: str) -> list:
    """Lines of a requirements file that the running Python does not satisfy."""
    lines = [line.split('#')[0].strip() for line in requirements.splitlines()]
    lines = [line for line in lines if line]
    try:
        from packaging.requirements import Requirement  # a dependency of timm's dependencies
    except ImportError:
        return lines
    missing = []
    for line in lines:
        requirement = Requirement(line)
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                missing.append(line)
        except PackageNotFoundError:
            missing.append(line)
    return missing


if __name__ == '__main__':
    missing = find_missing(Path(sys.argv[1]).read_text(encoding='utf-8'))
    if sys.version_info < (3, 10):
        missing.append('python>=3.10')
    if missing:
        print(' '.join(missing))
    sys.exit(bool(missing))
