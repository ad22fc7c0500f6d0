"""From a task's examples to token ids.

All tokens of a file lie in one array, one example after the other, without padding: what a batch
pads is the batch's affair (`batching.py`).
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

_CACHED_FORM = 1  # raised when the arrays of `Features` change their meaning
_EXAMPLES_AT_ONCE = 2**16  # bounds what tokenizing needs beside its result


@dataclass(frozen=True)
class Features:
    """A tokenized file.

    tokens: [total tokens] ids, each example as [CLS] text [SEP] or [CLS] first [SEP] second [SEP]; uint16, or
        int32 where the vocabulary is larger.
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


def load_features(path: Path, task: Task, tokenizer: BertTokenizer, max_seq_length: int, cache: Cache) -> Features:
    """Reads and tokenizes a train or dev file of a task, or finds it tokenized in the cache.

    Raises:
        UserError: as for `read_examples`.
    """
    try:
        content = file_digest(path)
    except OSError:
        return make_features(read_examples(path, task), tokenizer, max_seq_length)  # which tells what is wrong with it
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
    known = cache.get("features", key, names)
    if known is not None:
        return Features(**known)
    features = make_features(read_examples(path, task), tokenizer, max_seq_length)
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
