"""test/pipeline.sh on tiny models: all parts, which parts a later run skips or repeats, and mistakes."""

import json
import sys
from pathlib import Path

import cases
import pytest
from cases import ROOT, Run, Workplace, read_bin
from test_scripts import script, stand_in_python

sys.path.insert(0, str(ROOT / "test"))

import pipeline_inputs

PARTS = ("teacher", "intermediate", "student", "evaluation/teacher", "evaluation/student")


def pipeline(place: Workplace, *flags: str, cwd: Path | None = None, **settings: object) -> Run:
    """Run the script from another folder, with these settings."""
    values = {
        "TASK_NAME": place.task,
        "DATA_DIR": place.data,
        "BERT_MODEL": place.teacher,
        "STUDENT_MODEL": place.student,
        "WORK_DIR": place.folder / "work",
        "TEACHER_EPOCHS": 2,
        "EPOCHS": 1,
        "PRED_EPOCHS": 1,
        "MAX_SEQ_LENGTH": place.max_seq_length,
        "DEVICE": "cpu",
        **settings,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return script("pipeline.sh", *flags, cwd=cwd or place.folder, **given)


def written(work: Path) -> dict[str, int]:
    """Return the time at which each file under the folder was last written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(work.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_parts_run_once_and_again_when_their_inputs_change_or_they_were_interrupted(tmp_path):
    mnli = cases.Golden("mnli_small").workplace(tmp_path / "mnli")
    work = mnli.folder / "work"
    first = pipeline(mnli, WORK_DIR="work", BERT_MODEL="teacher")
    assert first.status == 0, first.err
    assert all((work / f"{part}.done").is_file() for part in PARTS)
    assert "acc = " in (work / "evaluation/student/eval_results.txt").read_text()
    assert (work / "evaluation/student-MM/eval_results.txt").is_file()
    rows = [line.split()[:3] for line in first.out.splitlines() if line.startswith(("the teacher ", "the student "))]
    files = ("dev_matched.tsv", "dev_mismatched.tsv")
    assert rows[-4:] == [["the", role, file] for role in ("teacher", "student") for file in files]
    assert "in the file" in first.out  # a column of the demo

    before = written(work)
    again = pipeline(mnli, "--workers", "1", WORK_DIR="mnli/work", DATA_DIR="mnli/data", cwd=mnli.folder.parent)
    assert (again.status, again.out.count("done already: ")) == (0, len(PARTS)), again.err
    assert written(work) == before
    assert again.out.splitlines()[-9:-2] == first.out.splitlines()[-9:-2]  # the table

    refused = pipeline(mnli, EPOCHS=2, RESUME=1)
    assert (refused.status, refused.err.count("\n"), refused.out.count("done already: ")) == (2, 1, 1)
    assert "intermediate" in refused.err
    assert "--num_train_epochs was 1, is 2" in refused.err
    assert written(work) == before

    weights = read_bin(work / "intermediate")
    replaced = pipeline(mnli, EPOCHS=2, OVERWRITE_OUTPUT_DIR=1)
    assert (replaced.status, replaced.out.count("done already: ")) == (0, 1), replaced.err
    assert any(not tensor.equal(weights[key]) for key, tensor in read_bin(work / "intermediate").items())

    before = written(work)
    (work / "intermediate.done").unlink()  # as after an interrupted run
    resumed = pipeline(mnli, EPOCHS=2)
    assert (resumed.status, resumed.out.count("done already: ")) == (0, 1), resumed.err
    changed = {name for name, time in written(work).items() if before.get(name) != time}
    assert {str(work / f"{part}.done") for part in PARTS[1:]} <= changed
    assert str(work / "teacher/pytorch_model.bin") not in changed


def inputs(done: Path, *flags: object) -> Run:
    return cases.call(pipeline_inputs.main, [str(done), *map(str, flags)], "pipeline_inputs.py")


def edit_task(place: Workplace, **changes: object) -> None:
    file = place.data / "films.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_rows(place: Workplace) -> None:
    file = place.data / "train.tsv"
    file.write_text(file.read_text() + "one more text\t1\n")


CHANGES = {  # what changes, and a word that the message must have
    "train.tsv": (edit_rows, "train.tsv has changed"),
    "metric": (lambda place: edit_task(place, metric="f1"), "was macro_f1, is f1"),
    "labels": (lambda place: edit_task(place, labels=["1", "0"]), "the task's description"),
    "case": (lambda place: cases.edit_config(place.teacher, note="x"), "config.json of --teacher_model"),
    "tokens": (lambda place: (place.teacher / "added_tokens.json").write_text("{}"), "added_tokens.json"),
    "code": (lambda place: (place.folder / "code/distillation/x.py").write_text("pass\n"), "code"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_data_task_model_or_code_are_named_and_refused(sst2, monkeypatch, name):
    change, fact = CHANGES[name]
    (sst2.folder / "code/distillation").mkdir(parents=True)
    (sst2.folder / "code/task_distill.py").write_text("")
    monkeypatch.setattr(pipeline_inputs, "ROOT", sst2.folder / "code")
    description = {"name": "films", "train": "train.tsv", "dev": "dev.tsv", "text": 0, "label": 1, "metric": "macro_f1"}
    (sst2.data / "films.json").write_text(json.dumps({**description, "labels": ["0", "1"]}))
    flags = ("--do_finetune", "--task_file", sst2.data / "films.json")
    flags += ("--teacher_model", sst2.teacher, "--output_dir", sst2.model)
    done = sst2.folder / "teacher.done"
    done.write_text(inputs(done, *flags).out)
    assert inputs(done, *flags, "--device", "cpu") == Run(0, "", "")

    change(sst2)
    refused = inputs(done, *flags)
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert fact in refused.err
    replaced = inputs(done, *flags, "--replace")
    assert (replaced.status, fact in replaced.err) == (0, True)
    done.write_text(replaced.out)
    assert inputs(done, *flags) == Run(0, "", "")


def test_a_file_that_does_not_name_its_inputs_is_refused(sst2):
    done = sst2.folder / "teacher.done"
    done.write_text("python task_distill.py --do_finetune\n")  # as earlier versions wrote it
    data = ("--task_name", "SST-2", "--data_dir", sst2.data)
    refused = inputs(done, "--do_finetune", *data, "--teacher_model", sst2.teacher, "--output_dir", sst2.model)
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "teacher.done" in refused.err


@pytest.mark.slow
def test_a_users_own_task_is_distilled_from_an_existing_teacher(sst2):
    description = {"name": "films", "train": "train.tsv", "dev": "dev.tsv", "text": 0, "label": 1}
    file = sst2.data / "films.json"
    file.write_text(json.dumps({**description, "labels": ["0", "1"], "metric": "macro_f1"}))
    own_task = {"TASK_NAME": None, "TASK_FILE": file, "DATA_DIR": None}
    done = pipeline(sst2, **own_task, TEACHER_MODEL=sst2.teacher, BERT_MODEL="nowhere")
    assert done.status == 0, done.err
    assert not (sst2.folder / "work/teacher").exists()
    assert "macro_f1" in (sst2.folder / "work/evaluation/student/eval_results.txt").read_text()


@pytest.mark.parametrize(
    ("flags", "settings", "fact"),
    [
        ([], {"TASK_NAME": None}, "TASK_NAME"),
        ([], {"TASK_FILE": "task.json"}, "TASK_NAME and TASK_FILE"),
        ([], {"TASK_NAME": "SST3"}, "SST3"),
        ([], {"DATA_DIR": "nowhere"}, "nowhere: no such folder"),
        ([], {"BERT_MODEL": "nowhere"}, "nowhere"),
        ([], {"DO_LOWER_CASE": 1, "BERT_MODEL": "nowhere"}, "nowhere"),
        (["--max_seq_length"], {}, "--max_seq_length"),
        (["--device=cpu"], {}, "--device"),
        (["--do_predict"], {}, "--do_predict"),
        (["--output_dir"], {}, "--output_dir"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_leaves_nothing(sst2, flags, settings, fact):
    before = sorted(sst2.folder.rglob("*"))
    done = pipeline(sst2, *flags, **settings)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert fact in done.err
    assert sorted(sst2.folder.rglob("*")) == before


def test_a_folder_with_other_files_is_not_touched(sst2):
    work = sst2.folder / "work"
    work.mkdir()
    (work / "mine").write_text("mine")
    done = pipeline(sst2)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert [path.name for path in work.iterdir()] == ["mine"]


def test_both_dev_sets_of_mnli_are_in_one_folder(mnli):
    python = stand_in_python(mnli.folder, 'echo "$@" >&2; exit 2')
    done = pipeline(mnli, TASK_NAME="MNLI-MM", DATA_DIR=None, PYTHON=python)
    assert f"--data_dir {ROOT}/glue_dir/mnli ".lower() in done.err.lower()
