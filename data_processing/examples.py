"""Read a task's examples from its files: which cells are texts, labels and ids, and which values they may have."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_processing.tables import Table, cells_of, open_table, shortened
from data_processing.tasks import Column, Task
from transformer.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """The texts and labels of a file's rows.

    texts: one list per text column. labels: [examples] ids (int64), or scores (float32) where the task is a
    regression; zeros if the file has none. ids: [examples] the names of the rows of a test file.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    ids: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)


def read_examples(path: Path, task: Task) -> Examples:
    """Read a train or dev file of a task.

    Raises:
        UserError: the file is missing or has no rows, a column is missing, a row has too few or too many columns, a
            label is not one of the task's, or a score is not a number; the message names the file and the row (the
            first line of the file is row 1).
    """
    table = open_table(path, task.form, task.has_header)
    columns = _labelled_columns(table, task)
    parser = _LabelParser(path, task)
    cells, labels = [], []
    for line, _, wanted in _rows(table, task, columns, task.skips_short_rows):
        cells.append(wanted)
        labels.append(parser.parse(line, wanted[-1]))
    return Examples(_texts(cells, len(task.text_columns)), np.array(labels, dtype=_label_dtype(task)))


def read_unlabelled(path: Path, task: Task) -> Examples:
    """Read a test file of a task: texts and ids, no labels. A row that is too short is an error in every task.

    Raises:
        UserError: as for `read_examples`.
    """
    table = open_table(path, task.form, task.test_has_header)
    texts = task.test_text_columns or task.text_columns
    wanted = texts if task.id_column is None else (*texts, task.id_column)
    columns = tuple(table.index(column) for column in wanted)
    cells = [cells for _, _, cells in _rows(table, task, columns, skips_short_rows=False)]
    ids = [str(number) if task.id_column is None else row[-1].strip() for number, row in enumerate(cells)]
    return Examples(_texts(cells, len(texts)), _no_labels(task, len(cells)), ids)


def unlabelled(texts: Sequence[str], task: Task, seconds: Sequence[str] | None = None) -> Examples:
    """Return texts, or pairs of a text and its second, as examples without labels."""
    sides = (list(texts),) if seconds is None else (list(texts), list(seconds))
    return Examples(sides, _no_labels(task, len(texts)))


class Row(NamedTuple):
    """A row of a training file: its one or two texts, and all of its cells (of JSON lines: the object)."""

    texts: tuple[str, ...]
    cells: Any


class TextRows:
    """Iterate over the rows of a task's training file, and format them with other texts.

    The file is read again by each iteration and never held in memory. All other columns, and bytes that are not
    UTF-8, stay as they are. `head` is the formatted row of column names, empty if the file has none.

    Raises:
        UserError: as for `read_examples`.
    """

    def __init__(self, path: Path, task: Task) -> None:
        self._task = task
        self._table = open_table(path, task.form, task.has_header, keeps_bytes=True)
        self._columns = _labelled_columns(self._table, task)
        self.head = "" if self._table.names is None else self._table.format_row(self._table.names)

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows, without those that the task leaves out.

        Raises:
            UserError: as for `read_examples`.
        """
        parser = _LabelParser(self._table.path, self._task)
        for line, row, wanted in _rows(self._table, self._task, self._columns, self._task.skips_short_rows):
            parser.parse(line, wanted[-1])
            yield Row(tuple(wanted[:-1]), row)

    def format_row(self, row: Row, texts: Sequence[str]) -> str:
        """Return a row as a line of the file, line end included, with these texts in place of its own."""
        cells = dict(row.cells) if self._task.form == "jsonl" else list(row.cells)
        for column, text in zip(self._columns, texts, strict=False):  # the label's column comes last
            cells[column] = text
        return self._table.format_row(cells)


def _labelled_columns(table: Table, task: Task) -> tuple[Any, ...]:
    """Return the columns of the texts and, last, of the label.

    Raises:
        UserError: a column is missing; or the first row is an example where the task expects column names.
    """
    columns = tuple(table.index(column) for column in (*task.text_columns, task.label_column))
    label = task.label_column
    if table.names and isinstance(label, int):  # a column found by its name proves that there is a header
        cell = table.names[label : label + 1 or None]
        if cell and _LabelParser(table.path, task).value(cell[0]) is not None:
            raise UserError(f"{table.path}, row 1: is an example; {task.name}'s files begin with a row of column names")
    return columns


def _rows(
    table: Table, task: Task, columns: tuple[Any, ...], skips_short_rows: bool
) -> Iterator[tuple[int, Any, list[str]]]:
    """Yield each row's line, the whole row, and its cells in these columns.

    Raises:
        UserError: there is no row, or a row lacks one of the columns.
    """
    count = short = 0
    for line, row in table:
        if table.form == "jsonl":
            cells = cells_of(table.path, line, row, columns)
        elif places := _places(columns, len(row)):
            cells = [row[place] for place in places]
        elif skips_short_rows:
            short += 1
            continue
        else:
            raise UserError(
                f"{table.path}, row {line}: has {len(row)} column{'s' if len(row) != 1 else ''}, {task.name} needs "
                f"at least {_fewest_cells(columns)}" + (", split by tabs" if task.form == "tsv" else "")
            )
        _check_width(table, line, row, columns)
        count += 1
        yield line, row, cells
    if short and not table.keeps_bytes:  # augmentation reads a file several times
        fewest = _fewest_cells(columns)
        logger.warning("%s: %d rows with fewer than %d columns were left out", table.path, short, fewest)
    if not count:
        raise UserError(f"{table.path}: holds no examples")


def _check_width(table: Table, line: int, row: Any, columns: tuple[Any, ...]) -> None:
    """Check that a row has no cell beyond the column names, as after a comma in a text without quotation marks.

    Where a column is counted from the end, as in MNLI, rows may have any number of cells.

    Raises:
        UserError: it has one that is not empty (spreadsheets write empty ones).
    """
    if table.names is None or not any(row[len(table.names) :]) or min(columns) < 0:
        return
    separator, advice = "tab", "remove tabs within texts"
    if table.form == "csv":
        separator, advice = "comma", "put texts with commas in quotation marks"
    raise UserError(
        f"{table.path}, row {line}: has {len(row)} columns, the row of names has {len(table.names)}; is there a "
        f"{separator} in a text? Then {advice}"
    )


@lru_cache(maxsize=1024)
def _places(columns: tuple[int, ...], length: int) -> list[int] | None:
    """Return where these columns are in a row of `length` cells; None if one is missing or two are the same cell."""
    places = [column if column >= 0 else length + column for column in columns]
    if min(places) < 0 or max(places) >= length or len(set(places)) < len(set(columns)):
        return None
    return places


def _fewest_cells(columns: tuple[int, ...]) -> int:
    return next(length for length in itertools.count(1) if _places(columns, length))


def _texts(rows: Sequence[Sequence[str]], count: int) -> tuple[list[str], ...]:
    return tuple([cells[number] for cells in rows] for number in range(count))


def _label_dtype(task: Task) -> type[np.number]:
    return np.float32 if task.is_regression else np.int64


def _no_labels(task: Task, count: int) -> np.ndarray:
    return np.zeros(count, dtype=_label_dtype(task))


class _LabelParser:
    """Turns cells of the label column of a file into label ids, or scores where the task is a regression."""

    def __init__(self, path: Path, task: Task) -> None:
        self.path, self.task = path, task
        self.ids = {label: number for number, label in enumerate(task.labels)}

    def value(self, cell: str) -> float | None:
        """Return the id or score; None if the cell holds neither."""
        return _score(cell) if self.task.is_regression else self.ids.get(cell.strip())

    def parse(self, line: int, cell: str) -> float:
        """Return the id or score.

        Raises:
            UserError: the cell holds neither; the message names the file, the row and the column.
        """
        value = self.value(cell)
        if value is None:
            what, expected = "score", "a number"
            if not self.task.is_regression:
                known = ", ".join(shortened(label) for label in self.task.labels[:20])
                what, expected = "label", f"one of {known}{', …' if len(self.task.labels) > 20 else ''}"
            raise UserError(
                f"{self.path}, row {line}: the {what} is {shortened(cell.strip())!r}, "
                f"expected {expected} in {_describe_column(self.task.label_column)}"
            )
        return value


def _score(cell: str) -> float | None:
    try:
        score = float(cell) if "_" not in cell else math.nan  # float reads Python's 1_000 as well
    except ValueError:
        return None
    return score if abs(score) < 1e30 else None  # neither infinite nor too large for fp32 to square


def _describe_column(column: Column) -> str:
    if isinstance(column, str):
        return f"the column {shortened(column)!r}"
    return "the last column" if column == -1 else f"column {column + 1}"
