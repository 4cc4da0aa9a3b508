#!/usr/bin/env bash
# Run the tests, including timm's own model tests.
#   bash cmd/test.sh [arguments of pytest, e.g. tests/test_engine.py, or -n 0 for a single process]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
timm="timm-$("$python" -c 'import timm; print(timm.__version__)')"
if [ ! -f "build/$timm/tests/test_models.py" ]; then
    mkdir -p build
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: -d build "${timm/-/==}" &&
        tar -xzf "build/$timm.tar.gz" -C build "$timm/tests" ||
        echo "timm's own tests could not be downloaded and are skipped." >&2
fi
"$python" -m ruff check .
exec "$python" -m pytest --numprocesses auto --dist loadfile "$@"
