#!/usr/bin/env bash
# A task from beginning to end: fine-tunes a teacher, takes a student through both stages, evaluates both, shows
# the student at work. Any task of GLUE, or your own:
#     TASK_NAME=RTE bash test/pipeline.sh
#     TASK_FILE=reviews.json BERT_MODEL=my_bert STUDENT_MODEL=my_student bash test/pipeline.sh --amp
# What a part has made is kept: run again, after a stop too, it goes on with the first part that is not done. Flags
# that follow the script's name go to training and evaluation (task_distill.py --help). With RESUME=1 that part goes
# on from where it was stopped.
#
#   TASK_NAME, TASK_FILE  one of them
#   DATA_DIR              glue_dir/TASK_NAME, or TASK_FILE's folder
#   BERT_MODEL            bert_base_uncased: what the teacher is made from
#   TEACHER_MODEL         a teacher that is there already; then none is made
#   STUDENT_MODEL         general_tinybert
#   WORK_DIR              pipeline/TASK_NAME (in capitals), or TASK_FILE's name: all that is made; folders in it belong to this script
#   AUG_TRAIN=1           both stages train on the augmented file
#   TEACHER_EPOCHS, EPOCHS, PRED_EPOCHS, MAX_SEQ_LENGTH    the task's own where not given
#   BATCH_SIZE, LEARNING_RATE (of the prediction stage and the teacher), EVAL_STEP, DEVICE, DEVICE_LIST
set -euo pipefail
source "$(dirname "$0")/common.sh"
source test/env_npu_1p.sh

fail() {
    echo "pipeline.sh: error: $1" >&2
    exit 2
}

for flag in "$@"; do
    case "${flag%%=*}" in
        --task_name | --task_file | --data_dir | --teacher_model | --student_model | --output_dir | --fps_acc_dir | \
            --max_seq_length | --device | --device_list | --seed | --aug_train | --do_lower_case | --pred_distill | --do_*)
            fail "${flag%%=*} is not for all parts: the variables at the head of this script set it" ;;
    esac
done
if [ -n "${TASK_NAME:-}" ] && [ -n "${TASK_FILE:-}" ]; then fail "give only one of TASK_NAME and TASK_FILE"; fi
if [ -n "${TASK_NAME:-}" ]; then
    name="$TASK_NAME"
    folder="$name"
    case "${name,,}" in *-mm) folder="${name::-3}" ;; esac # both of MNLI's sets lie in one folder
    for other in glue_dir/*; do # a task is named in any case
        if [ "${other,,}" = "glue_dir/${folder,,}" ]; then folder="${other#glue_dir/}"; fi
    done
    name="${name^^}" # one work folder, however the task is written
    task=(--task_name "$TASK_NAME" --data_dir "${DATA_DIR:-glue_dir/$folder}")
elif [ -n "${TASK_FILE:-}" ]; then
    name="$(basename "${TASK_FILE%.*}")"
    task=(--task_file "$TASK_FILE")
    if [ -n "${DATA_DIR:-}" ]; then task+=(--data_dir "$DATA_DIR"); fi
else
    fail "give TASK_NAME, a task of GLUE, or TASK_FILE, the description of your own (README)"
fi
work="${WORK_DIR:-pipeline/$name}"
student_start="${STUDENT_MODEL:-general_tinybert}"
teacher="${TEACHER_MODEL:-$work/teacher}"
parts=(teacher intermediate student evaluation)

# Without DO_LOWER_CASE the models' own files tell their case.
case_flags=()
if [ "${DO_LOWER_CASE:-0}" != 0 ]; then case_flags=(--do_lower_case); fi
reads=("${task[@]}" ${case_flags[@]+"${case_flags[@]}"})
if [ -n "${MAX_SEQ_LENGTH:-}" ]; then reads+=(--max_seq_length "$MAX_SEQ_LENGTH"); fi
runs=("${reads[@]}" --fps_acc_dir "$work/output" --seed "${SEED:-42}"
    --device "${DEVICE:-auto}" --device_list "${DEVICE_LIST:-0}")
trains=("${runs[@]}" --train_batch_size "${BATCH_SIZE:-32}")
if [ -n "${EVAL_STEP:-}" ]; then trains+=(--eval_step "$EVAL_STEP"); fi
distils=("${trains[@]}")
if [ "${AUG_TRAIN:-0}" != 0 ]; then distils+=(--aug_train); fi

epochs() { # the flag for a number of epochs, where one is given
    if [ -n "$1" ]; then printf '%s\n' --num_train_epochs "$1"; fi
}

# Runs a part unless its mark says that it is done; then it marks it, and forgets that later parts were done.
part() {
    local part="$1" title="$2" mark="$work/$1.done"
    shift 2
    echo
    echo "=== $title"
    if [ -f "$mark" ]; then
        if [ "$(cat "$mark")" = "$*" ]; then
            echo "done already: $work/$part"
        else
            echo "done already, but with other settings: $work/$part is kept. To make it anew: rm $mark"
        fi
        return
    fi
    local other seen=0
    for other in "${parts[@]}"; do
        if [ "$other" = "$part" ]; then seen=1; fi
        if [ "$seen" = 1 ]; then rm -f "$work/$other.done"; fi
    done
    if [ "${RESUME:-0}" != 0 ] && [ "$part" != evaluation ]; then
        "$@" --resume
    else
        "$@"
    fi
    mkdir -p "$work"
    echo "$*" >"$mark"
}

evaluate() {
    local role
    for role in teacher student; do
        "$PYTHON" task_distill.py --do_eval "${runs[@]}" --student_model "$1" --output_dir "$work/evaluation/$role" "${@:3}"
        set -- "$2" "$1" "${@:3}"
    done
}

if [ -d "$work" ] && [ -n "$(ls -A "$work")" ] && [ ! -f "$work/made_by_pipeline" ]; then
    fail "$work is not empty and was not made by this script; give another WORK_DIR"
fi
mkdir -p "$work"
if [ ! -f "$work/made_by_pipeline" ]; then touch "$work/made_by_pipeline"; fi
leave_nothing_empty() { # a mistake that the first part tells leaves no folder behind
    if [ "$(ls -A "$work")" = made_by_pipeline ]; then rm "$work/made_by_pipeline" && rmdir "$work"; fi
}
trap leave_nothing_empty EXIT

if [ -z "${TEACHER_MODEL:-}" ]; then
    mapfile -t long < <(epochs "${TEACHER_EPOCHS:-}")
    part teacher "the teacher, fine-tuned from ${BERT_MODEL:-bert_base_uncased}" \
        "$PYTHON" task_distill.py --do_finetune "${trains[@]}" ${long[@]+"${long[@]}"} \
        --teacher_model "${BERT_MODEL:-bert_base_uncased}" --output_dir "$teacher" --overwrite_output_dir \
        --learning_rate "${LEARNING_RATE:-3e-5}" "$@"
fi
mapfile -t long < <(epochs "${EPOCHS:-}")
part intermediate "intermediate-layer distillation" \
    "$PYTHON" task_distill.py "${distils[@]}" ${long[@]+"${long[@]}"} --transfer_learning \
    --teacher_model "$teacher" --student_model "$student_start" \
    --output_dir "$work/intermediate" --overwrite_output_dir "$@"
mapfile -t long < <(epochs "${PRED_EPOCHS:-}")
part student "prediction-layer distillation" \
    "$PYTHON" task_distill.py --pred_distill "${distils[@]}" ${long[@]+"${long[@]}"} \
    --teacher_model "$teacher" --student_model "$work/intermediate" \
    --output_dir "$work/student" --overwrite_output_dir --learning_rate "${LEARNING_RATE:-3e-5}" "$@"
part evaluation "evaluation of teacher and student" evaluate "$teacher" "$work/student" "$@"

echo
echo "=== the student at work, on rows of the dev file"
"$PYTHON" test/demo.py --model "$work/student" "${reads[@]}"
"$PYTHON" test/results_table.py --log "$work/output/metrics.jsonl" "the teacher=$teacher" "the student=$work/student"
echo "Judged on the dev files, the first of which also chose the checkpoints. The student is in $work/student."
