"""Rows and columns of a text file: tab-separated as GLUE writes it, CSV, or JSON lines.

Knows no task: which columns matter, and what stands in them, is the caller's affair (`examples.py`).
"""

from __future__ import annotations

import csv
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_processing.tasks import Column
from transformer.errors import UserError

logger = logging.getLogger(__name__)

FORMS = ("tsv", "csv", "jsonl")
_MOST_KEYS = 1000  # of the objects in a file of JSON lines


@dataclass(frozen=True)
class Table:
    """A file's rows.

    names: the columns' names; None where the file has no row of them.
    rows: their cells; a row may have too few, and a cell of JSON lines that holds no text or number is None.
    lines: the line of the file, from 1, that each row begins on.
    """

    path: Path
    names: list[str] | None
    rows: list[list[str | None]]
    lines: list[int]

    def index(self, column: Column) -> int:
        """A column's number, by its number or name.

        Raises:
            UserError: no column has that name, or several have it.
        """
        if isinstance(column, int):
            return column
        name = repr(shortened(column))
        if self.names is None:
            raise UserError(f"{self.path}: has no row of column names, so {name} cannot be found; give its number")
        if column not in self.names:
            there = ", ".join(repr(shortened(other)) for other in self.names[:20])
            more = ", …" if len(self.names) > 20 else ""
            raise UserError(f"{self.path}: has no column {name}; its columns are {there}{more}")
        if self.names.count(column) > 1:
            raise UserError(f"{self.path}: has {self.names.count(column)} columns {name}; give the number of one")
        return self.names.index(column)


def read_table(path: Path, form: str = "tsv", has_header: bool = True) -> Table:
    """Reads a file of one of FORMS. Bytes that are not UTF-8 become U+FFFD, and a warning says in how many rows.

    Args:
        path: the file.
        form: `tsv`: columns split at tabs, quotation marks mean nothing, empty lines at the end do not count.
            `csv`: quotation marks as usual, empty lines do not count. `jsonl`: an object a line.
        has_header: whether the first row names the columns; in JSON lines the keys do.

    Raises:
        UserError: the file is missing, cannot be read, or is not of this form.
    """
    lines = _lines(path)
    if form == "jsonl":
        return _from_json_lines(path, lines)
    numbered = _csv_rows(path, lines) if form == "csv" else _tsv_rows(lines)
    numbers: list[int] = []
    rows: list[list[str | None]] = []
    for number, row in numbered:
        numbers.append(number)
        rows.append(list(row))
    if not has_header:
        return Table(path, None, rows, numbers)
    names = [name or "" for name in rows[0]] if rows else []
    return Table(path, names, rows[1:], numbers[1:])


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").rstrip(b"\n")
    lines, broken = [], 0
    for line in content.split(b"\n") if content else []:
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            lines.append(line.decode("utf-8", errors="replace"))
            broken += 1
    if broken:
        logger.warning("%s: %d rows are not UTF-8; what cannot be read became U+FFFD", path, broken)
    return lines


def _tsv_rows(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, start=1):
        yield number, line.split("\t")


def _csv_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # a long text is no mistake
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    number = 1
    try:
        for row in reader:
            if row:
                yield number, row
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, row {number}: is no valid CSV ({error})") from None


def _from_json_lines(path: Path, lines: list[str]) -> Table:
    columns: dict[str, int] = {}
    rows: list[list[str | None]] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, row {number}: is no valid JSON") from None
        if not isinstance(values, dict):
            raise UserError(
                f'{path}, row {number}: is no JSON object; expected one such as {{"text": "…", "label": "…"}}'
            )
        for name in values:
            columns.setdefault(name, len(columns))
        if len(columns) > _MOST_KEYS:  # each row would have as many cells
            raise UserError(
                f"{path}, row {number}: is the first in which there are more than {_MOST_KEYS} different keys in all"
            )
        row: list[str | None] = [None] * len(columns)
        for name, value in values.items():
            row[columns[name]] = as_text(value)
        rows.append(row)
        numbers.append(number)
    return Table(path, list(columns), rows, numbers)


def as_text(value: object) -> str | None:
    """A value of JSON as a cell: a text as it is, a number, true or false as JSON writes it; None for all else."""
    if isinstance(value, str):  # JSON can escape half of a character
        return value.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    if isinstance(value, float) and not math.isfinite(value):  # what some programs write for nothing
        return None
    return json.dumps(value) if isinstance(value, (bool, int, float)) else None


def shortened(text: str) -> str:
    """A text as messages show it: of a long one, the beginning."""
    return text if len(text) <= 60 else text[:60] + "…"
