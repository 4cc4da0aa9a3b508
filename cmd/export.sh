#!/usr/bin/env bash
# Export a network to Core ML (or --format onnx, openvino, torch, ...) and verify the result.
#   bash cmd/export.sh --model care_s1 --checkpoint CARETrans_S1.pth.tar
#   bash cmd/export.sh --model care_s1 --pretrained
#   bash cmd/export.sh --checkpoint runs/NAME/best.pth.tar --format mlpackage mlmodel onnx
# The converters of ExecuTorch, LiteRT and Core AI conflict with the training environment and get a separate
# one, .venv-export, created on first use.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/python.sh"
own="$("$python" "$here/list_own_environment.py" "$@")"
if [ -n "$own" ]; then
    echo "--format $own: its packages conflict with those of training (see coreml/requirements.txt); it runs in a" \
        "separate environment, .venv-export, unless the active one has them." >&2
    requirements_file=coreml/requirements.txt
    environment_folder=.venv-export
fi
source "$here/env.sh"
exec "$python" "$root/coreml/export.py" "$@"
