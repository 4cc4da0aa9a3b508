# Sourced by scripts that train. `launch SCRIPT ARGUMENTS` or `launch -m MODULE ARGUMENTS` runs it with $python, in as many
# processes and on as many machines as these variables say:
# NPROC=2         processes on this machine (default: one per GPU)
# NNODES=2 NODE_RANK=0 MASTER_ADDR=host [MASTER_PORT=29500]   on each machine of several; see also cmd/train.sbatch
# MAX_RESTARTS=3  restarts of all processes after one of them died (default: 3 on several machines, else 0)
launch() {
    processes="${NPROC:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
    if ! [[ "$processes" =~ ^[1-9][0-9]*$ ]]; then
        echo "NPROC is '$processes' but must be a positive number of processes." >&2
        exit 2
    fi
    nodes="${NNODES:-1}"
    if [ "$processes" = 1 ] && [ "$nodes" = 1 ]; then
        exec "$python" "$@"
    fi
    export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"  # hides advice of PyTorch that would cost exactness on CPUs
    if [ -z "${OMP_NUM_THREADS:-}" ]; then  # the processes share the cores
        cores="$("$python" -c 'import os; print(os.cpu_count())')"
        export OMP_NUM_THREADS="$((cores > processes ? cores / processes : 1))"
    fi
    if [ "$nodes" = 1 ]; then
        rendezvous=(--standalone)
    else
        : "${MASTER_ADDR:?set it to the name of the first machine}"
        : "${NODE_RANK:=${SLURM_NODEID:?or NODE_RANK: set it to 0 on the first machine, 1 on the second, ...}}"
        # With the launchers' shared store, processes restarted after a failure wait for one another forever.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
            --rdzv-id "${RUN_ID:-${SLURM_JOB_ID:-caretrans}}" --rdzv-conf "is_host=$((NODE_RANK == 0))")
    fi
    "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" "${rendezvous[@]}" \
        --max-restarts "${MAX_RESTARTS:-$((nodes > 1 ? 3 : 0))}" "$@" &
    launcher=$!
    # SIGTERM goes to the training processes, which write a checkpoint and exit with 0, as the launcher then does.
    trap 'pkill -TERM -P "$launcher" || kill -TERM "$launcher"' TERM
    code=0
    while true; do
        wait "$launcher" && code=0 || code=$?
        kill -0 "$launcher" 2>/dev/null || exit "$code"
    done
}
