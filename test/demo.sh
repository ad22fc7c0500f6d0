#!/usr/bin/env bash
# Prints the predictions of a student for some sentences, and checks that its logits are the same 20 times.
#     bash ./test/demo.sh --text "A film to remember."
set -euo pipefail
source "$(dirname "$0")/common.sh"

flags=(--model "${STUDENT_MODEL:-${root}TinyBERT_dir}" --max_seq_length "${MAX_SEQ_LENGTH:-64}")
if [ "${DO_LOWER_CASE:-1}" != 0 ]; then flags+=(--do_lower_case); fi

"$PYTHON" "${root}test/demo.py" "${flags[@]}" "$@"
