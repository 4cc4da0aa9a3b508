#!/usr/bin/env bash
# Train models on the same data with the same budget, time them, and plot accuracy against latency. Without --model, data
# and recipe: one model of each family on the bundled images. Everything runs in one process, on one GPU or the CPU. If it
# is killed, run the same command again: it resumes.
#   bash cmd/compare.sh [DATA] [--model care_s0 casvit_xs mlla_t] [--recipe R] [--seeds 0 1 2] [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export KINETO_LOG_LEVEL="${KINETO_LOG_LEVEL:-99}"  # quiets the profiler that counts memory
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m caretrans compare "$@"
