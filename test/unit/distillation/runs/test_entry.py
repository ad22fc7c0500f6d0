"""main.py from end to end on tiny cases: every kind of run, the files that it writes and those that it leaves."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    ROOT,
    Golden,
    assert_close,
    assert_same_weights,
    call,
    command,
    edit_config,
    edit_weights,
    linear,
    next_run,
    read_bin,
    weights_of,
    write_rows,
)

import main
from data_processing.batching import Collator
from transformer.configuration import BertConfig
from transformer.heads import TinyBertForSequenceClassification

HEADER = ["sentence", "label"]


def under(keys, prefixes: tuple[str, ...]) -> set[str]:
    return {key for key in keys if key.startswith(prefixes)}


def drop(folder: Path, *prefixes: str) -> None:
    """Remove tensors from a checkpoint."""
    edit_weights(folder, lambda weights: [weights.pop(key) for key in under(weights, prefixes)])


def test_a_fine_tuned_teacher_trains_a_student_in_both_stages(sst2):
    """Trap 34: the student reaches the accuracy of its teacher."""
    drop(sst2.teacher, "classifier.", "fit_dense.")
    log = sst2.run(do_finetune=True, student_model=None, num_train_epochs=30, learning_rate=2e-3, eval_step=5).out
    assert "not in the checkpoint, newly initialized: classifier" in log
    teacher_accuracy = sst2.events("end")[0]["best"]
    assert teacher_accuracy >= 7 / 8
    assert sorted(path.name for path in sst2.model.iterdir()) == [
        "config.json",
        "eval_results.txt",
        "pytorch_model.bin",
        "run.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]

    first = next_run(sst2, "first", teacher=sst2.model)
    first.run(num_train_epochs=20, learning_rate=5e-3)
    losses = np.add(first.series("att_loss"), first.series("rep_loss"))
    assert losses[-1] < losses[0] / 4
    assert first.events("teacher")[0]["acc"] == teacher_accuracy

    second = next_run(sst2, "second", teacher=sst2.model, student=first.model)
    second.run(pred_distill=True, num_train_epochs=30, learning_rate=2e-3, eval_step=5)
    best = second.events("end")[0]["best"]
    assert best >= 7 / 8

    last = next_run(sst2, "last", student=second.model)
    assert f"{second.model}: dev.tsv: acc {best:.4f}, " in last.run(do_eval=True, teacher_model=None).out


@pytest.mark.parametrize("stage", [{}, {"pred_distill": True}, {"do_finetune": True, "student_model": None}], ids=str)
def test_two_runs_with_one_seed_give_the_same_weights(sst2, stage):
    """Trap 4, with dropout and threads; another seed gives other weights."""
    for folder in (sst2.teacher, sst2.student):
        edit_config(folder, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    drop(sst2.student, "classifier.", "fit_dense.")  # so that new weights are drawn too
    saved = []
    for number, seed in enumerate((7, 7, 8)):
        run = next_run(sst2, str(number))
        run.run(
            **stage, seed=seed, train_batch_size=3, num_train_epochs=2, eval_step=100, workers=2, learning_rate=1e-3
        )
        saved.append(read_bin(run.model))
    assert_same_weights(saved[0], saved[1])
    assert any(not torch.equal(saved[0][key], saved[2][key]) for key in saved[0])


def test_the_schedule_spans_the_optimizer_steps(sst2):
    """Trap 5: not micro-batches, and the short last batch counts. 8 examples by 3 are 3 steps an epoch."""
    sst2.run(
        pred_distill=True,
        train_batch_size=3,
        gradient_accumulation_steps=3,
        num_train_epochs=4,
        learning_rate=1e-3,
        warmup_proportion=0.25,
    )
    progress = np.arange(12) / 12
    expected = np.where(progress < 0.25, progress / 0.25, (1 - progress) / 0.75) * 1e-3
    assert_close(sst2.series("learning_rate"), expected, atol=1e-9)
    assert sst2.series("step") == list(range(1, 13))


def test_the_intermediate_stages_rate_is_constant(sst2):
    sst2.run(train_batch_size=3, num_train_epochs=2, learning_rate=1e-3)
    assert sst2.series("learning_rate") == [1e-3] * 6


@pytest.mark.parametrize(
    ("pred_distill", "frozen"),
    [(False, ("classifier.", "bert.pooler.")), (True, ("fit_dense.",))],
    ids=["intermediate", "prediction"],
)
def test_a_stage_leaves_the_parameters_that_it_does_not_train(sst2, pred_distill, frozen):
    """Trap 8: not even weight decay changes them; all others change."""
    sst2.run(pred_distill=pred_distill, num_train_epochs=3, learning_rate=1e-3, weight_decay=0.5, warmup_proportion=0)
    before, after = read_bin(sst2.student), read_bin(sst2.model)
    unmoved = {key for key in before if torch.equal(before[key], after[key])}
    # The softmax over keys does not depend on a key's bias, so its gradient is 0, and biases do not decay.
    may_stay = {key for key in before if pred_distill and key.endswith("self.key.bias")}
    assert unmoved - may_stay == under(before, frozen)


def test_weight_decay_acts_on_all_but_biases_and_layer_norms(sst2):
    """Trap 12: the original reads the flag and applies 0.01. After one step the gradients are still the same."""
    saved = {}
    for decay in ("0", "0.5"):
        run = next_run(sst2, decay)
        run.run(weight_decay=decay, learning_rate=1e-2)
        saved[decay] = read_bin(run.model)
    start = read_bin(sst2.student)
    for key, tensor in start.items():
        frozen = key.startswith(("classifier.", "bert.pooler."))
        decays = not (frozen or key.endswith("bias") or "LayerNorm" in key)
        assert_close(saved["0.5"][key] - saved["0"][key], -1e-2 * 0.5 * tensor * decays, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_collate_batches_in_threads(sst2, monkeypatch, workers):
    """Trap 12."""
    threads = set()
    collate = Collator.collate

    def noted(self, features, examples):
        threads.add(threading.current_thread().name.split("_")[0])
        return collate(self, features, examples)

    monkeypatch.setattr(Collator, "collate", noted)
    sst2.run(workers=workers, train_batch_size=1)
    assert ("batches" in threads) == (workers > 0)


def test_only_padding_max_length_counts_padding_in_the_losses(sst2):
    """Trap 13: with the same sentences, more padding changes no loss of the default."""
    write_rows(sst2.data / "train.tsv", [HEADER, ["a warm film .", "1"], ["a dull film with awful acting", "0"]])
    losses = {}
    for padding in ("longest", "max_length"):
        for length in (16, 32):
            run = next_run(sst2, f"{padding}{length}")
            run.run(padding=padding, max_seq_length=length, num_train_epochs=2)
            losses[padding, length] = np.array([run.series("att_loss"), run.series("rep_loss")])
    assert_close(losses["longest", 16], losses["longest", 32], rtol=1e-5)
    assert (np.abs(losses["max_length", 16] / losses["max_length", 32] - 1) > 1e-2).all()


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize(("eval_step", "steps"), [(2, [2, 4, 6]), (4, [3, 4, 6]), (50, [3, 6])])
def test_evaluations_come_once_a_step_and_at_least_once_an_epoch(sst2, accumulation, eval_step, steps):
    """Traps 18 and 20: 8 examples by 3 and 2 epochs are 6 steps."""
    sst2.run(
        pred_distill=True,
        train_batch_size=3,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        eval_step=eval_step,
    )
    assert [event["step"] for event in sst2.events("eval")] == steps


@pytest.mark.parametrize("pred_distill", [False, True])
def test_a_run_shorter_than_an_eval_step_is_saved(sst2, pred_distill):
    """Trap 18."""
    sst2.run(pred_distill=pred_distill, num_train_epochs=1, eval_step=100, warmup_proportion=0)
    start, saved = read_bin(sst2.student), read_bin(sst2.model)
    assert start.keys() == saved.keys()
    assert any(not torch.equal(start[key], saved[key]) for key in start)


def test_the_last_step_is_evaluated_once_where_it_is_an_eval_step(sst2):
    sst2.run(pred_distill=True, train_batch_size=4, num_train_epochs=2, eval_step=2)
    assert [event["step"] for event in sst2.events("eval")] == [2, 4]


@pytest.mark.parametrize("head", [None, "relu", "linear"])
@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "Other"])
def test_the_flag_or_else_the_config_sets_the_teachers_head(sst2, head, architecture):
    """Trap 31."""
    edit_config(sst2.teacher, architectures=[architecture])
    edit_config(sst2.student, architectures=["BertForSequenceClassification"])
    sst2.run(teacher_head=head)
    golden = Golden("sst2_small")
    linear_head = head == "linear" or (head is None and architecture == "BertForSequenceClassification")
    changes = {"architectures": ["BertForSequenceClassification"] if linear_head else []}
    model = TinyBertForSequenceClassification(BertConfig.from_dict(golden.config("teacher") | changes), 2, 48).eval()
    model.load(golden.weights("teacher"), "teacher")
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(*golden.inputs()).logits, golden.tensor("feat_label_ids"))
    assert sst2.events("teacher")[0]["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    # The student keeps its own head.
    assert BertConfig.from_pretrained(sst2.model).architectures == ["BertForSequenceClassification"]


def test_projections_of_each_layer_are_trained_and_saved(sst2):
    """Trap 32."""
    shapes = {key: shape for n in range(4) for key, shape in linear(f"fit_denses.{n}", 32, 48).items()}
    drop(sst2.student, "fit_dense.")
    edit_weights(sst2.student, lambda weights: weights.update(weights_of(shapes)))
    sst2.run(num_train_epochs=2, learning_rate=1e-3)
    before, after = read_bin(sst2.student), read_bin(sst2.model)
    assert before.keys() == after.keys()
    moved = {key for key in after if "fit_dense" in key and not torch.equal(before[key], after[key])}
    assert moved == under(before, ("fit_denses.",))


def test_a_projection_to_another_hidden_size_is_initialized(sst2):
    edit_weights(sst2.student, lambda w: w.update(weights_of(linear("fit_dense", 32, 768))))
    log = sst2.run().out
    assert "student: not in the checkpoint, newly initialized: fit_dense" in log
    assert read_bin(sst2.model)["fit_dense.weight"].shape == (48, 32)


def test_missing_and_unused_weights_are_logged(sst2):
    """Trap 23."""
    drop(sst2.student, "fit_dense.")
    edit_weights(sst2.student, lambda w: w.update({"cls.predictions.bias": torch.zeros(100)}))
    log = sst2.run().out.splitlines()
    assert f"{sst2.student}: not in the checkpoint, newly initialized: fit_dense" in log
    assert f"{sst2.student}: in the checkpoint, not used: cls.predictions.bias" in log


@pytest.mark.parametrize("checkpoint", ["two labels", "none"])
@pytest.mark.parametrize("pred_distill", [False, True])
def test_transfer_learning_initializes_only_the_students_classifier(mnli, checkpoint, pred_distill):
    """Trap 28: the original threw away the teacher's, and failed on a checkpoint without a classifier."""

    drop(mnli.student, "classifier.")
    if checkpoint == "two labels":
        edit_weights(mnli.student, lambda weights: weights.update(weights_of(linear("classifier", 36, 2))))
    log = mnli.run(transfer_learning=True, pred_distill=pred_distill, num_train_epochs=2, learning_rate=1e-3).out
    assert "student: not in the checkpoint, newly initialized: classifier" in log
    golden = Golden("mnli_small")
    logits, labels = golden.tensor("teacher_logits"), golden.tensor("feat_label_ids")
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert mnli.events("teacher")[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert read_bin(mnli.model)["classifier.weight"].shape == (3, 36)


def test_transfer_learning_keeps_a_classifier_of_as_many_labels(mnli):
    mnli.run(transfer_learning=True, num_train_epochs=1)
    assert torch.equal(read_bin(mnli.model)["classifier.weight"], read_bin(mnli.student)["classifier.weight"])


def test_an_evaluation_appends_to_a_folder_that_is_not_empty(sst2):
    sst2.model.mkdir()
    (sst2.model / "mine.txt").write_text("mine", encoding="utf-8")
    for _ in range(2):
        sst2.run(do_eval=True, teacher_model=None)
    assert {path.name for path in sst2.model.iterdir()} == {"mine.txt", "eval_results.txt"}
    assert (sst2.model / "mine.txt").read_text(encoding="utf-8") == "mine"
    lines = (sst2.model / "eval_results.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" = ")[0] for line in lines] == ["acc", "eval_loss"] * 2


@pytest.mark.parametrize(
    ("task", "output_dir"),
    [
        ("sst2", "."),
        ("sst2", ".."),
        ("sst2", "result/"),
        ("mnli", "."),
        ("mnli", ".."),
        ("mnli", "result/"),
    ],
)
def test_an_evaluation_takes_relative_folders(task, output_dir, request, monkeypatch):
    place = request.getfixturevalue(task)
    (place.folder / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(place.folder / "a" / "b")
    place.run(do_eval=True, teacher_model=None, output_dir=output_dir)
    folder = {".": "a/b", "..": "a", "result/": "a/b/result"}[output_dir]
    assert (place.folder / folder / "eval_results.txt").is_file()
    assert (place.folder / f"{folder}-MM" / "eval_results.txt").is_file() == (task == "mnli")


def test_an_output_folder_is_overwritten_only_with_the_flag(sst2):
    """Trap 25."""
    sst2.run()
    first = read_bin(sst2.model)
    assert "--overwrite_output_dir" in sst2.fails(learning_rate=1e-3)
    assert_same_weights(read_bin(sst2.model), first)
    sst2.run(learning_rate=1e-3, overwrite_output_dir=True)
    second = read_bin(sst2.model)
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_aug_train_trains_on_the_augmented_file(sst2):
    write_rows(sst2.data / "train_aug.tsv", [HEADER, *([["a film", "1"]] * 20)])
    assert ": 20 examples of 4.0 tokens" in sst2.run(aug_train=True).out


def test_a_loss_that_is_not_finite_stops_the_run_and_the_good_checkpoint_stays(sst2):
    """Trap 10: one row's teacher logits are NaN; the dev set has no such row."""

    def poison(weights):
        weights["bert.embeddings.word_embeddings.weight"][Golden("sst2_small").case["vocab"].index("rock")] = (
            3e38  # overflows
        )

    edit_weights(sst2.teacher, poison)
    rows = [[f"a {word} film", str(n % 2)] for n, word in enumerate(["warm", "dull", "sad", "fun", "good", "bad"])]
    write_rows(sst2.data / "dev.tsv", [HEADER, *rows])
    write_rows(sst2.data / "train.tsv", [HEADER, *rows, ["a rock film", "1"]])
    flags = {"pred_distill": True, "train_batch_size": 1, "num_train_epochs": 1, "eval_step": 1, "learning_rate": 1e-3}
    done = call(main.main, sst2.flags(**flags))
    assert done.status == 2
    good = len(sst2.events("eval"))
    assert 0 < good < 7
    assert done.err.startswith(f"main.py: error: step {good + 1}: the loss is not finite (cls_loss nan); ")
    assert done.err.count("\n") == 1
    assert all(tensor.isfinite().all() for tensor in read_bin(sst2.model).values())
    next_run(sst2, "eval", student=sst2.model).run(do_eval=True, teacher_model=None)


def test_the_original_scripts_command_in_an_empty_folder(sst2):
    """Traps 2 and 27: without apex and torch_npu, from a folder without ./output; nothing on standard error."""
    (sst2.folder / "here").mkdir()
    for package in ("apex", "torch_npu"):  # importing one of them fails
        (sst2.folder / "here" / f"{package}.py").write_text("raise RuntimeError", encoding="utf-8")
    flags = sst2.flags(
        teacher_model="../teacher", student_model="../student", data_dir="../data", output_dir="new/model"
    )
    flags += ["--fps_acc_dir", "./output"]
    done = command(str(ROOT / "main.py"), *flags, cwd=sst2.folder / "here", PYTHONPATH=str(sst2.folder / "here"))
    assert (done.status, done.err) == (0, "")
    assert read_bin(sst2.folder / "here" / "new" / "model")
    assert (sst2.folder / "here" / "output" / "train_full_1p_1.txt").is_file()
