#!/usr/bin/env bash
# Train on all GPUs of this machine, of several, or on the CPU. Without arguments: care_s0 on the bundled photographs.
#   bash cmd/train.sh [DATA] [--recipe NAME_OR_FILE] [flags of train.py]
# NPROC=2         processes on this machine (default: one per GPU)
# NNODES=2 NODE_RANK=0 MASTER_ADDR=host [MASTER_PORT=29500]   on each machine of several; see also cmd/train.sbatch
# MAX_RESTARTS=3  times that the processes are started again after one of them died (default: 3 on several machines)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ $# -eq 0 ]; then
    set -- "$root/data/fruit14" --recipe care_s0_fruit14
fi
processes="${NPROC:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
if ! [[ "$processes" =~ ^[1-9][0-9]*$ ]]; then
    echo "NPROC is '$processes', it must be a number of processes from 1 on." >&2
    exit 2
fi
nodes="${NNODES:-1}"
if [ "$processes" = 1 ] && [ "$nodes" = 1 ]; then
    exec "$python" "$root/train.py" "$@"
fi
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"  # on a CPU, advice of PyTorch's that would cost exactness
if [ -z "${OMP_NUM_THREADS:-}" ]; then  # the processes share the cores
    cores="$("$python" -c 'import os; print(os.cpu_count())')"
    export OMP_NUM_THREADS="$((cores > processes ? cores / processes : 1))"
fi
if [ "$nodes" = 1 ]; then
    meeting=(--standalone)
else
    : "${MASTER_ADDR:?set it to the name of the first machine}"
    : "${NODE_RANK:=${SLURM_NODEID:?or NODE_RANK: set it to 0 on the first machine, 1 on the second, ...}}"
    # With the launchers' shared store, processes that are started again after a failure wait for one another for ever.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    meeting=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
        --rdzv-id "${RUN_ID:-${SLURM_JOB_ID:-caretrans}}" --rdzv-conf "is_host=$((NODE_RANK == 0))")
fi
"$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" "${meeting[@]}" \
    --max-restarts "${MAX_RESTARTS:-$((nodes > 1 ? 3 : 0))}" "$root/train.py" "$@" &
launcher=$!
# SIGTERM goes to the training processes, which write a checkpoint and end well, and so does their launcher.
trap 'pkill -TERM -P "$launcher" || kill -TERM "$launcher"' TERM
code=0
while true; do
    wait "$launcher" && code=0 || code=$?
    kill -0 "$launcher" 2>/dev/null || exit "$code"
done
