#!/usr/bin/env bash
# Measure the models of the paper's table that timm or this package has, and all of the comparison systems CAS-ViT and
# MLLA, and print the tables of the README in Markdown.
#   bash cmd/benchmark.sh [flags of benchmark.py, e.g. --backend eager openvino --batch-size 1 32]
#   bash cmd/benchmark.sh --update     writes them into the README
#   bash cmd/benchmark.sh --check      counts its parameters and GMACs again
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
exec "$python" "$root/benchmark.py" --model paper 'casvit_*' 'mlla_*' --markdown "$@"
