"""Group examples into optimizer steps and micro-batches, and pad them.

The order is a pure function of (seed, epoch): each process of a run computes the same one and takes its own part of
each step, so processes communicate neither the order nor the denominators of the losses.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_processing.features import Features

_STEPS_PER_SORT = 50  # how many steps of the shuffle are sorted by length together

Item = TypeVar("Item")
Result = TypeVar("Result")


class LossDenominators(NamedTuple):
    """The denominators of the losses of one optimizer step, over all its processes and micro-batches.

    examples: how many there are; n_i is the length of example i, or the maximum where padding counts.
    tokens: N = Σ n_i, of the hidden losses. pairs: P = Σ n_i², the (query, key) pairs of one head, of the attention
    losses.
    """

    examples: int
    tokens: int
    pairs: int


class Step(NamedTuple):
    """One optimizer step: this process's micro-batches, as example numbers, and the denominators of the whole step."""

    micro_batches: list[np.ndarray]
    denominators: LossDenominators


class Batch(NamedTuple):
    """Examples padded to one length.

    input_ids, token_type_ids, attention_mask: [batch, length].
    labels: [batch].
    examples: [batch] their numbers in the features.
    teacher_states: [batch, layers, length, hidden] cached hidden states, 0 at padding; None if not fetched.
    teacher_scores: [batch, layers, heads, query, key] cached attention scores, 0 at padding; None if not fetched.
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
        """The arguments of a model, in their order."""
        return self.input_ids, self.token_type_ids, self.attention_mask

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Copy the batch to pinned memory, from which a GPU copies while it computes."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return self._replace(**{name: change(tensor) for name, tensor in self._asdict().items() if tensor is not None})


@dataclass(frozen=True)
class Collator:
    """Pads examples into batches.

    to_maximum: pad to max_seq_length, as the original does; otherwise to the longest example of the batch.
    bucketed_lengths: round the longest example's length up by `bucketed_length`.
    """

    to_maximum: bool
    max_seq_length: int
    pad_token_id: int = 0
    bucketed_lengths: bool = False

    def denominators(self, lengths: np.ndarray) -> LossDenominators:
        """Return the denominators of a step whose examples have these lengths [examples]."""
        lengths = np.full_like(lengths, self.max_seq_length) if self.to_maximum else lengths
        return LossDenominators(len(lengths), int(lengths.sum()), int((lengths**2).sum()))

    def collate(self, features: Features, examples: np.ndarray) -> Batch:
        """Pad the examples of these numbers [batch] into a batch; there may be none."""
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
        return min(bucketed_length(longest), self.max_seq_length) if self.bucketed_lengths else longest


def bucketed_length(length: int) -> int:
    """Round a length up to a multiple of 1 (up to 16), 2 (up to 32), 4 (up to 64) and so on: by an eighth at most.

    In half precision oneDNN compiles and keeps kernels for each length, which costs time and memory, and a training
    set may have hundreds of lengths.
    """
    step = 1 << max(0, (length - 1).bit_length() - 4)
    return -(-length // step) * step


@dataclass(frozen=True)
class TrainingPlan:
    """The order of a training set's examples, by seed and epoch.

    Each epoch is a new shuffle of all examples, cut into steps of `batch_size`; the last step of an epoch has the
    remainder. Each step is cut evenly into `accumulation` micro-batches for each of `world_size` processes; some may
    be empty.

    lengths: [examples] in tokens.
    group_by_length: give each step examples of similar length, so that little is padded: the examples of each 50
        steps of the shuffle are sorted by length, then the steps of the epoch are shuffled.
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
        """The number of optimizer steps of an epoch."""
        return math.ceil(len(self.lengths) / self.batch_size)

    def epoch(self, number: int) -> Iterator[Step]:
        """Yield the steps of an epoch, counted from 0."""
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(len(self.lengths))
        for examples in self._grouped(order, random) if self.group_by_length else self._cut(order):
            parts = np.array_split(examples, self.accumulation * self.world_size)
            yield Step(parts[self.rank :: self.world_size], self.collator.denominators(self.lengths[examples]))

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _grouped(self, order: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        full = len(order) // self.batch_size * self.batch_size
        window = _STEPS_PER_SORT * self.batch_size
        sorted_windows = [
            part[np.argsort(self.lengths[part], kind="stable")]
            for part in (order[start : min(start + window, full)] for start in range(0, full, window))
        ]
        steps = self._cut(np.concatenate(sorted_windows)) if sorted_windows else []
        random.shuffle(steps)
        return steps + self._cut(order[full:])


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Yield map(function, items) in order, computed up to two items per worker ahead in `workers` threads.

    Without workers each result is computed when it is requested.
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
