"""The quickstart's data, its table, its refusal of other folders, and the set-up of .venv."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import cases
import pytest
from cases import ROOT, Run
from test_scripts import bash, script, stand_in_python

sys.path.insert(0, str(ROOT / "test"))

import quickstart_data
import results_table
from quickstart_data import Snippet, split_by_film

from data_processing.examples import read_examples
from data_processing.tasks import find_task
from transformer.errors import UserError

SNIPPETS = [Snippet(f"text {film}.{n}", str(n % 2), f"film {film}") for film in range(12) for n in range(7)]


def make_data(folder: Path, train: int, dev: int) -> Run:
    flags = ["--train_examples", str(train), "--dev_examples", str(dev), "--output_dir", str(folder)]
    return cases.call(quickstart_data.main, flags, "quickstart_data.py")


def test_no_film_is_in_both_files():
    train, dev = split_by_film(SNIPPETS, train_examples=40, dev_examples=10, seed=1)
    assert (len(train), len(dev), len(set(train))) == (40, 10, 40)
    assert not {snippet.film for snippet in train} & {snippet.film for snippet in dev}


def test_the_split_depends_on_the_seed():
    first, again, other = (split_by_film(SNIPPETS, 40, 10, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_corpus_that_is_too_small_is_an_error():
    with pytest.raises(UserError, match="84 snippets"):
        split_by_film(SNIPPETS, train_examples=80, dev_examples=10, seed=1)


def test_the_corpus_is_written_as_a_folder_of_sst2(tmp_path):
    made = make_data(tmp_path, 600, 200)
    assert (made.status, made.err) == (0, "")
    sides = [read_examples(tmp_path / name, find_task("SST-2")) for name in ("train.tsv", "dev.tsv")]
    assert [len(side) for side in sides] == [600, 200]
    texts = [text for side in sides for text in side.texts[0]]
    assert max(Counter(text.casefold() for text in texts).values()) == 1
    assert all(text == " ".join(text.split()) and text for text in texts)
    assert "&amp;" not in "".join(texts)
    assert all(0.4 < side.labels.mean() < 0.7 for side in sides)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart_data, "CORPUS", Path("data/none.csv"))
    made = make_data(tmp_path / "data", 6, 2)
    assert (made.status, made.err.count("\n")) == (2, 1)
    assert "requirements-quickstart.txt" in made.err
    assert list(tmp_path.iterdir()) == []


def table(folder: Path, *rows: str, **logs: tuple[dict, ...]) -> Run:
    """Print the table of these rows; `logs` are the events of FOLDER/name/metrics.jsonl by name."""
    for name, events in logs.items():
        (folder / name).mkdir()
        lines = [json.dumps({"event": "eval", **event}) for event in events]
        (folder / name / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return cases.call(
        results_table.main, [f"{name}={folder / last}" for name, last in (row.rsplit("=", 1) for row in rows)]
    )


def test_the_table_has_the_last_evaluation_of_each_model(tmp_path):
    model = {"model": "m", "file": "dev.tsv", "parameters": 22_713_986}
    teacher = ({**model, "acc": 0.1, "fps": 1.0}, {"step": 100, "acc": 0.2}, {**model, "acc": 0.8125, "fps": 151.7})
    student = ({**model, "parameters": 17_390_000, "acc": 0.8, "fps": 300.2},)
    done = table(tmp_path, "the teacher=t", "a=b=s", t=teacher, s=student)
    assert (done.status, done.err) == (0, "")
    rows = [line.split() for line in done.out.splitlines() if line.startswith(("the teacher", "a=b"))]
    assert rows == [["the", "teacher", "22.7", "M", "81.2%", "152"], ["a=b", "17.4", "M", "80.0%", "300"]]


def test_the_table_has_a_row_for_each_file(tmp_path):
    model = {"model": "m", "parameters": 1_000_000, "fps": 10.0, "eval_loss": 0.5}
    events = ({"file": "a.tsv", "acc": 0.5, "f1": 0.25, **model}, {"file": "b.tsv", "acc": 0.75, "f1": 0.125, **model})
    done = table(tmp_path, "it=m", m=events)
    assert [line.split() for line in done.out.splitlines() if line] == [
        ["file", "parameters", "accuracy", "f1", "examples/s"],
        ["it", "a.tsv", "1.0", "M", "50.0%", "0.2500", "10"],
        ["it", "b.tsv", "1.0", "M", "75.0%", "0.1250", "10"],
    ]


@pytest.mark.parametrize("content", [None, "{", '{"event": "eval", "step": 1}\n'])
def test_a_log_without_the_evaluation_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = table(tmp_path, "the teacher=.")
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "metrics.jsonl" in done.err


@pytest.mark.parametrize(("size", "fact"), [("tiny", "QUICKSTART_DIR"), ("huge", "default or tiny")])
def test_the_quickstart_refuses_a_folder_with_other_files_and_an_unknown_size(tmp_path, size, fact):
    (tmp_path / "mine").write_text("mine")
    done = script("quickstart.sh", QUICKSTART_DIR=tmp_path, QUICKSTART_SIZE=size)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert fact in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.fixture
def setup_env(tmp_path) -> str:
    """The set-up script in a repository with an empty requirements.txt."""
    (tmp_path / "test").mkdir()
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    return str(shutil.copy(ROOT / "test/setup_env.sh", tmp_path / "test"))


@pytest.mark.parametrize(
    ("program", "fact"), [("exit 1", "Python 3.10"), ('case "$2" in *ensurepip*) exit 1;; esac', "ensurepip")]
)
def test_the_set_up_refuses_an_interpreter_that_is_old_or_without_ensurepip(setup_env, tmp_path, program, fact):
    done = bash(setup_env, "requirements.txt", PYTHON=stand_in_python(tmp_path, program))
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert fact in done.err
    assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_the_set_up_installs_once_and_again_when_the_requirements_change(setup_env, tmp_path):
    first, second = (bash(setup_env, "requirements.txt", PYTHON=sys.executable) for _ in range(2))
    assert (first.status, "requirements.txt" in first.out) == (0, True)
    assert (tmp_path / ".venv").is_dir()
    assert second == Run(0, "", "")
    (tmp_path / "requirements.txt").write_text("no-such-package-at-all @ file:///nonexistent\n")
    broken = bash(setup_env, "requirements.txt", PYTHON=sys.executable)
    assert broken.status == 2
    assert "nonexistent" in broken.err
    assert "pip install" in broken.err.splitlines()[-1]
