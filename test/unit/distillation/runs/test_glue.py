"""Each task of GLUE from end to end: a fine-tuned teacher, both stages, evaluation, predictions.

Expected values are computed without the project's readers, batches and metrics (`glue_rows.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import ROOT, Workplace, assert_close, command, edit_weights, linear, read_bin, weights_of
from glue_rows import FORMS, TEST, TRAIN, Form, Row, inputs_of, logits_of, workplace, write_file
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

import task_distill
from data_processing import tasks
from distillation.options import Options, parse_options
from transformer.heads import TinyBertForSequenceClassification
from transformer.optimization import decay_groups


@dataclass
class Done:
    """A task's folders after all its runs, and its rows by file."""

    name: str
    form: Form
    place: Workplace
    rows: dict[str, list[Row]]

    def folder(self, name: str) -> Path:
        return self.place.folder / name


@pytest.fixture(scope="module", params=FORMS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All runs of a task, with the flags that a user gives; logs go to their default folder."""
    folder = tmp_path_factory.mktemp(request.param)
    place, rows = workplace(folder, request.param)
    place.output = folder / "output" / request.param
    if request.param == "QQP":  # its files have rows with too few columns
        with (place.data / "train.tsv").open("a", encoding="utf-8") as file:
            file.write("8\n9\trock\na film\tbad\tgood\tdull\tfun\n")
    common = {"fps_acc_dir": None, "max_seq_length": None, "padding": "longest", "learning_rate": 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fine_tuning = {"do_finetune": True, "student_model": None, "output_dir": "tuned"}
        place.run(**common, **fine_tuning, num_train_epochs=25, train_batch_size=6)
        place.teacher = folder / "tuned"
        place.run(**common, output_dir="intermediate", num_train_epochs=None, train_batch_size=TRAIN)
        place.student = folder / "intermediate"
        both = {"pred_distill": True, "output_dir": "both", "eval_step": 12}
        place.run(**common, **both, num_train_epochs=None, train_batch_size=1)
        alone = common | {"teacher_model": None, "eval_batch_size": 4}
        for model in ("tuned", "both"):
            place.student = folder / model
            place.run(**alone, do_eval=True, output_dir=f"evaluated_{model}")
        place.student = folder / "tuned"  # whose predictions differ from row to row
        place.run(**alone, do_predict=True, output_dir="predicted")
    return Done(request.param, FORMS[request.param], place, rows)


def expected_metrics(form: Form, logits: np.ndarray, rows: Sequence[Row]) -> dict[str, float]:
    """Return the task's metrics by their formulas, and the loss."""
    if not form.labels:
        scores, wanted = logits[:, 0].astype(float), np.array([float(row.label) for row in rows])
        pearson = np.corrcoef(scores, wanted)[0, 1]
        spearman = np.corrcoef(scores.argsort().argsort(), wanted.argsort().argsort())[0, 1]
        loss = np.square(scores - wanted).mean()
        return {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2, "eval_loss": loss}
    wanted, predicted = np.array([form.labels.index(row.label) for row in rows]), logits.argmax(axis=1)
    tp, fp, fn, tn = (int(((predicted == s) & (wanted == w)).sum()) for s, w in ((1, 1), (1, 0), (0, 1), (0, 0)))
    acc, f1 = (predicted == wanted).mean(), 2 * tp / max(1, 2 * tp + fp + fn)
    mcc = (tp * tn - fp * fn) / max(1, (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    known = {"acc": acc, "f1": f1, "acc_and_f1": (acc + f1) / 2, "mcc": mcc}
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = -np.log(probabilities[np.arange(len(rows)), wanted]).mean()
    return {**{name: known[name] for name in form.metrics}, "eval_loss": loss}


def read_results(path: Path) -> list[dict[str, float]]:
    """Return the values of each evaluation in eval_results.txt."""
    results: list[dict[str, float]] = [{}]
    for line in path.read_text(encoding="utf-8").splitlines():
        name, value = line.split(" = ")
        if name in results[-1]:
            results.append({})
        results[-1][name] = float(value)
    return results


def read_predictions(path: Path) -> tuple[str, list[str], list[str]]:
    """Return the row of names, the ids and the predictions."""
    names, *rows = path.read_text(encoding="utf-8").splitlines()
    ids, values = zip(*(row.split("\t") for row in rows), strict=True)
    return names, list(ids), list(values)


def test_stages_last_the_tasks_default_epochs(done: Done) -> None:
    """The intermediate stage's batch is the whole file, so each step is an epoch."""
    assert [event["steps"] for event in done.place.events("end")] == [25 * 2, done.form.epochs, 3 * TRAIN]


def test_evaluation_writes_the_tasks_metrics(done: Done) -> None:
    """For each dev file, of which one row is truncated to the task's length; MNLI's second has a folder of its own."""
    for suffix, file in zip(("", "-MM"), done.form.dev_files, strict=False):
        (found,) = read_results(done.folder(f"evaluated_tuned{suffix}") / "eval_results.txt")
        logits = logits_of(done.folder("tuned"), done.rows[file], done.form.length)
        assert found.keys() == {*done.form.metrics, "eval_loss"}
        assert found == pytest.approx(expected_metrics(done.form, logits, done.rows[file]), abs=2e-5)
    assert done.folder("evaluated_tuned-MM").exists() == (done.name == "MNLI")


def test_the_saved_student_is_the_best_checkpoint(done: Done) -> None:
    """By the task's metric on the first dev file; evaluating the saved model gives the same value."""
    evaluations = [event for event in done.place.events("eval") if event["file"] == done.form.dev_files[0]]
    *during_training, _, alone = [event[done.form.chosen_by] for event in evaluations]
    assert len(during_training) == 25 + 3  # one for each epoch of fine-tuning and of the prediction stage
    *_, prediction = done.place.events("end")
    assert prediction["best"] == max(during_training[25:]) == pytest.approx(alone, abs=1e-4)


def test_predictions_are_a_submission_to_glue(done: Done) -> None:
    """For each row of the test file its id and the most probable label, or the score clipped to 0..5."""
    assert {path.name for path in done.folder("predicted").iterdir()} == set(done.form.submission.values())
    for file, submission in done.form.submission.items():
        names, ids, values = read_predictions(done.folder("predicted") / submission)
        logits = logits_of(done.folder("tuned"), done.rows[file], done.form.length)
        assert names == "index\tprediction"
        assert ids == [row.id for row in done.rows[file]]
        assert len(set(values)) > 1  # otherwise the order of the rows would not be tested
        if done.form.labels:
            assert values == [done.form.labels[number] for number in logits.argmax(axis=1)]
        else:
            assert_close([float(value) for value in values], logits[:, 0].clip(0, 5), atol=6e-4)
            assert {len(value.split(".")[1]) for value in values} == {3}


def test_fine_tuning_beats_a_constant_prediction(done: Done) -> None:
    fine_tuning, *_ = done.place.events("end")
    labels = [row.label for row in done.rows[done.form.dev_files[0]]]
    share = max(map(labels.count, labels)) / len(labels)
    assert fine_tuning["best"] > (share if done.form.chosen_by == "acc" else 0.5)


def test_logs_go_to_the_tasks_folder(done: Done) -> None:
    """One per kind of run; the evaluation's lines hold the selecting metric of each dev file."""
    names = {"train_teacher_1p.txt", "train_full_1p_1.txt", "train_full_1p_2.txt", "train_eval_1p.txt"}
    assert names <= {path.name for path in done.place.output.iterdir()}
    lines = (done.place.output / "train_eval_1p.txt").read_text(encoding="utf-8").splitlines()
    values = [event[done.form.chosen_by] for event in done.place.events("eval") if "step" not in event]
    assert len(values) == 2 * len(done.form.dev_files)
    assert [float(line.rsplit("acc", 1)[1]) for line in lines] == pytest.approx(values, abs=1e-4)
    predicted = [(event["file"], event["examples"]) for event in done.place.events("predict")]
    assert predicted == [(file, TEST) for file in done.form.submission]


def test_saved_models_name_their_labels(done: Done) -> None:
    """As words if the files write numbers; a regression has one output."""
    expected = done.form.words or done.form.labels
    for name in ("tuned", "intermediate", "both"):
        config = json.loads((done.folder(name) / "config.json").read_text(encoding="utf-8"))
        assert list(config["id2label"].values()) == list(expected)
        assert read_bin(done.folder(name))["classifier.weight"].shape[0] == len(expected)


@pytest.mark.parametrize("name", FORMS)
def test_epochs_and_length_default_to_the_tasks(name: str) -> None:
    form = FORMS[name]
    given = ["--num_train_epochs", "7", "--max_seq_length", "99"]
    cases = [([], form.epochs, form.length), (["--pred_distill"], 3, form.length), (given, 7, 99)]
    for flags, epochs, length in cases:
        options = options_of(name.lower(), *flags)
        assert (options.num_train_epochs, options.max_seq_length) == (epochs, length)
    assert options_of(name).eval_step == 50
    assert options_of(name).fps_acc_dir == Path("output") / name


def options_of(task: str, *flags: str) -> Options:
    folders = ["--data_dir", "d", "--teacher_model", "t", "--student_model", "s", "--output_dir", "o"]
    return parse_options([*folders, "--task_name", task, *flags], task_distill.ENTRY)


@pytest.mark.parametrize("name", ["CoLA", "MNLI", "MRPC", "STS-B", "QQP"])
def test_the_tasks_metric_selects_the_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selecting value is highest at the second evaluation, all other values at another one."""
    form, given = FORMS[name], []

    def compute(*_: np.ndarray) -> dict[str, float]:
        evaluation = min(len(given) // len(form.dev_files), 2)  # a last call asks for the level of chance
        first_file = len(given) % len(form.dev_files) == 0
        given.append(evaluation)
        chooses, other = (-0.2, -0.1, -0.3)[evaluation], (0.9, 0.1, 0.8)[evaluation]
        return {name: chooses if name == form.chosen_by and first_file else other for name in form.metrics}

    table = tuple(
        dataclasses.replace(task, metric=dataclasses.replace(task.metric, compute=compute)) for task in tasks.TASKS
    )
    monkeypatch.setattr(tasks, "TASKS", table)
    place, _ = workplace(tmp_path, name)
    place.run(do_finetune=True, student_model=None, train_batch_size=TRAIN, num_train_epochs=3, eval_step=1)
    assert place.events("end")[0]["best"] == -0.1
    results = read_results(place.model / "eval_results.txt")
    assert [step[form.chosen_by] for step in results] == [-0.2, -0.1, -0.3]
    assert [step["global_step"] for step in results] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("done", ["MNLI"], indirect=True)
def test_two_processes_predict_the_same_as_one(done: Done) -> None:
    """Each row once and in order, although one process has one row more and batches differ."""
    flags = {
        "do_predict": True,
        "student_model": done.folder("tuned"),
        "output_dir": done.folder("by_two_processes"),
    }
    flags |= {"max_seq_length": None, "padding": "longest", "eval_batch_size": 3, "device_list": "0,1"}
    run = command(str(ROOT / "task_distill.py"), *done.place.flags(**flags), cwd=done.place.folder)
    assert (run.status, run.err) == (0, "")
    assert (done.place.output / "predict_2p.txt").exists()
    for submission in done.form.submission.values():
        alone, shared = (done.folder(name) / submission for name in ("predicted", "by_two_processes"))
        assert shared.read_text(encoding="utf-8") == alone.read_text(encoding="utf-8")


@pytest.fixture
def regression(tmp_path: Path) -> tuple[Workplace, list[Row]]:
    """STS-B, with a classifier of one output in both models; its train and dev rows are the same, a batch each."""
    place, rows = workplace(tmp_path, "STS-B")
    for folder, hidden in ((place.teacher, 48), (place.student, 32)):
        edit_weights(folder, lambda weights, h=hidden: weights.update(weights_of(linear("classifier", h, 1))))
    write_file(place.data / "dev.tsv", FORMS["STS-B"].train, rows["train.tsv"])
    return place, rows["train.tsv"]


@pytest.mark.parametrize(
    ("flags", "trained", "target"),
    [
        ({"pred_distill": True}, "student", "labels"),
        ({"pred_distill": True, "regression_target": "labels"}, "student", "labels"),
        ({"pred_distill": True, "regression_target": "teacher"}, "student", "teacher"),
        ({"pred_distill": True, "regression_target": "teacher", "num_train_epochs": 2}, "student", "teacher"),
        ({"do_finetune": True, "student_model": None}, "teacher", "labels"),
    ],
    ids=["default", "labels", "teacher", "teacher for two epochs", "fine-tuning"],
)
def test_a_regression_is_trained_by_squared_error(
    regression: tuple[Workplace, list[Row]], flags: dict[str, Any], trained: str, target: str
) -> None:
    """The first gradient is that of the mean over the rows; scores are not divided by the temperature."""
    place, rows = regression
    found: list[torch.Tensor] = []

    def keep(optimizer: Optimizer, *_: object) -> None:
        if not found:
            found.extend(p.grad.clone().to_dense() for group in optimizer.param_groups for p in group["params"])

    hook = register_optimizer_step_pre_hook(keep)
    try:
        place.run(**flags, temperature=3.0, padding="longest")
    finally:
        hook.remove()

    model = TinyBertForSequenceClassification.from_pretrained(place.folder / trained)
    scores = torch.cat([model(*inputs_of(row, place.max_seq_length)).logits[:, 0] for row in rows])
    labels = torch.tensor([float(row.label) for row in rows])
    targets = (
        torch.from_numpy(logits_of(place.teacher, rows, place.max_seq_length)[:, 0]) if target == "teacher" else labels
    )
    loss = (scores - targets).square().mean()
    loss.backward()
    assert place.series("cls_loss")[0] == pytest.approx(loss.item(), rel=1e-4)
    expected = [p.grad for group in decay_groups(model, 0.01) for p in group["params"] if p.grad is not None]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, atol=1e-5 * float(max(g.abs().max() for g in expected)))


def test_the_eval_loss_of_a_regression_is_the_squared_error(regression: tuple[Workplace, list[Row]]) -> None:
    place, rows = regression
    place.run(do_eval=True, student_model=place.teacher, padding="longest")
    labels = [float(row.label) for row in rows]
    expected = np.square(logits_of(place.teacher, rows, place.max_seq_length)[:, 0] - labels).mean()
    assert place.events("eval")[0]["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_predictions_depend_on_max_seq_length(tmp_path: Path) -> None:
    """A row of 153 words is truncated to the flag's length, or to the task's default."""
    place, rows = workplace(tmp_path, "STS-B")
    classifier = weights_of(linear("classifier", 48, 1)) | {"classifier.bias": torch.tensor([2.5])}
    edit_weights(place.teacher, lambda weights: weights.update(classifier))
    written = []
    for length in (None, 12):
        flags = {"max_seq_length": length, "student_model": place.teacher, "padding": "longest"}
        place.run(**flags, do_predict=True, overwrite_output_dir=True)
        values = [float(value) for value in read_predictions(place.model / "STS-B.tsv")[2]]
        assert_close(values, logits_of(place.teacher, rows["test.tsv"], length or 128)[:, 0], atol=6e-4)
        written.append(values)
    assert abs(written[0][0] - written[1][0]) > 2e-3


def test_predicted_scores_are_clipped_to_the_tasks_range(regression: tuple[Workplace, list[Row]]) -> None:
    place, _ = regression
    for bias, expected in ((-100.0, "0.000"), (100.0, "5.000")):
        edit_weights(place.teacher, lambda weights, b=bias: weights["classifier.bias"].fill_(b))
        place.run(do_predict=True, student_model=place.teacher, overwrite_output_dir=True)
        _, _, values = read_predictions(place.model / "STS-B.tsv")
        assert values == [expected] * TEST
