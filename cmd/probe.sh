#!/usr/bin/env bash
# Score features by their nearest neighbours and by a linear classifier, on labelled images.
#   bash cmd/probe.sh DATA --checkpoint FILE [--recipe selfsup_r50_probe] [--no-crops] [--json]
#   bash cmd/probe.sh DATA --random-weights --model resnet50      a baseline
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m caretrans probe "$@"
