"""Examples: which rows and cells of a task's files are texts and labels, and which are refused."""

from pathlib import Path

import pytest

from data_processing.examples import TextRows, read_examples, read_unlabelled
from data_processing.tables import ENCODING
from data_processing.tasks import Task, find_task
from transformer.errors import UserError

SST2, MNLI = find_task("SST-2"), find_task("MNLI")


def task(**changes) -> Task:
    return Task(**{"name": "mine", "text_columns": (0,), "label_column": 1, "labels": ("a", "b"), **changes})


def written(folder: Path, *rows: str, name: str = "file.tsv") -> Path:
    path = folder / name
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def refusal(read, path: Path, of: Task) -> str:
    with pytest.raises(UserError) as caught:
        read(path, of)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.splitlines() == [message]
    return message.removeprefix(str(path))


def test_the_label_of_mnli_is_the_last_column(tmp_path):
    """Train files have 12 columns, dev files 16."""
    texts = "\t".join(["x"] * 8 + ["first", "second"])
    path = written(
        tmp_path, "h\t" * 11, f"{texts}\tcontradiction\t neutral ", f"{texts}{5 * '	neutral'}\tentailment"
    )
    read = read_examples(path, MNLI)
    assert read.texts == (["first"] * 2, ["second"] * 2)
    assert read.labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("of", "rows", "message"),
    [
        (SST2, ["a film\t1", "a bore"], ", row 3: has 1 column, SST-2 needs at least 2, split by tabs"),
        (SST2, ["a film\t1", "", "a bore\t0"], ", row 3: has 1 column"),
        (SST2, ["a film\t1", "a bore\t2"], ", row 3: the label is '2', expected one of 0, 1 in column 2"),
        (SST2, ["a film\ta tab\t1"], ", row 2: has 3 columns, the row of names has 2; is there a tab in a text?"),
        (SST2, ["a film\t" + "y" * 10_000], f", row 2: the label is '{'y' * 60}…', expected one of"),
        (MNLI, ["x\t" * 9 + "x"], ", row 2: has 10 columns, MNLI needs at least 11"),
        (MNLI, ["x\t" * 11 + "-"], ", row 2: the label is '-'"),
        (SST2, [], ": holds no examples"),
    ],
)
@pytest.mark.parametrize("read", [read_examples, lambda path, of: list(TextRows(path, of))], ids=["all", "row by row"])
def test_a_bad_row_is_refused_with_its_number(tmp_path, read, of, rows, message):
    assert refusal(read, written(tmp_path, "header\tlabel", *rows), of).startswith(message)


def test_a_header_that_is_an_example_is_refused(tmp_path):
    assert "row 1: is an example" in refusal(read_examples, written(tmp_path, "x\ta", "y\tb"), task())
    scores = task(labels=())
    assert "row 1: is an example" in refusal(read_examples, written(tmp_path, "x\t1.5", "y\t2"), scores)
    assert read_examples(written(tmp_path, "text\tscore", "y\t2"), scores).labels.tolist() == [2.0]
    named = task(text_columns=("text",), label_column="a", form="csv")  # its name proves that it is a header
    assert read_examples(written(tmp_path, "text,a", "x,b"), named).labels.tolist() == [1]


def test_test_files_without_a_header_keep_their_first_row(tmp_path):
    path = written(tmp_path, "first", "second")
    assert read_unlabelled(path, task(id_column=None)).texts == (["second"],)
    assert read_unlabelled(path, task(id_column=None, test_has_header=False)).texts == (["first", "second"],)


@pytest.mark.parametrize(
    ("columns", "row", "enough"),
    [
        ((0, -1), "x\ta", True),
        ((0, -1), "a", False),
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
    assert message == f", row 2: the score is {cell!r}, expected a number in column 2"


def test_a_message_names_twenty_labels_at_most(tmp_path):
    of = task(labels=tuple(f"label {number}" for number in range(1000)))
    message = refusal(read_examples, written(tmp_path, "text\tlabel", "x\tother"), of)
    assert message.endswith("label 18, label 19, … in column 2")


def test_a_test_file_may_not_have_short_rows(tmp_path):
    """QQP's short rows are left out of training, but a submission has a prediction for each row."""
    path = written(tmp_path, "id\ttext", "0\tx", "1")
    of = task(text_columns=(1,), label_column=0, skips_short_rows=True)
    assert ", row 3: has 1 column" in refusal(read_unlabelled, path, of)


@pytest.mark.parametrize(
    ("form", "content", "expected"),
    [
        ("tsv", b'id\t"text\tl\xe9\n7\tx\xff\ta\n8\n', b'id\t"text\tl\xe9\n7\tnew\ta\n7\tx\xff\ta\n'),
        ("csv", b'id,text,l\n\xff,"x, ""y""",a\n', b'id,text,l\n\xff,new,a\n\xff,"x, ""y""",a\n'),
        (
            "jsonl",
            b'{"1": "x", "2": "a", "n": ["\xff"]}\n',
            b'{"1": "new", "2": "a", "n": ["\xff"]}\n{"1": "x", "2": "a", "n": ["\xff"]}\n',
        ),
    ],
)
def test_a_row_is_formatted_with_other_texts(tmp_path, form, content, expected):
    """All else stays as it is, bytes that are not UTF-8 too; rows that the task leaves out are left out."""
    path = tmp_path / "file"
    path.write_bytes(content)
    columns = (
        {"text_columns": ("1",), "label_column": "2"} if form == "jsonl" else {"text_columns": (1,), "label_column": 2}
    )
    rows = TextRows(path, task(form=form, skips_short_rows=True, **columns))
    formatted = [rows.format_row(row, texts) for row in rows for texts in (("new",), row.texts)]
    assert (rows.head + "".join(formatted)).encode(*ENCODING) == expected


def test_a_comma_without_quotation_marks_is_refused_by_row(tmp_path):
    """The text would be cut at it."""
    path = written(tmp_path, "label,text", "b,fine", "b,not bad, in fact one of the best", name="file.csv")
    of = task(form="csv", text_columns=("text",), label_column="label")
    for read in (read_examples, lambda path, of: list(TextRows(path, of)), read_unlabelled):
        assert refusal(read, path, of).startswith(", row 3: has 3 columns, the row of names has 2; is there a comma")


def test_empty_cells_beyond_the_names_are_a_spreadsheets(tmp_path):
    path = written(tmp_path, "text,label", "fine,b,,", "dull,a", name="file.csv")
    assert read_examples(path, task(form="csv")).labels.tolist() == [1, 0]


@pytest.mark.parametrize("form", ["tsv", "csv"])
def test_a_test_file_of_one_column_has_a_row_for_each_line(tmp_path, form):
    path = written(tmp_path, "text", "fine", "", "dull", "", name=f"file.{form}")
    assert read_unlabelled(path, task(form=form)).texts == (["fine", "", "dull", ""],)
