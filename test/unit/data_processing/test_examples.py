"""Which rows are examples: headers that are examples, columns counted from the end, odd cells, files without names."""

from pathlib import Path

import pytest

from data_processing.examples import read_examples, read_unlabelled
from data_processing.tasks import Task
from transformer.errors import UserError


def task(**changes) -> Task:
    return Task(**{"name": "mine", "text_columns": (0,), "label_column": 1, "labels": ("a", "b"), **changes})


def written(folder: Path, *rows: str, name: str = "file.tsv") -> Path:
    path = folder / name
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def refusal(read, path: Path, of: Task) -> str:
    with pytest.raises(UserError) as caught:
        read(path, of)
    return str(caught.value)


def test_a_header_that_is_an_example_is_told(tmp_path):
    path = written(tmp_path, "x\ta", "y\tb")
    assert "row 1: is an example" in refusal(read_examples, path, task())
    scores = task(labels=())
    assert "row 1: is an example" in refusal(read_examples, written(tmp_path, "x\t1.5", "y\t2"), scores)
    assert read_examples(written(tmp_path, "text\tscore", "y\t2"), scores).labels.tolist() == [2.0]


def test_a_column_may_be_named_as_one_of_its_labels(tmp_path):
    named = task(text_columns=("text",), label_column="spam", labels=("spam", "ham"), form="csv")
    assert read_examples(written(tmp_path, "text,spam", "x,ham", name="f.csv"), named).labels.tolist() == [1]


def test_test_files_without_a_header_keep_their_first_row(tmp_path):
    path = written(tmp_path, "first", "second")
    assert read_unlabelled(path, task(id_column=None)).texts == (["second"],)
    assert read_unlabelled(path, task(id_column=None, test_has_header=False)).texts == (["first", "second"],)


@pytest.mark.parametrize(
    ("columns", "row", "enough"),
    [
        ((0, -1), "x\ta", True),
        ((0, -1), "a", False),
        ((-2, -1), "x\ta", True),
        ((-2, 1), "x\ta", True),
        ((-2, 0), "a\tb", False),
        ((-2, 0), "a\tx\tb", True),
        ((1, -1), "a\tb", False),
        ((-3, -1), "x\ta", False),
    ],
)
def test_columns_counted_from_the_end_are_cells_of_their_own(tmp_path, columns, row, enough):
    of = task(text_columns=columns[:1], label_column=columns[1], has_header=False)
    path = written(tmp_path, row)
    if enough:
        assert read_examples(path, of).texts == (["x"],)
    else:
        assert "needs at least" in refusal(read_examples, path, of)


@pytest.mark.parametrize("cell", ["1_0", "1,5", "nan", "-inf", "1e31", "", "one"])
def test_a_score_is_a_number(tmp_path, cell):
    message = refusal(read_examples, written(tmp_path, "text\tscore", f"x\t{cell}"), task(labels=()))
    assert message == f"{tmp_path}/file.tsv, row 2: the score is {cell!r}, expected a number in column 2"


def test_many_labels_are_not_all_told(tmp_path):
    of = task(labels=tuple(f"label {number}" for number in range(1000)))
    message = refusal(read_examples, written(tmp_path, "text\tlabel", "x\tother"), of)
    assert message.endswith("label 18, label 19, … in column 2")


def test_a_submission_has_every_row(tmp_path):
    """Short rows of QQP are left out of training; a test file with one would give a submission that lacks it."""
    path = written(tmp_path, "id\ttext", "0\tx", "1")
    of = task(text_columns=(1,), label_column=0, skips_short_rows=True)
    assert "row 3: has 1 column" in refusal(read_unlabelled, path, of)
