"""test/pipeline.sh on tiny models: the whole way, what is skipped, what is done anew, and mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import ROOT, Run, Workplace, read_bin

PARTS = ("teacher", "intermediate", "student", "evaluation")


def pipeline(place: Workplace, *flags: str, **settings: object) -> Run:
    """Runs the script as a user types it, from anywhere."""
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
        "OMP_NUM_THREADS": 1,
        "PYTHON": sys.executable,
        **settings,
    }
    known = {name: str(value) for name, value in values.items() if value is not None}
    done = subprocess.run(
        ["bash", str(ROOT / "test/pipeline.sh"), *flags],
        cwd=place.folder,
        env={**os.environ, **known},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def made(work: Path) -> dict[str, int]:
    """When each file under the folder was last written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(work.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_the_whole_way_and_again(mnli):
    work = mnli.folder / "work"
    first = pipeline(mnli)
    assert first.status == 0, first.err
    for part in PARTS:
        assert (work / f"{part}.done").is_file()
    results = (work / "evaluation/student/eval_results.txt").read_text()
    assert "acc = " in results
    assert (work / "evaluation/student-MM/eval_results.txt").is_file()
    rows = [line.split() for line in first.out.splitlines() if line.startswith(("the teacher ", "the student "))]
    assert [row[:3] for row in rows[-4:]] == [
        ["the", role, file] for role in ("teacher", "student") for file in ("dev_matched.tsv", "dev_mismatched.tsv")
    ]
    assert "in the file" in first.out  # the demo

    before = made(work)
    again = pipeline(mnli)
    assert again.status == 0, again.err
    assert again.out.count("done already: ") == len(PARTS)
    assert made(work) == before

    other = pipeline(mnli, EPOCHS=2)
    assert other.out.count("with other settings") == 1
    assert made(work) == before

    (work / "intermediate.done").unlink()  # as a stop in this part leaves it, or a user who wants it anew
    weights = read_bin(work / "intermediate")
    anew = pipeline(mnli, EPOCHS=2)
    assert anew.status == 0, anew.err
    assert anew.out.count("done already: ") == 1
    changed = {name for name, time in made(work).items() if before.get(name) != time}
    assert {str(work / f"{part}.done") for part in PARTS[1:]} <= changed
    assert str(work / "teacher/pytorch_model.bin") not in changed
    assert any(not tensor.equal(weights[key]) for key, tensor in read_bin(work / "intermediate").items())


@pytest.mark.slow
def test_a_task_of_the_users_own_with_a_teacher_that_is_there(sst2):
    description = {"name": "films", "train": "train.tsv", "dev": "dev.tsv", "text": 0, "label": 1}
    file = sst2.data / "films.json"
    file.write_text(json.dumps({**description, "labels": ["0", "1"], "metric": "macro_f1"}))
    done = pipeline(
        sst2, TASK_NAME=None, TASK_FILE=file, DATA_DIR=None, TEACHER_MODEL=sst2.teacher, BERT_MODEL="nowhere"
    )
    assert done.status == 0, done.err
    assert not (sst2.folder / "work/teacher").exists()
    assert "macro_f1" in (sst2.folder / "work/evaluation/student/eval_results.txt").read_text()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"TASK_NAME": None}, "give TASK_NAME"),
        ({"TASK_FILE": "task.json"}, "give only one of TASK_NAME and TASK_FILE"),
        ({"TASK_NAME": "SST3"}, "no such task"),
        ({"DATA_DIR": "nowhere"}, "nowhere: no such folder"),
        ({"BERT_MODEL": "nowhere"}, "nowhere"),
        ({"DO_LOWER_CASE": 1, "BERT_MODEL": "nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(sst2, settings, told):
    before = sorted(sst2.folder.rglob("*"))
    done = pipeline(sst2, **settings)
    assert done.status == 2
    assert told in done.err
    assert done.err.count("\n") == 1
    assert sorted(sst2.folder.rglob("*")) == before


def test_a_folder_of_the_users_is_left_alone(sst2):
    work = sst2.folder / "work"
    work.mkdir()
    (work / "mine").write_text("mine")
    done = pipeline(sst2)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert [path.name for path in work.iterdir()] == ["mine"]


def test_a_task_is_named_in_any_case_and_both_of_mnlis_sets_lie_in_one_folder(mnli):
    done = pipeline(mnli, TASK_NAME="MNLI-MM", DATA_DIR=None)
    assert done.status == 2
    assert "glue_dir/MNLI: no such folder" in done.err


@pytest.mark.parametrize("flag", ["--max_seq_length", "--device=cpu", "--do_predict", "--output_dir"])
def test_flags_that_are_not_for_all_parts_are_refused(sst2, flag):
    done = pipeline(sst2, flag)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "is not for all parts" in done.err
    assert not (sst2.folder / "work").exists()
