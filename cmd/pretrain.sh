#!/usr/bin/env bash
# Pre-train a network on images without labels, on all GPUs of one or several machines, or on the CPU.
#   bash cmd/pretrain.sh FOLDER [--recipe NAME_OR_FILE] [flags of `python -m caretrans pretrain`]
# Without arguments: a small network on the bundled images, beside what needs no training, over three seeds.
# NPROC=2, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, MAX_RESTARTS: see cmd/launch.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$root/cmd/launch.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ $# -eq 0 ]; then
    exec "$python" -m caretrans.selfsup.demo "$root/data/fruit14"
fi
launch -m caretrans pretrain "$@"
