"""Task files: tasks of the user's own, their examples in every form, and refusals in one line."""

import json
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
    """The message about a task file of this content."""

    def refusal(content: str | bytes | dict[str, Any]) -> str:
        content = json.dumps(content) if isinstance(content, dict) else content
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return message_of(read_task_file, file)

    return refusal


def message_of(read, file: Path, *task: Task) -> str:
    """The message when a file is read: one line, without the file's name that begins it."""
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


def test_the_required_keys_suffice(task):
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


def test_every_key_is_read(task):
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
def test_flags_may_be_true_or_false(task, value):
    assert task(lower_case=value).lower_case is value
    assert task(header=value, text=0, label=1).has_header is value
    assert task(header=value, train="a.jsonl", dev="b.jsonl").label_column == "stars"


def test_names_and_columns_are_accepted_up_to_their_limits(task):
    read = task(name="a" * 100, train="a/" * 100 + "é" * 58 + ".csv", text=[-1000, 99_999], max_seq_length=999_999)
    assert (len(read.name), len(read.train_file), read.text_columns) == (100, 262, (-1000, 99_999))
    assert read.augmented_file.endswith("é_aug.csv")


def test_predictions_of_a_single_test_file_are_named_after_the_task(task):
    assert task(test="new.csv").submissions == task(test=["new.csv"]).submissions == ("reviews.tsv",)


def test_a_regression_has_scores_instead_of_labels(task):
    read = task(labels=None, regression=True)
    assert (read.labels, read.is_regression, read.outputs, read.score_range) == ((), True, 1, None)
    assert read.metric is METRICS["correlation"]
    assert task(regression=False) == task()


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_and_f1", "f1", "macro_f1", "matthews"])
def test_two_labels_fit_every_metric_of_labels(task, metric):
    assert task(metric=metric).metric is METRICS[metric]


@pytest.mark.parametrize("form", ["tsv", "csv", "jsonl"])
def test_the_form_follows_from_the_endings_or_the_format(task, form):
    files = {"train": f"a.{form}", "dev": f"b.{form.upper()}", "test": f"c.{form}"}
    assert task(**files).form == form
    assert task(format=form, train="a", dev="b.csv", test="c.txt").form == form


def test_a_task_file_may_have_a_byte_order_mark_and_other_scripts(file):
    content = json.dumps({**LEAST, "text": "größe 漢", "labels": LABELS}, ensure_ascii=False)
    file.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_task_file(file).text_columns == ("größe 漢",)


class TestExamples:
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

    def test_rows_of_a_test_file_without_ids_are_counted(self, task, tmp_path):
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

    def test_half_a_character_in_a_label_is_the_same_in_task_and_files(self, task, tmp_path):
        path = rows_of(tmp_path, "a.jsonl", '{"review": "x", "stars": "\\ud800"}\n')
        read = task(train="a.jsonl", dev="b.jsonl", labels=["x", "\ud800"])
        assert read.labels == ("x", "\ufffd")
        assert read_examples(path, read).labels.tolist() == [1]

    @pytest.mark.parametrize(
        ("keys", "content", "message"),
        [
            ({}, "review,stars\nx,good\n\ny\n", ", row 4: has 1 column, reviews needs at least 2"),
            ({}, "text,stars\nx,good\n", ": has no column 'review'"),
            ({}, "review,stars\n", ": holds no examples"),
            (
                {},
                "review,stars\nx,Good\n",
                ", row 2: the label is 'Good', expected one of bad, good in the column 'stars'",
            ),
            (
                {"text": [0, 5], "label": 1},
                "review,stars\nx,good\n",
                ", row 2: has 2 columns, reviews needs at least 6",
            ),
            ({"text": 0, "label": 1}, "x,good\ny,bad\n", ", row 1: is an example"),
            ({"labels": None, "regression": True}, 'review,stars\n"x\ny",1\nz,true\n', ", row 4: the score is 'true'"),
        ],
    )
    def test_a_row_that_does_not_fit_is_refused_with_its_number(self, task, tmp_path, keys, content, message):
        path = rows_of(tmp_path, "train.csv", content)
        assert message_of(read_examples, path, task(**keys)).startswith(message)

    @pytest.mark.parametrize("value", ["null", "[1]", "NaN", "Infinity", None])
    @pytest.mark.parametrize("key", ["review", "stars"])
    def test_a_key_that_json_lines_lack_is_refused_with_the_row(self, task, tmp_path, key, value):
        other = {"review": "stars", "stars": "review"}[key]
        last = f'{{"{other}": 1}}' if value is None else f'{{"{other}": 1, "{key}": {value}}}'
        whole = '{"review": "x", "stars": 1}'
        read = task(train="a.jsonl", dev="b.jsonl", labels=None, regression=True)
        for lines, row in (([whole, "", last], 3), ([last, whole], 1)):
            path = rows_of(tmp_path, "a.jsonl", "\n".join(lines))
            assert message_of(read_examples, path, read) == f", row {row}: has no text or number at {key!r}"


def test_a_task_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^--task_file /.*/no\.json: not found$"):
        read_task_file(tmp_path / "no.json")
    with pytest.raises(UserError, match=r"^--task_file /.*: cannot be read \(Is a directory\)$"):
        read_task_file(tmp_path)


LINES = {"train": "a.jsonl", "dev": "b.jsonl"}
WRONG_VALUES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("name", [None, "", 1, [], "a b", "../a", "/a", ".a", "-a", "a/b", "é", "a\n", "a" * 101], {}),
    ("train", [None, "", 1, ["a.csv"], ".", "/", "./", "a\0.csv", "\ud800.csv", "é" * 61], {"format": "csv"}),
    ("dev", [None, 1, "", "/", [1], ["a.csv", ""], "\0", ["\udc80"], "a" * 121, {}], {"format": "csv"}),
    ("dev", [[], ["a.csv", "a.csv"], ["a.csv", "b/a.csv"]], {}),
    ("test", [None, False, {"a": 1}, ["a.csv", None], ["."], ["a.csv", "b.csv", "a.CSV"]], {"format": "csv"}),
    ("format", [None, "", "json", "CSV", ["csv"], {}], {}),
    ("header", [None, 0, "yes"], {}),
    ("text", [None, "", True, 1.0, [], [""], ["a", "b", "c"], [["a"]], {}, -1001, 100_000], {}),
    ("text", ["a", [0, "a"]], {"header": False, "label": 1}),
    ("text", [0, ["a", 0], -1], LINES),
    ("label", [None, "", [], ["a"], False, 0.0], {}),
    ("label", ["a"], {"header": False, "text": 0}),
    ("label", [1], LINES),
    ("test_id", [None, "", ["a"], True], {}),
    ("test_id", [0, -1], LINES),
    ("test_text", [None, "", ["a", True], ["a", "b"]], {}),
    ("test_text", ["a", ["a"]], {"text": ["a", "b"]}),
    ("test_text", [0], LINES),
    ("regression", [None, 1, "true"], {}),
    ("labels", [[], ["a"], "ab", {"a": 0, "b": 1}, 2, ["a", None], ["a", []], ["a", " "], [1, {}]], {}),
    ("labels", [["a", " a"], [1, "1"], [True, "true"], [1, float("nan")], ["a\tb", "c"], ["a\nb", "c"]], {}),
    ("metric", [None, "", "acc", 1, [], ["f1"]], {}),
    ("meanings", [None, "ab", ["a"], ["a", "a"], ["a", ""], ["a", 1], ["a", "b", "c"], {"a": 1, "b": 2}], {}),
    ("meanings", [["good", "bad"]], {}),
    ("lower_case", [None, 1, "false"], {}),
    ("max_seq_length", [None, True, 7, -8, 64.0, "64", float("nan"), 1_000_000], {}),
    ("intermediate_epochs", [None, True, 0, -1, "3", float("nan"), float("inf"), 1_000_000], {}),
]


@pytest.mark.parametrize(
    ("key", "value", "others"),
    [(key, value, others) for key, values, others in WRONG_VALUES for value in values],
)
def test_a_wrong_value_is_refused_with_its_key(refusal, key, value, others):
    message = refusal({**LEAST, "labels": LABELS, **others, key: value})
    begin, expected = message.split(", expected ")
    assert begin.startswith(f": {key} is ")
    assert len(expected) > 3
    if len(json.dumps(value)) < 50:
        assert begin == f": {key} is {printable(json.dumps(value, ensure_ascii=False))}"


@pytest.mark.parametrize("key", list(LEAST))
def test_a_missing_key_is_refused_with_its_name(refusal, key):
    assert f"has no '{key}'" in refusal({name: value for name, value in LEAST.items() if name != key})


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, ["labels", "regression"]),
        ({"labels": None}, ["labels", "regression"]),
        ({"labels": LABELS, "regression": True}, ["labels", "regression"]),
        ({"labels": [1, 2, 3], "metric": "f1"}, ["metric f1", "accuracy, macro_f1, matthews"]),
        ({"labels": [1, 2], "metric": "correlation"}, ["metric correlation", ", ".join([*METRICS][:-1])]),
        ({"regression": True, "metric": "accuracy"}, ["metric accuracy", "are correlation"]),
        ({"dev": "dev.CSV", "test": ["x.TSV", "y"]}, [".csv, .tsv, no ending", "format"]),
        ({"train": "a.txt", "dev": "b.txt"}, ["have .txt", ".tsv, .csv, .jsonl"]),
        ({"epochs": 1}, ["unknown key 'epochs'", "intermediate_epochs"]),
        ({"k" * 10_000: 1}, [f"unknown key '{'k' * 60}…'"]),
        ({"\ud800": 1}, ["unknown key"]),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(refusal, keys, named):
    message = refusal({**LEAST, **keys})
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"name": }',
        '{"name": "a", "name": "b"}',
        '{"text": {"a\\n": 1, "a\\n": 1}}',
        f'{{"{"k" * 10_000}": 1, "{"k" * 10_000}": 2}}',
        "[" * 100_000,
        b'{"name": "\xe9"}',
        '{"name": ' + "1" * 5000 + "}",
    ],
    ids=["empty", "no value", "twice", "twice, deeper", "a long key twice", "deep", "not UTF-8", "5000 digits"],
)
def test_a_file_that_is_not_json_is_refused(refusal, content):
    assert refusal(content).startswith(": is not valid JSON (")


@pytest.mark.parametrize("content", ["[]", "null", '"reviews"', "1"])
def test_json_that_is_not_an_object_is_refused(refusal, content):
    assert "expected a JSON object" in refusal(content)


def test_a_value_of_any_depth_is_refused(refusal):
    """Python can read somewhat deeper lists than it can write."""
    whole = json.dumps({**LEAST, "labels": LABELS})[:-1]
    for depth in [3, 100, *range(900, 1020), 100_000]:
        message = refusal(f'{whole}, "lower_case": {"[" * depth}{"]" * depth}}}')
        assert message.startswith((": lower_case is ", ": is not valid JSON ("))
