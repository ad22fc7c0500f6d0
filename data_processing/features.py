"""From a task's .tsv files to token ids.

All tokens of a file lie in one array, one example after the other, without padding: what a batch
pads is the batch's affair (`batching.py`). Files are read as GLUE writes them: columns split at
tabs, quotation marks meaning nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_processing.tasks import Task
from transformer.errors import UserError
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """The rows of a file: their texts, one list for each text column, and label ids [examples]."""

    texts: tuple[list[str], ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Features:
    """A tokenized file.

    tokens: [total tokens] ids, each example as [CLS] text [SEP] or [CLS] first [SEP] second [SEP].
    offsets: [examples + 1]; example i is tokens[offsets[i]:offsets[i + 1]].
    first_lengths: [examples] tokens of segment 0, its [CLS] and [SEP] included.
    labels: [examples] label ids.
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


def read_rows(path: Path) -> list[list[str]]:
    """A tab-separated file's rows, as GLUE writes them; empty lines at the end do not count.

    Bytes that are not UTF-8 become U+FFFD, and a warning says in how many rows.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = content.rstrip(b"\n").split(b"\n") if content.strip(b"\n") else []
    rows, broken = [], 0
    for line in lines:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            text = line.decode("utf-8", errors="replace")
            broken += 1
        rows.append(text.split("\t"))
    if broken:
        logger.warning("%s: %d rows are not UTF-8; what cannot be read became U+FFFD", path, broken)
    return rows


def read_examples(path: Path, task: Task) -> Examples:
    """Reads a train or dev file of a task.

    Raises:
        UserError: no such file, no rows, a row with too few columns, or a label that the task does
            not name; the message names file and row (the first line of the file is row 1).
    """
    rows = read_rows(path)
    first = 2 if task.has_header else 1
    header_row, rows = rows[: first - 1], rows[first - 1 :]
    if not rows:
        raise UserError(f"{path}: holds no examples")
    ids = {label: number for number, label in enumerate(task.labels)}
    header = header_row[0] if header_row else []
    if len(header) >= task.columns_needed and header[task.label_column].strip() in ids:
        raise UserError(f"{path}, row 1: is an example; {task.name}'s files begin with a row of column names")
    labels = np.empty(len(rows), dtype=np.int64)
    texts: tuple[list[str], ...] = tuple([] for _ in task.text_columns)
    for number, row in enumerate(rows):
        if len(row) < task.columns_needed:
            raise UserError(
                f"{path}, row {number + first}: has {len(row)} columns, "
                f"{task.name} needs at least {task.columns_needed}, split by tabs"
            )
        label = row[task.label_column].strip()
        if label not in ids:
            raise UserError(
                f"{path}, row {number + first}: the label is {_shortened(label)}, "
                f"expected one of {', '.join(task.labels)} in {_column(task.label_column)}"
            )
        labels[number] = ids[label]
        for column, column_texts in zip(task.text_columns, texts, strict=True):
            column_texts.append(row[column])
    return Examples(texts, labels)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _column(index: int) -> str:
    return "the last column" if index == -1 else f"column {index + 1}"


def make_features(examples: Examples, tokenizer: BertTokenizer, max_seq_length: int) -> Features:
    """Tokenizes and truncates examples.

    A single text keeps its first max_seq_length - 2 WordPieces. Of a pair the longer text loses its
    last piece, the second one where both are as long, until both fit in max_seq_length - 3.
    """
    pieces = [tokenizer.encode_batch(texts) for texts in examples.texts]
    encoded, first_lengths = [], []
    for parts in zip(*pieces, strict=True):
        kept = _truncated([len(part) for part in parts], max_seq_length - len(parts) - 1)
        ids = [tokenizer.cls_token_id]
        for part, length in zip(parts, kept, strict=True):
            ids += [*part[:length], tokenizer.sep_token_id]
        encoded.append(np.array(ids, dtype=np.int32))
        first_lengths.append(kept[0] + 2)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    return Features(
        tokens=np.concatenate(encoded),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        first_lengths=np.array(first_lengths, dtype=np.int64),
        labels=examples.labels,
    )


def _truncated(lengths: Sequence[int], room: int) -> list[int]:
    """How many pieces each text keeps so that all fit in `room`.

    The same as taking pieces one at a time from the longer of two texts, and from the second where
    both are as long: the shorter keeps all it has, up to half of the room.
    """
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    first, second = lengths
    if first + second <= room:
        return [first, second]
    if first <= room // 2:
        return [first, room - first]
    if second <= room // 2:
        return [room - second, second]
    return [room - room // 2, room // 2]
