"""The logs of main.py's runs: speed, lines, names, the teacher's metric."""

import re

import pytest
from cases import Golden, next_run, read_bin

from distillation.runtime.logs import FpsMeter
from distillation.training import trainer


def test_fps_counts_the_examples_that_were_trained(sst2, monkeypatch):
    """Trap 16: not --eval_batch_size and not a micro-batch; times of evaluation and saving are logged separately."""
    counted = []
    count = FpsMeter.count
    monkeypatch.setattr(FpsMeter, "count", lambda meter, examples: (counted.append(examples), count(meter, examples)))
    sst2.run(
        pred_distill=True,
        train_batch_size=3,
        eval_batch_size=100,
        gradient_accumulation_steps=3,
        num_train_epochs=2,
    )
    assert counted == [3, 3, 2] * 2
    aside = sst2.events("end")[0]["seconds_aside"]
    assert aside.keys() == {"evaluation", "saving"}
    assert min(aside.values()) > 0


@pytest.mark.parametrize("stage", [{}, {"pred_distill": True}], ids=["intermediate", "prediction"])
def test_performance_mode_ends_the_run_after_its_steps(sst2, monkeypatch, stage):
    """Trap 26: the original leaves only the inner loop, at step 1100. Model and logs are written."""
    assert trainer.PERFORMANCE_STEPS == 1000
    monkeypatch.setattr(trainer, "PERFORMANCE_STEPS", 7)
    output = sst2.run(**stage, performance=True, train_batch_size=4, num_train_epochs=50, eval_step=1000).out
    assert output.splitlines()[-1] == "End performance testing. Ready to exit."
    assert sst2.series("step")[-1] == 7  # in the fourth epoch
    (end,) = sst2.events("end")
    assert end["steps"] == 7
    assert end["fps"] > 0
    assert read_bin(sst2.model)
    number = 2 if stage else 1
    lines = (sst2.output / f"train_performance_1p_{number}.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7
    # The schedule of the learning rate is that of all 50 epochs of 2 steps.
    assert sst2.series("learning_rate")[-1] == pytest.approx(5e-5 * (6 / 10 if stage else 1))


def test_logs_have_the_originals_names_and_lines(sst2):
    """Stage 2 logs the accuracy after the first evaluation; a second run appends (trap 17)."""
    flags = {"train_batch_size": 4, "num_train_epochs": 2, "output_txt_step": 2}
    sst2.run(**flags)
    next_run(sst2, "second", output=sst2.output).run(pred_distill=True, eval_step=3, **flags)
    next_run(sst2, "third", output=sst2.output).run(pred_distill=True, eval_step=3, **flags)
    first = (sst2.output / "train_full_1p_1.txt").read_text(encoding="utf-8").splitlines()
    second = (sst2.output / "train_full_1p_2.txt").read_text(encoding="utf-8").splitlines()
    fps, acc = r"FPS\d+\.\d\d ", r"acc[01]\.\d{4}"
    expected = [rf"\[CPU:0\]  epoch {epoch} step1 {fps}" for epoch in range(2)]
    assert all(map(re.fullmatch, expected, first)), first
    assert len(first) == 2
    expected = [line + acc for line in expected]  # each epoch is evaluated
    assert all(map(re.fullmatch, expected * 2, second)), second
    assert len(second) == 4
    assert {path.name for path in sst2.output.iterdir()} == {
        "train_full_1p_1.txt",
        "train_full_1p_2.txt",
        "metrics.jsonl",
        "debug_layer_loss.log",
    }


def test_output_txt_step_counts_steps_over_epochs(sst2):
    """Counted within epochs, RTE's 78 steps per epoch would log no line with the default of 100."""
    sst2.run(train_batch_size=4, num_train_epochs=6, output_txt_step=5)
    assert sst2.series("step") == [5, 10, 12]  # the last step is always logged
    lines = (sst2.output / "train_full_1p_1.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("FPS")[0] for line in lines] == [
        f"[CPU:0]  epoch {e} step{n} " for e, n in ((2, 0), (4, 1), (5, 1))
    ]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"do_eval": True, "teacher_model": None}, "train_eval_1p"),
        ({"do_finetune": True, "student_model": None}, "train_teacher_1p"),
        ({"transfer_learning": True}, "train_finetune_1p_1"),
        ({"transfer_learning": True, "pred_distill": True}, "train_finetune_1p_2"),
    ],
)
def test_each_kind_of_run_has_its_log_name(sst2, flags, name):
    sst2.run(**flags)
    assert f"{name}.txt" in {path.name for path in sst2.output.iterdir()}


def test_the_teachers_metric_is_logged_before_training(sst2):
    golden = Golden("sst2_small")
    right = golden.figures["teacher_logits"].argmax(axis=1) == golden.figures["feat_label_ids"]
    lines = sst2.run().out.splitlines()
    (line,) = [line for line in lines if line.startswith("the teacher's own dev.tsv: acc")]
    assert f"acc {right.mean():.4f}" in line
    metrics = (sst2.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [line.split('"event": "')[1].split('"')[0] for line in metrics] == ["teacher", "train", "end"]


def test_the_console_shows_sizes_precision_rate_and_loss_terms(sst2):
    words = sst2.run(num_train_epochs=1).out
    assert " in fp32: " in words
    assert "1 epoch\n" in words
    assert re.search(r"^the teacher: 6 layers, hidden 48, \S+ million parameters$", words, re.MULTILINE)
    assert re.search(r"^step 1 of 1, epoch 1: loss \S+, att_loss \S+, rep_loss \S+, learning_rate 5e-05", words, re.M)
    assert not re.search(r" 0 s\b|1 epochs|FPS 0", words)
