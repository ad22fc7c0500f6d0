"""test/demo.py takes any text, prints the model's label names, and prints a mistake as one line."""

import sys

import cases
import pytest
from cases import ROOT, Run

sys.path.insert(0, str(ROOT / "test"))

import demo

ODD_TEXTS = (
    "",
    " ",
    "word " * 100_000,
    "w" * 100_000,
    'tab\there, "quotes", \\backslashes\\, a line\nbreak and \x00\x07\x1b[31m controls',
    "a lone surrogate \udcff and \ud800",
    "[MASK] [SEP] \u202e right to left, 中文, emoji 🎬",
)


def run(*flags: object) -> Run:
    return cases.call(demo.main, ["--do_lower_case", *map(str, flags)], "demo.py")


def test_the_demo_takes_any_text(sst2):
    texts = [flag for text in ODD_TEXTS for flag in ("--text", text)]
    done = run("--model", sst2.teacher, "--max_seq_length", 16, *texts)
    assert (done.status, done.err) == (0, "")
    head, *lines, last = done.out.splitlines()
    assert len(lines) == len(ODD_TEXTS)
    assert all(line.split()[0] in ("0", "1") and 0.5 <= float(line.split()[1]) <= 1 for line in lines)
    assert all(part.isprintable() for part in (head, *lines, last))


def test_the_demo_prints_the_label_names_of_the_config(mnli):
    cases.edit_config(mnli.teacher, id2label={"0": "no", "1": "yes", "2": "perhaps"})
    done = run("--model", mnli.teacher, "--max_seq_length", 16)
    assert {line.split()[0] for line in done.out.splitlines()[1:-1]} <= {"no", "yes", "perhaps"}


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "student"], "no classifier"),
        (["--model", "teacher", "--max_seq_length", "7"], "--max_seq_length"),
        (["--model", "teacher", "--max_seq_length", "9999"], "positions"),
        (["--model", "teacher", "--txt", "x"], "--txt"),
    ],
)
def test_a_mistake_is_one_line(sst2, monkeypatch, flags, fact):
    cases.edit_weights(sst2.student, lambda weights: [weights.pop(f"classifier.{name}") for name in ("weight", "bias")])
    before = sorted(sst2.folder.rglob("*"))
    monkeypatch.chdir(sst2.folder)
    done = run(*flags)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert fact in done.err
    assert sorted(sst2.folder.rglob("*")) == before
