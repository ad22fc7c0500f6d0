"""The table of tasks: the columns, labels and files of each task of GLUE, and rows in the form of its files."""

import dataclasses
import logging
import math

import pytest
from cases import write_rows

from data_processing.examples import read_examples, read_unlabelled
from data_processing.metrics import METRICS
from data_processing.tasks import TASKS, Task, find_task
from transformer.errors import UserError

TWO = ("0", "1")
ENTAILED = ("entailment", "not_entailment")
MNLI_LABELS = ("contradiction", "entailment", "neutral")

# Text columns, label column, labels by id, metric, the value that selects the checkpoint, intermediate epochs, length.
FACTS = {
    "CoLA": ((3,), 1, TWO, "matthews", "mcc", 50, 64),
    "MNLI": ((8, 9), -1, MNLI_LABELS, "accuracy", "acc", 5, 128),
    "MNLI-mm": ((8, 9), -1, MNLI_LABELS, "accuracy", "acc", None, None),
    "MRPC": ((3, 4), 0, TWO, "accuracy_and_f1", "acc", 20, 128),
    "SST-2": ((0,), 1, TWO, "accuracy", "acc", 10, 64),
    "STS-B": ((7, 8), -1, (), "correlation", "corr", 20, 128),
    "QQP": ((3, 4), 5, TWO, "accuracy_and_f1", "acc", 5, 128),
    "QNLI": ((1, 2), -1, ENTAILED, "accuracy", "acc", 10, 128),
    "RTE": ((1, 2), -1, ENTAILED, "accuracy", "acc", 20, 128),
    "WNLI": ((1, 2), -1, TWO, "accuracy", "acc", None, None),
}

# The columns of GLUE's own files: T and U are the texts, L the label, I the index of a test file.
TRAIN = {
    "CoLA": "source L note T",
    "MNLI": "index promptID pairID genre b1 b2 p1 p2 T U label1 L",
    "MNLI-mm": "index promptID pairID genre b1 b2 p1 p2 T U label1 L",
    "MRPC": "L #1_ID #2_ID T U",
    "SST-2": "T L",
    "STS-B": "index genre filename year old_index source1 source2 T U L",
    "QQP": "id qid1 qid2 T U L",
    "QNLI": "index T U L",
    "RTE": "index T U L",
    "WNLI": "index T U L",
}
MNLI_DEV = "index promptID pairID genre b1 b2 p1 p2 T U label1 label2 label3 label4 label5 L"
DEV = {**TRAIN, "MNLI": MNLI_DEV, "MNLI-mm": MNLI_DEV}
TEST = {
    "CoLA": "I T",
    "MNLI": "I promptID pairID genre b1 b2 p1 p2 T U",
    "MNLI-mm": "I promptID pairID genre b1 b2 p1 p2 T U",
    "MRPC": "I #1_ID #2_ID T U",
    "SST-2": "I T",
    "STS-B": "I genre filename year old_index source1 source2 T U",
    "QQP": "I T U",
    "QNLI": "I T U",
    "RTE": "I T U",
    "WNLI": "I T U",
}
NAMES = list(FACTS)


def written(tmp_path, columns: str, values: list[dict[str, str]], has_header: bool):
    """Write a file of these columns; all other cells hold their column's name."""
    rows = [[value.get(column, column) for column in columns.split()] for value in values]
    return write_rows(tmp_path / "file.tsv", [columns.split()] * has_header + rows)


def test_the_table_has_the_tasks_of_glue():
    assert [task.name for task in TASKS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_the_columns_labels_and_defaults_of_glue(name):
    task = find_task(name)
    text, label, labels, metric, chosen_by, epochs, length = FACTS[name]
    assert (task.text_columns, task.label_column, task.labels) == (text, label, labels)
    assert (task.metric, task.metric.chosen_by) == (METRICS[metric], chosen_by)
    assert (task.intermediate_epochs, task.max_seq_length) == (epochs, length)
    assert task.is_regression is task.metric.regression is (name == "STS-B")
    assert task.outputs == {"MNLI": 3, "MNLI-mm": 3, "STS-B": 1}.get(name, 2)
    assert task.has_header is (name != "CoLA")
    assert task.skips_short_rows is (name == "QQP")
    assert (task.form, task.lower_case, task.id_column) == ("tsv", None, 0)
    assert len(task.labels) == 2 or not task.metric.two_labels


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_the_files_of_glue(name):
    task = find_task(name)
    dev, test, submissions, suffixes = {
        "MNLI": (
            ("dev_matched.tsv", "dev_mismatched.tsv"),
            ("test_matched.tsv", "test_mismatched.tsv"),
            ("MNLI-m.tsv", "MNLI-mm.tsv"),
            ("", "-MM"),
        ),
        "MNLI-mm": (("dev_mismatched.tsv",), ("test_mismatched.tsv",), ("MNLI-mm.tsv",), ("",)),
    }.get(name, (("dev.tsv",), ("test.tsv",), (f"{name}.tsv",), ("",)))
    assert (task.train_file, task.augmented_file) == ("train.tsv", "train_aug.tsv")
    assert (task.dev_files, task.dev_suffixes) == (dev, suffixes)
    assert (task.test_files, task.submissions) == (test, submissions)


def test_labels_that_are_numbers_have_meanings():
    """In the order of the ids, as models trained elsewhere name them."""
    assert {task.name: task.meanings for task in TASKS if task.meanings} == {
        "CoLA": ("unacceptable", "acceptable"),
        "MRPC": ("not_equivalent", "equivalent"),
        "SST-2": ("negative", "positive"),
        "QQP": ("not_duplicate", "duplicate"),
        "WNLI": ("not_entailment", "entailment"),
    }
    assert {task.name for task in TASKS if task.labels == TWO} == {task.name for task in TASKS if task.meanings}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [TRAIN, DEV], ids=["train", "dev"])
def test_rows_in_the_form_of_train_and_dev_files_are_read(tmp_path, name, columns):
    task = find_task(name)
    labels = task.labels or ("0.000", "3.250", "5.000")
    values = [{"T": f"first {n}", "U": f"second {n}", "L": label} for n, label in enumerate(labels)]
    rows = read_examples(written(tmp_path, columns[name], values, task.has_header), task)
    texts = ([value[key] for value in values] for key in ("T", "U"))
    assert rows.texts == tuple(texts)[: columns[name].count("U") + 1]
    if name == "STS-B":
        assert (rows.labels.tolist(), str(rows.labels.dtype)) == ([0.0, 3.25, 5.0], "float32")
    else:
        assert (rows.labels.tolist(), str(rows.labels.dtype)) == (list(range(len(labels))), "int64")


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_the_form_of_test_files_are_read(tmp_path, name):
    """All have a header, CoLA's too."""
    task = find_task(name)
    values = [{"T": f"first {n}", "U": f"second {n}", "I": f"{10 * n}"} for n in range(3)]
    rows = read_unlabelled(written(tmp_path, TEST[name], values, True), task)
    texts = ([value[key] for value in values] for key in ("T", "U"))
    assert rows.texts == tuple(texts)[: TEST[name].count("U") + 1]
    assert rows.ids == ["0", "10", "20"]
    assert (len(rows), str(rows.labels.dtype)) == (3, "float32" if name == "STS-B" else "int64")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("CoLA", "STS-B")])
def test_a_file_without_its_header_is_refused(tmp_path, name):
    """Its first example would be lost."""
    task = find_task(name)
    path = written(tmp_path, TRAIN[name], [{"L": task.labels[1]}, {"L": task.labels[0]}], has_header=False)
    with pytest.raises(UserError) as caught:
        read_examples(path, task)
    assert str(caught.value).startswith(f"{path}, row 1: is an example")


def test_short_rows_of_qqp_are_left_out_with_a_warning(tmp_path, caplog):
    """Its files have rows that end within a question."""
    rows = [["id", "qid1", "qid2", "T", "U", "L"], list("123ab1"), list("123ab"), ["1"], list("456cd0")]
    path = write_rows(tmp_path / "train.tsv", rows)
    with caplog.at_level(logging.WARNING):
        read = read_examples(path, find_task("QQP"))
    assert (read.texts, read.labels.tolist()) == ((["a", "c"], ["b", "d"]), [1, 0])
    (record,) = caplog.records
    assert f"{path}: 2 rows" in record.getMessage()


def test_a_file_of_only_short_rows_is_refused(tmp_path):
    path = write_rows(tmp_path / "train.tsv", [["id", "qid1"], ["1", "2"]])
    with pytest.raises(UserError, match=r"train\.tsv: holds no examples$"):
        read_examples(path, find_task("QQP"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "QQP"])
def test_short_rows_of_other_tasks_are_refused(tmp_path, name):
    task = find_task(name)
    good = {"L": task.labels[0] if task.labels else "1.0"}
    path = written(tmp_path, TRAIN[name], [good], task.has_header)
    needed = {"MNLI": 11, "MNLI-mm": 11}.get(name, len(TRAIN[name].split()))
    with path.open("a", encoding="utf-8") as file:
        file.write("\t".join(["x"] * (needed - 1)) + "\n")
    with pytest.raises(UserError) as caught:
        read_examples(path, task)
    message = f"{path}, row {3 if task.has_header else 2}: has {needed - 1} column"
    assert str(caught.value).startswith(message)
    assert f"{name} needs at least {needed}" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "STS-B"])
def test_label_ids_are_formatted_as_the_files_write_labels(name):
    task = find_task(name)
    assert task.format_predictions([1, 0, 1]) == [task.labels[1], task.labels[0], task.labels[1]]
    assert task.format_predictions([len(task.labels) - 1]) == [task.labels[-1]]


def test_scores_are_clipped_to_their_range_with_three_decimals():
    scores = [-0.3, -1e-9, 0.0, 2.71828, 4.9996, 5.0, 7.5, math.inf, -math.inf]
    expected = ["0.000", "0.000", "0.000", "2.718", "5.000", "5.000", "5.000", "5.000", "0.000"]
    assert find_task("STS-B").format_predictions(scores) == expected
    anything = dataclasses.replace(find_task("STS-B"), score_range=None)
    assert anything.format_predictions([-0.3, 1234.5678]) == ["-0.300", "1234.568"]


def test_a_row_of_the_table_has_defaults():
    task = Task("X", (0,), 1, TWO)
    assert (task.metric, task.form, task.has_header, task.skips_short_rows) == (METRICS["accuracy"], "tsv", True, False)
    assert (task.train_file, task.augmented_file, task.dev_files) == ("train.tsv", "train_aug.tsv", ("dev.tsv",))
    assert len(task.dev_suffixes) == len(task.dev_files)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_found_in_any_case(name):
    assert find_task(name).name == find_task(name.lower()).name == find_task(name.upper()).name == name


@pytest.mark.parametrize("name", ["", "sst2", "SST-2 ", "MNLI-m", "AX"])
def test_an_unknown_task_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError) as caught:
        find_task(name)
    assert str(caught.value).startswith(f"--task_name {name}: ")
    assert str(caught.value).endswith(", ".join(NAMES))
