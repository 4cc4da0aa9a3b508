#!/usr/bin/env bash
# Test caretrans.openmm inside OpenMMLab's mmpretrain and mmdet, in an environment of its own, .venv-openmm. It is made on
# first use, sees the packages of training, and adds those of tests/dense/openmm_requirements.txt.
#   bash cmd/test_openmm.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
own=.venv-openmm/bin/python
if [ ! -x "$own" ]; then
    "$python" -m venv .venv-openmm
fi
paths='import sysconfig; print(*dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib"))), sep="\n")'
"$python" -c "$paths" > "$("$own" -c "$paths" | head -n 1)/training.pth"
requirements=tests/dense/openmm_requirements.txt
if ! missing="$("$own" cmd/check_requirements.py "$requirements")"; then
    echo "Installing into .venv-openmm: $missing" >&2
    "$own" -m pip install --quiet --disable-pip-version-check --no-deps -r "$requirements"
fi
"$own" -m pytest -p no:xdist tests/dense/test_openmm.py "$@"
exec "$own" -m pytest -p no:xdist tests/dense/test_openmm_detectors.py "$@"  # apart: it replaces a part of mmcv
