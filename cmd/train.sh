#!/usr/bin/env bash
# Train. Without arguments: care_s0 on the bundled photographs, on any machine, in minutes.
#   bash cmd/train.sh [DATA] [--recipe NAME_OR_FILE] [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ $# -eq 0 ]; then
    set -- "$root/data/fruit14" --recipe care_s0_fruit14
fi
exec "$python" "$root/train.py" "$@"
