"""task_distill.py's own choices: the case of its models, what is predicted and where, the task, the device, copies."""

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
# In place of tokens that no text uses.
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
    """The cross-entropy of one text, which are these tokens."""
    ids = [vocabulary.index(token) for token in ("[CLS]", *tokens, "[SEP]")]
    with torch.no_grad():
        logits = TinyBertForSequenceClassification.from_pretrained(folder).eval()(torch.tensor([ids])).logits
    return cross_entropy(logits, torch.tensor([label])).item()


def sharpen(place: Workplace) -> None:
    """Lets the models tell texts apart, whose logits are else all but the same."""

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
def test_the_models_folders_tell_the_case(
    place: Workplace, vocabulary: Sequence[str], flags: dict[str, Any], text: str, tokens: str
) -> None:
    """Of the teacher, of the student, and of what a run makes of them, read without a flag."""
    sharpen(place)
    give_vocabulary(place, vocabulary)
    write_rows(place.data / "dev.tsv", [HEADER, [text, "1"]])
    words = place.run(**flags).out
    expected = loss_of(place.teacher, tokens.split(), vocabulary, 1)
    assert place.events("teacher")[0]["eval_loss"] == pytest.approx(expected, rel=1e-4)
    told = f"{place.student}: an uncased model (its vocabulary has no capitals): its text is lower-cased, as by"
    assert (told in words) == (vocabulary is UNCASED and not flags["do_lower_case"])

    written = json.loads((place.model / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written["do_lower_case"] == (vocabulary is UNCASED or flags["do_lower_case"])
    place.student, place.model = place.model, place.folder / "judged"
    place.run(do_eval=True, do_lower_case=False)
    expected = loss_of(place.student, tokens.split(), vocabulary, 1)
    assert place.events("eval")[0]["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "flags", [{}, {"pred_distill": True}, {"do_finetune": True}, {"do_eval": True}, {"do_predict": True}], ids=str
)
def test_a_wrong_do_lower_case_is_refused(place: Workplace, flags: dict[str, Any]) -> None:
    give_vocabulary(place, CASED)
    message = place.fails(**flags, do_lower_case=True)
    assert "this model is cased (its vocabulary has capitals); leave out --do_lower_case" in message


def test_a_teacher_and_a_student_of_different_case_are_refused(place: Workplace) -> None:
    (place.student / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    message = place.fails(do_lower_case=False)
    assert f"{place.student} and {place.teacher}: one model is cased (tokenizer_config.json says so)" in message
    assert "the other uncased (its vocabulary has no capitals)" in message


def predictions_of(path: Path) -> dict[str, str]:
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    assert header == "index\tprediction"
    return dict(line.split("\t") for line in lines)


@pytest.fixture
def told_apart(place: Workplace) -> Workplace:
    """Its student predicts both labels."""
    sharpen(place)
    golden = Golden("sst2_small")
    with torch.no_grad():
        logits = TinyBertForSequenceClassification.from_pretrained(place.student).eval()(*golden.inputs()).logits
    edit_weights(place.student, lambda weights: weights["classifier.bias"].sub_(logits.median(dim=0).values))
    return place


def golden_predictions(place: Workplace) -> dict[str, str]:
    """What the student says of the golden rows, counted from 0."""
    model = TinyBertForSequenceClassification.from_pretrained(place.student).eval()
    with torch.no_grad():
        said = model(*Golden("sst2_small").inputs()).logits.argmax(dim=1).tolist()
    assert len(set(said)) == 2
    return {str(number): str(label) for number, label in enumerate(said)}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("dev.tsv", "SST-2-dev.tsv"),
        ("./dev.tsv", "SST-2-dev.tsv"),
        ("train.tsv", "SST-2-train.tsv"),
        ("../data/train.tsv", "SST-2-train.tsv"),
        ("train_aug.tsv", "SST-2-train_aug.tsv"),
    ],
)
def test_a_file_with_labels_is_predicted_too(told_apart: Workplace, file: str, name: str) -> None:
    """Its labels are left aside; rows are counted from 0."""
    shutil.copy(told_apart.data / "dev.tsv", told_apart.data / "train_aug.tsv")
    words = told_apart.run(do_predict=True, predict_file=file).out
    assert predictions_of(told_apart.model / name) == golden_predictions(told_apart)
    assert "none of the task's own files" not in words
    assert f"the predictions are in {told_apart.model / name}\n" in words
    assert {path.name for path in told_apart.output.iterdir()} == {
        "predict_1p.txt",
        "metrics.jsonl",
        "debug_layer_loss.log",
    }


@pytest.mark.parametrize(
    ("file", "name"), [("test.tsv", "SST-2.tsv"), ("more/new rows.tsv", "SST-2-new rows.tsv"), ("new", "SST-2-new.tsv")]
)
def test_another_file_is_read_as_a_test_file(told_apart: Workplace, file: str, name: str) -> None:
    """An id, then the text, no label; a line says so."""
    rows = [[f"n{number}", row[0]] for number, row in enumerate(SST2_ROWS)]
    write_rows(told_apart.data / file, [["index", "sentence"], *rows])
    words = told_apart.run(do_predict=True, predict_file=file).out
    expected = {f"n{number}": label for number, label in golden_predictions(told_apart).items()}
    assert predictions_of(told_apart.model / name) == expected
    line = f"{told_apart.data / file}: none of the task's own files: read in the form of SST-2's test files"
    assert (line in words) == (file != "test.tsv")


def test_a_file_without_a_row_of_names_is_predicted_from_its_first_row(told_apart: Workplace) -> None:
    """CoLA's dev set has none."""
    write_rows(told_apart.data / "dev.tsv", [["gj04", row[1], "", row[0]] for row in SST2_ROWS])
    told_apart.run(task_name="cola", do_predict=True, predict_file="dev.tsv")
    assert predictions_of(told_apart.model / "CoLA-dev.tsv") == golden_predictions(told_apart)


def test_one_of_mnlis_test_files_can_be_predicted_alone(mnli: Workplace) -> None:
    mnli.entry = task_distill
    header, *rows = Golden("mnli_small").case["rows"]
    write_rows(mnli.data / "test_mismatched.tsv", [header[:10], *(row[:10] for row in rows)])
    mnli.run(do_predict=True, predict_file="test_mismatched.tsv")
    assert list(predictions_of(mnli.model / "MNLI-mm.tsv")) == [row[0] for row in rows]
    assert [path.name for path in mnli.model.iterdir()] == ["MNLI-mm.tsv"]


def test_predictions_are_not_overwritten_unless_that_is_asked_for(told_apart: Workplace) -> None:
    """What else is in the folder does not matter, and stays."""
    place, path = told_apart, told_apart.model / "SST-2-dev.tsv"
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
        ({"do_eval": True, "predict_file": "dev.tsv"}, "--predict_file names what --do_predict reads; give both"),
        ({"predict_file": "dev.tsv"}, "--predict_file names what --do_predict reads; give both"),
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
def test_flags_that_do_not_fit_are_refused(place: Workplace, flags: dict[str, Any], message: str) -> None:
    assert message in place.fails(**flags)


PREDICT = {"do_predict": True, "predict_file": "dev.tsv"}


@pytest.mark.parametrize(
    ("in_the_way", "flags", "message"),
    [
        ("model/eval_results.txt/", {"do_eval": True}, "is a folder where the metrics are to be written"),
        ("model", {"do_eval": True}, "the folder of --output_dir cannot be made"),
        ("output/metrics.jsonl/", {"do_eval": True}, "the log cannot be written"),
        ("model/SST-2-dev.tsv/", PREDICT, "is a folder where the predictions are to be written"),
        ("model", PREDICT, "the folder of --output_dir cannot be made"),
        ("output/predict_1p.txt/", PREDICT, "the log cannot be written"),
    ],
)
def test_what_is_in_the_way_is_told_before_the_model_is_asked(
    place: Workplace, in_the_way: str, flags: dict[str, Any], message: str
) -> None:
    path = place.folder / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if in_the_way.endswith("/") else path.write_text("mine", encoding="utf-8")
    assert message in place.fails(**flags, overwrite_output_dir=True)


@pytest.fixture
def nobodys_place() -> Iterator[Workplace]:
    """A workplace that anybody may write to; root, who may write every file, is nobody while it is used."""
    with tempfile.TemporaryDirectory() as folder:
        place = Golden("sst2_small").workplace(Path(folder))
        place.entry = task_distill
        place.model.mkdir()
        for path in (place.folder, place.model):
            path.chmod(0o777)
        (place.model / "eval_results.txt").touch(mode=0o444)
        if os.geteuid() != 0:
            yield place
            return
        os.setresuid(65534, 65534, 0)
        try:
            yield place
        finally:
            os.setresuid(0, 0, 0)


def test_results_that_may_not_be_written_are_told_before_the_model_is_asked(nobodys_place: Workplace) -> None:
    assert "eval_results.txt: cannot be written" in nobodys_place.fails(do_eval=True)


@pytest.mark.parametrize("task", ["CoLA", "mnli-mm", "sts-b", "wnli"])
def test_main_names_the_entry_for_the_other_tasks(sst2: Workplace, task: str) -> None:
    message = sst2.fails(task_name=task)
    assert f"--task_name {task}: main.py is for SST-2 and MNLI; task_distill.py takes all of GLUE" in message


def test_main_has_no_flags_of_task_distill_alone(sst2: Workplace) -> None:
    for flag in ("no_cuda", "task_file"):
        assert f"unrecognized arguments: --{flag}" in sst2.fails(**{flag: True})


def test_no_cuda_is_the_cpu(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is an accelerator that would be chosen without it."""
    monkeypatch.setattr(device, "_device_count", lambda kind: 1)
    assert device.choose_device("auto") != "cpu"
    for flags in ({"device": None}, {"device": "auto"}, {"device": "cpu"}):
        assert "SST-2 on cpu:" in place.run(**flags, no_cuda=True, overwrite_output_dir=True).out


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "model_manifest.json"]  # its own
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "flags",
    [{}, {"pred_distill": True}, {"do_eval": True}, {"do_predict": True, "predict_file": "dev.tsv"}],
    ids=["intermediate", "prediction", "evaluation", "predictions"],
)
def test_what_was_made_is_copied(place: Workplace, flags: dict[str, Any]) -> None:
    """Into a folder that is made, or one that is empty."""
    for target in (place.folder / "made" / "copy", place.folder / "empty"):
        if target.name == "empty":
            target.mkdir()
        place.run(**flags, data_url=target, overwrite_output_dir=True)
        assert contents(target) == contents(place.model)
        assert contents(target)


@pytest.mark.parametrize("target", ["copy", "copy/", ".", "../other"])
def test_mnlis_second_folder_is_copied_beside_the_first(
    mnli: Workplace, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its OUTPUT-MM holds the metrics of the mismatched dev set."""
    mnli.entry = task_distill
    here = mnli.folder / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    mnli.run(do_eval=True, data_url=target)
    copied = here / target
    first, second = (mnli.folder / name for name in ("model", "model-MM"))
    assert contents(copied) == contents(first)
    assert contents(copied.resolve().with_name(f"{copied.resolve().name}-MM")) == contents(second) != {}


def test_mnlis_second_copy_is_looked_at_too(mnli: Workplace) -> None:
    mnli.entry = task_distill
    write_rows(mnli.folder / "copy-MM" / "mine.tsv", [["mine"]])
    assert "copy-MM: is not empty" in mnli.fails(do_eval=True, data_url=mnli.folder / "copy")
    write_rows(mnli.folder / "other-MM", [["mine"]])
    assert "other-MM: is a file, a folder is needed" in mnli.fails(do_eval=True, data_url=mnli.folder / "other")


def test_a_copy_is_not_overwritten_unless_that_is_asked_for(place: Workplace) -> None:
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
def test_a_folder_that_cannot_take_the_copy_is_refused(
    place: Workplace, target: str, message: str, flags: dict[str, Any]
) -> None:
    """Before anything is done, also where overwriting is allowed."""
    assert message in place.fails(**flags, data_url=place.folder / target, overwrite_output_dir=True)


def test_an_address_is_no_folder(place: Workplace) -> None:
    message = place.fails(data_url="obs://bucket/folder")
    assert "--data_url obs://bucket/folder: outputs are copied to folders only" in message


def test_main_copies_nothing(sst2: Workplace) -> None:
    """As the original's, which has the flag too."""
    sst2.run(data_url=sst2.folder / "copy")
    assert not (sst2.folder / "copy").exists()
