#!/usr/bin/env bash
# The checks and the fast tests, on all cores; with arguments these go to pytest.
#   bash scripts/test.sh
#   bash scripts/test.sh -m slow tests/reliability
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
WITH_DEV=1
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if [ $# -eq 0 ]; then
    set -- --numprocesses auto --maxprocesses 8 --dist worksteal
fi
"$PYTHON" -m pytest -q "$@"
