#!/usr/bin/env bash
# The checks and the fast tests, on all cores; with arguments these go to pytest.
#   bash scripts/test.sh
#   bash scripts/test.sh -m slow tests/reliability
set -euo pipefail

case "${1:-}" in -h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit ;;
esac
WITH_DEV=1
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if [ $# -eq 0 ]; then
    set -- --numprocesses auto --maxprocesses 8 --dist worksteal
fi
"$PYTHON" -m pytest -q "$@"
