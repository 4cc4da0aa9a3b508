"""Measure a Core ML program on this Mac or on a connected iPhone or iPad, and print its row for results.csv.

    python coreml/measure.py care_s1.mlpackage --device-model 'MacBook Air (M2)' --reporter NAME
    python coreml/measure.py care_s1.mlpackage --phone --team TEAM --device-model 'iPhone 15 Pro' --reporter NAME

Untested: needs macOS, and Xcode for a phone. See coreml/README.md.
"""
import argparse
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from caretrans.export import apple  # noqa: E402
from caretrans.export.config import Job  # noqa: E402
from caretrans.export.coreml import read_facts  # noqa: E402
from caretrans.errors import ResultsError  # noqa: E402
from caretrans.export.phone_results import format_row, make_row  # noqa: E402
from caretrans.errors import ExportError  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('program', type=Path, help='.mlpackage or .mlmodel of coreml/export.py')
    parser.add_argument('--units', choices=list(apple.UNITS), default='all', help='what it may run on')
    parser.add_argument('--runs', type=int, default=apple.RUNS, help='timed predictions')
    parser.add_argument('--warm-up', type=int, default=apple.WARM_UP, help='predictions before them')
    parser.add_argument('--phone', action='store_true', help='on a connected iPhone or iPad, not on this Mac')
    parser.add_argument('--device-name', default='', help='of the phone in its settings, where several are connected')
    parser.add_argument('--team', default='', help="Apple's identifier of your development team")
    parser.add_argument('--bundle', help='bundle identifier for the app that is installed, e.g. com.example.runner')
    parser.add_argument('--device-model', required=True, help="Apple's name of the device, e.g. iPhone 15 Pro")
    parser.add_argument('--reporter', required=True, help='who measures')
    return parser.parse_args()


def measure(args: argparse.Namespace, facts: dict[str, str]) -> list[str]:
    """Lines: where operations run (on this Mac), the latency, the row."""
    height, width = (int(side) for side in facts['size'].split('x'))
    job = Job(facts['format'], facts['precision'], facts['input'], facts['output'], (height, width),
              batch=int(facts['batch']))
    shape = job.batch, int(facts['channels']), height, width
    images = torch.randint(256, shape).float() if job.input == 'image' else torch.randn(shape)
    settings = dict(units=args.units, runs=args.runs, warm_up=args.warm_up)
    device = apple.find_device(args.device_name) if args.phone else None
    system = f'macOS {platform.mac_ver()[0]}' if device is None else \
        f'{"iPadOS" if device.type.value == "ipad" else "iOS"} {device.os_version}'
    row = make_row(facts, dict(
        date=date.today().isoformat(), reporter=args.reporter, device=args.device_model, os=system, tool='coremltools',
        tool_version=version('coremltools'), compute_units=args.units, statistic='median', runs=str(args.runs),
        warm_up=str(args.warm_up)))
    format_row(dict(row, latency_ms='1'))  # what was typed is checked before it is measured
    if device is None:
        latency = apple.measure_latency(args.program, job, images, **settings)
        lines = apple.describe_placements(apple.list_placements(args.program, args.units))
    else:
        latency = apple.measure_on_device(args.program, job, images, device, args.team, args.bundle, **settings)
        lines = []
    measured = dict(latency_ms=f'{latency.median:.3f}', load_ms=f'{latency.load:.1f}')
    return [*lines, str(latency), format_row({**row, **measured})]


def main() -> int:
    args = parse()
    try:
        print('\n'.join(measure(args, read_facts(args.program))))
    except (ExportError, ResultsError) as error:
        print(f'measure.py: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
