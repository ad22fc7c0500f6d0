"""Which examples go together, and how they are padded.

A plan is a pure function of (seed, epoch): every process of a run computes the same one and takes
its own part of each step, so nothing needs to be communicated, not even a loss's denominators.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_processing.features import Features

_STEPS_SORTED_TOGETHER = 50

Item = TypeVar("Item")
Result = TypeVar("Result")


class LossDenominators(NamedTuple):
    """What the losses of one optimizer step are divided by, over all processes and micro-batches.

    examples: in the step. tokens: Σ of the examples' lengths. pairs: Σ of their squares, the
    (query, key) pairs of one attention head. Padding to the maximum counts padding too.
    """

    examples: int
    tokens: int
    pairs: int


class Step(NamedTuple):
    """One optimizer step: this process's micro-batches, as example numbers, and the whole step's totals."""

    micro_batches: list[np.ndarray]
    denominators: LossDenominators


class Batch(NamedTuple):
    """Examples padded to one length.

    input_ids, token_type_ids, attention_mask: [batch, length]. labels: [batch].
    examples: [batch] their numbers in the features.
    teacher_states: [batch, layers, length, hidden], teacher_scores: [batch, layers, heads, query, key]; what a
        teacher has said of them, where that was fetched: 0 at padding.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    examples: Tensor
    teacher_states: Tensor | None = None
    teacher_scores: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a model takes, in its order."""
        return self.input_ids, self.token_type_ids, self.attention_mask

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in memory from which a GPU copies while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return self._replace(**{name: change(tensor) for name, tensor in self._asdict().items() if tensor is not None})


@dataclass(frozen=True)
class Collator:
    """How batches are padded: to their longest example, or (`to_maximum`) all to max_seq_length.

    few_lengths: whether the longest is rounded up by `next_of_few`.
    """

    to_maximum: bool
    max_seq_length: int
    pad_token_id: int = 0
    bucketed_lengths: bool = False

    def denominators(self, lengths: np.ndarray) -> LossDenominators:
        """The totals of a step whose examples have these lengths."""
        lengths = np.full_like(lengths, self.max_seq_length) if self.to_maximum else lengths
        return LossDenominators(len(lengths), int(lengths.sum()), int((lengths**2).sum()))

    def collate(self, features: Features, examples: np.ndarray) -> Batch:
        """Pads the examples of these numbers into a batch."""
        lengths = features.offsets[examples + 1] - features.offsets[examples]
        width = self._width(int(lengths.max(initial=1)))
        columns = np.arange(width)
        real = columns < lengths[:, None]
        ids = np.full((len(examples), width), self.pad_token_id, dtype=np.int64)
        ids[real] = features.tokens[(features.offsets[examples][:, None] + columns)[real]]
        second = real & (columns >= features.first_lengths[examples][:, None])
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(second.astype(np.int64)),
            torch.from_numpy(real.astype(np.int64)),
            torch.from_numpy(features.labels[examples]),
            torch.from_numpy(examples),
        )

    def _width(self, longest: int) -> int:
        if self.to_maximum:
            return self.max_seq_length
        return min(next_of_few(longest), self.max_seq_length) if self.bucketed_lengths else longest


def next_of_few(length: int) -> int:
    """A length rounded up to a multiple of 1 (up to 16), 2 (up to 32), 4 (up to 64) and so on: an eighth more at most.

    In half precision oneDNN makes kernels for each length that it meets, and keeps them: that takes time and memory,
    and a training set may have hundreds of lengths.
    """
    step = 1 << max(0, (length - 1).bit_length() - 4)
    return -(-length // step) * step


@dataclass(frozen=True)
class TrainingPlan:
    """The order in which a training set is learned.

    Each epoch is a new shuffle of all examples, cut into steps of `batch_size`; the last step of an
    epoch takes what is left. With `group_by_length` the examples of a step are of like length, so
    that little is padded: of each 50 steps in the shuffle the examples are sorted, and then the order
    of all steps is shuffled. Each step is cut into `accumulation` micro-batches for each of
    `world_size` processes, as even as can be; some may be empty.
    """

    lengths: np.ndarray
    batch_size: int
    collator: Collator
    seed: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    group_by_length: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(len(self.lengths) / self.batch_size)

    def epoch(self, number: int) -> Iterator[Step]:
        """The steps of an epoch, counted from 0."""
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(len(self.lengths))
        for examples in self._grouped(order, random) if self.group_by_length else self._cut(order):
            parts = np.array_split(examples, self.accumulation * self.world_size)
            yield Step(parts[self.rank :: self.world_size], self.collator.denominators(self.lengths[examples]))

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _grouped(self, order: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        full = len(order) // self.batch_size * self.batch_size
        window = _STEPS_SORTED_TOGETHER * self.batch_size
        sorted_windows = [
            part[np.argsort(self.lengths[part], kind="stable")]
            for part in (order[start : min(start + window, full)] for start in range(0, full, window))
        ]
        steps = self._cut(np.concatenate(sorted_windows)) if sorted_windows else []
        random.shuffle(steps)
        return steps + self._cut(order[full:])


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """map(function, items), in order, worked out up to two items a worker ahead in `workers` threads.

    With no workers it is worked out when asked for.
    """
    if workers == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
