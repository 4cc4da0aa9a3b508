#!/usr/bin/env bash
# Train models on the same data with the same budget, time them, and plot accuracy against latency. Without --model: one
# of each family; without data and recipe: the bundled photographs. It is one process, on one GPU or the processor.
# Killed, the same command goes on where it was.
#   bash cmd/compare.sh [DATA] [--model care_s0 casvit_xs mlla_t] [--recipe R] [--seeds 0 1 2] [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export KINETO_LOG_LEVEL="${KINETO_LOG_LEVEL:-99}"  # the profiler that counts memory is silent
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m caretrans compare "$@"
