"""The table of tasks: for each one its files, columns, labels and metric.

A further task of GLUE would be a further row; a task of the user's own is described by a file (`task_files.py`).
Nothing else in the project knows a task's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_processing.metrics import METRICS, Metric
from transformer.errors import UserError

Column = int | str  # its number, counted from 0 or, as -1, from the end; or its name in the file's first row


@dataclass(frozen=True)
class Task:
    """One row of the table.

    name: as GLUE writes it; flags accept it in any case.
    text_columns: of the one or two texts. label_column: of the label.
    labels: in the order of their ids, as the files write them; empty if the task is a regression.
    meanings: the labels as words, where files write numbers; models trained elsewhere name their labels so.
    metric: evaluates predictions, and selects the checkpoint by the first dev file.
    form: of all files: `tsv` (cells split at tabs, quotation marks have no meaning), `csv` or `jsonl`.
    has_header, test_has_header: whether train and dev files, or test files, begin with a row of column names.
    skips_short_rows: leave out rows that have too few columns; otherwise they are errors.
    train_file, augmented_file, dev_files, test_files: names in the data folder. Test files have no labels.
    dev_suffixes: for each dev file, what is added to the name of the output folder that holds its eval_results.txt.
    test_text_columns: of test files; None if they are the same.
    id_column: of test files; None if rows are counted from 0.
    submissions: the names of the prediction files, one per test file.
    score_range: of a regression: predictions are clipped to it; None for any score.
    intermediate_epochs, max_seq_length: the original's defaults; None if it has none.
    lower_case: whether the task's models are uncased; None leaves it to --do_lower_case.
    augmentation_n: how many new texts the original's data augmentation makes of one; None if it has no number.
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
        """Whether labels are scores, that is, numbers instead of names."""
        return not self.labels

    @property
    def outputs(self) -> int:
        """The number of logits of a model of this task: one per label, or one for the score."""
        return len(self.labels) or 1

    def format_predictions(self, predictions: Iterable[float]) -> list[str]:
        """Return predicted label ids or scores as the task's files write them."""
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
    """Return the command that makes a task's augmented file, for messages."""
    which = f"--task_name {task.name}" if task in TASKS else "--task_file FILE"
    count = "" if task.augmentation_n else " --N 20"
    return (
        f"python data_processing/data_augmentation.py {which} --data_dir {data_dir} "
        f"--pretrained_bert_model bert_base_uncased --glove_embs glove.6B.300d.txt{count}"
    )


def find_task(name: str, offered: Sequence[str] | None = None) -> Task:
    """Return the task of a name in any case.

    Args:
        name: from --task_name.
        offered: the names that the error message lists; all if not given.

    Raises:
        UserError: no task has that name.
    """
    for task in TASKS:
        if task.name.lower() == name.lower():
            return task
    names = offered or [task.name for task in TASKS]
    raise UserError(f"--task_name {name}: no such task; the tasks are {', '.join(names)}")
