#!/usr/bin/env bash
# Build a page that checks, measures and runs exported networks in the browser of any phone or computer, serve it, and
# print its address. Needs npm, which fetches the browser runtime once.
#   bash cmd/page.sh                                                  six networks with random weights, for speed only
#   bash cmd/page.sh --checkpoint runs/NAME/best.pth.tar [--model casvit_xs ...]      classifies photos as well
#   bash cmd/page.sh --host 0.0.0.0 --tls                             for phones in the same network, see docs/browser.md
# It is served again without being built by: python -m caretrans serve
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m caretrans page --serve "$@"
