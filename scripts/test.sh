#!/usr/bin/env bash
# The checks and the fast tests; arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
WITH_DEV=1
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -q "$@"
