"""The table of tasks: a row says where a task's files, columns and labels are, and how it is judged.

A further task of GLUE would be a further row; a user's own is described by a file (`task_files.py`).
Nothing else in the project knows a task's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_processing.metrics import METRICS, Metric
from transformer.errors import UserError

Column = int | str  # its number, from 0 and from the end as -1, or its name in the file's first row


@dataclass(frozen=True)
class Task:
    """One row of the table.

    name: as GLUE writes it; flags name it in any case.
    text_columns: the columns of the one or two texts.
    label_column: the label's column.
    labels: the labels in the order of their ids, as the files write them; none where the task is a regression.
    meanings: the labels in words, where files write numbers; models from elsewhere name their labels so.
    metric: what predictions are judged by.
    form: of all files: `tsv` (columns split at tabs, quotation marks mean nothing), `csv` or `jsonl`.
    has_header: whether train and dev files begin with a row of column names.
    skips_short_rows: whether rows with too few columns are left out; otherwise they are errors.
    train_file, augmented_file: by names in the data folder.
    dev_files: the files that are evaluated. The first one's `metric.chosen_by` chooses the checkpoint.
    dev_suffixes: what is added to the output folder's name for each dev file's eval_results.txt.
    test_files: the files without labels. test_has_header: whether they begin with a row of column names.
    test_text_columns: as `text_columns`, of the test files; None where they are the same.
    id_column: of the test files; None where their rows are counted from 0.
    submissions: the names of the predictions for each test file.
    score_range: least and greatest score of a regression, which predictions are cut to; None where any will do.
    intermediate_epochs, max_seq_length: defaults of the original; None where it has none.
    lower_case: whether the task's models lower-case; None leaves it to --do_lower_case.
    augmentation_n: how many new texts data augmentation makes of one, of the original; None where it has none.
    """

    name: str
    text_columns: tuple[Column, ...]
    label_column: Column
    labels: tuple[str, ...]
    meanings: tuple[str, ...] = ()
    metric: Metric = METRICS["accuracy"]
    form: str = "tsv"
    has_header: bool = True
    skips_short_rows: bool = False
    train_file: str = "train.tsv"
    augmented_file: str = "train_aug.tsv"
    dev_files: tuple[str, ...] = ("dev.tsv",)
    dev_suffixes: tuple[str, ...] = ("",)
    test_files: tuple[str, ...] = ("test.tsv",)
    test_has_header: bool = True
    test_text_columns: tuple[Column, ...] | None = None
    id_column: Column | None = 0
    submissions: tuple[str, ...] = ()
    score_range: tuple[float, float] | None = None
    intermediate_epochs: float | None = None
    max_seq_length: int | None = None
    lower_case: bool | None = None
    augmentation_n: int | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score, a number, and not one of some labels."""
        return not self.labels

    @property
    def outputs(self) -> int:
        """How many logits a model of this task has: one for each label, or the score alone."""
        return len(self.labels) or 1

    def written(self, predictions: Iterable[float]) -> list[str]:
        """Predicted label ids, or scores, as the task's files write them."""
        if self.is_regression:
            least, greatest = self.score_range or (-math.inf, math.inf)
            return [f"{min(max(score, least), greatest):.3f}" for score in predictions]
        return [self.labels[int(number)] for number in predictions]


_TWO = ("0", "1")
_ENTAILED = ("entailment", "not_entailment")
_MNLI_LABELS = ("contradiction", "entailment", "neutral")

TASKS = (
    Task(
        "CoLA",
        (3,),
        1,
        _TWO,
        meanings=("unacceptable", "acceptable"),
        metric=METRICS["matthews"],
        has_header=False,
        test_text_columns=(1,),
        submissions=("CoLA.tsv",),
        intermediate_epochs=50,
        max_seq_length=64,
        augmentation_n=30,
    ),
    Task(
        "MNLI",
        (8, 9),
        -1,
        _MNLI_LABELS,
        dev_files=("dev_matched.tsv", "dev_mismatched.tsv"),
        dev_suffixes=("", "-MM"),
        test_files=("test_matched.tsv", "test_mismatched.tsv"),
        submissions=("MNLI-m.tsv", "MNLI-mm.tsv"),
        intermediate_epochs=5,
        max_seq_length=128,
        augmentation_n=10,
    ),
    Task(
        "MNLI-mm",
        (8, 9),
        -1,
        _MNLI_LABELS,
        dev_files=("dev_mismatched.tsv",),
        test_files=("test_mismatched.tsv",),
        submissions=("MNLI-mm.tsv",),
        augmentation_n=10,
    ),
    Task(
        "MRPC",
        (3, 4),
        0,
        _TWO,
        meanings=("not_equivalent", "equivalent"),
        metric=METRICS["accuracy_and_f1"],
        submissions=("MRPC.tsv",),
        intermediate_epochs=20,
        max_seq_length=128,
        augmentation_n=30,
    ),
    Task(
        "SST-2",
        (0,),
        1,
        _TWO,
        meanings=("negative", "positive"),
        test_text_columns=(1,),
        submissions=("SST-2.tsv",),
        intermediate_epochs=10,
        max_seq_length=64,
        augmentation_n=20,
    ),
    Task(
        "STS-B",
        (7, 8),
        -1,
        (),
        metric=METRICS["correlation"],
        submissions=("STS-B.tsv",),
        score_range=(0.0, 5.0),
        intermediate_epochs=20,
        max_seq_length=128,
        augmentation_n=30,
    ),
    Task(
        "QQP",
        (3, 4),
        5,
        _TWO,
        meanings=("not_duplicate", "duplicate"),
        metric=METRICS["accuracy_and_f1"],
        skips_short_rows=True,
        test_text_columns=(1, 2),
        submissions=("QQP.tsv",),
        intermediate_epochs=5,
        max_seq_length=128,
        augmentation_n=10,
    ),
    Task(
        "QNLI",
        (1, 2),
        -1,
        _ENTAILED,
        submissions=("QNLI.tsv",),
        intermediate_epochs=10,
        max_seq_length=128,
        augmentation_n=20,
    ),
    Task(
        "RTE",
        (1, 2),
        -1,
        _ENTAILED,
        submissions=("RTE.tsv",),
        intermediate_epochs=20,
        max_seq_length=128,
        augmentation_n=30,
    ),
    Task(
        "WNLI",
        (1, 2),
        -1,
        _TWO,
        meanings=("not_entailment", "entailment"),
        submissions=("WNLI.tsv",),
    ),
)


def augmentation_command(task: Task, data_dir: Path) -> str:
    """The command that makes a task's augmented file, for messages."""
    which = f"--task_name {task.name}" if task in TASKS else "--task_file FILE"
    count = "" if task.augmentation_n else " --N 20"
    return (
        f"python data_processing/data_augmentation.py {which} --data_dir {data_dir} "
        f"--pretrained_bert_model bert_base_uncased --glove_embs glove.6B.300d.txt{count}"
    )


def find_task(name: str, offered: Sequence[str] | None = None) -> Task:
    """The task of that name, in any case.

    Args:
        offered: the tasks that a message names; all where not given.

    Raises:
        UserError: there is none.
    """
    for task in TASKS:
        if task.name.lower() == name.lower():
            return task
    names = offered or [task.name for task in TASKS]
    raise UserError(f"--task_name {name}: no such task; the tasks are {', '.join(names)}")
