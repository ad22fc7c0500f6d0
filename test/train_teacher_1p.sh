#!/usr/bin/env bash
# Fine-tunes a teacher: BERT-base on the labels of SST-2 or, with TASK_NAME=MNLI, of MNLI.
set -euo pipefail
source "$(dirname "$0")/common.sh"
source "${root}test/env_npu_1p.sh"

task_name="${TASK_NAME:-SST-2}"
case "$task_name" in
    [Mm][Nn][Ll][Ii]*) name=mnli data_dir="${root}glue_dir/MNLI" eval_step=2000 ;;
    *) name=sst data_dir="${root}glue_dir/SST-2" eval_step=200 ;;
esac

"$PYTHON" "${root}main.py" \
    --do_finetune \
    --task_name "$task_name" \
    --data_dir "${DATA_DIR:-$data_dir}" \
    --teacher_model "${TEACHER_MODEL:-${root}bert_base_uncased}" \
    --output_dir "${OUTPUT_DIR:-${root}bert_base_uncased_ft_$name}" \
    --fps_acc_dir "${FPS_ACC_DIR:-${root}output}" \
    --num_train_epochs "${EPOCHS:-3}" \
    --train_batch_size "${BATCH_SIZE:-32}" \
    --max_seq_length "${MAX_SEQ_LENGTH:-64}" \
    --learning_rate "${LEARNING_RATE:-2e-5}" \
    --eval_step "${EVAL_STEP:-$eval_step}" \
    --amp --opt_level "${OPT_LEVEL:-O1}" --loss_scale "${LOSS_SCALE:-128}" \
    --device "${DEVICE:-auto}" --device_list "${DEVICE_LIST:-0}" \
    "${switches[@]}" "$@"
