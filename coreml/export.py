"""Export a network to Core ML and other runtimes, and verify that the programs compute what PyTorch computes.

    python coreml/export.py --model care_s1 --checkpoint CARETrans_S1.pth.tar
    python coreml/export.py --checkpoint runs/NAME/best.pth.tar --format mlpackage onnx --precision fp32
"""
import json
import logging
import signal
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from caretrans.errors import run_command  # noqa: E402
from caretrans.export.config import ExportConfig  # noqa: E402
from caretrans.export.report import describe_exports  # noqa: E402
from caretrans.export.run import export  # noqa: E402
from caretrans.flags import parse_flags  # noqa: E402
from caretrans.progress import show_messages  # noqa: E402


def main() -> int:
    show_messages()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, which removes temporary files
    logging.getLogger('torch').setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module='torch|coremltools')
    config = parse_flags(ExportConfig, description=__doc__.splitlines()[0])
    facts, exports = export(config, sys.stderr if config.json else None)
    if config.json:
        print(json.dumps({**vars(facts), 'programs': [item.to_dict() for item in exports]}, indent=2, allow_nan=False))
    else:
        print('\n'.join(describe_exports(facts, exports)))
    for item in exports:
        if item.failure:
            print(f'export.py: failed: {item.failure}', file=sys.stderr)
    return int(any(item.failure for item in exports))


if __name__ == '__main__':
    sys.exit(run_command('export.py', main))
