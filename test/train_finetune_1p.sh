#!/usr/bin/env bash
# Transfer learning: both stages of distillation on MNLI with one device, from a student of any task.
# A classifier with another number of outputs is replaced. Flags go to both stages, so set the folders with
# INTERMEDIATE_DIR and OUTPUT_DIR, not with --output_dir.
set -euo pipefail
source "$(dirname "$0")/common.sh"
source "${root}test/env_npu_1p.sh"

data_dir="${DATA_DIR:-${root}glue_dir/MNLI}"
teacher_model="${TEACHER_MODEL:-${root}bert_base_uncased_ft_mnli}"
intermediate_dir="${INTERMEDIATE_DIR:-${root}tmp_tinybert_finetune}"
output_dir="${OUTPUT_DIR:-${root}TinyBERT_dir_finetune}"

# Check the second stage's folder now, not hours later.
if [ "${OVERWRITE_OUTPUT_DIR:-0}" = 0 ] && [ "${RESUME:-0}" = 0 ] && [ -n "$(ls -A "$output_dir" 2>/dev/null)" ]; then
    echo "train_finetune_1p.sh: error: $output_dir is not empty; give another OUTPUT_DIR, or OVERWRITE_OUTPUT_DIR=1" >&2
    exit 2
fi

"$PYTHON" "${root}main.py" \
    --task_name MNLI \
    --transfer_learning \
    --data_dir "$data_dir" \
    --teacher_model "$teacher_model" \
    --student_model "${STUDENT_MODEL:-${root}general_tinybert}" \
    --output_dir "$intermediate_dir" \
    --fps_acc_dir "${FPS_ACC_DIR:-${root}output}" \
    --num_train_epochs "${EPOCHS:-10}" \
    --train_batch_size "${BATCH_SIZE:-32}" \
    --max_seq_length "${MAX_SEQ_LENGTH:-64}" \
    --amp --opt_level "${OPT_LEVEL:-O1}" --loss_scale "${LOSS_SCALE:-128}" \
    --device "${DEVICE:-auto}" --device_list "${DEVICE_LIST:-0}" \
    "${switches[@]}" "$@"

"$PYTHON" "${root}main.py" \
    --task_name MNLI \
    --transfer_learning \
    --pred_distill \
    --data_dir "$data_dir" \
    --teacher_model "$teacher_model" \
    --student_model "$intermediate_dir" \
    --output_dir "$output_dir" \
    --fps_acc_dir "${FPS_ACC_DIR:-${root}output}" \
    --num_train_epochs "${PRED_EPOCHS:-3}" \
    --train_batch_size "${BATCH_SIZE:-32}" \
    --max_seq_length "${MAX_SEQ_LENGTH:-64}" \
    --learning_rate "${LEARNING_RATE:-3e-5}" \
    --eval_step "${EVAL_STEP:-2000}" \
    --amp --opt_level "${OPT_LEVEL:-O1}" --loss_scale "${LOSS_SCALE:-128}" \
    --device "${DEVICE:-auto}" --device_list "${DEVICE_LIST:-0}" \
    "${switches[@]}" "$@"
