"""Read word vectors from a text file, as GloVe's, and find a word's nearest neighbours by cosine.

A line is a word and its values, separated by spaces; the word may contain spaces, as some in GloVe's 840B do. The file
may be compressed by gzip, whatever its name, and may begin with a line of two counts, as word2vec's do.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch

from transformer.errors import UserError

logger = logging.getLogger(__name__)

MOST_VECTORS = 100_000
_LINES_PER_CHUNK = 1000
_WORDS_PER_BATCH = 128
_MARGIN = 16  # additional neighbours that fp32 preselects, before fp64 sorts them
_FORMS = 8  # as film, Film and FILM: more than a word has on average among its neighbours
_MOST_SPACES = 8  # in a word
_MOST_MIXED = 0.1  # share of lines with another dimension; above it the file is refused
_LISTED = 5  # malformed lines in a warning
_LONGEST_LINE = 2**20  # bytes; GloVe's longest lines have 3 kB
_MOST_BYTES = 2**31  # of all lines that are read


class WordVectors:
    """Words and their vectors, normalized to length 1: [words, dimension] fp32."""

    def __init__(self, words: list[str], vectors: np.ndarray) -> None:
        self.words = words
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))[:, None]  # fp32's squares overflow
        self.vectors = (vectors / np.maximum(lengths, 1e-30)).astype(np.float32)
        self._rows: dict[str, int] = {}
        for row, word in enumerate(words):
            self._rows.setdefault(word, row)

    def __contains__(self, word: str) -> bool:
        return word in self._rows

    def digest(self) -> str:
        """Return a digest of the words and vectors, of 32 hexadecimal digits."""
        content = hashlib.sha256("\n".join(self.words).encode("utf-8", errors="replace"))
        content.update(np.ascontiguousarray(self.vectors).data)
        return content.hexdigest()[:32]

    def neighbours(self, words: Sequence[str], count: int, form: Callable[[str], str] = str) -> dict[str, list[str]]:
        """Return the nearest other words of each word by cosine, the nearest first; an unknown word has none.

        Args:
            words: in the file's spelling.
            count: the largest number of neighbours.
            form: applied to neighbours, which are returned once in each form; as `str.lower` for a cased file.
        """
        known = [word for word in words if word in self._rows]
        table = torch.from_numpy(self.vectors)
        found: dict[str, list[str]] = {}
        for start in range(0, len(known), _WORDS_PER_BATCH):
            some = known[start : start + _WORDS_PER_BATCH]
            own = [self._rows[word] for word in some]
            cosines = table[own] @ table.T
            wanted = count + 1 + _MARGIN if form is str else _FORMS * (count + 1) + _MARGIN
            near = cosines.topk(min(wanted, len(self.words)), sorted=False).indices.numpy()
            for word, row, others in zip(some, own, near, strict=True):
                found[word] = self._nearest(row, others, count, form)
        return {word: found.get(word, []) for word in words}

    def _nearest(self, row: int, others: np.ndarray, count: int, form: Callable[[str], str]) -> list[str]:
        """Return the nearest of other rows, sorted by cosines in fp64.

        The last digit of fp32's cosines depends on the other words of the batch.
        """
        cosines = (self.vectors[others].astype(np.float64) * self.vectors[row].astype(np.float64)).sum(axis=1)
        order = others[np.lexsort((others, -cosines))]
        own = form(self.words[row])
        distinct = dict.fromkeys(form(self.words[other]) for other in order)
        return [word for word in distinct if word != own][:count]


def read_vectors(path: Path, most: int = MOST_VECTORS) -> WordVectors:
    """Read the first `most` vectors of a file; malformed lines are left out, and a warning lists them.

    Raises:
        UserError: the file is missing, broken or empty, or its vectors have different dimensions.
    """
    lines = _lines(path, most)
    numbers = Counter(line.count(b" ") for line in lines[:1000] if line)
    first = 1  # the number of the first line
    if lines and lines[0].count(b" ") == 1 and len(numbers) > 1 and all(map(bytes.isdigit, lines[0].split())):
        lines, first = lines[1:], 2
    lines = lines[:most]
    if not numbers:
        raise UserError(f"{path}: is empty; expected GloVe vectors, a word and its numbers on each line")
    dimension = numbers.most_common(1)[0][0]
    if dimension < 2:
        raise UserError(f"{path}: is not a file of word vectors; expected a word and its numbers on each line")
    _check_not_mixed(path, lines, dimension)
    words, vectors, malformed = _parse(lines, dimension)
    if not words:
        raise UserError(f"{path}: holds no word vectors; expected a word and its numbers on each line")
    if malformed:
        listed = ", ".join(str(first + number) for number in malformed[:_LISTED])
        more = ", …" if len(malformed) > _LISTED else ""
        logger.warning(
            f"{path}: {len(malformed)} of {len(lines)} lines are not a word and {dimension} numbers, and were left out "
            f"(line {listed}{more})"
        )
    return WordVectors(words, vectors)


def _lines(path: Path, most: int) -> list[bytes]:
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            with gzip.GzipFile(fileobj=plain) if packed else plain as file:
                return [line.rstrip() for line in islice(_whole_lines(cast(BinaryIO, file), path), most + 1)]
    except FileNotFoundError:
        raise UserError(f"--glove_embs {path}: not found") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--glove_embs {path}: cannot be read ({reason})") from None


def _whole_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the lines; raise UserError before they need more memory than word vectors can."""
    room = _MOST_BYTES
    for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE + 1), b""), start=1):
        room -= len(line)
        if len(line) > _LONGEST_LINE or room < 0:
            fault = f"line {number} is longer than {_LONGEST_LINE} bytes" if room >= 0 else "its lines are too long"
            raise UserError(f"--glove_embs {path}: {fault}: not a file of word vectors")
        yield line


def _check_not_mixed(path: Path, lines: Sequence[bytes], dimension: int) -> None:
    """Raise UserError if many lines have another dimension; a few such lines are merely malformed."""
    others: Counter[int] = Counter()
    for row, line in enumerate(lines, start=1):
        number = line.count(b" ")
        if number in (dimension, 0, 1) or _numbers(line.split(b" ", 1)[1]) is None:  # such as a word with spaces
            continue
        others[number] += 1
        if others[number] > max(1, _MOST_MIXED * len(lines)):
            raise UserError(
                f"{path}: its vectors have different dimensions, {dimension} and, as in line {row}, {number}; "
                "give a file of one dimension"
            )


def _parse(lines: Sequence[bytes], dimension: int) -> tuple[list[str], np.ndarray, list[int]]:
    """Return the words, their vectors, and the indices of malformed lines."""
    words: list[bytes] = []
    vectors = np.empty((len(lines), dimension), dtype=np.float32)
    malformed: list[int] = []
    for start in range(0, len(lines), _LINES_PER_CHUNK):
        chunk = lines[start : start + _LINES_PER_CHUNK]
        if all(line.count(b" ") == dimension for line in chunk):
            parts = [line.split(b" ", 1) for line in chunk]
            values = _numbers(b" ".join(part[1] for part in parts))
            if values is not None and len(values) == len(chunk) * dimension:
                vectors[len(words) : len(words) + len(chunk)] = values.reshape(-1, dimension)
                words += [part[0] for part in parts]
                continue
        for index, line in enumerate(chunk, start=start):  # a word has spaces, or a line is malformed
            word, *rest = line.rsplit(b" ", dimension)
            values = _numbers(b" ".join(rest))
            if values is None or not word or len(values) != dimension or word.count(b" ") > _MOST_SPACES:
                malformed.append(index)
                continue
            vectors[len(words)] = values
            words.append(word)
    return [word.decode("utf-8", errors="replace") for word in words], vectors[: len(words)], malformed


def _numbers(text: bytes) -> np.ndarray | None:
    """Return the numbers in a text, separated by spaces; None if it has anything else or a number is not finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # older versions of NumPy warn of text that is not a number
        try:
            values = np.fromstring(text, dtype=np.float32, sep=" ")
        except (ValueError, DeprecationWarning):
            return None
    return values if np.isfinite(values).all() else None
