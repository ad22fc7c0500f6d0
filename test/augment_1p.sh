#!/usr/bin/env bash
# Augments SST-2: writes train_aug.tsv, which the training scripts read, from train.tsv. TASK_NAME and DATA_DIR select
# another task.
#
#   GLOVE_EMBS=glove.6B.300d.txt     vectors from nlp.stanford.edu/projects/glove; GLOVE_EMBS= (empty) for none
#   BERT_MODEL=bert_base_uncased     with a masked-LM head; TRAIN_MLM_HEAD=1000 trains one in 1000 steps
#   N, M, P, MLM_CONTEXT             number and kind of replacements (data_augmentation.py --help)
#   RELABEL_BY=DIR                   drop new examples to which this teacher gives another label
#   RESUME=1                         continue an interrupted run
#   OVERWRITE_OUTPUT_FILE=1          replace train_aug.tsv
set -euo pipefail
source "$(dirname "$0")/common.sh"
source "${root}test/env_npu_1p.sh"

switches=(--seed "${SEED:-42}")
if [ "${DO_LOWER_CASE:-1}" != 0 ]; then switches+=(--do_lower_case); fi
if [ -n "${GLOVE_EMBS-${root}glove.6B.300d.txt}" ]; then
    switches+=(--glove_embs "${GLOVE_EMBS-${root}glove.6B.300d.txt}")
else
    switches+=(--no_glove)
fi
if [ -n "${N:-}" ]; then switches+=(--N "$N"); fi
if [ -n "${TRAIN_MLM_HEAD:-}" ]; then switches+=(--train_mlm_head "$TRAIN_MLM_HEAD"); fi
if [ -n "${RELABEL_BY:-}" ]; then switches+=(--relabel teacher --teacher_model "$RELABEL_BY"); fi
if [ "${RESUME:-0}" != 0 ]; then switches+=(--resume); fi
if [ "${OVERWRITE_OUTPUT_FILE:-0}" != 0 ]; then switches+=(--overwrite_output_file); fi

"$PYTHON" "${root}data_processing/data_augmentation.py" \
    --task_name "${TASK_NAME:-SST-2}" \
    --data_dir "${DATA_DIR:-${root}glue_dir/SST-2}" \
    --pretrained_bert_model "${BERT_MODEL:-${root}bert_base_uncased}" \
    --M "${M:-15}" --p "${P:-0.4}" \
    --mlm_context "${MLM_CONTEXT:-original}" \
    --device "${DEVICE:-auto}" --device_list "${DEVICE_LIST:-0}" \
    "${switches[@]}" "$@"
