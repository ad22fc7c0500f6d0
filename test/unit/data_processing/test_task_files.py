"""Tasks of the user's own: a JSON file and rows of every form to examples, and every mistake to one line."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from data_processing.examples import read_examples, read_unlabelled
from data_processing.metrics import METRICS
from data_processing.task_files import read_task_file
from data_processing.tasks import Task
from transformer.errors import UserError, printable

LEAST = {"name": "reviews", "train": "train.csv", "dev": "dev.csv", "text": "review", "label": "stars"}
LABELS = ["bad", "good"]


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "reviews.json"


@pytest.fixture
def task(file):
    """The task of a file of the least keys and these; None leaves one out."""

    def task(**keys: Any) -> Task:
        values = {**LEAST, "labels": LABELS, **keys}
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return read_task_file(file)

    return task


@pytest.fixture
def refusal(file):
    """What is said of a task file of this content."""

    def refusal(content: str | bytes) -> str:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return said(read_task_file, file)

    return refusal


def said(read, file: Path, *task: Task) -> str:
    """What is said when a file is read: one line, without the file's name, which begins it."""
    with pytest.raises(UserError) as caught:
        read(file, *task)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert message.startswith(str(file))
    assert len(message) < len(str(file)) + 400
    return message.removeprefix(str(file))


def rows_of(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def test_a_file_of_the_least_keys(task):
    """All the rest has a default, none of which is a figure of GLUE's."""
    assert task() == Task(
        name="reviews",
        text_columns=("review",),
        label_column="stars",
        labels=("bad", "good"),
        form="csv",
        train_file="train.csv",
        augmented_file="train_aug.csv",
        dev_files=("dev.csv",),
        test_files=(),
        id_column=None,
    )


def test_a_file_of_every_key(task):
    read = task(
        name="Reviews-2.1_x",
        train="parts/train.txt",
        dev=["dev.txt", "parts/dev-hard.v2.txt"],
        test=["new.txt", "parts/old.v2.txt"],
        format="tsv",
        header=False,
        text=[0, 2],
        label=-1,
        labels=[" no ", 1, True, 2.5],
        meanings=["negative", "one", "true", "two and a half"],
        test_text=[1, 3],
        test_id=0,
        metric="macro_f1",
        lower_case=False,
        max_seq_length=8,
        intermediate_epochs=0.5,
    )
    assert read == Task(
        name="Reviews-2.1_x",
        text_columns=(0, 2),
        label_column=-1,
        labels=("no", "1", "true", "2.5"),
        meanings=("negative", "one", "true", "two and a half"),
        metric=METRICS["macro_f1"],
        form="tsv",
        has_header=False,
        test_has_header=False,
        train_file="parts/train.txt",
        augmented_file="parts/train_aug.txt",
        dev_files=("dev.txt", "parts/dev-hard.v2.txt"),
        dev_suffixes=("", "-dev-hard.v2"),
        test_files=("new.txt", "parts/old.v2.txt"),
        test_text_columns=(1, 3),
        id_column=0,
        submissions=("Reviews-2.1_x-new.tsv", "Reviews-2.1_x-old.v2.tsv"),
        intermediate_epochs=0.5,
        max_seq_length=8,
        lower_case=False,
    )


@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_taken_as_they_are(task, value):
    assert task(lower_case=value).lower_case is value
    assert task(header=value, text=0, label=1).has_header is value
    assert task(header=value, train="a.jsonl", dev="b.jsonl").label_column == "stars"  # keys name what stands there


def test_long_names_and_far_columns_are_taken_up_to_their_limits(task):
    read = task(name="a" * 100, train="a/" * 100 + "é" * 58 + ".csv", text=[-1000, 99_999], max_seq_length=999_999)
    assert (len(read.name), len(read.train_file), read.text_columns) == (100, 262, (-1000, 99_999))
    assert read.augmented_file.endswith("é_aug.csv")


def test_one_test_file_has_the_tasks_name_for_its_predictions(task):
    assert task(test="new.csv").submissions == task(test=["new.csv"]).submissions == ("reviews.tsv",)


def test_scores_stand_in_place_of_labels(task):
    read = task(labels=None, regression=True)
    assert (read.labels, read.is_regression, read.outputs, read.score_range) == ((), True, 1, None)
    assert read.metric is METRICS["correlation"]
    assert task(regression=False) == task()


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_and_f1", "f1", "macro_f1", "matthews"])
def test_two_labels_go_with_every_metric_of_labels(task, metric):
    assert task(metric=metric).metric is METRICS[metric]


@pytest.mark.parametrize("form", ["tsv", "csv", "jsonl"])
def test_the_form_is_told_by_the_endings_or_by_a_key(task, form):
    files = {"train": f"a.{form}", "dev": f"b.{form.upper()}", "test": f"c.{form}"}
    assert task(**files).form == form
    assert task(format=form, train="a", dev="b.csv", test="c.txt").form == form


def test_a_byte_order_mark_and_other_scripts_are_read(file):
    content = json.dumps({**LEAST, "text": "größe 漢", "labels": LABELS}, ensure_ascii=False)
    file.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_task_file(file).text_columns == ("größe 漢",)


class TestExamples:
    """What such a task reads."""

    TABLES = (
        ("tsv", 'review\tstars\tid\n"x, y\tgood\t7\nz\t bad \t8\n'),
        ("csv", 'review,stars,id\n"""x, y",good,7\nz, bad ,8\n'),
        ("jsonl", '{"review": "\\"x, y", "stars": "good", "id": 7}\n{"id": "8", "stars": " bad ", "review": "z"}\n'),
    )

    @pytest.mark.parametrize(("form", "content"), TABLES)
    def test_one_text_and_columns_by_name(self, task, tmp_path, form, content):
        path = rows_of(tmp_path, f"train.{form}", content)
        read = task(train=path.name, dev=f"dev.{form}", test_id="id")
        rows = read_examples(path, read)
        assert (rows.texts, rows.labels.tolist(), str(rows.labels.dtype)) == ((['"x, y', "z"],), [1, 0], "int64")
        new = read_unlabelled(path, read)
        assert (new.texts, new.ids, len(new)) == ((['"x, y', "z"],), ["7", "8"], 2)
        both = read_examples(path, task(train=path.name, dev=f"dev.{form}", text=["id", "review"]))
        assert both.texts == (["7", "8"], ['"x, y', "z"])

    @pytest.mark.parametrize(("form", "content"), TABLES[:2])
    @pytest.mark.parametrize("header", [True, False])
    def test_two_texts_and_columns_by_number(self, task, tmp_path, form, content, header):
        path = rows_of(tmp_path, f"train.{form}", content if header else content.partition("\n")[2])
        read = task(train=path.name, dev=f"dev.{form}", header=header, text=[-1, 0], label=1)
        rows = read_examples(path, read)
        assert (rows.texts, rows.labels.tolist()) == ((["7", "8"], ['"x, y', "z"]), [1, 0])

    def test_rows_of_a_test_file_are_counted_where_no_column_has_ids(self, task, tmp_path):
        path = rows_of(tmp_path, "new.csv", "id,text\n7,x\n8,y\n")
        new = read_unlabelled(path, task(test_text="text"))
        assert (new.texts, new.ids, new.labels.tolist()) == ((["x", "y"],), ["0", "1"], [0, 0])
        assert read_unlabelled(path, task(test_text=-1, test_id=0)).ids == ["7", "8"]

    @pytest.mark.parametrize(
        ("form", "content"),
        [
            ("csv", "review,stars\nx, 2.50 \ny,-1e3\n"),
            ("jsonl", '{"review": "x", "stars": 2.5}\n{"review": "y", "stars": "-1000"}\n'),
        ],
    )
    def test_scores(self, task, tmp_path, form, content):
        path = rows_of(tmp_path, f"train.{form}", content)
        rows = read_examples(path, task(train=path.name, dev=f"dev.{form}", labels=None, regression=True))
        assert (rows.labels.tolist(), str(rows.labels.dtype)) == ([2.5, -1000], "float32")

    def test_labels_that_are_numbers_true_and_false(self, task, tmp_path):
        path = rows_of(tmp_path, "a.jsonl", '{"review": 5, "stars": 1}\n{"review": true, "stars": false}\n')
        rows = read_examples(path, task(train="a.jsonl", dev="b.jsonl", labels=[False, 1]))
        assert (rows.texts, rows.labels.tolist()) == ((["5", "true"],), [1, 0])
        path = rows_of(tmp_path, "a.csv", "review,stars\nx,1\ny,0\n")
        assert read_examples(path, task(labels=[0, 1])).labels.tolist() == [1, 0]

    def test_half_of_a_character_is_the_same_in_the_task_and_its_files(self, task, tmp_path):
        path = rows_of(tmp_path, "a.jsonl", '{"review": "x", "stars": "\\ud800"}\n')
        read = task(train="a.jsonl", dev="b.jsonl", labels=["x", "\ud800"])
        assert read.labels == ("x", "\ufffd")
        assert read_examples(path, read).labels.tolist() == [1]

    def test_short_rows_are_mistakes(self, task, tmp_path, caplog):
        path = rows_of(tmp_path, "train.csv", "review,stars\nx,good\n\ny\n")
        with caplog.at_level(logging.WARNING):
            message = said(read_examples, path, task())
        assert message == ", row 4: has 1 column, reviews needs at least 2"
        assert caplog.records == []

    @pytest.mark.parametrize(
        ("keys", "content", "message"),
        [
            ({}, "text,stars\nx,good\n", ": has no column 'review'; its columns are 'text', 'stars'"),
            ({}, "review,stars\n", ": holds no examples"),
            ({}, "review,stars\nx,Good\n", "the label is 'Good', expected one of bad, good in the column 'stars'"),
            ({"label": 1}, "review,stars\nx,\n", "the label is '', expected one of bad, good in column 2"),
            ({"text": [0, 5], "label": 1}, "review,stars\nx,good\n", "has 2 columns, reviews needs at least 6"),
            ({"text": 0, "label": 1}, "x,good\ny,bad\n", "row 1: is an example; reviews's files begin with a row of "),
        ],
    )
    def test_rows_that_do_not_fit_are_told(self, task, tmp_path, keys, content, message):
        path = rows_of(tmp_path, "train.csv", content)
        read = task(**keys)
        assert message in said(read_examples, path, read)

    @pytest.mark.parametrize(
        "score", ["", "four", "nan", "NaN", "inf", "-inf", "Infinity", "1e999", "1e30", "3,5", "true"]
    )
    def test_what_is_no_score_is_told(self, task, tmp_path, score):
        path = rows_of(tmp_path, "train.csv", f'review,stars\n"x\ny",1\nz,"{score}"\n')
        message = said(read_examples, path, task(labels=None, regression=True))
        assert message == f", row 4: the score is {score!r}, expected a number in the column 'stars'"

    @pytest.mark.parametrize("value", ["null", "[1]", "NaN", "Infinity", None])
    @pytest.mark.parametrize("key", ["review", "stars"])
    def test_what_json_lines_lack_is_told(self, task, tmp_path, key, value):
        other = {"review": "stars", "stars": "review"}[key]
        last = f'{{"{other}": 1}}' if value is None else f'{{"{other}": 1, "{key}": {value}}}'
        whole = '{"review": "x", "stars": 1}'
        read = task(train="a.jsonl", dev="b.jsonl", labels=None, regression=True)
        for lines, row in (([whole, "", last], 3), ([last, whole], 1)):
            path = rows_of(tmp_path, "a.jsonl", "\n".join(lines))
            assert said(read_examples, path, read) == f", row {row}: has no text or number at {key!r}"


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"^--task_file /.*/no\.json: not found$"):
        read_task_file(tmp_path / "no.json")
    with pytest.raises(UserError, match=r"^--task_file /.*: cannot be read \(Is a directory\)$"):
        read_task_file(tmp_path)


ONE = "a file's name in the data folder, of 120 bytes at most"
SEVERAL = f"{ONE}, or a list of names"
COLUMN = "its name, or its number: from 0, or -1 for the last"
COLUMNS = f"a column, or a list of two; a column is {COLUMN}"
NAME = "1 to 100 letters, digits, - _ and ., no sign first: files are named after it"
DIFFERENT = "a list of two or more different labels, each one line as the label column writes it"
WORDS = "a different word for each of the labels"
LENGTH = "a whole number of WordPieces, 8 or more and below a million"
EPOCHS = "a number from above 0 to below a million"
NO_NAMES = "a number, since the files have no row of column names (header is false)"
NO_NUMBERS = "a key's name, since the files are JSON lines"
LINES = {"train": "a.jsonl", "dev": "b.jsonl"}

WRONG_VALUES: list[tuple[str, list[Any], str, dict[str, Any]]] = [
    ("name", [None, "", 1, [], "a b", "../a", "/a", ".a", "-a", "a/b", "é", "a\n", "a" * 101], NAME, {}),
    ("train", [None, "", 1, ["a.csv"], ".", "/", "./", "a\0.csv", "\ud800.csv", "é" * 61], ONE, {"format": "csv"}),
    ("dev", [None, 1, "", "/", [1], ["a.csv", ""], "\0", ["\udc80"], "a" * 121, {}], SEVERAL, {"format": "csv"}),
    ("test", [None, False, {"a": 1}, ["a.csv", None], ["."]], SEVERAL, {"format": "csv"}),
    ("dev", [[]], "at least one file's name: the first one chooses the checkpoint", {}),
    ("dev", [["a.csv", "a.csv"], ["a.csv", "b/a.csv"]], "names that differ before the dot", {}),
    ("test", [["a.csv", "b.csv", "a.CSV"]], "names that differ before the dot", {}),
    ("format", [None, "", "json", "CSV", ["csv"], {}], "one of tsv, csv, jsonl", {}),
    ("header", [None, 0, "yes"], "true or false", {}),
    ("text", [None, "", True, 1.0, [], [""], ["a", "b", "c"], [["a"]], {}, -1001, 100_000], COLUMNS, {}),
    ("test_text", [None, "", ["a", True]], COLUMNS, {}),
    ("label", [None, "", [], ["a"], False, 0.0], f"a column: {COLUMN}", {}),
    ("test_id", [None, "", ["a"], True], f"a column: {COLUMN}", {}),
    ("test_text", [["a", "b"]], "as many columns as text has, 1", {}),
    ("test_text", ["a", ["a"]], "as many columns as text has, 2", {"text": ["a", "b"]}),
    ("text", ["a", [0, "a"]], NO_NAMES, {"header": False, "label": 1}),
    ("label", ["a"], NO_NAMES, {"header": False, "text": 0}),
    ("text", [0, ["a", 0], -1], NO_NUMBERS, LINES),
    ("label", [1], NO_NUMBERS, LINES),
    ("test_text", [0], NO_NUMBERS, LINES),
    ("test_id", [0, -1], NO_NUMBERS, LINES),
    ("regression", [None, 1, "true"], "true or false", {}),
    ("labels", [[], ["a"], "ab", {"a": 0, "b": 1}, 2, ["a", None], ["a", []], ["a", " "], [1, {}]], DIFFERENT, {}),
    ("labels", [["a", " a"], [1, "1"], [True, "true"], [1, float("nan")], ["a\tb", "c"], ["a\nb", "c"]], DIFFERENT, {}),
    ("metric", [None, "", "acc", 1, [], ["f1"]], f"one of {', '.join(METRICS)}", {}),
    ("meanings", [None, "ab", ["a"], ["a", "a"], ["a", ""], ["a", 1], ["a", "b", "c"], {"a": 1, "b": 2}], WORDS, {}),
    ("lower_case", [None, 1, "false"], "true or false", {}),
    ("max_seq_length", [None, True, 7, -8, 64.0, "64", float("nan"), 1_000_000], LENGTH, {}),
    ("intermediate_epochs", [None, True, 0, -1, "3", float("nan"), float("inf"), 1_000_000], EPOCHS, {}),
]


@pytest.mark.parametrize(
    ("key", "value", "expected", "others"),
    [(key, value, expected, others) for key, values, expected, others in WRONG_VALUES for value in values],
)
def test_a_value_of_no_use_is_told_with_its_key(refusal, key, value, expected, others):
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    content = json.dumps({**LEAST, "labels": LABELS, **others, key: value})
    assert refusal(content) == f": {key} is {printable(shown)}, expected {expected}"


@pytest.mark.parametrize("key", list(LEAST))
def test_a_key_that_is_needed_is_told(refusal, key):
    values = {**LEAST, "labels": LABELS}
    del values[key]
    message = f": has no '{key}'; needed are name, train, dev, text, label, and labels or regression"
    assert refusal(json.dumps(values)) == message


EITHER = "needs either labels, a list, or regression, true"
FITTING = "does not fit the labels; those that do are"
ENDINGS = "expected the same one of .tsv, .csv, .jsonl for all, or a format that says what they are"
WRONG_TOGETHER = [
    ({}, EITHER),
    ({"labels": None}, EITHER),
    ({"regression": False}, EITHER),
    ({"labels": LABELS, "regression": True}, EITHER),
    ({"labels": [1, 2, 3], "metric": "f1"}, f"the metric f1 {FITTING} accuracy, macro_f1, matthews"),
    ({"labels": [1, 2], "metric": "correlation"}, f"the metric correlation {FITTING} {', '.join([*METRICS][:-1])}"),
    ({"regression": True, "metric": "accuracy"}, f"the metric accuracy {FITTING} correlation"),
    ({"dev": "dev.CSV", "test": ["x.TSV", "y"]}, f"train, dev and test have .csv, .tsv, no ending, {ENDINGS}"),
    ({"train": "a.txt", "dev": "b.txt"}, f"train, dev and test have .txt, {ENDINGS}"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG_TOGETHER)
def test_keys_that_do_not_fit_together_are_told(refusal, keys, message):
    assert refusal(json.dumps({**LEAST, **keys})) == f": {message}"


@pytest.mark.parametrize("key", ["", "Name", "epochs", "a\nb", "k" * 10_000, "\ud800"])
def test_an_unknown_key_is_told_with_those_there_are(refusal, key):
    shown = repr(key if len(key) <= 60 else f"{key[:60]}…")
    assert refusal(json.dumps({key: 1, **LEAST})) == (
        f": unknown key {shown}; the keys are name, train, dev, test, format, header, text, label, labels, meanings, "
        "regression, test_text, test_id, metric, lower_case, max_seq_length, intermediate_epochs"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ('{"name": }', "Expecting value: line 1 column 10 (char 9)"),
        ('{\n"name": "a"\n"train": 1}', "Expecting ',' delimiter: line 3 column 1 (char 14)"),
        ('{"name": "a", "name": "b"}', "'name' stands twice"),
        ('{"text": {"a\\n": 1, "a\\n": 1}}', "'a\\n' stands twice"),
        (f'{{"{"k" * 10_000}": 1, "{"k" * 10_000}": 2}}', f"'{'k' * 59}…"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        (b'{"name": "\xe9"}', "'utf-8' codec can't decode byte 0xe9 in position 10"),
        ('{"name": ' + "1" * 5000 + "}", "Exceeds the limit (4300 digits) for integer string conversion"),
    ],
)
def test_what_is_no_json_is_told(refusal, content, reason):
    message = refusal(content)
    assert message.startswith(f": is no valid JSON ({reason}"[:60])
    assert message.endswith(")")


@pytest.mark.parametrize("content", ["[]", "null", '"reviews"', "1"])
def test_what_is_no_object_is_told(refusal, content):
    assert refusal(content) == ": expected a JSON object, as README shows"


def test_however_deep_a_value_is_it_is_told(refusal):
    """Python can read somewhat deeper lists than it can write."""
    whole = json.dumps({**LEAST, "labels": LABELS})[:-1]
    for depth in [3, 100, *range(900, 1020), 100_000]:
        message = refusal(f'{whole}, "lower_case": {"[" * depth}{"]" * depth}}}')
        assert message.startswith((": lower_case is ", ": is no valid JSON (maximum recursion depth exceeded"))
