#!/usr/bin/env bash
# Shows a student at work: the same sentences twenty times, with equal logits each time.
#     bash ./test/demo.sh --text "A film to remember."
set -euo pipefail
source "$(dirname "$0")/common.sh"

flags=(--model "${STUDENT_MODEL:-TinyBERT_dir}" --max_seq_length "${MAX_SEQ_LENGTH:-64}")
if [ "${DO_LOWER_CASE:-1}" != 0 ]; then flags+=(--do_lower_case); fi

"$PYTHON" test/demo.py "${flags[@]}" "$@"
