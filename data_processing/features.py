"""From a task's files to token ids.

All tokens of a file lie in one array, one example after the other, without padding: what a batch
pads is the batch's affair (`batching.py`).
"""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from data_processing.cache import Cache, digest, file_digest
from data_processing.tables import Table, read_table
from data_processing.tasks import Column, Task
from transformer.errors import UserError
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)

_CACHED_FORM = 1  # raised when the arrays of `Features` change their meaning
_EXAMPLES_AT_ONCE = 2**16  # bounds what tokenizing needs beside its result


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


@dataclass(frozen=True)
class Features:
    """A tokenized file.

    tokens: [total tokens] ids (uint16, or int32 for a larger vocabulary), each example as [CLS] text [SEP] or [CLS] first [SEP] second [SEP].
    offsets: [examples + 1]; example i is tokens[offsets[i]:offsets[i + 1]].
    first_lengths: [examples] tokens of segment 0, its [CLS] and [SEP] included.
    labels: [examples] as in `Examples`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    first_lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """[examples] tokens of each, specials included."""
        return np.diff(self.offsets)


def read_examples(path: Path, task: Task) -> Examples:
    """Reads a train or dev file of a task.

    Raises:
        UserError: no such file, no rows, a column that is not there, a row with too few columns, a label
            that the task does not name, or a score that is no number; the message names file and row
            (the first line of the file is row 1).
    """
    table = _read(path, task, task.has_header)
    columns = [table.index(column) for column in (*task.text_columns, task.label_column)]
    _check_has_header(table, task, columns[-1])
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
    table = _read(path, task, has_header=True)
    texts = task.test_text_columns or task.text_columns
    wanted = texts if task.id_column is None else (*texts, task.id_column)
    rows = _wanted(table, task, [table.index(column) for column in wanted])
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


def _check_has_header(table: Table, task: Task, label: int) -> None:
    names = table.names
    if names and task.labels and -len(names) <= label < len(names) and names[label].strip() in task.labels:
        raise UserError(f"{table.path}, row 1: is an example; {task.name}'s files begin with a row of column names")


def _wanted(table: Table, task: Task, columns: Sequence[int]) -> list[tuple[int, list[str]]]:
    """The cells of these columns of every row, and the rows' lines."""
    needed = max(*columns, *(-1 - column for column in columns)) + 1
    if -1 in columns:  # the last column is one of its own
        needed = max(needed, max(columns) + 2)
    rows, short = [], 0
    for line, row in zip(table.lines, table.rows, strict=True):
        if len(row) < needed and task.form == "jsonl":  # its later keys come first in later rows
            row = row + [None] * (needed - len(row))
        if len(row) < needed:
            if not task.skips_short_rows:
                raise UserError(
                    f"{table.path}, row {line}: has {len(row)} columns, {task.name} needs at least {needed}"
                    + (", split by tabs" if task.form == "tsv" else "")
                )
            short += 1
            continue
        cells = [row[column] for column in columns]
        if None in cells:
            name = (table.names or [])[columns[cells.index(None)]]
            raise UserError(f"{table.path}, row {line}: has no text or number at {name!r}")
        rows.append((line, [cell for cell in cells if cell is not None]))
    if short:
        logger.warning("%s: %d rows with fewer than %d columns were left out", table.path, short, needed)
    if not rows:
        raise UserError(f"{table.path}: holds no examples")
    return rows


def _texts(rows: Sequence[tuple[int, list[str]]], count: int) -> tuple[list[str], ...]:
    return tuple([cells[number] for _, cells in rows] for number in range(count))


def _label(path: Path, line: int, cell: str, task: Task, ids: dict[str, int]) -> int:
    label = cell.strip()
    if label not in ids:
        raise UserError(
            f"{path}, row {line}: the label is {_shortened(label)}, "
            f"expected one of {', '.join(task.labels)} in {_column(task.label_column)}"
        )
    return ids[label]


def _score(path: Path, line: int, cell: str, task: Task, _: dict[str, int]) -> float:
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not abs(score) < 1e30:  # nor infinite, nor too large for fp32 to square
        raise UserError(
            f"{path}, row {line}: the score is {_shortened(cell.strip())}, "
            f"expected a number in {_column(task.label_column)}"
        )
    return score


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _column(column: Column) -> str:
    if isinstance(column, str):
        return f"the column {column!r}"
    return "the last column" if column == -1 else f"column {column + 1}"


def load_features(
    path: Path, task: Task, tokenizer: BertTokenizer, max_seq_length: int, cache: Cache, labelled: bool = True
) -> Features:
    """Reads and tokenizes a file of a task, or finds it tokenized in the cache.

    Args:
        labelled: whether it is a train or dev file; otherwise a test file.

    Raises:
        UserError: as for `read_examples`.
    """
    read = read_examples if labelled else read_unlabelled
    try:
        content = file_digest(path)
    except OSError:
        return make_features(read(path, task), tokenizer, max_seq_length)  # which tells what is wrong with it
    key = digest(
        version=_CACHED_FORM,
        content=content,
        vocabulary=tokenizer.vocabulary_file,
        lower_case=tokenizer.do_lower_case,
        unicode=unicodedata.unidata_version,
        length=max_seq_length,
        labelled=labelled,
        reading=[task.form, task.has_header, task.skips_short_rows, task.labels],
        columns=[task.text_columns, task.label_column, task.test_text_columns],
    )
    names = [field.name for field in fields(Features)]
    known = cache.get("features", key, names)
    if known is not None:
        return Features(**known)
    features = make_features(read(path, task), tokenizer, max_seq_length)
    cache.put("features", key, {name: getattr(features, name) for name in names})
    return features


def make_features(examples: Examples, tokenizer: BertTokenizer, max_seq_length: int) -> Features:
    """Tokenizes and truncates examples.

    A single text keeps its first max_seq_length - 2 WordPieces. Of a pair the longer text loses its
    last piece, the second one where both are as long, until both fit in max_seq_length - 3.
    """
    tokens, offsets, first_lengths = [], [np.zeros(1, dtype=np.int64)], []
    for start in range(0, len(examples), _EXAMPLES_AT_ONCE):
        sides = [tokenizer.encode_flat(side[start : start + _EXAMPLES_AT_ONCE]) for side in examples.texts]
        joined, ends, kept = _joined(sides, tokenizer, max_seq_length)
        tokens.append(joined)
        offsets.append(offsets[-1][-1] + ends)
        first_lengths.append(kept[0] + 2)
    return Features(
        tokens=np.concatenate(tokens),
        offsets=np.concatenate(offsets),
        first_lengths=np.concatenate(first_lengths).astype(np.int32),
        labels=examples.labels,
    )


def _joined(
    sides: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer: BertTokenizer, max_seq_length: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """[CLS] text [SEP], or [CLS] first [SEP] second [SEP], of all examples one after the other.

    Args:
        sides: the ids of all first texts, and how many each has; the same of the second ones.

    Returns:
        The tokens, the offsets of the examples' ends, and how many pieces each text keeps.
    """
    kept = _truncated([lengths for _, lengths in sides], max_seq_length - len(sides) - 1)
    ends = np.cumsum(sum(kept) + 1 + len(sides))
    place = np.concatenate([[0], ends[:-1]])
    tokens = np.empty(ends[-1], dtype=np.uint16 if len(tokenizer) <= 2**16 else np.int32)
    tokens[place] = tokenizer.cls_token_id
    place = place + 1
    for (ids, lengths), keep in zip(sides, kept, strict=True):
        inside = np.arange(keep.sum()) - np.repeat(np.cumsum(keep) - keep, keep)
        tokens[np.repeat(place, keep) + inside] = ids[np.repeat(np.cumsum(lengths) - lengths, keep) + inside]
        place = place + keep
        tokens[place] = tokenizer.sep_token_id
        place = place + 1
    return tokens, ends, kept


def _truncated(lengths: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
    """How many pieces each text keeps so that all of an example fit in `room`.

    The same as taking pieces one at a time from the longer of two texts, and from the second where
    both are as long: the shorter keeps all it has, up to half of the room.
    """
    if len(lengths) == 1:
        return [np.minimum(lengths[0], room)]
    first, second = lengths
    half = room // 2
    first_kept = np.where(first <= half, first, np.where(second <= half, room - second, room - half))
    second_kept = np.where(first <= half, room - first, np.where(second <= half, second, half))
    fits = first + second <= room
    return [np.where(fits, first, first_kept), np.where(fits, second, second_kept)]
