"""Word vectors from a text file, as GloVe's, and a word's nearest neighbours by cosine.

A line is a word and its values, split by spaces; the word may hold spaces itself, as some of GloVe's 840B do. The
file may be compressed by gzip, whatever its name, and may begin with a line of two numbers, as word2vec's do.
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
_CHUNK = 1000  # lines that are parsed at once
_WORDS_AT_ONCE = 128
_MARGIN = 16  # more neighbours than are wanted are found in fp32, and put in order in fp64
_FORMS = 8  # as film, Film and FILM: more than a word has on average among its neighbours
_MOST_SPACES = 8  # in a word
_MIXED = 0.1  # of the lines with another number of values, and the file is of two kinds
_SHOWN = 5
_LONGEST_LINE = 2**20  # bytes; GloVe's longest are of 3 kB
_MOST_BYTES = 2**31  # of all lines that are read


class WordVectors:
    """Words and their vectors, brought to length 1: [words, dimension] fp32."""

    def __init__(self, words: list[str], vectors: np.ndarray) -> None:
        self.words = words
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))[:, None]  # fp32's squares overflow
        self.vectors = (vectors / np.maximum(lengths, 1e-30)).astype(np.float32)
        self._places: dict[str, int] = {}
        for place, word in enumerate(words):
            self._places.setdefault(word, place)

    def __contains__(self, word: str) -> bool:
        return word in self._places

    def digest(self) -> str:
        """What tells these vectors from others."""
        content = hashlib.sha256("\n".join(self.words).encode("utf-8", errors="replace"))
        content.update(np.ascontiguousarray(self.vectors).data)
        return content.hexdigest()[:32]

    def neighbours(self, words: Sequence[str], count: int, form: Callable[[str], str] = str) -> dict[str, list[str]]:
        """The nearest other words of each word, by cosine, the nearest first; a word that is not known has none.

        Args:
            words: in the file's spelling.
            count: of each one's neighbours, at most.
            form: neighbours are given in this form, each once, as `str.lower` of a file that tells case apart.
        """
        known = [word for word in words if word in self._places]
        table = torch.from_numpy(self.vectors)
        found: dict[str, list[str]] = {}
        for start in range(0, len(known), _WORDS_AT_ONCE):
            some = known[start : start + _WORDS_AT_ONCE]
            own = [self._places[word] for word in some]
            likeness = table[own] @ table.T
            wanted = count + 1 + _MARGIN if form is str else _FORMS * (count + 1) + _MARGIN
            near = likeness.topk(min(wanted, len(self.words)), sorted=False).indices.numpy()
            for word, place, others in zip(some, own, near, strict=True):
                found[word] = self._in_order(place, others, count, form)
        return {word: found.get(word, []) for word in words}

    def _in_order(self, place: int, others: np.ndarray, count: int, form: Callable[[str], str]) -> list[str]:
        """fp32's likeness depends, in the last digit, on what else was asked; this does not."""
        cosines = (self.vectors[others].astype(np.float64) * self.vectors[place].astype(np.float64)).sum(axis=1)
        order = others[np.lexsort((others, -cosines))]
        own = form(self.words[place])
        distinct = dict.fromkeys(form(self.words[other]) for other in order)
        return [word for word in distinct if word != own][:count]


def read_vectors(path: Path, most: int = MOST_VECTORS) -> WordVectors:
    """Reads the first `most` vectors of a file. Lines that are none are left out, and a warning names them.

    Raises:
        UserError: the file is missing, broken or empty, or its lines have different numbers of values.
    """
    lines = _lines(path, most)
    numbers = Counter(line.count(b" ") for line in lines[:1000] if line)
    first = 1  # the number of the first line
    if lines and lines[0].count(b" ") == 1 and len(numbers) > 1 and all(map(bytes.isdigit, lines[0].split())):
        lines, first = lines[1:], 2
    lines = lines[:most]
    if not numbers:
        raise UserError(f"{path}: is empty; expected GloVe's vectors, a word and its numbers on each line")
    dimension = numbers.most_common(1)[0][0]
    if dimension < 2:
        raise UserError(f"{path}: is no file of word vectors; expected a word and its numbers on each line")
    _check_not_mixed(path, lines, dimension)
    words, vectors, malformed = _parsed(lines, dimension)
    if not words:
        raise UserError(f"{path}: holds no word vectors; expected a word and its numbers on each line")
    if malformed:
        named = ", ".join(str(first + number) for number in malformed[:_SHOWN])
        more = ", …" if len(malformed) > _SHOWN else ""
        logger.warning(
            "%s: %d of %d lines are no word and %d numbers, and were left out (line %s%s)",
            path,
            len(malformed),
            len(lines),
            dimension,
            named,
            more,
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
    """The lines, as long as no memory is needed that word vectors do not need."""
    room = _MOST_BYTES
    for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE + 1), b""), start=1):
        room -= len(line)
        if len(line) > _LONGEST_LINE or room < 0:
            what = f"line {number} is longer than {_LONGEST_LINE} bytes" if room >= 0 else "its lines are too long"
            raise UserError(f"--glove_embs {path}: {what}: no file of word vectors")
        yield line


def _check_not_mixed(path: Path, lines: Sequence[bytes], dimension: int) -> None:
    """A line or two with a value too many or few are malformed; many of another number are another file."""
    others: Counter[int] = Counter()
    for place, line in enumerate(lines, start=1):
        number = line.count(b" ")
        if number in (dimension, 0, 1) or _numbers(line.split(b" ", 1)[1]) is None:  # a word with spaces, for one
            continue
        others[number] += 1
        if others[number] > max(1, _MIXED * len(lines)):
            raise UserError(
                f"{path}: its vectors have different dimensions, {dimension} and, as in line {place}, {number}; "
                "give a file of one dimension"
            )


def _parsed(lines: Sequence[bytes], dimension: int) -> tuple[list[str], np.ndarray, list[int]]:
    """The words, their vectors, and the places of the lines that are none."""
    words: list[bytes] = []
    vectors = np.empty((len(lines), dimension), dtype=np.float32)
    malformed: list[int] = []
    for start in range(0, len(lines), _CHUNK):
        chunk = lines[start : start + _CHUNK]
        if all(line.count(b" ") == dimension for line in chunk):
            parts = [line.split(b" ", 1) for line in chunk]
            values = _numbers(b" ".join(part[1] for part in parts))
            if values is not None and len(values) == len(chunk) * dimension:
                vectors[len(words) : len(words) + len(chunk)] = values.reshape(-1, dimension)
                words += [part[0] for part in parts]
                continue
        for place, line in enumerate(chunk, start=start):  # one of them is out of the ordinary
            word, *rest = line.rsplit(b" ", dimension)
            values = _numbers(b" ".join(rest))
            if values is None or not word or len(values) != dimension or word.count(b" ") > _MOST_SPACES:
                malformed.append(place)
                continue
            vectors[len(words)] = values
            words.append(word)
    return [word.decode("utf-8", errors="replace") for word in words], vectors[: len(words)], malformed


def _numbers(text: bytes) -> np.ndarray | None:
    """The finite numbers, split by single spaces, that a text is; None where it is anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what older numpy says of a text that is no number
        try:
            values = np.fromstring(text, dtype=np.float32, sep=" ")
        except (ValueError, DeprecationWarning):
            return None
    return values if np.isfinite(values).all() else None
