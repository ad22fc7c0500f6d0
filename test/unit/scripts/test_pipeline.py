"""test/pipeline.sh on tiny models: all parts, which parts a later run skips or repeats, and mistakes."""

import json
from pathlib import Path

import pytest
from cases import Run, Workplace, read_bin
from test_scripts import script, stand_in_python

PARTS = ("teacher", "intermediate", "student", "evaluation")


def pipeline(place: Workplace, *flags: str, **settings: object) -> Run:
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
    return script("pipeline.sh", *flags, cwd=place.folder, **given)


def written(work: Path) -> dict[str, int]:
    """Return the time at which each file under the folder was last written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(work.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_all_parts_run_once_and_again_when_their_marks_are_removed(mnli):
    work = mnli.folder / "work"
    first = pipeline(mnli)
    assert first.status == 0, first.err
    assert all((work / f"{part}.done").is_file() for part in PARTS)
    assert "acc = " in (work / "evaluation/student/eval_results.txt").read_text()
    assert (work / "evaluation/student-MM/eval_results.txt").is_file()
    rows = [line.split()[:3] for line in first.out.splitlines() if line.startswith(("the teacher ", "the student "))]
    files = ("dev_matched.tsv", "dev_mismatched.tsv")
    assert rows[-4:] == [["the", role, file] for role in ("teacher", "student") for file in files]
    assert "in the file" in first.out  # a column of the demo

    before = written(work)
    again, other = pipeline(mnli), pipeline(mnli, EPOCHS=2)
    assert (again.status, again.out.count("done already: ")) == (0, len(PARTS))
    assert (other.status, other.out.count("with other settings")) == (0, 1)
    assert written(work) == before

    (work / "intermediate.done").unlink()  # as after an interrupted run
    weights = read_bin(work / "intermediate")
    resumed = pipeline(mnli, EPOCHS=2)
    assert (resumed.status, resumed.out.count("done already: ")) == (0, 1), resumed.err
    changed = {name for name, time in written(work).items() if before.get(name) != time}
    assert {str(work / f"{part}.done") for part in PARTS[1:]} <= changed
    assert str(work / "teacher/pytorch_model.bin") not in changed
    assert any(not tensor.equal(weights[key]) for key, tensor in read_bin(work / "intermediate").items())


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
    python = stand_in_python(mnli.folder, 'echo "$@"; exit 2')
    done = pipeline(mnli, TASK_NAME="MNLI-MM", DATA_DIR=None, PYTHON=python)
    assert "--data_dir glue_dir/mnli " in done.out.lower()
