# Sourced by the other scripts: goes to the project's root, makes .venv, fills it if need be, and sets
# PYTHON to its interpreter. WITH_DEV=1 adds what the tests need. A stamp in .venv tells what is
# installed; it is written last, and without it a .venv with a half-installed package is made anew.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHON="$PWD/.venv/bin/python"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # waiting threads leave the cores to others

fail() {
    echo "error: $1" >&2
    exit 2
}

fingerprint() { # of requirement files and the interpreter
    { "$PYTHON" -V && cat "$@"; } | "$PYTHON" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

venv_is_whole() { # a recent Python, pip, and no package without its list of files or one of them
    "$PYTHON" -c '
import sys
from importlib.metadata import distributions

import pip

whole = sys.version_info >= (3, 10)
for package in distributions():
    files = [f for f in package.files or [] if f.suffix != ".pyc"]
    whole = whole and bool(files) and all(f.locate().exists() for f in files)
sys.exit(not whole)' 2>/dev/null
}

make_venv() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "python3 is missing or too old: install Python 3.10 or newer"
    python3 -m venv --clear .venv >/dev/null ||
        fail "python3 cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)"
}

install() { # install STAMP REQUIREMENTS...
    local stamp=".venv/$1" log=".venv/install.log"
    shift
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint "$@" 2>/dev/null)" ] && return
    echo "setting up .venv from $* (some minutes the first time)"
    rm -f "$stamp"
    venv_is_whole || make_venv
    "$PYTHON" -m pip install -q --disable-pip-version-check "${@/#/--requirement=}" >"$log" 2>&1 ||
        fail "the installation failed, $log says why; run this again to go on with it"
    fingerprint "$@" >"$stamp"
}

install installed requirements.txt
if [ "${WITH_DEV:-0}" = 1 ]; then
    install installed-dev requirements-dev.txt
fi
