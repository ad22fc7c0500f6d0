#!/usr/bin/env bash
# All stages of a task: fine-tunes a teacher, distils a student in both stages, evaluates both, and prints predictions
# of the student. For any GLUE task, or your own:
#     TASK_NAME=RTE bash test/pipeline.sh
#     TASK_FILE=reviews.json BERT_MODEL=my_bert STUDENT_MODEL=my_student bash test/pipeline.sh --amp
# A later run starts with the first part that is not finished; with RESUME=1 it continues that part's training. It
# refuses a part that was made from other data, models, settings or code, and names the difference;
# OVERWRITE_OUTPUT_DIR=1 makes that part and those after it again. Flags after the script's name go to training and
# evaluation (task_distill.py --help).
#
#   TASK_NAME, TASK_FILE  one of them
#   DATA_DIR              default: glue_dir/TASK_NAME, or the folder of TASK_FILE
#   BERT_MODEL            encoder from which the teacher is fine-tuned (default: bert_base_uncased)
#   TEACHER_MODEL         an existing teacher, instead of fine-tuning one
#   STUDENT_MODEL         default: general_tinybert
#   WORK_DIR              folder of all outputs, for this script only (default: pipeline/TASK_NAME in capitals, or
#                         pipeline/ and the name of TASK_FILE)
#   AUG_TRAIN=1           train both stages on train_aug.tsv
#   TEACHER_EPOCHS, EPOCHS, PRED_EPOCHS, MAX_SEQ_LENGTH    default: the task's
#   BATCH_SIZE, LEARNING_RATE (of the prediction stage and the teacher), EVAL_STEP, DEVICE, DEVICE_LIST
set -euo pipefail
source "$(dirname "$0")/common.sh"
source "${root}test/env_npu_1p.sh"

fail() {
    echo "pipeline.sh: error: $1" >&2
    exit 2
}

for flag in "$@"; do
    case "${flag%%=*}" in
        --task_name | --task_file | --data_dir | --teacher_model | --student_model | --output_dir | --fps_acc_dir | \
            --max_seq_length | --device | --device_list | --seed | --aug_train | --do_lower_case | --pred_distill | --do_*)
            fail "${flag%%=*} is not for all parts: use the variables at the top of this script" ;;
    esac
done
if [ -n "${TASK_NAME:-}" ] && [ -n "${TASK_FILE:-}" ]; then fail "give only one of TASK_NAME and TASK_FILE"; fi
if [ -n "${TASK_NAME:-}" ]; then
    name="$TASK_NAME"
    folder="$name"
    case "${name,,}" in *-mm) folder="${name::-3}" ;; esac # both dev sets of MNLI are in one folder
    for other in "${root}glue_dir"/*; do # a task's name in upper or lower case
        other="${other##*/}"
        if [ "${other,,}" = "${folder,,}" ]; then folder="$other"; fi
    done
    name="${name^^}" # one work folder for all spellings
    task=(--task_name "$TASK_NAME" --data_dir "${DATA_DIR:-${root}glue_dir/$folder}")
elif [ -n "${TASK_FILE:-}" ]; then
    name="$(basename "${TASK_FILE%.*}")"
    task=(--task_file "$TASK_FILE")
    if [ -n "${DATA_DIR:-}" ]; then task+=(--data_dir "$DATA_DIR"); fi
else
    fail "give TASK_NAME, a task of GLUE, or TASK_FILE, the JSON file of your own task (README)"
fi
work="${WORK_DIR:-${root}pipeline/$name}"
student_start="${STUDENT_MODEL:-${root}general_tinybert}"
teacher="${TEACHER_MODEL:-$work/teacher}"
bert="${BERT_MODEL:-${root}bert_base_uncased}"
parts=(teacher intermediate student evaluation/teacher evaluation/student)

# Without DO_LOWER_CASE, the models' own files decide.
case_flags=()
if [ "${DO_LOWER_CASE:-0}" != 0 ]; then case_flags=(--do_lower_case); fi
reads=("${task[@]}" ${case_flags[@]+"${case_flags[@]}"})
if [ -n "${MAX_SEQ_LENGTH:-}" ]; then reads+=(--max_seq_length "$MAX_SEQ_LENGTH"); fi
runs=("${reads[@]}" --seed "${SEED:-42}" --device "${DEVICE:-auto}" --device_list "${DEVICE_LIST:-0}")
trains=("${runs[@]}" --fps_acc_dir "$work/output" --train_batch_size "${BATCH_SIZE:-32}")
if [ -n "${EVAL_STEP:-}" ]; then trains+=(--eval_step "$EVAL_STEP"); fi
distils=("${trains[@]}")
if [ "${AUG_TRAIN:-0}" != 0 ]; then distils+=(--aug_train); fi

epochs() { # prints the flag for a number of epochs, if one is given
    if [ -n "$1" ]; then printf '%s\n' --num_train_epochs "$1"; fi
}

# Runs a part with flags of task_distill.py, unless its file PART.done has the same inputs as now. Then writes that file.
# Files of later parts are removed first, because their inputs change.
part() {
    local part="$1" title="$2" mark="$work/$1.done" resume=() replace=() inputs other seen=0
    shift 2
    echo
    echo "=== $title"
    if [ ! -d "$work/$part" ]; then rm -f "$mark"; fi
    if [ "${OVERWRITE_OUTPUT_DIR:-0}" != 0 ]; then replace=(--replace); fi
    inputs="$("$PYTHON" "${root}test/pipeline_inputs.py" "$mark" ${replace[@]+"${replace[@]}"} "$@")"
    if [ -z "$inputs" ]; then
        echo "done already: $work/$part"
        return
    fi
    case "$part" in evaluation/*) ;; *) if [ "${RESUME:-0}" != 0 ] && [ ! -f "$mark" ]; then resume=(--resume); fi ;; esac
    for other in "${parts[@]}"; do
        if [ "$other" = "$part" ]; then seen=1; fi
        if [ "$seen" = 1 ]; then rm -f "$work/$other.done"; fi
    done
    "$PYTHON" "${root}task_distill.py" "$@" ${resume[@]+"${resume[@]}"}
    echo "$inputs" >"$mark.new"
    mv "$mark.new" "$mark"
}

evaluate() { # a role, its model, flags
    part "evaluation/$1" "evaluation of the $1" --do_eval "${runs[@]}" --student_model "$2" \
        --output_dir "$work/evaluation/$1" --fps_acc_dir "$work/evaluation/$1" "${@:3}"
}

if [ -d "$work" ] && [ -n "$(ls -A "$work")" ] && [ ! -f "$work/made_by_pipeline" ]; then
    fail "$work is not empty and was not made by this script; give another WORK_DIR"
fi
mkdir -p "$work"
if [ ! -f "$work/made_by_pipeline" ]; then touch "$work/made_by_pipeline"; fi
leave_nothing_empty() { # an error in the first part leaves no folder
    if [ "$(ls -A "$work")" = made_by_pipeline ]; then rm "$work/made_by_pipeline" && rmdir "$work"; fi
}
trap leave_nothing_empty EXIT

if [ -z "${TEACHER_MODEL:-}" ]; then
    mapfile -t long < <(epochs "${TEACHER_EPOCHS:-}")
    part teacher "the teacher, fine-tuned from $bert" \
        --do_finetune "${trains[@]}" ${long[@]+"${long[@]}"} \
        --teacher_model "$bert" --output_dir "$teacher" --overwrite_output_dir \
        --learning_rate "${LEARNING_RATE:-3e-5}" "$@"
fi
mapfile -t long < <(epochs "${EPOCHS:-}")
part intermediate "intermediate-layer distillation" \
    "${distils[@]}" ${long[@]+"${long[@]}"} --transfer_learning \
    --teacher_model "$teacher" --student_model "$student_start" \
    --output_dir "$work/intermediate" --overwrite_output_dir "$@"
mapfile -t long < <(epochs "${PRED_EPOCHS:-}")
part student "prediction-layer distillation" \
    --pred_distill "${distils[@]}" ${long[@]+"${long[@]}"} \
    --teacher_model "$teacher" --student_model "$work/intermediate" \
    --output_dir "$work/student" --overwrite_output_dir --learning_rate "${LEARNING_RATE:-3e-5}" "$@"
evaluate teacher "$teacher" "$@"
evaluate student "$work/student" "$@"

echo
echo "=== predictions of the student for rows of the dev file"
"$PYTHON" "${root}test/demo.py" --model "$work/student" "${reads[@]}"
"$PYTHON" "${root}test/results_table.py" "the teacher=$work/evaluation/teacher" "the student=$work/evaluation/student"
echo "The figures are of the dev files; the first one also selected the checkpoints. The student is in $work/student."
