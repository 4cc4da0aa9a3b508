"""Measure a Core ML program on this Mac, and print its row for results.csv. Phones are measured with Xcode.

    python coreml/measure.py care_s1.mlpackage --device-model 'MacBook Air (M2)' --reporter NAME

Untested: needs macOS. See coreml/README.md.
"""
import argparse
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from caretrans.errors import run_command  # noqa: E402
from caretrans.export.config import Job  # noqa: E402
from caretrans.export.coreml import apple  # noqa: E402
from caretrans.export.coreml.convert import read_facts  # noqa: E402
from caretrans.export.phone_results import format_row, make_row  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('program', type=Path, help='.mlpackage or .mlmodel written by coreml/export.py')
    parser.add_argument('--units', choices=list(apple.UNITS), default='all', help='compute units to allow')
    parser.add_argument('--runs', type=int, default=apple.RUNS, help='timed predictions')
    parser.add_argument('--warm-up', type=int, default=apple.WARM_UP, help='warm-up predictions, not timed')
    parser.add_argument('--device-model', required=True, help="Apple's name for the Mac, e.g. MacBook Air (M2)")
    parser.add_argument('--reporter', required=True, help='your name')
    args = parser.parse_args()
    facts = read_facts(args.program)
    height, width = (int(side) for side in facts['size'].split('x'))
    job = Job(facts['format'], facts['precision'], facts['input'], facts['output'], (height, width),
              batch=int(facts['batch']))
    shape = job.batch, int(facts['channels']), height, width
    images = torch.randint(256, shape).float() if job.input == 'image' else torch.randn(shape)
    row = make_row(facts, dict(
        date=date.today().isoformat(), reporter=args.reporter, device=args.device_model,
        os=f'macOS {platform.mac_ver()[0]}', tool='coremltools', tool_version=version('coremltools'),
        compute_units=args.units, statistic='median', runs=str(args.runs), warm_up=str(args.warm_up)))
    format_row({**row, 'latency_ms': '1'})  # checks the flags before anything is measured
    latency = apple.measure_latency(args.program, job, images, args.units, args.warm_up, args.runs)
    measured = dict(latency_ms=f'{latency.median:.3f}', load_ms=f'{latency.load:.1f}')
    lines = apple.describe_placements(apple.list_placements(args.program, args.units))
    print('\n'.join([*lines, str(latency), format_row({**row, **measured})]))
    return 0


if __name__ == '__main__':
    sys.exit(run_command('measure.py', main))
