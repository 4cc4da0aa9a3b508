#!/usr/bin/env bash
# Export a network to Core ML (or --format onnx, openvino, torch, ...) and verify the result.
#   bash cmd/export.sh --model care_s1 --checkpoint CARETrans_S1.pth.tar
#   bash cmd/export.sh --checkpoint runs/NAME/best.pth.tar --format mlpackage mlmodel onnx
# The converters of ExecuTorch, LiteRT and Core AI clash with the environment of training and get their own,
# .venv-export, made at the first use.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/python.sh"
own="$("$python" "$here/list_own_environment.py" "$@")"
if [ -n "$own" ]; then
    echo "--format $own: its packages clash with those of training (why: coreml/requirements.txt); it runs in an" \
        "environment that has them: .venv-export, unless the active one does." >&2
    requirements_file=coreml/requirements.txt
    environment_folder=.venv-export
fi
source "$here/env.sh"
exec "$python" "$root/coreml/export.py" "$@"
