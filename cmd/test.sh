#!/usr/bin/env bash
# Run the tests, timm's own tests of our models among them. With --all, install first what drives a real browser:
# playwright, and on Debian as root chromium and npm; without them the tests of the page are skipped.
#   bash cmd/test.sh          what every change needs
#   bash cmd/test.sh --all    every test: 12.5 minutes on two shared cores
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
if [ ${#tier[@]} -eq 0 ]; then
    "$python" -c 'import playwright' 2>/dev/null ||
        "$python" -m pip install --quiet --disable-pip-version-check 'playwright>=1.50' || true
    missing=()
    for tool in chromium npm; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update -qq && apt-get install -qq -y "${missing[@]}"; } >/dev/null ||
            echo "${missing[*]} could not be installed: tests of the page are skipped." >&2
    fi
fi
"$python" -m ruff check .
# One process more than cores: some tests wait for others that they start.
workers="$("$python" -c 'import os; print(1 + len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)))')"
exec "$python" -m pytest --numprocesses "$workers" --dist worksteal "${tier[@]}" "$@"
