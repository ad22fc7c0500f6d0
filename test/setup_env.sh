#!/usr/bin/env bash
# Makes the repository's virtual environment .venv if it is missing, and installs the repository's requirements files:
#     bash test/setup_env.sh requirements.txt --no-deps requirements-quickstart.txt
# --no-deps applies to the files after it. A file that is already installed and has not changed is skipped.
# PYTHON is the interpreter for .venv (default: python3).
set -euo pipefail

base="${PYTHON:-python3}"
case "$base" in /*) ;; */*) base="$PWD/$base" ;; esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

log="$(mktemp)"
trap 'rm -f "$log"' EXIT

fail() {
    echo "setup_env.sh: error: $1" >&2
    exit 2
}

quietly() { # runs a command and prints its output only if it fails
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        fail "this command failed, its output is above: $*"
    fi
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "$base is not Python 3.10 or newer; give a newer one, for example PYTHON=python3.12"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base cannot make virtual environments (no ensurepip); install it, on Debian and Ubuntu: apt install python3-venv"
    echo "Making the virtual environment .venv with $("$base" --version) …"
    quietly "$base" -m venv .venv
fi

options=()
for file in "$@"; do
    if [ "$file" = --no-deps ]; then
        options=(--no-deps)
        continue
    fi
    if [ ! -f "$file" ]; then fail "$file: no such file in $PWD"; fi
    stamp=".venv/installed-$file"
    wanted="$(cat requirements*.txt | cksum)" # all files, because one may include another
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then continue; fi
    echo "Installing $file into .venv (the first time takes some minutes; torch is large) …"
    quietly .venv/bin/python -m pip install --disable-pip-version-check ${options[@]+"${options[@]}"} -r "$file"
    echo "$wanted" >"$stamp"
done
