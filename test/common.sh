#!/usr/bin/env bash
# Sourced by the scripts in test/, which run from any folder: finds the repository and reads their common settings.
# Relative paths in variables and flags are relative to the current folder; default folders are in the repository's root.
#
#   PYTHON                  interpreter (default: .venv/bin/python if it exists, otherwise python3)
#   DO_LOWER_CASE=0         for a cased model
#   OVERWRITE_OUTPUT_DIR=1  replace the model in an output folder that is not empty
#   RESUME=1                continue an interrupted training; start a new one if there is none
#   SEED=42
#
# The other settings, with their defaults, are in each script's command. Flags after the script's name override them.

# What paths in the repository begin with: nothing in its root, elsewhere the root's path and a slash.
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)/"
if [ "$root" -ef . ]; then root=""; fi

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "${root}.venv/bin/python" ]; then PYTHON="${root}.venv/bin/python"; fi
fi

switches=(--seed "${SEED:-42}")
if [ "${DO_LOWER_CASE:-1}" != 0 ]; then switches+=(--do_lower_case); fi
if [ "${OVERWRITE_OUTPUT_DIR:-0}" != 0 ]; then switches+=(--overwrite_output_dir); fi
if [ "${RESUME:-0}" != 0 ]; then switches+=(--resume); fi

# Waiting threads sleep instead of spinning, which is faster while other programs use the cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
