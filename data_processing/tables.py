"""Read the rows and columns of a text file: tab-separated as GLUE writes it, CSV, or JSON lines.

Knows no task: `examples.py` chooses the columns that hold texts and labels. A table reads its file row by row, so a
file may be larger than memory.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_processing.tasks import Column
from transformer.errors import UserError

logger = logging.getLogger(__name__)

FORMS = ("tsv", "csv", "jsonl")
ENCODING = ("utf-8", "surrogateescape")  # of files and of formatted rows: bytes that are not UTF-8 come back unchanged
_UTF16 = re.compile("\udcff\udcfe|\udcfe\udcff|(\0[^\0]){3}|([^\0]\0){3}")  # a byte order mark or ASCII, read as UTF-8
_SURROGATES = re.compile("[\ud800-\udfff]")  # half characters, which JSON can escape and no encoding can write
_UNWRITABLE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # those among them that do not stand for an escaped byte


@dataclass(frozen=True)
class Table:
    """A file's rows, which each iteration reads again.

    names: the column names; None if the file has no row of names, and in JSON lines, whose objects have keys.
    keeps_empty: whether an empty line is a row with an empty cell, as in a file of one column.
    keeps_bytes: whether cells hold bytes that are not UTF-8 as surrogates, so that `format_row` can write them back;
        otherwise such bytes become U+FFFD.
    """

    path: Path
    form: str
    names: list[str] | None
    keeps_bytes: bool = False
    keeps_empty: bool = False

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yield each row below the names: the line it begins on, counted from 1, and its cells or JSON object.

        A row may have more or fewer cells than there are names.

        Raises:
            UserError: the file cannot be read, or is not of this form.
        """
        rows = _rows(self.path, self.form, self.keeps_bytes, keeps_empty=self.keeps_empty)
        if self.names is not None:
            next(rows, None)
        return rows

    def index(self, column: Column) -> Column:
        """Return the number of a column, given by number or name; in JSON lines, its key.

        Raises:
            UserError: no column has that name, or several have it.
        """
        if isinstance(column, int) or self.form == "jsonl":
            return column
        name = repr(shortened(column))
        if self.names is None:
            raise UserError(f"{self.path}: has no row of column names, so {name} cannot be found; give its number")
        if column not in self.names:
            known = ", ".join(repr(shortened(other)) for other in self.names[:20])
            more = ", …" if len(self.names) > 20 else ""
            raise UserError(f"{self.path}: has no column {name}; its columns are {known}{more}")
        if self.names.count(column) > 1:
            raise UserError(f"{self.path}: has {self.names.count(column)} columns {name}; give the number of one")
        return self.names.index(column)

    def format_row(self, row: Any) -> str:
        """Return cells or a JSON object as a line of this file, line end included.

        Raises:
            UserError: the object is nested too deeply.
        """
        if self.form == "tsv":
            return "\t".join(row) + "\n"
        if self.form == "csv":
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow(row)
            return line.getvalue()
        try:
            return _UNWRITABLE.sub("\ufffd", json.dumps(row, ensure_ascii=False)) + "\n"
        except RecursionError:
            raise UserError(f"{self.path}: one of its objects is nested too deeply") from None


def open_table(path: Path, form: str = "tsv", has_header: bool = True, keeps_bytes: bool = False) -> Table:
    """Open a file of one of FORMS, and read its column names.

    Args:
        path: the file.
        form: `tsv`: cells are split at tabs, quotation marks have no meaning, empty lines at the end are not rows.
            `csv`: cells may be quoted, empty lines are not rows. `jsonl`: one object per line. In a file of one column
            each empty line is a row with an empty text.
        has_header: whether the first row of a tsv or csv file holds the column names.
        keeps_bytes: see `Table`.

    Raises:
        UserError: the file is missing, cannot be read, is empty, or its first row is not of this form.
    """
    first = next(_rows(path, form, keeps_bytes, warns=False), None)
    if first is None:
        raise UserError(f"{path}: holds no examples")
    names = first[1] if has_header and form != "jsonl" else None
    return Table(path, form, names, keeps_bytes, keeps_empty=form != "jsonl" and len(first[1]) == 1)


def _rows(
    path: Path, form: str, keeps_bytes: bool, warns: bool = True, keeps_empty: bool = False
) -> Iterator[tuple[int, Any]]:
    lines = _lines(path, keeps_bytes, warns, keeps_empty)
    if form == "jsonl":
        return _json_rows(path, lines)
    if form == "csv":
        return _csv_rows(path, lines, keeps_empty)
    return ((number, line.split("\t")) for number, line in lines)


def _lines(path: Path, keeps_bytes: bool, warns: bool, keeps_empty: bool) -> Iterator[tuple[int, str]]:
    """Yield the lines without their ends and their numbers; without `keeps_empty`, up to the last that is not empty."""
    broken = empty = number = 0
    try:
        if not (path.is_file() or path.is_dir()) and path.exists():
            raise UserError(f"{path}: is not a regular file")  # a pipe or a device may have no end
        with path.open(encoding="utf-8-sig", errors=ENCODING[1]) as file:
            for number, line in enumerate(file, start=1):
                line = line.rstrip("\n")
                if number == 1 and _UTF16.match(line):
                    raise UserError(f"{path}: is UTF-16; save it as UTF-8")
                if not line:
                    empty += 1
                    continue
                yield from ((number - empty + n, "") for n in range(empty))
                empty = 0
                if not keeps_bytes and not line.isascii() and _SURROGATES.search(line):
                    line = line.encode(*ENCODING).decode("utf-8", errors="replace")
                    broken += 1
                yield number, line
        if keeps_empty:
            yield from ((number - empty + n, "") for n in range(1, empty + 1))
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if broken and warns:
        logger.warning("%s: %d rows are not UTF-8; their unreadable bytes became U+FFFD", path, broken)


def _csv_rows(path: Path, lines: Iterator[tuple[int, str]], keeps_empty: bool) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # a long text is not a mistake
    reader = csv.reader((f"{line}\n" for _, line in lines), strict=True)
    number = 1
    try:
        for row in reader:
            if row or keeps_empty:
                yield number, row or [""]
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, row {number}: is not valid CSV ({error})") from None


def _json_rows(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines:
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise UserError(f"{path}: is a JSON array; expected JSON lines, one object on each line")
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, row {number}: is not valid JSON") from None
        if not isinstance(values, dict):
            raise UserError(
                f'{path}, row {number}: is not a JSON object; expected one such as {{"text": "…", "label": "…"}}'
            )
        yield number, values


def cells_of(path: Path, line: int, values: dict[str, Any], keys: Sequence[Column]) -> list[str]:
    """Return the texts and numbers under these keys of a JSON object.

    Raises:
        UserError: a key is missing, or holds neither; the message names it and the row.
    """
    cells = []
    for key in keys:
        cell = as_text(values.get(str(key)))
        if cell is None:
            raise UserError(f"{path}, row {line}: has no text or number at {shortened(str(key))!r}")
        cells.append(cell)
    return cells


def as_text(value: object) -> str | None:
    """Return a JSON value as a cell: a string, or a number, true or false as JSON writes it; None for all else."""
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):  # some programs write NaN for a missing value
        return None
    return json.dumps(value) if isinstance(value, (bool, int, float)) else None


def shortened(text: str) -> str:
    """Return a text cut to 60 characters for a message."""
    return text if len(text) <= 60 else text[:60] + "…"
