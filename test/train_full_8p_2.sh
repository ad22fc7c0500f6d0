#!/usr/bin/env bash
# Prediction-layer distillation on SST-2 with eight devices (on the CPU: eight processes).
set -euo pipefail
source "$(dirname "$0")/common.sh"
source "${root}test/env_npu_8p.sh"
if [ "${AUG_TRAIN:-1}" != 0 ]; then switches+=(--aug_train); fi

"$PYTHON" "${root}main.py" \
    --task_name SST-2 \
    --data_dir "${DATA_DIR:-${root}glue_dir/SST-2}" \
    --teacher_model "${TEACHER_MODEL:-${root}bert_base_uncased_ft_sst}" \
    --student_model "${STUDENT_MODEL:-${root}tmp_tinybert_dir}" \
    --output_dir "${OUTPUT_DIR:-${root}TinyBERT_dir}" \
    --fps_acc_dir "${FPS_ACC_DIR:-${root}output}" \
    --num_train_epochs "${EPOCHS:-3}" \
    --train_batch_size "${BATCH_SIZE:-32}" \
    --max_seq_length "${MAX_SEQ_LENGTH:-64}" \
    --learning_rate "${LEARNING_RATE:-3e-5}" \
    --eval_step "${EVAL_STEP:-100}" \
    --pred_distill \
    --amp --opt_level "${OPT_LEVEL:-O2}" --loss_scale "${LOSS_SCALE:-128}" \
    --device "${DEVICE:-auto}" --device_list "${DEVICE_LIST:-0,1,2,3,4,5,6,7}" \
    --addr "${ADDR:-127.0.0.1}" --port "${PORT:-12000}" \
    "${switches[@]}" "$@"
