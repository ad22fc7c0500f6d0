#!/usr/bin/env bash
# Sets up .venv with what the tests need, then runs linters, types and tests. Further arguments go to pytest:
#     bash test/run_tests.sh -k tokenization
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash test/setup_env.sh requirements-dev.txt --no-deps requirements-quickstart.txt
python=.venv/bin/python

step() {
    echo "== $*"
    "$@" || {
        echo "run_tests.sh: FAILED in: $*" >&2
        exit 1
    }
}

step "$python" -m ruff check .
step "$python" -m ruff format --check .
step "$python" -m mypy
for script in test/*.sh .ci/run; do step bash -n "$script"; done
# A process for each core, of one thread; what a file's tests share is made once.
step "$python" -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
echo "run_tests.sh: everything passed in $SECONDS s"
