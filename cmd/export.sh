#!/usr/bin/env bash
# Export a network to Core ML (or --format onnx, openvino, torch, ...) and prove what was written.
#   bash cmd/export.sh --model care_s1 --checkpoint CARETrans_S1.pth.tar
#   bash cmd/export.sh --checkpoint runs/NAME/best.pth.tar --format mlpackage mlmodel onnx
# The converters of ExecuTorch, LiteRT and Core AI clash with the environment of training and get one of their own,
# .venv-export, made at their first use.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/python.sh"
own="$("$python" "$here/list_own_environment.py" "$@")"
if [ -n "$own" ]; then
    echo "--format $own: its packages clash with those of training (why: coreml/requirements.txt); it runs in an" \
        "environment that has them, .venv-export if the active one does not." >&2
    requirements_file=coreml/requirements.txt
    environment_folder=.venv-export
fi
source "$here/env.sh"
exec "$python" "$root/coreml/export.py" "$@"
