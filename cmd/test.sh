#!/usr/bin/env bash
# Run the tests, timm's own tests of our models among them.
#   bash cmd/test.sh          what every change needs
#   bash cmd/test.sh --all    every test: 14 minutes on two shared cores
#   bash cmd/test.sh [--all] [arguments of pytest, e.g. tests/training/test_engine.py, or -n 0 for a single process]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
tier=(-m 'not slow')
if [ "${1:-}" = --all ]; then
    tier=()
    shift
fi
timm="timm-$("$python" -c 'import timm; print(timm.__version__)')"
if [ ! -f "build/$timm/tests/test_models.py" ]; then
    mkdir -p build
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: -d build "${timm/-/==}" &&
        tar -xzf "build/$timm.tar.gz" -C build "$timm/tests" ||
        echo "timm's own tests could not be downloaded and are skipped." >&2
fi
"$python" -m ruff check .
# One process more than cores: some tests wait for others that they start.
workers="$("$python" -c 'import os; print(1 + len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)))')"
exec "$python" -m pytest --numprocesses "$workers" --dist worksteal "${tier[@]}" "$@"
