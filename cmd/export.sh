#!/usr/bin/env bash
# Export a network to Core ML (or --format onnx, openvino, torch, ...) and prove what was written.
#   bash cmd/export.sh --model care_s1 --checkpoint CARETrans_S1.pth.tar
#   bash cmd/export.sh --checkpoint runs/NAME/best.pth.tar --format mlpackage mlmodel onnx
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$python" "$root/coreml/export.py" "$@"
