"""Commands of the repository in one process, which starts with HF_ENDPOINT set; huggingface_hub reads it when imported.

    HF_ENDPOINT=... python tests/checkpoint/hub_commands.py < commands.json    # prints [[code, stdout, stderr], ...]
"""
import contextlib
import io
import json
import logging
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, *flags: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script, or of a module after '-m'."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    logging.root.handlers.clear()  # they write to the stream of the command before
    sys.argv = [script, *flags]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if script == '-m':
                sys.argv = list(flags)
                runpy.run_module(flags[0], run_name='__main__', alter_sys=True)
            else:
                runpy.run_path(str(ROOT / script), run_name='__main__')
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    import torch
    torch.set_num_threads(1)
    print(json.dumps([run(*command) for command in json.load(sys.stdin)]))
