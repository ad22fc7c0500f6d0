#!/usr/bin/env bash
# Makes the virtual environment .venv where it is missing, and installs what requirements files pin:
#     bash test/setup_env.sh requirements.txt --no-deps requirements-quickstart.txt
# --no-deps counts for the files after it. A file whose content is installed already is left alone.
# PYTHON names the interpreter that .venv is made with; python3 otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base="${PYTHON:-python3}"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

fail() {
    echo "setup_env.sh: error: $1" >&2
    exit 2
}

quietly() { # runs a command; its output is shown only if it fails
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        fail "this command failed, its output is above: $*"
    fi
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "$base is not Python 3.10 or newer; name one that is, as PYTHON=python3.12"
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
    stamp=".venv/installed-$file"
    wanted="$(cat requirements*.txt | cksum)" # all of them, since one may include another
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then continue; fi
    echo "Installing $file into .venv (the first time it takes some minutes; torch is large) …"
    quietly .venv/bin/python -m pip install --disable-pip-version-check ${options[@]+"${options[@]}"} -r "$file"
    echo "$wanted" >"$stamp"
done
