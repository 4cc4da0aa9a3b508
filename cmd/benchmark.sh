#!/usr/bin/env bash
# Measure the models of the paper's table that timm has, then CARE, CAS-ViT and MLLA, by family and size, and print
# tables in Markdown.
#   bash cmd/benchmark.sh [flags of benchmark.py, e.g. --backend eager openvino --batch-size 1 32]
#   bash cmd/benchmark.sh --update     writes docs/benchmarks.md
#   bash cmd/benchmark.sh --check      recounts the parameters and GMACs of README.md and docs/benchmarks.md
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
models=(mobilenetv2_100 mobileone_s0 fastvit_t8 mobileone_s2 fastvit_t12 mobileone_s4 care_s0 care_s1 care_s2
    casvit_xs casvit_s casvit_m casvit_t mlla_t mlla_s mlla_b)
exec "$python" "$root/benchmark.py" --model "${models[@]}" --markdown "$@"
