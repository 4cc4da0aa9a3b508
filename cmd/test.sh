#!/usr/bin/env bash
# Run the tests, timm's own tests of our models among them.
#   bash cmd/test.sh          what every change needs
#   bash cmd/test.sh --all    every test: 18 minutes on two shared cores
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
exec "$python" -m pytest --numprocesses auto --dist worksteal "${tier[@]}" "$@"
