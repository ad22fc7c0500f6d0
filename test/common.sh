#!/usr/bin/env bash
# Sourced by the scripts in test/: goes to the repository's root and reads the settings that they share.
# Paths in a script's variables and flags are seen from there.
#
#   PYTHON                  the interpreter; .venv/bin/python where there is one, else python3
#   DO_LOWER_CASE=0         for a cased model
#   OVERWRITE_OUTPUT_DIR=1  replaces the model in an output folder that is not empty
#   RESUME=1                goes on with a training that was stopped, and begins where there is none
#   SEED                    42
#
# The other settings stand, with their defaults, in each script's command. Flags that follow the
# script's name come last and so win.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi

switches=(--seed "${SEED:-42}")
if [ "${DO_LOWER_CASE:-1}" != 0 ]; then switches+=(--do_lower_case); fi
if [ "${OVERWRITE_OUTPUT_DIR:-0}" != 0 ]; then switches+=(--overwrite_output_dir); fi
if [ "${RESUME:-0}" != 0 ]; then switches+=(--resume); fi

# Threads that wait for one another sleep instead of spinning: as fast on an idle machine, and several times
# as fast where other programs need the cores too.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
