#!/usr/bin/env bash
# Runs all 8p scripts, one after another, with eight processes on the CPU and a tiny generated case. The logs are kept
# in output/; models and data are deleted at the end.
set -euo pipefail
source "$(dirname "$0")/common.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" "${root}test/unit/tiny_case.py" "$work"

export DEVICE=cpu OMP_NUM_THREADS=1 MAX_SEQ_LENGTH=16 EVAL_STEP=1 DATA_DIR="$work/data" TEACHER_MODEL="$work/teacher"
few=(--output_txt_step 1)
STUDENT_MODEL="$work/student" OUTPUT_DIR="$work/performance_1" bash "${root}test/train_performance_8p_1.sh" "${few[@]}"
STUDENT_MODEL="$work/performance_1" OUTPUT_DIR="$work/performance_2" bash "${root}test/train_performance_8p_2.sh" "${few[@]}"
STUDENT_MODEL="$work/student" OUTPUT_DIR="$work/full_1" EPOCHS=2 bash "${root}test/train_full_8p_1.sh" "${few[@]}"
STUDENT_MODEL="$work/full_1" OUTPUT_DIR="$work/full_2" EPOCHS=2 bash "${root}test/train_full_8p_2.sh" "${few[@]}"
STUDENT_MODEL="$work/full_2" OUTPUT_DIR="$work/result" bash "${root}test/train_eval_8p.sh"

for log in train_performance_8p_1 train_performance_8p_2 train_full_8p_1 train_full_8p_2 train_eval_8p; do
    if [ ! -s "${root}output/$log.txt" ]; then
        echo "tiny_8p.sh: ${root}output/$log.txt was not written" >&2
        exit 1
    fi
    tail -n 1 "${root}output/$log.txt"
done
