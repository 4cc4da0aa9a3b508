#!/usr/bin/env bash
# Measure everything that needs a GPU: its tests, then the tables of docs/gpu.md, a folder for each step.
#   bash cmd/benchmark_gpu.sh [FOLDER]     runs/gpu if not given
# MODELS='care_s0 care_s1'   models (default: all three)
# STEPS='tests infer'        steps (default: tests published infer compile paper profile train compare)
# CIFAR10=FOLDER             a folder of images with train/ and val/; by default torchvision's download in data/cifar10
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
folder="${1:-runs/gpu}"
steps="${STEPS:-tests published infer compile paper profile train compare}"
read -ra models <<< "${MODELS:-care_s0 care_s1 care_s2}"
failed=()
mkdir -p "$folder"
step() {  # NAME COMMAND: a step that fails is named at the end, the others still run
    [[ " $steps " == *" $1 "* ]] || return 0
    echo "== $1: ${*:2}"
    "${@:2}" 2>&1 | tee "$folder/$1.txt" || failed+=("$1")
}
bench() {  # NAME FLAGS
    step "$1" "$python" benchmark.py --device cuda --output "$folder/$1" "${@:2}"
}
step tests "$python" -m pytest -s tests/kernels/test_cuda_kernels.py tests/bench/test_cuda_benchmarks.py tests/test_cuda.py
bench published --model "${models[@]}" --published
bench infer --model "${models[@]}" --backend eager fused cudagraph --dtype tf32 float32 bfloat16 float16 --batch-size 1 64
bench compile --model "${models[@]}" --backend eager compile --dtype tf32 bfloat16 --batch-size 1 64
bench paper --model paper 'casvit_*' 'mlla_*' --backend eager cudagraph --dtype tf32 bfloat16 --batch-size 64 --markdown
bench profile --model "${models[@]}" --bench profile --backend eager fused cudagraph --dtype tf32 bfloat16 --batch-size 1 64
bench train --model "${models[@]}" --bench train --teacher none regnety_160 --batch-size 128
if [ -n "${CIFAR10:-}" ]; then
    cifar=("$CIFAR10" --dataset '')
else
    cifar=(data/cifar10 --dataset-download)
fi
step compare bash cmd/compare.sh "${cifar[@]}" --recipe cifar10 --epochs 30 --amp bf16 --channels-last --device cuda \
    --model care_s0 casvit_xs mlla_t --seeds 0 1 2 --output "$folder/compare"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; see $folder" >&2
    exit 1
fi
