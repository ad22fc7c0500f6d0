"""The table of tasks: a row says where a task's files, columns and labels are, and how it is judged.

A further task is a further row. Nothing else in the project knows a task's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from transformer.errors import UserError

Metric = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The share of predicted label ids [examples] that are right, under the name `acc`."""
    return {"acc": float((predictions == labels).mean())}


@dataclass(frozen=True)
class Task:
    """One row of the table.

    name: as GLUE writes it; flags name it in any case.
    text_columns: the columns of the one or two texts, counted from 0.
    label_column: the label's column; -1 is a row's last.
    labels: the labels in the order of their ids.
    dev_files: the files that are evaluated. The first one's `chosen_by` chooses the checkpoint.
    metric: what predictions are judged by.
    has_header: whether train and dev files begin with a row of column names.
    intermediate_epochs, max_seq_length: defaults of the original; None where it has none.
    """

    name: str
    text_columns: tuple[int, ...]
    label_column: int
    labels: tuple[str, ...]
    dev_files: tuple[str, ...] = ("dev.tsv",)
    train_file: str = "train.tsv"
    augmented_file: str = "train_aug.tsv"
    metric: Metric = accuracy
    chosen_by: str = "acc"
    has_header: bool = True
    intermediate_epochs: float | None = None
    max_seq_length: int | None = None

    @property
    def columns_needed(self) -> int:
        """The fewest columns that a row must have."""
        label = 1 if self.label_column == -1 else 0
        return max(*self.text_columns, self.label_column) + 1 + label


_MNLI_LABELS = ("contradiction", "entailment", "neutral")

TASKS = (
    Task("SST-2", (0,), 1, ("0", "1"), intermediate_epochs=10, max_seq_length=64),
    Task(
        "MNLI",
        (8, 9),
        -1,
        _MNLI_LABELS,
        dev_files=("dev_matched.tsv", "dev_mismatched.tsv"),
        intermediate_epochs=5,
        max_seq_length=128,
    ),
    Task("MNLI-mm", (8, 9), -1, _MNLI_LABELS, dev_files=("dev_mismatched.tsv",)),
)


def find_task(name: str) -> Task:
    """The task of that name, in any case.

    Raises:
        UserError: there is none.
    """
    for task in TASKS:
        if task.name.lower() == name.lower():
            return task
    raise UserError(f"--task_name {name}: no such task; the tasks are {', '.join(task.name for task in TASKS)}")
