#!/usr/bin/env bash
# Installs the tests' requirements into .venv, then runs the linter, the type checker and the tests. Arguments go to
# pytest, paths relative to the repository's root:
#     bash test/run_tests.sh -k tokenization
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

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
step .venv/bin/vermin --target=3.10- --violations --no-tips --eval-annotations --exclude long . # tensors have .long() too
for script in test/*.sh .ci/run; do step bash -n "$script"; done
# One process per core; the tests of a file run in one process and share their fixtures.
step "$python" -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
echo "run_tests.sh: everything passed in $SECONDS s"
