"""The rows of a training file one after the other, and the same rows with other texts: `tables.py` without its memory.

A row is written as it was read but for its texts: with all columns, quotation marks as they stand, and bytes that are
not UTF-8 too.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from data_processing.examples import EnoughCells, check_has_header, check_label
from data_processing.tables import Table, as_text, shortened
from data_processing.tasks import Task
from transformer.errors import UserError

ENCODING = ("utf-8", "surrogateescape")  # of what `written` gives: bytes that were no UTF-8 come back
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # what JSON can escape; those left out stand for such bytes


class Row(NamedTuple):
    """A row of a file.

    texts: its one or two. cells: all of them, by column; of JSON lines the object.
    """

    texts: tuple[str, ...]
    cells: Any


class TextRows:
    """A task's training file, which is read anew each time it is gone through.

    `head` is the row of column names as it is written, its end included; empty where the file has none.

    Raises UserError where the file is missing, cannot be read, is empty or begins otherwise than the task's files.
    """

    def __init__(self, path: Path, task: Task) -> None:
        self._path, self._task = path, task
        self._has_header = task.has_header and task.form != "jsonl"
        self._columns: list[int] = []
        self.head = ""
        if task.form == "jsonl":
            return
        first = next(self._cells(), None)
        if first is None:
            raise UserError(f"{path}: holds no examples")
        names = [name or "" for name in first[1]] if self._has_header else None
        table = Table(path, names, [], [])
        self._columns = [table.index(column) for column in (*task.text_columns, task.label_column)]
        check_has_header(table, task, self._columns[-1])
        if names is not None:
            self.head = self._joined(names)

    def __iter__(self) -> Iterator[Row]:
        """The rows, without those that the task leaves out.

        Raises:
            UserError: there is none; a row has too few columns, or no text or label where they belong.
        """
        found = False
        for row in self._objects() if self._task.form == "jsonl" else self._rows():
            found = True
            yield row
        if not found:
            raise UserError(f"{self._path}: holds no examples")

    def written(self, row: Row, texts: Sequence[str]) -> str:
        """A row as the file writes it, its end included, with these texts in the places of its own."""
        if self._task.form == "jsonl":
            changed = dict(zip(self._task.text_columns, texts, strict=True))
            return json.dumps({**row.cells, **changed}, ensure_ascii=False) + "\n"
        cells = list(row.cells)
        for column, text in zip(self._columns, texts, strict=False):  # the label's column comes last
            cells[column] = text
        return self._joined(cells)

    def _joined(self, cells: Sequence[str]) -> str:
        if self._task.form == "tsv":
            return "\t".join(cells) + "\n"
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        return line.getvalue()

    def _rows(self) -> Iterator[Row]:
        enough, task = EnoughCells(self._columns), self._task
        for line, cells in self._cells():
            if line == 1 and self._has_header:
                continue
            if not enough[len(cells)]:
                if task.skips_short_rows:
                    continue
                raise UserError(
                    f"{self._path}, row {line}: has {len(cells)} column{'s' if len(cells) != 1 else ''}, {task.name} "
                    f"needs at least {enough.least()}" + (", split by tabs" if task.form == "tsv" else "")
                )
            check_label(self._path, line, cells[self._columns[-1]], task)
            yield Row(tuple(cells[column] for column in self._columns[:-1]), cells)

    def _objects(self) -> Iterator[Row]:
        for line, text in self._lines():
            if not text.strip():
                continue
            try:
                values = _writable(json.loads(text))
            except (ValueError, RecursionError):
                raise UserError(f"{self._path}, row {line}: is no valid JSON") from None
            cells = []
            for key in (*self._task.text_columns, self._task.label_column):
                cell = as_text(values.get(key)) if isinstance(values, dict) else None
                if cell is None:
                    raise UserError(f"{self._path}, row {line}: has no text or number at {shortened(str(key))!r}")
                cells.append(cell)
            check_label(self._path, line, cells[-1], self._task)
            yield Row(tuple(cells[:-1]), values)

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        """The cells of each row and the line that it begins on, from 1."""
        if self._task.form == "tsv":
            yield from ((line, text.split("\t")) for line, text in self._lines())
            return
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader((text + "\n" for _, text in self._lines()), strict=True)
        line = 1
        try:
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{self._path}, row {line}: is no valid CSV ({error})") from None

    def _lines(self) -> Iterator[tuple[int, str]]:
        """The lines, from 1, without their ends; empty ones at the end of the file do not count."""
        empty = 0
        with self._open() as file:
            for number, text in enumerate(file, start=1):
                text = text.rstrip("\n")
                if not text:
                    empty += 1
                    continue
                yield from ((number - empty + n, "") for n in range(empty))
                empty = 0
                yield number, text

    def _open(self) -> TextIO:
        try:
            return self._path.open(encoding="utf-8-sig", errors=ENCODING[1])
        except FileNotFoundError:
            raise UserError(f"{self._path}: not found") from None
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror})") from None


def _writable(value: Any) -> Any:
    """A value of JSON in which halves of characters, which no encoding has, are U+FFFD as `as_text` has them."""
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_writable(item) for item in value]
    if isinstance(value, dict):
        return {_HALVES.sub("\ufffd", key): _writable(item) for key, item in value.items()}
    return value
