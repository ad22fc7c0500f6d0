"""Data augmentation as a run: from folders and a task to blocks of augmented rows on a device.

The method is in `data_processing/augmentation/augmenter.py`; here are the models that it asks.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_processing.augmentation.augmenter import Augmenter, Settings
from data_processing.augmentation.glove import WordVectors, read_vectors
from data_processing.augmentation.masked_words import MaskedWords
from data_processing.examples import Row, TextRows, unlabelled
from data_processing.features import Features, make_features
from data_processing.tables import ENCODING
from data_processing.tasks import Task
from distillation.models import LoadedModel, load_complete
from distillation.runs.mlm_head import load_masked_lm
from transformer import packed_inference

_TOKENS_AT_ONCE = {"cpu": 3200, "cuda": 32768, "npu": 32768}  # of a batch for the teacher; could change its answers


@lru_cache(maxsize=1)
def word_vectors(path: Path) -> WordVectors:
    """The vectors of a file, read once in a process.

    Raises:
        UserError: as for `read_vectors`.
    """
    return read_vectors(path)


class Block(NamedTuple):
    """Rows of the file, and the number of the first of them, from 0."""

    first: int
    rows: list[Row]


class Augmented(NamedTuple):
    """What came of a block: its lines, how many rows they are, and how many new ones the teacher dropped."""

    content: bytes
    rows: int
    dropped: int


@dataclass(frozen=True)
class AugmentationPlan:
    """What a process needs to augment blocks of rows.

    masked_lm: the folder of a model with its head. vectors: of words, None for none. with_original: as `MaskedWords`'.
    half: the type of matrix products, None for fp32. teacher: that judges new texts, None for none; max_seq_length: of
    what it reads.
    """

    rows: TextRows
    task: Task
    settings: Settings
    masked_lm: Path
    do_lower_case: bool
    with_original: bool
    vectors: Path | None
    half: torch.dtype | None
    teacher: Path | None
    max_seq_length: int

    def build(self, device: torch.device, threads: int) -> Callable[[Block], Augmented]:
        """What augments a block on this device."""
        model, tokenizer, _ = load_masked_lm(self.masked_lm, self.do_lower_case)
        masked = MaskedWords(model.to(device), tokenizer, self.with_original, self.half, threads)
        vectors = None if self.vectors is None else word_vectors(self.vectors)
        judge = None
        if self.teacher is not None:
            loaded = load_complete(self.teacher, self.task, self.do_lower_case, use="the teacher")
            judge = TeacherJudge(loaded, self.task, self.max_seq_length, device, self.half, threads)
        augmenter = Augmenter(self.settings, tokenizer, masked, vectors)

        def augment(block: Block) -> Augmented:
            with _few_kernels(device, self.half):
                made = augmenter.augment(block.rows, block.first)
                count = sum(map(len, made))
                if judge is not None:
                    made = judge.kept(made)
            rows = zip(block.rows, made, strict=True)
            lines = [self.rows.format_row(row, texts) for row, own in rows for texts in own]
            return Augmented("".join(lines).encode(*ENCODING), len(lines), count - len(lines))

        return augment


@contextmanager
def _few_kernels(device: torch.device, half: torch.dtype | None) -> Iterator[None]:
    """In fp32 on an x86 CPU leaves oneDNN aside, in all of the process's threads.

    There torch takes nothing but gelu from it. Batches come in ever new shapes, for each of which it makes a kernel and
    keeps the last thousand, between which ever more memory lies idle. In half precision see `packed_inference.py`.
    """
    if device.type != "cpu" or half is not None or platform.machine() not in ("x86_64", "AMD64"):
        yield
        return
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property of the module's class
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class TeacherJudge:
    """Drops new texts that a teacher puts into another class than the original.

    Batches are of one length and depend on the texts alone, as those of `MaskedWords`.
    """

    def __init__(
        self,
        teacher: LoadedModel,
        task: Task,
        max_seq_length: int,
        device: torch.device,
        half: torch.dtype | None = None,
        threads: int = 1,
    ) -> None:
        self._model, self._tokenizer = teacher.model.to(device).eval(), teacher.tokenizer
        self._task, self._length = task, min(max_seq_length, teacher.model.config.max_position_embeddings)
        self._device, self._half, self._threads = device, half, threads
        if device.type == "cpu" and half == torch.bfloat16 and packed_inference.can_pack():
            packed_inference.pack_linear_layers(self._model, few_sizes=True)

    def kept(self, made: Sequence[Sequence[tuple[str, ...]]]) -> list[list[tuple[str, ...]]]:
        """Of each row's texts, the first of which is the original's, those of the same class as it."""
        texts = [_readable(own) for row in made for own in row]
        sides = list(zip(*texts, strict=True))
        second = sides[1] if len(sides) > 1 else None
        examples = unlabelled(sides[0], self._task, second)
        classes = iter(self._classes(make_features(examples, self._tokenizer, self._length)))
        result = []
        for row in made:
            of_row = [next(classes) for _ in row]
            result.append([texts for texts, label in zip(row, of_row, strict=True) if label == of_row[0]])
        return result

    def _classes(self, features: Features) -> list[int]:
        order = sorted(range(len(features)), key=lambda n: (features.lengths[n], n))
        most = _TOKENS_AT_ONCE[self._device.type]
        batches: list[list[int]] = []
        for number in order:
            length = features.lengths[number]
            if not batches or features.lengths[batches[-1][0]] != length or len(batches[-1]) * length >= most:
                batches.append([])
            batches[-1].append(number)
        found = np.empty(len(features), dtype=np.int64)

        def ask(batch: list[int]) -> None:
            found[batch] = self._asked(features, batch)

        if self._threads == 1 or self._device.type != "cpu":
            for batch in batches:
                ask(batch)
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(ask, batches))
        return found.tolist()

    @torch.inference_mode()
    def _asked(self, features: Features, batch: list[int]) -> np.ndarray:
        starts = features.offsets[batch][:, None]
        places = np.arange(features.lengths[batch[0]])[None, :]
        ids = torch.from_numpy(features.tokens[starts + places].astype(np.int64)).to(self._device)
        segments = torch.from_numpy((places >= features.first_lengths[batch][:, None]).astype(np.int64))
        with torch.autocast(self._device.type, self._half, enabled=self._half is not None):
            output = self._model(ids, segments.to(self._device), hidden_layers=(), attention_layers=())
        assert output.logits is not None
        return output.logits.float().argmax(dim=1).cpu().numpy()


def _readable(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Texts as training reads them: bytes that are not UTF-8 are U+FFFD."""
    return tuple(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in texts)
