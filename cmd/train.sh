#!/usr/bin/env bash
# Train on all GPUs of one or several machines, or on the CPU. Without arguments: care_s0 on the bundled images.
#   bash cmd/train.sh [DATA] [--recipe NAME_OR_FILE] [flags of train.py]
# NPROC=2, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, MAX_RESTARTS: see cmd/launch.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$root/cmd/launch.sh"
if [ $# -eq 0 ]; then
    set -- "$root/data/fruit14" --recipe care_s0_fruit14
fi
launch "$root/train.py" "$@"
