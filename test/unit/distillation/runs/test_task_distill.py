"""task_distill.py: the case of models, predictions, its own flags, the device, and copies of outputs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Golden, Workplace, edit_weights, write_rows
from torch.nn.functional import cross_entropy

import task_distill
from distillation.runtime import device
from transformer.heads import TinyBertForSequenceClassification

UNCASED = Golden("sst2_small").case["vocab"]
# Some replace tokens that no text uses.
CASED = [*UNCASED[:61], "Warm", "FILM", "The", "A", *UNCASED[65:]]
CHINESE = [*UNCASED[:5], *"我爱电影不好看的，。", *(f"[unused{n}]" for n in range(15, 100))]
HEADER = ["sentence", "label"]
SST2_ROWS = Golden("sst2_small").case["rows"][1:]


@pytest.fixture
def place(sst2: Workplace) -> Workplace:
    """The golden SST-2 case with task_distill.py."""
    sst2.entry = task_distill
    return sst2


def give_vocabulary(place: Workplace, tokens: Sequence[str]) -> None:
    for folder in (place.teacher, place.student):
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")


def loss_of(folder: Path, tokens: Sequence[str], vocabulary: Sequence[str], label: int) -> float:
    """Return the cross-entropy of one text, given by its tokens."""
    ids = [vocabulary.index(token) for token in ("[CLS]", *tokens, "[SEP]")]
    with torch.no_grad():
        logits = TinyBertForSequenceClassification.from_pretrained(folder).eval()(torch.tensor([ids])).logits
    return cross_entropy(logits, torch.tensor([label])).item()


def scale_weights(place: Workplace) -> None:
    """Scale the weights, so that logits differ between texts."""

    def scale(weights: dict[str, torch.Tensor]) -> None:
        for key in weights:
            if key.endswith("weight") and "LayerNorm" not in key:
                weights[key] *= 5

    edit_weights(place.teacher, scale)
    edit_weights(place.student, scale)


TEXT = "Warm FILM , the Good film"
CASES: dict[str, tuple[Sequence[str], dict[str, Any], str, str]] = {
    "cased": (CASED, {"do_lower_case": False}, TEXT, "Warm FILM , the [UNK] film"),
    "uncased": (UNCASED, {"do_lower_case": False}, TEXT, "warm film , the good film"),
    "uncased with the flag": (UNCASED, {"do_lower_case": True}, TEXT, "warm film , the good film"),
    "Chinese": (CHINESE, {"do_lower_case": False}, "我爱电影，warm。", "我 爱 电 影 ， [UNK] 。"),
    "Chinese with the flag": (CHINESE, {"do_lower_case": True}, "我爱电影，warm。", "我 爱 电 影 ， [UNK] 。"),
}


@pytest.mark.parametrize(("vocabulary", "flags", "text", "tokens"), CASES.values(), ids=CASES)
def test_the_case_is_read_from_the_models_folder(
    place: Workplace, vocabulary: Sequence[str], flags: dict[str, Any], text: str, tokens: str
) -> None:
    """For teacher, student and trained model, with and without a flag."""
    scale_weights(place)
    give_vocabulary(place, vocabulary)
    write_rows(place.data / "dev.tsv", [HEADER, [text, "1"]])
    output = place.run(**flags).out
    expected = loss_of(place.teacher, tokens.split(), vocabulary, 1)
    assert place.events("teacher")[0]["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert (f"{place.student}: an uncased model" in output) == (vocabulary is UNCASED and not flags["do_lower_case"])

    written = json.loads((place.model / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written["do_lower_case"] == (vocabulary is UNCASED or flags["do_lower_case"])
    place.student, place.model = place.model, place.folder / "evaluated"
    place.run(do_eval=True, do_lower_case=False)
    expected = loss_of(place.student, tokens.split(), vocabulary, 1)
    assert place.events("eval")[0]["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "flags", [{}, {"pred_distill": True}, {"do_finetune": True}, {"do_eval": True}, {"do_predict": True}], ids=str
)
def test_a_wrong_do_lower_case_is_refused(place: Workplace, flags: dict[str, Any]) -> None:
    give_vocabulary(place, CASED)
    message = place.fails(**flags, do_lower_case=True)
    assert "this model is cased" in message
    assert "--do_lower_case" in message


def test_a_teacher_and_a_student_of_different_case_are_refused(place: Workplace) -> None:
    (place.student / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    message = place.fails(do_lower_case=False)
    assert f"{place.student} and {place.teacher}: one model is cased" in message


def predictions_of(path: Path) -> dict[str, str]:
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    assert header == "index\tprediction"
    return dict(line.split("\t") for line in lines)


@pytest.fixture
def predicting(place: Workplace) -> Workplace:
    """A workplace whose student predicts both labels."""
    scale_weights(place)
    golden = Golden("sst2_small")
    with torch.no_grad():
        logits = TinyBertForSequenceClassification.from_pretrained(place.student).eval()(*golden.inputs()).logits
    edit_weights(place.student, lambda weights: weights["classifier.bias"].sub_(logits.median(dim=0).values))
    return place


def golden_predictions(place: Workplace) -> dict[str, str]:
    """Return the student's predictions of the golden rows, by their numbers from 0."""
    model = TinyBertForSequenceClassification.from_pretrained(place.student).eval()
    with torch.no_grad():
        labels = model(*Golden("sst2_small").inputs()).logits.argmax(dim=1).tolist()
    assert len(set(labels)) == 2
    return {str(number): str(label) for number, label in enumerate(labels)}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("dev.tsv", "SST-2-dev.tsv"),
        ("../data/train.tsv", "SST-2-train.tsv"),
        ("train_aug.tsv", "SST-2-train_aug.tsv"),
    ],
)
def test_a_file_with_labels_can_be_predicted(predicting: Workplace, file: str, name: str) -> None:
    """Its labels are ignored; rows are counted from 0."""
    shutil.copy(predicting.data / "dev.tsv", predicting.data / "train_aug.tsv")
    output = predicting.run(do_predict=True, predict_file=file).out
    assert predictions_of(predicting.model / name) == golden_predictions(predicting)
    assert "test files" not in output
    assert str(predicting.model / name) in output
    assert {path.name for path in predicting.output.iterdir()} == {
        "predict_1p.txt",
        "metrics.jsonl",
        "debug_layer_loss.log",
    }


@pytest.mark.parametrize(
    ("file", "name"), [("test.tsv", "SST-2.tsv"), ("more/new rows.tsv", "SST-2-new rows.tsv"), ("new", "SST-2-new.tsv")]
)
def test_another_file_is_read_as_a_test_file(predicting: Workplace, file: str, name: str) -> None:
    """An id, then the text, no label; the log says so."""
    rows = [[f"n{number}", row[0]] for number, row in enumerate(SST2_ROWS)]
    write_rows(predicting.data / file, [["index", "sentence"], *rows])
    output = predicting.run(do_predict=True, predict_file=file).out
    expected = {f"n{number}": label for number, label in golden_predictions(predicting).items()}
    assert predictions_of(predicting.model / name) == expected
    assert ("SST-2's test files" in output) == (file != "test.tsv")


def test_a_file_without_a_header_is_predicted_from_its_first_row(predicting: Workplace) -> None:
    """CoLA's dev set has none."""
    write_rows(predicting.data / "dev.tsv", [["gj04", row[1], "", row[0]] for row in SST2_ROWS])
    predicting.run(task_name="cola", do_predict=True, predict_file="dev.tsv")
    assert predictions_of(predicting.model / "CoLA-dev.tsv") == golden_predictions(predicting)


def test_a_single_test_file_of_mnli_can_be_predicted(mnli: Workplace) -> None:
    mnli.entry = task_distill
    header, *rows = Golden("mnli_small").case["rows"]
    write_rows(mnli.data / "test_mismatched.tsv", [header[:10], *(row[:10] for row in rows)])
    mnli.run(do_predict=True, predict_file="test_mismatched.tsv")
    assert list(predictions_of(mnli.model / "MNLI-mm.tsv")) == [row[0] for row in rows]
    assert [path.name for path in mnli.model.iterdir()] == ["MNLI-mm.tsv"]


def test_predictions_are_overwritten_only_by_flag(predicting: Workplace) -> None:
    """Other files in the folder stay."""
    place, path = predicting, predicting.model / "SST-2-dev.tsv"
    flags = {"do_predict": True, "predict_file": "dev.tsv"}
    place.model.mkdir()
    (place.model / "mine.txt").write_text("mine", encoding="utf-8")
    place.run(**flags)
    first = path.read_bytes()
    edit_weights(place.student, lambda weights: weights["classifier.bias"].add_(torch.tensor([100.0, 0.0])))
    assert f"{path}: is there already; give another --output_dir, or --overwrite" in place.fails(**flags)
    assert path.read_bytes() == first
    place.run(**flags, overwrite_output_dir=True)
    assert set(predictions_of(path).values()) == {"0"}
    assert {entry.name for entry in place.model.iterdir()} == {"mine.txt", path.name}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"do_predict": True}, "test.tsv: not found; --predict_file names another file to predict"),
        ({"do_predict": True, "predict_file": "none.tsv"}, "none.tsv: not found"),
        ({"do_predict": True, "predict_file": "."}, "cannot be read"),
        ({"do_eval": True, "predict_file": "dev.tsv"}, "--predict_file is for --do_predict"),
        ({"predict_file": "dev.tsv"}, "--predict_file is for --do_predict"),
        ({"do_predict": True, "do_eval": True}, "give only one of --do_eval and --do_predict"),
        ({"do_predict": True, "student_model": None}, "--student_model is required for predictions"),
        ({"do_predict": True, "data_dir": "nowhere"}, "nowhere: no such folder"),
        ({"task_file": "mine.json"}, "give either --task_name, a task of GLUE, or --task_file"),
        ({"task_name": None}, "give either --task_name, a task of GLUE, or --task_file"),
        ({"task_name": "SST"}, "--task_name SST: no such task; the tasks are CoLA, MNLI, MNLI-mm, MRPC, SST-2"),
        ({"data_dir": None}, "--data_dir is required"),
        ({"no_cuda": True, "device": "gpu"}, "--no_cuda and --device gpu: give one of them"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_together_are_refused(place: Workplace, flags: dict[str, Any], message: str) -> None:
    assert message in place.fails(**flags)


PREDICT = {"do_predict": True, "predict_file": "dev.tsv"}


@pytest.mark.parametrize(
    ("obstacle", "flags", "message"),
    [
        ("model/eval_results.txt/", {"do_eval": True}, "is a folder where the metrics are to be written"),
        ("model", {"do_eval": True}, "the folder of --output_dir cannot be made"),
        ("output/metrics.jsonl/", {"do_eval": True}, "the log cannot be written"),
        ("model/SST-2-dev.tsv/", PREDICT, "is a folder where the predictions are to be written"),
        ("model", PREDICT, "the folder of --output_dir cannot be made"),
        ("output/predict_1p.txt/", PREDICT, "the log cannot be written"),
    ],
)
def test_an_obstacle_to_writing_is_refused_before_the_model_runs(
    place: Workplace, obstacle: str, flags: dict[str, Any], message: str
) -> None:
    path = place.folder / obstacle
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if obstacle.endswith("/") else path.write_text("mine", encoding="utf-8")
    assert message in place.fails(**flags, overwrite_output_dir=True)


@pytest.fixture
def unprivileged() -> Iterator[Workplace]:
    """A workplace with a read-only eval_results.txt; root, who may write any file, is another user meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        place = Golden("sst2_small").workplace(Path(folder))
        place.entry = task_distill
        place.model.mkdir()
        for path in (place.folder, place.model):
            path.chmod(0o777)
        (place.model / "eval_results.txt").touch(mode=0o444)
        root = os.geteuid() == 0
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield place
        finally:
            if root:
                os.setresuid(0, 0, 0)


def test_read_only_results_are_refused_before_the_model_runs(unprivileged: Workplace) -> None:
    line = unprivileged.fails(do_eval=True)
    assert "eval_results.txt: " in line
    assert "cannot be written" in line


@pytest.mark.parametrize("task", ["CoLA", "mnli-mm", "sts-b", "wnli"])
def test_main_refuses_other_tasks_and_names_task_distill(sst2: Workplace, task: str) -> None:
    message = sst2.fails(task_name=task)
    assert f"--task_name {task}: " in message
    assert "task_distill.py" in message


def test_main_refuses_the_flags_of_task_distill_alone(sst2: Workplace) -> None:
    for flag in ("no_cuda", "task_file"):
        assert f"unrecognized arguments: --{flag}" in sst2.fails(**{flag: True})


def test_no_cuda_chooses_the_cpu(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although there is an accelerator that would be chosen without it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.choose_device("auto") != "cpu"
    for flags in ({"device": None}, {"device": "auto"}, {"device": "cpu"}):
        assert "SST-2 on cpu in" in place.run(**flags, no_cuda=True, overwrite_output_dir=True).out


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "model_manifest.json"]  # its own
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "flags",
    [{}, {"pred_distill": True}, {"do_eval": True}, {"do_predict": True, "predict_file": "dev.tsv"}],
    ids=["intermediate", "prediction", "evaluation", "predictions"],
)
def test_outputs_are_copied_to_data_url(place: Workplace, flags: dict[str, Any]) -> None:
    """Into a new folder, or an empty one."""
    for target in (place.folder / "made" / "copy", place.folder / "empty"):
        if target.name == "empty":
            target.mkdir()
        place.run(**flags, data_url=target, overwrite_output_dir=True)
        assert contents(target) == contents(place.model)
        assert contents(target)


@pytest.mark.parametrize("target", ["copy/", ".", "../other"])
def test_the_metrics_of_mnli_mm_are_copied_beside_the_first_folder(
    mnli: Workplace, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mnli.entry = task_distill
    here = mnli.folder / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    mnli.run(do_eval=True, data_url=target)
    copied = (here / target).resolve()
    first, second = (mnli.folder / name for name in ("model", "model-MM"))
    assert contents(copied) == contents(first)
    assert contents(copied.with_name(f"{copied.name}-MM")) == contents(second) != {}


def test_the_second_copy_of_mnli_is_checked_before_the_run(mnli: Workplace) -> None:
    mnli.entry = task_distill
    write_rows(mnli.folder / "copy-MM" / "mine.tsv", [["mine"]])
    assert "copy-MM: is not empty" in mnli.fails(do_eval=True, data_url=mnli.folder / "copy")


def test_a_copy_is_overwritten_only_by_flag(place: Workplace) -> None:
    target = place.folder / "copy"
    target.mkdir()
    (target / "mine.txt").write_text("mine", encoding="utf-8")
    for flags in ({}, {"do_eval": True}, {"do_predict": True, "predict_file": "dev.tsv"}):
        assert f"--data_url {target}: is not empty" in place.fails(**flags, data_url=target)
    place.run(data_url=target, overwrite_output_dir=True)
    assert contents(target) == contents(place.model) | {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("model", "is --output_dir itself"),
        ("model/copy", "or a folder in it"),
        ("data/dev.tsv", "is a file, a folder is needed"),
        ("data/dev.tsv/copy", "cannot be made"),
        ("teacher", "is a folder that this run reads from"),
        ("student", "is a folder that this run reads from"),
        ("data", "is a folder that this run reads from"),
        ("n" * 300, "no file can have this name"),
    ],
)
@pytest.mark.parametrize("flags", [{}, {"do_eval": True}], ids=["intermediate", "evaluation"])
def test_a_data_url_that_cannot_hold_the_copy_is_refused(
    place: Workplace, target: str, message: str, flags: dict[str, Any]
) -> None:
    """Before anything is written, also with --overwrite_output_dir."""
    assert message in place.fails(**flags, data_url=place.folder / target, overwrite_output_dir=True)


def test_a_data_url_must_be_a_folder(place: Workplace) -> None:
    message = place.fails(data_url="obs://bucket/folder")
    assert "--data_url obs://bucket/folder: " in message


def test_main_copies_nothing(sst2: Workplace) -> None:
    """Like the original's, which has the flag too."""
    sst2.run(data_url=sst2.folder / "copy")
    assert not (sst2.folder / "copy").exists()
