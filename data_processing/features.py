"""Turn a task's examples into token ids.

One array holds all tokens of a file, one example after the other, without padding; `batching.py` pads.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tokenizers

from data_processing.cache import Cache, digest
from data_processing.examples import Examples, read_examples
from data_processing.files import file_digest
from data_processing.tasks import Task
from transformer.tokenization import BertTokenizer

_CACHED_FORM = 1  # increased when the arrays of `Features` change their meaning
_CHUNK = 2**16  # bounds the memory of tokenizing


@dataclass(frozen=True)
class Features:
    """A tokenized file.

    tokens: [total tokens] ids, each example as [CLS] text [SEP] or [CLS] first [SEP] second [SEP]; uint16, or
        int32 where the vocabulary is larger.
    offsets: [examples + 1]; example i is tokens[offsets[i]:offsets[i + 1]].
    first_lengths: [examples] tokens of segment 0, its [CLS] and [SEP] included.
    labels: [examples] ids or scores, as in `Examples`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    first_lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """[examples] the number of tokens of each, [CLS] and [SEP] included."""
        return np.diff(self.offsets)


def load_features(path: Path, task: Task, tokenizer: BertTokenizer, max_seq_length: int, cache: Cache) -> Features:
    """Read and tokenize a train or dev file of a task, or load its features from the cache.

    Raises:
        UserError: as for `read_examples`.
    """
    try:
        content = file_digest(path)
    except OSError:
        return make_features(read_examples(path, task), tokenizer, max_seq_length)  # raises a UserError about the file
    key = digest(
        version=_CACHED_FORM,
        content=content,
        vocabulary=tokenizer.vocabulary_file,
        lower_case=tokenizer.do_lower_case,
        libraries=[unicodedata.unidata_version, tokenizers.__version__],
        length=max_seq_length,
        reading=[task.form, task.has_header, task.skips_short_rows, task.labels],
        columns=[task.text_columns, task.label_column],
    )
    names = [field.name for field in fields(Features)]
    cached = cache.get("features", key, names)
    if cached is not None:
        return Features(**cached)
    features = make_features(read_examples(path, task), tokenizer, max_seq_length)
    cache.put("features", key, {name: getattr(features, name) for name in names})
    return features


def make_features(examples: Examples, tokenizer: BertTokenizer, max_seq_length: int) -> Features:
    """Tokenize and truncate examples.

    A single text keeps its first max_seq_length - 2 WordPieces. In a pair the longer text loses its last WordPiece,
    the second text if both are of one length, until both fit in max_seq_length - 3.
    """
    tokens, offsets, first_lengths = [], [np.zeros(1, dtype=np.int64)], []
    for start in range(0, len(examples), _CHUNK):
        sides = [tokenizer.encode_flat(side[start : start + _CHUNK]) for side in examples.texts]
        joined, ends, kept = _join(sides, tokenizer, max_seq_length)
        tokens.append(joined)
        offsets.append(offsets[-1][-1] + ends)
        first_lengths.append(kept[0] + 2)
    return Features(
        tokens=np.concatenate(tokens),
        offsets=np.concatenate(offsets),
        first_lengths=np.concatenate(first_lengths).astype(np.int32),
        labels=examples.labels,
    )


def _join(
    sides: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer: BertTokenizer, max_seq_length: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Join the texts of examples as [CLS] text [SEP], or [CLS] first [SEP] second [SEP], one example after the other.

    Args:
        sides: for the first texts, and for the second ones: their ids [total ids] and lengths [examples].

    Returns:
        The tokens [total tokens], the offsets of the examples' ends [examples], and for each side how many ids each
        text keeps [examples].
    """
    kept = _truncate([lengths for _, lengths in sides], max_seq_length - len(sides) - 1)
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


def _truncate(lengths: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
    """Return how many ids each text keeps so that those of an example fit in `room`, for each side [examples].

    The result equals removing one id at a time from the longer of two texts, or from the second if both are of one
    length: the shorter text keeps all of its ids, up to half of the room.
    """
    if len(lengths) == 1:
        return [np.minimum(lengths[0], room)]
    first, second = lengths
    half = room // 2
    first_kept = np.where(first <= half, first, np.where(second <= half, room - second, room - half))
    second_kept = np.where(first <= half, room - first, np.where(second <= half, second, half))
    fits = first + second <= room
    return [np.where(fits, first, first_kept), np.where(fits, second, second_kept)]
