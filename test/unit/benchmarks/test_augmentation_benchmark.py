"""benchmarks/augmentation.py prints all of its table; no time is looked at."""

import re

import pytest
from augmentation_cases import Place, many_rows
from cases import call, write_rows

from benchmarks import augmentation


@pytest.fixture
def place(tmp_path) -> Place:
    made = Place(tmp_path)
    write_rows(made.data / "train.tsv", many_rows(60))
    return made


def test_every_way_has_its_line(place):
    flags = ["--data_dir", str(place.data), "--vocabulary", str(place.bert), "--size", "tiny", "--sentences", "20"]
    flags += ["--glove_embs", str(place.vectors), "--one_at_a_time", "5", "--memory", "30"]
    done = call(augmentation.main, flags, "augmentation.py")
    assert done.status == 0, done.err
    lines = done.out.splitlines()[1:]
    assert re.fullmatch(r"vectors: 10 x 3 loaded in .* s; neighbours of 10 words in .* s", lines[0])
    contexts = [line for line in lines if line.startswith("--mlm_context")]
    assert [line.split(":")[0] for line in contexts] == ["--mlm_context original", "--mlm_context masked"]
    for line in contexts:
        told = re.fullmatch(r".*: (\d+) words of 20 sentences, one at a time the (\d+) of the first 5", line)
        assert told
        assert 0 < int(told[2]) < int(told[1])
    ways = [line for line in lines if line.startswith("  ")]
    assert sum("one word at a time" in line and line.endswith(" 1.0x") for line in ways) == 2
    assert all(float(line.split()[-3]) > 0 for line in ways)
    assert re.fullmatch(r"memory: 30 rows, fp32 \d+ MB(, bf16 \d+ MB)?", lines[-1])


@pytest.mark.parametrize(
    ("flags", "told"),
    [(["--sentences", "0"], "--sentences"), (["--memory", "5", "0"], "--memory"), (["--data_dir", "/no"], "/no")],
)
def test_mistakes_are_told_in_one_line(place, flags, told):
    start = ["--data_dir", str(place.data), "--vocabulary", str(place.bert), "--size", "tiny"]
    done = call(augmentation.main, [*start, *flags], "augmentation.py")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert told in done.err
