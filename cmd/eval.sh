#!/usr/bin/env bash
# Evaluate a checkpoint: top-1, top-5, loss, images, images/s.
#   bash cmd/eval.sh CHECKPOINT [DATA] [flags of validate.py, e.g. --json]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$python" "$root/validate.py" "$@"
