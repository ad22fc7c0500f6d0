#!/usr/bin/env bash
# Measures the speed of intermediate-layer distillation on SST-2 with one device; 1000 steps.
set -euo pipefail
source "$(dirname "$0")/common.sh"
source "${root}test/env_npu_1p.sh"
if [ "${AUG_TRAIN:-1}" != 0 ]; then switches+=(--aug_train); fi

"$PYTHON" "${root}main.py" \
    --task_name SST-2 \
    --data_dir "${DATA_DIR:-${root}glue_dir/SST-2}" \
    --teacher_model "${TEACHER_MODEL:-${root}bert_base_uncased_ft_sst}" \
    --student_model "${STUDENT_MODEL:-${root}general_tinybert}" \
    --output_dir "${OUTPUT_DIR:-${root}tmp_tinybert_performance}" \
    --fps_acc_dir "${FPS_ACC_DIR:-${root}output}" \
    --num_train_epochs "${EPOCHS:-1}" \
    --train_batch_size "${BATCH_SIZE:-32}" \
    --max_seq_length "${MAX_SEQ_LENGTH:-64}" \
    --learning_rate "${LEARNING_RATE:-5e-5}" \
    --performance \
    --amp --opt_level "${OPT_LEVEL:-O1}" --loss_scale "${LOSS_SCALE:-128}" \
    --device "${DEVICE:-auto}" --device_list "${DEVICE_LIST:-0}" \
    "${switches[@]}" "$@"
