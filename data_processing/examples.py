"""A task's examples: which cells of its files are texts, labels and ids, and what they may be."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_processing.tables import Table, read_table, shortened
from data_processing.tasks import Column, Task
from transformer.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """The rows of a file: their texts, one list for each text column, and labels [examples].

    Labels are ids (int64), or scores (float32) where the task is a regression; zeros where the file has none.
    ids: what the rows of a test file are called.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    ids: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)


def read_examples(path: Path, task: Task) -> Examples:
    """Reads a train or dev file of a task.

    Raises:
        UserError: no such file, no rows, a column that is not there, a row with too few columns, a label
            that the task does not name, or a score that is no number; the message names file and row
            (the first line of the file is row 1).
    """
    table = _read(path, task, task.has_header)
    columns = [table.index(column) for column in (*task.text_columns, task.label_column)]
    check_has_header(table, task, columns[-1])
    rows = _wanted(table, task, columns)
    label_of = _score if task.is_regression else _label
    ids = {label: number for number, label in enumerate(task.labels)}
    labels = np.array(
        [label_of(table.path, line, cells[-1], task, ids) for line, cells in rows],
        dtype=np.float32 if task.is_regression else np.int64,
    )
    return Examples(_texts(rows, len(task.text_columns)), labels)


def read_unlabelled(path: Path, task: Task) -> Examples:
    """Reads a test file of a task: an id and the texts, no label.

    Raises:
        UserError: as for `read_examples`.
    """
    table = _read(path, task, task.test_has_header)
    texts = task.test_text_columns or task.text_columns
    wanted = texts if task.id_column is None else (*texts, task.id_column)
    whole = replace(task, skips_short_rows=False)  # a submission has a prediction for every row
    rows = _wanted(table, whole, [table.index(column) for column in wanted])
    ids = [str(n) if task.id_column is None else cells[-1].strip() for n, (_, cells) in enumerate(rows)]
    return Examples(_texts(rows, len(texts)), _no_labels(task, len(rows)), ids)


def unlabelled(texts: Sequence[str], task: Task, seconds: Sequence[str] | None = None) -> Examples:
    """Texts, or pairs of them, as examples without labels."""
    sides = (list(texts),) if seconds is None else (list(texts), list(seconds))
    return Examples(sides, _no_labels(task, len(texts)))


def _no_labels(task: Task, count: int) -> np.ndarray:
    return np.zeros(count, dtype=np.float32 if task.is_regression else np.int64)


def _read(path: Path, task: Task, has_header: bool) -> Table:
    table = read_table(path, task.form, has_header)
    if not table.rows:
        raise UserError(f"{path}: holds no examples")
    return table


def check_has_header(table: Table, task: Task, label: int) -> None:
    """A file that begins with an example would lose it. Where the column is known by its name there was a header.

    Raises:
        UserError: it begins with one.
    """
    names = table.names or []
    if isinstance(task.label_column, str) or not -len(names) <= label < len(names):
        return
    cell = names[label].strip()
    if (_as_number(cell) is not None) if task.is_regression else (cell in task.labels):
        raise UserError(f"{table.path}, row 1: is an example; {task.name}'s files begin with a row of column names")


def _wanted(table: Table, task: Task, columns: Sequence[int]) -> list[tuple[int, list[str]]]:
    """The cells of these columns of every row, and the rows' lines."""
    rows, short = [], 0
    enough = EnoughCells(columns)
    for line, row in zip(table.lines, table.rows, strict=True):
        if task.form == "jsonl" and len(row) < len(table.names or ()):  # its later keys come first in later rows
            row = row + [None] * (len(table.names or ()) - len(row))
        if not enough[len(row)]:
            if not task.skips_short_rows:
                raise UserError(
                    f"{table.path}, row {line}: has {len(row)} column{'s' if len(row) != 1 else ''}, {task.name} needs "
                    f"at least {enough.least()}" + (", split by tabs" if task.form == "tsv" else "")
                )
            short += 1
            continue
        cells = [row[column] for column in columns]
        if None in cells:
            name = shortened((table.names or [])[columns[cells.index(None)]])
            raise UserError(f"{table.path}, row {line}: has no text or number at {name!r}")
        rows.append((line, [cell for cell in cells if cell is not None]))
    if short:
        logger.warning("%s: %d rows with fewer than %d columns were left out", table.path, short, enough.least())
    if not rows:
        raise UserError(f"{table.path}: holds no examples")
    return rows


class EnoughCells(dict[int, bool]):
    """Whether a row of so many cells has all of some columns, each a cell of its own; worked out once a length."""

    def __init__(self, columns: Sequence[int]) -> None:
        super().__init__()
        self.columns = columns

    def __missing__(self, length: int) -> bool:
        places = {column if column >= 0 else length + column for column in self.columns}
        self[length] = len(places) == len(set(self.columns)) and min(places) >= 0 and max(places) < length
        return self[length]

    def least(self) -> int:
        """The fewest cells that are enough."""
        return next(length for length in range(1, 10**6) if self[length])


def _texts(rows: Sequence[tuple[int, list[str]]], count: int) -> tuple[list[str], ...]:
    return tuple([cells[number] for _, cells in rows] for number in range(count))


def check_label(path: Path, line: int, cell: str, task: Task) -> None:
    """Checks a cell of the label column.

    Raises:
        UserError: it is no label, or no score, of the task.
    """
    if task.is_regression:
        _score(path, line, cell, task, {})
    else:
        _label(path, line, cell, task, dict.fromkeys(task.labels, 0))


def _label(path: Path, line: int, cell: str, task: Task, ids: dict[str, int]) -> int:
    label = cell.strip()
    if label not in ids:
        known = ", ".join(shortened(name) for name in task.labels[:20]) + (", …" if len(task.labels) > 20 else "")
        raise UserError(
            f"{path}, row {line}: the label is {shortened(label)!r}, "
            f"expected one of {known} in {_column(task.label_column)}"
        )
    return ids[label]


def _score(path: Path, line: int, cell: str, task: Task, _: dict[str, int]) -> float:
    score = _as_number(cell)
    if score is None:
        raise UserError(
            f"{path}, row {line}: the score is {shortened(cell.strip())!r}, "
            f"expected a number in {_column(task.label_column)}"
        )
    return score


def _as_number(cell: str) -> float | None:
    try:
        score = float(cell) if "_" not in cell else math.nan  # Python's own way to write 1_000
    except ValueError:
        score = math.nan
    return score if abs(score) < 1e30 else None  # nor infinite, nor too large for fp32 to square


def _column(column: Column) -> str:
    if isinstance(column, str):
        return f"the column {shortened(column)!r}"
    return "the last column" if column == -1 else f"column {column + 1}"
