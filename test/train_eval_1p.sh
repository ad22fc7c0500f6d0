#!/usr/bin/env bash
# Evaluates a student on SST-2's dev set with one device.
set -euo pipefail
source "$(dirname "$0")/common.sh"
source "${root}test/env_npu_1p.sh"

"$PYTHON" "${root}main.py" \
    --do_eval \
    --task_name SST-2 \
    --data_dir "${DATA_DIR:-${root}glue_dir/SST-2}" \
    --student_model "${STUDENT_MODEL:-${root}TinyBERT_dir}" \
    --output_dir "${OUTPUT_DIR:-${root}result_dir}" \
    --fps_acc_dir "${FPS_ACC_DIR:-${root}output}" \
    --eval_batch_size "${BATCH_SIZE:-32}" \
    --max_seq_length "${MAX_SEQ_LENGTH:-64}" \
    --device "${DEVICE:-auto}" --device_list "${DEVICE_LIST:-0}" \
    "${switches[@]}" "$@"
