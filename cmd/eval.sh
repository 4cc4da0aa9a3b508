#!/usr/bin/env bash
# Evaluate a checkpoint: top-1 and top-5, average precision of a detector, mean IoU of a segmenter. Runs one process per visible GPU, or NPROC of them.
#   bash cmd/eval.sh CHECKPOINT [DATA] [flags of validate.py, e.g. --json]
#   bash cmd/eval.sh --pretrained --model care_s0 DATA      published weights, from their hub or its cache
#   NPROC=2 bash cmd/eval.sh CHECKPOINT [DATA] --device cpu
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
NPROC="${NPROC:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
if ! [[ "$NPROC" =~ ^[1-9][0-9]*$ ]]; then
    echo "NPROC is '$NPROC' but must be a positive number of processes." >&2
    exit 2
fi
if [ "$NPROC" -eq 1 ]; then
    exec "$python" "$root/validate.py" "$@"
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then  # the processes share the cores
    cores="$("$python" -c 'import os; print(os.cpu_count())')"
    export OMP_NUM_THREADS="$((cores > NPROC ? cores / NPROC : 1))"
fi
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$root/validate.py" "$@"
