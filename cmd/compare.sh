#!/usr/bin/env bash
# Train models on the same data with the same budget, time them, and plot accuracy against latency. Without arguments: one
# model of each family on the bundled photographs. Killed, the same command goes on where it was.
#   bash cmd/compare.sh [DATA] --model care_s0 casvit_xs mlla_t [--recipe R] [--seeds 0 1 2] [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ $# -eq 0 ]; then
    set -- "$root/data/fruit14" --recipe care_s0_fruit14 --model care_s0 casvit_xs mlla_t
fi
export KINETO_LOG_LEVEL="${KINETO_LOG_LEVEL:-99}"  # the profiler that counts memory is silent
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m caretrans compare "$@"
