#!/usr/bin/env bash
# Extract ImageNet (ILSVRC 2012) from its archives, offline; run it again after an interruption. See data/README.md.
#   bash data/extract_ILSVRC.sh [ARCHIVES [TARGET]] [flags, see --help]     both folders: by default that of this script
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cmd/env.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m caretrans.data.imagenet --folder "$root/data" "$@"
