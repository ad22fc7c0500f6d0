"""test/demo.py takes any text, names labels as the model does, and tells mistakes in one line."""

import sys

import cases
import pytest
from cases import ROOT

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


def test_the_demo_takes_any_text(sst2):
    flags = [flag for text in ODD_TEXTS for flag in ("--text", text)]
    shown = cases.call(
        demo.main, ["--model", str(sst2.teacher), "--max_seq_length", "16", "--do_lower_case", *flags], "demo.py"
    )
    assert (shown.status, shown.err) == (0, "")
    head, *lines, last = shown.out.splitlines()
    assert len(lines) == len(ODD_TEXTS)
    assert all(line.split()[0] in ("0", "1") and 0.5 <= float(line.split()[1]) <= 1 for line in lines)
    assert all(part.isprintable() for part in (head, *lines, last))


def test_the_demo_names_labels_as_the_config_does(mnli, tmp_path):
    cases.edit_config(mnli.teacher, id2label={"0": "no", "1": "yes", "2": "perhaps"})
    shown = cases.call(
        demo.main, ["--model", str(mnli.teacher), "--max_seq_length", "16", "--do_lower_case"], "demo.py"
    )
    assert {line.split()[0] for line in shown.out.splitlines()[1:-1]} <= {"no", "yes", "perhaps"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "RAW"], "no classifier"),
        (["--model", "TEACHER", "--max_seq_length", "7"], "--max_seq_length"),
        (["--model", "TEACHER", "--max_seq_length", "9999"], "positions"),
        (["--model", "TEACHER", "--txt", "x"], "--txt"),
    ],
)
def test_the_demo_tells_mistakes_in_one_line(sst2, tmp_path, flags, told):
    raw = tmp_path / "raw"
    weights = {key: tensor for key, tensor in cases.read_bin(sst2.teacher).items() if key.startswith("bert.")}
    cases.write_model(
        raw, cases.Golden("sst2_small").config("teacher"), weights, cases.Golden("sst2_small").case["vocab"]
    )
    before = sorted(tmp_path.rglob("*"))
    places = {"RAW": str(raw), "TEACHER": str(sst2.teacher)}
    done = cases.call(demo.main, ["--do_lower_case", *(places.get(flag, flag) for flag in flags)], "demo.py")
    assert (done.status, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert told in done.err
    assert sorted(tmp_path.rglob("*")) == before
