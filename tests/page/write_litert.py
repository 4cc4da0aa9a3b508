"""Write tests/data/page: a small network, its program for LiteRT, and what the export said of it.

    python tests/page/write_litert.py

The converter is not in the environment of the tests, so the program is kept in the repository.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(Path(__file__).parent)]

import torch  # noqa: E402
from checkpoints import TINY  # noqa: E402
from pages import LITERT_CHECKPOINT, LITERT_DATA, write_checkpoint  # noqa: E402


def main() -> None:
    LITERT_DATA.mkdir(exist_ok=True)
    torch.manual_seed(0)
    write_checkpoint(LITERT_CHECKPOINT, **TINY['care_s0'])
    folder = ROOT / 'runs' / 'litert'
    done = subprocess.run(
        ['bash', str(ROOT / 'cmd' / 'export.sh'), '--checkpoint', str(LITERT_CHECKPOINT), '--format', 'litert',
         '--images', '14', '--no-latency', '--output-dir', str(folder), '--json'],
        check=True, stdout=subprocess.PIPE)
    item = json.loads(done.stdout)['programs'][0]
    kept = dict(form=item['form'], verification={name: item['verification'][name] for name in ('largest', 'max_error')})
    (LITERT_DATA / 'export.json').write_text(json.dumps(kept) + '\n', encoding='utf-8')
    shutil.copy(folder / 'care_s0.tflite', LITERT_DATA / 'tiny.tflite')


if __name__ == '__main__':
    main()
