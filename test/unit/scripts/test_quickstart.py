"""What the quickstart is made of: its data, its table, and the refusal of a folder that is not its own."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cases
import pytest
from cases import ROOT

sys.path.insert(0, str(ROOT / "test"))

import quickstart_data
import results_table
from quickstart_data import Snippet, split_by_film

from data_processing.examples import read_examples
from data_processing.tasks import find_task
from transformer.errors import UserError


def films(count: int, snippets: int) -> list[Snippet]:
    return [Snippet(f"text {f}.{n}", str(n % 2), f"film {f}") for f in range(count) for n in range(snippets)]


def test_no_film_is_on_both_sides():
    train, dev = split_by_film(films(12, 7), train_examples=40, dev_examples=10, seed=1)
    assert (len(train), len(dev)) == (40, 10)
    assert not {snippet.film for snippet in train} & {snippet.film for snippet in dev}
    assert len(set(train)) == 40


def test_the_seed_draws_the_split():
    splits = [split_by_film(films(12, 7), 40, 10, seed) for seed in (1, 1, 2)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_too_small_a_corpus_is_told():
    with pytest.raises(UserError, match="has 84 snippets"):
        split_by_film(films(12, 7), train_examples=80, dev_examples=10, seed=1)


def test_the_corpus_becomes_a_folder_of_sst2(tmp_path):
    flags = ["--train_examples", "600", "--dev_examples", "200", "--output_dir", str(tmp_path)]
    made = cases.call(quickstart_data.main, flags, "quickstart_data.py")
    assert (made.status, made.err) == (0, "")
    sides = [read_examples(tmp_path / name, find_task("SST-2")) for name in ("train.tsv", "dev.tsv")]
    assert [len(side) for side in sides] == [600, 200]
    texts = [text for side in sides for text in side.texts[0]]
    assert max(Counter(text.casefold() for text in texts).values()) == 1
    assert all(text == " ".join(text.split()) and text for text in texts)
    assert "&amp;" not in "".join(texts)
    assert all(0.4 < side.labels.mean() < 0.7 for side in sides)  # both kinds, the fresh ones more often


def test_a_missing_package_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart_data, "CORPUS", Path("data/none.csv"))
    flags = ["--train_examples", "6", "--dev_examples", "2", "--output_dir", str(tmp_path / "data")]
    made = cases.call(quickstart_data.main, flags, "quickstart_data.py")
    assert made.status == 2
    assert "requirements-quickstart.txt" in made.err
    assert list(tmp_path.iterdir()) == []


def write_log(path: Path, *events: dict) -> Path:
    path.write_text("".join(json.dumps({"event": "eval", **event}) + "\n" for event in events), encoding="utf-8")
    return path


def test_the_table_has_the_last_evaluation_of_each_model(tmp_path):
    log = write_log(
        tmp_path / "metrics.jsonl",
        {"model": "q/teacher", "file": "dev.tsv", "parameters": 22_713_986, "acc": 0.1, "fps": 1.0},
        {"step": 100, "acc": 0.2},
        {"model": "q/teacher", "file": "dev.tsv", "parameters": 22_713_986, "acc": 0.8125, "fps": 151.7},
        {"model": "q/student", "file": "dev.tsv", "parameters": 17_390_000, "acc": 0.8, "fps": 300.2},
    )
    shown = cases.call(results_table.main, ["--log", str(log), "the teacher=q/teacher", "a=b=q/student"], "table")
    assert (shown.status, shown.err) == (0, "")
    rows = [line.split() for line in shown.out.splitlines() if line.startswith(("the teacher", "a=b"))]
    assert rows == [["the", "teacher", "22.7", "M", "81.2%", "152"], ["a=b", "17.4", "M", "80.0%", "300"]]


def test_the_table_has_a_row_for_each_file_and_a_column_for_each_metric(tmp_path):
    also = {"model": "m", "parameters": 1_000_000, "fps": 10.0, "eval_loss": 0.5}
    log = write_log(
        tmp_path / "metrics.jsonl",
        {"file": "a.tsv", "acc": 0.5, "f1": 0.25, **also},
        {"file": "b.tsv", "acc": 0.75, "f1": 0.125, **also},
    )
    shown = cases.call(results_table.main, ["--log", str(log), "it=m"], "table")
    assert [line.split() for line in shown.out.splitlines() if line] == [
        ["file", "parameters", "accuracy", "f1", "examples/s"],
        ["it", "a.tsv", "1.0", "M", "50.0%", "0.2500", "10"],
        ["it", "b.tsv", "1.0", "M", "75.0%", "0.1250", "10"],
    ]


@pytest.mark.parametrize("content", [None, "{", '{"event": "eval", "step": 1}\n'])
def test_a_log_without_the_evaluation_is_told_in_one_line(tmp_path, content):
    log = tmp_path / "metrics.jsonl"
    if content is not None:
        log.write_text(content)
    shown = cases.call(results_table.main, ["--log", str(log), "the teacher=teacher"], "table")
    assert (shown.status, shown.out, shown.err.count("\n")) == (2, "", 1)


def bash(path: Path, *arguments: str, **variables: str) -> cases.Run:
    environment = {**os.environ, **variables}
    done = subprocess.run(
        ["bash", str(path), *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return cases.Run(done.returncode, done.stdout, done.stderr)


def test_the_quickstart_leaves_a_folder_alone_that_it_did_not_make(tmp_path):
    (tmp_path / "mine").write_text("mine")
    done = bash(ROOT / "test/quickstart.sh", QUICKSTART_DIR=str(tmp_path))
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_quickstart_knows_its_sizes(tmp_path):
    done = bash(ROOT / "test/quickstart.sh", QUICKSTART_DIR=str(tmp_path / "q"), QUICKSTART_SIZE="huge")
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "default or tiny" in done.err


@pytest.fixture
def bare(tmp_path) -> Path:
    """A repository with nothing but what the set-up needs."""
    (tmp_path / "test").mkdir()
    shutil.copy(ROOT / "test/setup_env.sh", tmp_path / "test")
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    return tmp_path


def interpreter(folder: Path, program: str) -> str:
    path = folder / "python-stand-in"
    path.write_text(f"#!/bin/sh\n{program}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("exit 1", "not Python 3.10 or newer"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "no ensurepip"),
    ],
)
def test_the_set_up_tells_what_python_lacks(bare, program, told):
    done = bash(bare / "test/setup_env.sh", "requirements.txt", PYTHON=interpreter(bare, program))
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert told in done.err
    assert not (bare / ".venv").exists()


@pytest.mark.slow
def test_the_set_up_installs_once_and_again_when_the_pins_change(bare):
    first, second = (bash(bare / "test/setup_env.sh", "requirements.txt", PYTHON=sys.executable) for _ in range(2))
    assert "Making the virtual environment" in first.out
    assert "Installing requirements.txt" in first.out
    assert second == cases.Run(0, "", "")
    (bare / "requirements.txt").write_text("no-such-package-at-all @ file:///nonexistent\n")
    broken = bash(bare / "test/setup_env.sh", "requirements.txt", PYTHON=sys.executable)
    assert broken.status == 2
    assert "nonexistent" in broken.err
    assert "its output is above" in broken.err.splitlines()[-1]
