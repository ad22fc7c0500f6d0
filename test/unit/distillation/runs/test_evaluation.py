"""Evaluation: every example once and in order, metrics that are numbers, and the chosen dev file."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import Golden, assert_close, assert_same_weights, call, edit_weights, read_bin, write_rows

import task_distill
from data_processing import batching, tasks
from data_processing.batching import Collator
from data_processing.cache import Cache
from data_processing.examples import read_examples
from data_processing.features import make_features
from data_processing.metrics import METRICS, Metric, accuracy
from data_processing.tasks import find_task
from distillation.evaluation import Predictor
from distillation.runtime.device import Process
from distillation.runtime.full_precision import Precision
from distillation.runtime.mixed_precision import TorchMixedPrecision
from distillation.teacher.query import TeacherQuery
from distillation.teacher.teacher import load_or_compute_logits
from distillation.training import trainer
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

CPU = Process(torch.device("cpu"))


def predictor(collator: Collator, batch_size: int = 5) -> Predictor:
    return Predictor(collator, batch_size, CPU, Precision())


@pytest.fixture
def parts(golden, tmp_path):
    """The golden teacher and its dev set."""
    place = golden.workplace(tmp_path)
    model = TinyBertForSequenceClassification.from_pretrained(place.teacher)
    examples = read_examples(place.data / "train.tsv", find_task(place.task))
    features = make_features(examples, BertTokenizer.from_pretrained(place.teacher), place.max_seq_length)
    return golden, model, features, place


class MetricInTurn(Metric):
    def chance_level(self, labels: np.ndarray) -> float:
        return 0.0  # without another call of the metric


def metrics_in_turn(monkeypatch, task_name: str, values: list[float]) -> list[np.ndarray]:
    """Replace a task's metric by these values, one for each evaluation; return the predictions that it gets."""
    seen: list[np.ndarray] = []

    def metric(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        seen.append(predictions)
        return {"acc": values[len(seen) - 1]}

    table = tuple(
        dataclasses.replace(task, metric=MetricInTurn(metric, "acc")) if task.name == task_name else task
        for task in tasks.TASKS
    )
    monkeypatch.setattr(tasks, "TASKS", table)
    return seen


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
@pytest.mark.parametrize("to_maximum", [False, True], ids=["longest", "max_length"])
def test_every_example_is_predicted_once_and_in_order(parts, batch_size, to_maximum):
    """Trap 14: the original shuffles and drops the last batch."""
    golden, model, features, place = parts
    logits = predictor(Collator(to_maximum, place.max_seq_length), batch_size).logits(model, features)
    assert_close(logits, golden.figures["teacher_logits"], atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_outputs_that_are_not_finite_end_the_evaluation(parts, value, row):
    _, model, features, place = parts
    with torch.no_grad():
        model.classifier.bias[row] = value
    with pytest.raises(UserError, match=f"evaluation: .* {len(features)} of {len(features)} texts are not finite"):
        predictor(Collator(False, place.max_seq_length)).evaluate(model, features, find_task(place.task))


@pytest.mark.parametrize("flags", [{"do_eval": True}, {"do_predict": True}])
def test_a_run_whose_outputs_overflow_writes_no_result(sst2, flags):
    """Each weight is finite; the sum over the hidden size is not."""
    edit_weights(sst2.student, lambda w: w["classifier.weight"].fill_(3e38))
    write_rows(sst2.data / "test.tsv", [["index", "sentence"], ["0", "a good film"]])
    done = call(task_distill.main, sst2.flags(teacher_model=None, task_name="SST-2", **flags))
    assert done.status == 2
    assert "not finite" in done.err
    assert not list(sst2.folder.rglob("eval_results.txt"))
    assert not list(sst2.folder.rglob("SST-2.tsv"))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_evaluated_in_eval_mode_and_left_in_its_own(parts, training):
    golden, model, features, place = parts
    model.train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    logits = predictor(Collator(True, place.max_seq_length), 4).logits(model, features)
    assert_close(logits, golden.figures["teacher_logits"], atol=1e-5)
    assert model.training is training


def test_metrics_are_those_of_all_examples(parts):
    golden, model, features, place = parts
    result = predictor(Collator(True, place.max_seq_length)).evaluate(model, features, find_task(place.task))
    logits, labels = golden.tensor("teacher_logits"), golden.tensor("feat_label_ids")
    assert result.examples == len(labels)
    assert result.metrics["acc"] == (logits.argmax(dim=1) == labels).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert result.metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert result.examples_per_second == pytest.approx(result.examples / result.seconds)


def test_a_metric_that_is_nan_counts_as_0(parts):
    """Trap 40."""
    _, model, features, place = parts
    task = dataclasses.replace(find_task(place.task), metric=Metric(lambda *_: {"acc": math.nan, "other": 0.25}, "acc"))
    result = predictor(Collator(True, place.max_seq_length)).evaluate(model, features, task)
    assert (result.metrics["acc"], result.metrics["other"]) == (0.0, 0.25)


def test_accuracy():
    assert accuracy(np.array([0, 1, 2, 1]), np.array([0, 1, 1, 1])) == {"acc": 0.75}


@pytest.mark.parametrize("value", [math.nan, 0.0, -0.5])
def test_a_model_is_saved_whatever_its_metric_is(sst2, monkeypatch, value):
    """Traps 19 and 40: best = 0.0 at the start, or a NaN that compares false, saved nothing."""
    metrics_in_turn(monkeypatch, "SST-2", [value] * 10)
    sst2.run(pred_distill=True, num_train_epochs=3, eval_step=1)
    assert read_bin(sst2.model)
    (end,) = sst2.events("end")
    assert end["best"] == (0.0 if math.isnan(value) else value)


def test_the_best_checkpoint_stays(sst2, monkeypatch):
    """Its weights are those of the step that was best, the first of equals, not of the end."""
    metrics_in_turn(monkeypatch, "SST-2", [0.1, 0.2, 0.8, 0.5, 0.8, 0.7])
    done = sst2.run(pred_distill=True, num_train_epochs=5, eval_step=1, learning_rate=1e-3)
    (end,) = sst2.events("end")
    assert end["best"] == 0.8
    assert "dev.tsv chose the checkpoint of step 2" in done.out
    best = read_bin(sst2.model)

    metrics_in_turn(monkeypatch, "SST-2", [0.1, 0.2])
    monkeypatch.setattr(trainer, "PERFORMANCE_STEPS", 2)  # the same run, left after its second step
    sst2.model = sst2.folder / "two_steps"
    sst2.run(pred_distill=True, num_train_epochs=5, eval_step=1000, learning_rate=1e-3, performance=True)
    assert_same_weights(best, read_bin(sst2.model))


def test_mnli_is_evaluated_on_both_files_and_matched_chooses(mnli):
    """Trap 15: the two dev sets' labels are opposed, so that one falls while the other rises."""
    golden = Golden("mnli_small")
    header, *rows = golden.case["rows"]
    for name, label in (("dev_matched", "entailment"), ("dev_mismatched", "neutral")):
        write_rows(mnli.data / f"{name}.tsv", [header, *([*row[:-1], label] for row in rows)])
    write_rows(mnli.data / "train.tsv", [header, *([*row[:-1], "entailment"] for row in rows)])
    done = mnli.run(do_finetune=True, student_model=None, num_train_epochs=6, eval_step=1, learning_rate=1e-3)
    events = mnli.events("eval")
    by_file = {
        name: [e["acc"] for e in events if e["file"] == name] for name in ("dev_matched.tsv", "dev_mismatched.tsv")
    }
    assert [len(values) for values in by_file.values()] == [6, 6]
    matched = by_file["dev_matched.tsv"]
    assert max(matched) == 1.0 > max(by_file["dev_mismatched.tsv"])
    assert by_file["dev_mismatched.tsv"][-1] == 0.0
    (end,) = mnli.events("end")
    assert end["best"] == 1.0
    assert "dev_matched.tsv chose the checkpoint" in done.out

    results = [folder / "eval_results.txt" for folder in (mnli.model, mnli.folder / "model-MM")]
    accuracies = [
        [
            float(line.split(" = ")[1])
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith("acc")
        ]
        for path in results
    ]
    assert accuracies == list(by_file.values())


def test_mnli_mm_is_evaluated_on_the_mismatched_file_alone(mnli):
    (mnli.data / "dev_matched.tsv").unlink()
    mnli.task, mnli.entry = "mnli-mm", task_distill
    mnli.run(do_eval=True, student_model=mnli.teacher, teacher_model=None)
    assert [event["file"] for event in mnli.events("eval")] == ["dev_mismatched.tsv"]


@pytest.mark.parametrize("task", ["sst2", "mnli"])
def test_evaluating_alone_gives_the_figures_of_the_run_that_saved_the_model(task, request):
    place = request.getfixturevalue(task)
    place.run(do_finetune=True, student_model=None, num_train_epochs=4, eval_step=1, learning_rate=3e-4)
    trained = place.events("eval")
    (end,) = place.events("end")
    place.student, place.model, place.output = place.model, place.folder / "result", place.folder / "output2"
    place.run(do_eval=True, teacher_model=None, padding="longest", eval_batch_size=3)
    evaluated = place.events("eval")
    assert evaluated[0]["acc"] == end["best"]
    best = next(event for event in trained if event["acc"] == end["best"])
    assert evaluated[0]["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-4)


def test_the_root_folder_is_refused_as_output_dir(sst2):
    assert "--output_dir" in sst2.fails(do_eval=True, student_model=sst2.teacher, teacher_model=None, output_dir="/")


def test_both_results_of_mnli_are_copied(mnli):
    mnli.entry = task_distill
    mnli.run(do_eval=True, student_model=mnli.teacher, teacher_model=None, data_url=mnli.folder / "copied")
    for name in ("copied", "copied-MM"):
        assert "acc = " in (mnli.folder / name / "eval_results.txt").read_text(encoding="utf-8")


def test_a_performance_run_does_not_evaluate_the_teacher(sst2):
    sst2.run(performance=True)
    assert sst2.events("teacher") == []


def test_logits_of_bucketed_lengths_are_cached_apart(parts, tmp_path):
    """They differ in their last bits."""
    _, model, features, _ = parts
    cache = Cache(tmp_path / "cache", 10**6)
    for bucketed_lengths, found in ((False, False), (True, False), (False, True), (True, True)):
        collator = Collator(False, 64, bucketed_lengths=bucketed_lengths)
        _, seconds = load_or_compute_logits(TeacherQuery(model, "digest", features, predictor(collator), cache))
        assert (seconds is None) is found


@pytest.mark.parametrize(("device", "bucketed"), [("cpu", True), ("cuda", False)])
def test_half_precision_buckets_lengths_on_a_cpu(device, bucketed):
    assert TorchMixedPrecision(torch.device(device), torch.bfloat16, "O1", 1.0).bucketed_lengths is bucketed


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("stage", [{"pred_distill": True}, {}, {"do_eval": True}], ids=str)
def test_a_run_in_half_precision_pads_to_bucketed_lengths(sst2, monkeypatch, amp, stage):
    rounded = []
    monkeypatch.setattr(batching, "bucketed_length", lambda length: rounded.append(length) or length)
    assert sst2.run(amp=amp, amp_dtype="bf16", padding="longest", **stage).status == 0
    assert bool(rounded) is amp


@pytest.mark.parametrize("stage", [{}, {"pred_distill": True}, {"do_finetune": True, "student_model": None}])
def test_a_model_that_is_no_better_than_chance_is_warned_of(sst2, stage):
    """Every output is that of label 1, as the most frequent label of the dev set."""
    write_rows(sst2.data / "dev.tsv", [["sentence", "label"], ["a good film", "1"], ["a film", "1"], ["bad", "0"]])

    def always_one(weights):
        weights["classifier.weight"].zero_()
        weights["classifier.bias"].copy_(torch.tensor([-9.0, 9.0]))

    edit_weights(sst2.teacher, always_one)
    done = sst2.run(**stage, learning_rate=1e-6)
    (line,) = [line for line in (done.out + done.err).splitlines() if "no better" in line]
    assert "acc 0.6667 on dev.tsv" in line
    assert ("id2label" in line) == ("do_finetune" not in stage)


@pytest.mark.parametrize(
    ("metric", "labels", "level"),
    [
        ("accuracy", [0, 1, 1, 2], 0.5),
        ("f1", [0, 0, 1, 1], 2 / 3),
        ("macro_f1", [0, 1, 1, 1], 3 / 7),
        ("matthews", [0, 1, 1], 0.0),
        ("correlation", [0.5, 1.0, 4.0], 0.0),
    ],
)
def test_the_chance_level_is_the_best_constant_prediction(metric, labels, level):
    assert METRICS[metric].chance_level(np.array(labels)) == pytest.approx(level)
