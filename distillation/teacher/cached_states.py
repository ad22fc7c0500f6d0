"""A teacher's hidden states and attention scores of all examples, on disk: asked for once, read in every epoch.

They are some hundred kilobytes an example, far more than memory has room for. So they lie in the cache as
two flat files, `hidden` and `scores`, each example's values side by side and without padding, the longest
example first; a training step copies those of its examples out of memory maps. What a state or score is
compared with, and which are wanted, is for `stages.py`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_processing.batching import Batch, Collator
from data_processing.cache import Cache, write_values
from data_processing.features import Features
from distillation.runtime.device import Process
from distillation.runtime.logs import Progress, clock
from distillation.runtime.precision import Precision
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification, TinyBertOutput

logger = logging.getLogger(__name__)

_KIND = "teacher_states"
_LENGTH = -1  # in a shape: the example's
# numpy has no bf16: its bits are kept.
_STORED: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.uint16),
}
_TYPES = {stored: dtype for dtype, stored in _STORED.items()}


@dataclass(frozen=True)
class Part:
    """One of the two files.

    shape: of an example's values, _LENGTH where its length stands: [layers, length, hidden], or
        [layers, heads, query, key].
    """

    name: str
    shape: tuple[int, ...]

    def of(self, length: int) -> tuple[int, ...]:
        """The shape of an example of this length."""
        return tuple(length if size == _LENGTH else size for size in self.shape)

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        """How many values examples of these lengths have."""
        return np.prod([lengths if size == _LENGTH else np.full_like(lengths, size) for size in self.shape], axis=0)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the files.

    lengths: [examples]. parts: those that are wanted.
    """

    lengths: np.ndarray
    parts: tuple[Part, ...]

    @cached_property
    def order(self) -> np.ndarray:
        """[examples] their numbers as they lie and are asked about."""
        # The longest first: memory that suffices for them always does.
        return np.argsort(-self.lengths, kind="stable")

    def starts(self, part: Part) -> np.ndarray:
        """[examples + 1]: the number of each example's first value, by the example's number; and of all values."""
        ends = np.cumsum(part.sizes(self.lengths[self.order]))
        starts = np.zeros(len(self.order) + 1, dtype=np.int64)
        starts[self.order[1:]] = ends[:-1]
        starts[-1] = ends[-1]
        return starts


@dataclass(frozen=True)
class TeacherQuery:
    """What a teacher is asked about a training set.

    model: on the process's device, in eval mode.
    padding: to the longest of a batch.
    hidden_layers, attention_layers: those wanted, ascending, as for `BertModel`.
    batch_size: how many examples it is asked about at a time.
    """

    model: TinyBertForSequenceClassification
    features: Features
    collator: Collator
    hidden_layers: tuple[int, ...]
    attention_layers: tuple[int, ...]
    batch_size: int
    process: Process
    precision: Precision

    def layout(self) -> Layout:
        """How the answers lie in their files."""
        config = self.model.config
        parts = (
            Part("hidden", (len(self.hidden_layers), _LENGTH, config.hidden_size)),
            Part("scores", (len(self.attention_layers), config.num_attention_heads, _LENGTH, _LENGTH)),
        )
        return Layout(self.features.lengths.astype(np.int64), tuple(part for part in parts if part.shape[0]))

    @torch.no_grad()
    def answers(self, examples: np.ndarray) -> dict[str, Tensor]:
        """What it says of a batch.

        Returns:
            `hidden` [batch, layers, length, hidden] and `scores` [batch, layers, heads, query, key].
        """
        batch = self.collator.collate(self.features, examples).to(self.process.device)
        layers = {"hidden_layers": self.hidden_layers, "attention_layers": self.attention_layers}
        with self.precision.autocast():
            said = self.model(*batch.inputs, **layers, with_logits=False)
        found = {"hidden": said.hidden_states, "scores": said.attention_scores}
        return {name: _stacked(tensors) for name, tensors in found.items() if tensors}

    def write_answers(self, layout: Layout, folder: Path, peers: range) -> None:
        """Asks, and writes what it says into the files that were reserved.

        Args:
            peers: the ranks of the processes that share this work; they take turns at the batches.

        Raises:
            OSError: a file cannot be written.
        """
        starts = {part.name: layout.starts(part) for part in layout.parts}
        batches = [layout.order[i : i + self.batch_size] for i in range(0, len(layout.order), self.batch_size)]
        own = batches[self.process.rank - peers.start :: len(peers)]
        progress = Progress("the teacher's states", len(own), self.process.is_main, unit="batch")
        with contextlib.closing(progress):
            for examples in own:
                answers = self.answers(examples)
                for part in layout.parts:
                    values = _without_padding(part, _as_stored(answers[part.name]), layout.lengths[examples])
                    write_values(folder / f"{part.name}.npy", int(starts[part.name][examples[0]]), values)
                progress.advance()


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    """[batch, layers, ...] of a tensor [batch, ...] a layer; layers of several types in one that holds all exactly."""
    dtype = reduce(torch.promote_types, (layer.dtype for layer in layers))
    return torch.stack([layer.to(dtype) for layer in layers], dim=1)


def _as_stored(tensor: Tensor) -> np.ndarray:
    """The same values, or their bits, in the type of a file."""
    stored = tensor.contiguous().cpu()
    return (stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored).numpy()


def _without_padding(part: Part, padded: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The values of a batch's examples, whose lengths do not grow, side by side."""
    pieces = []
    ends = [*(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):  # examples of one length
        real = (slice(begin, end), *map(slice, part.of(int(lengths[begin]))))
        pieces.append(padded[real].reshape(-1))
    return np.concatenate(pieces)


@dataclass(frozen=True)
class _Values:
    """A part's values: flat, mapped into memory, and where each example's begin."""

    part: Part
    values: np.ndarray
    starts: np.ndarray

    def padded(self, examples: np.ndarray, lengths: np.ndarray, width: int) -> Tensor:
        """[batch, *shape], 0 at padding; of an example that is not padded all is one copy."""
        padded = np.zeros((len(examples), *self.part.of(width)), dtype=self.values.dtype)
        starts = self.starts[examples]
        ends = starts + self.part.sizes(lengths)
        for row, start, end, length in zip(padded, starts.tolist(), ends.tolist(), lengths.tolist(), strict=True):
            shape = self.part.of(length)
            row[tuple(map(slice, shape))] = self.values[start:end].reshape(shape)
        return torch.from_numpy(padded).view(_TYPES[padded.dtype])


class CachedStates:
    """What is kept of all examples, for the steps that read it; several threads may.

    Args:
        layout: of the files.
        arrays: their flat values, by the parts' names.
        hidden_layers, attention_layers: the layers they hold, ascending.
    """

    def __init__(
        self,
        layout: Layout,
        arrays: dict[str, np.ndarray],
        hidden_layers: tuple[int, ...],
        attention_layers: tuple[int, ...],
    ) -> None:
        self._lengths = layout.lengths
        # A plain view of the map: a memory map's own kind of array takes longer to slice.
        self._values = {
            part.name: _Values(part, arrays[part.name].view(np.ndarray), layout.starts(part)) for part in layout.parts
        }
        self._hidden_layers, self._attention_layers = hidden_layers, attention_layers

    def fetch(self, batch: Batch) -> Batch:
        """The batch, which is in memory, with what is kept of its examples."""
        examples, width = batch.examples.numpy(), batch.input_ids.shape[1]
        lengths = self._lengths[examples]
        padded = {name: values.padded(examples, lengths, width) for name, values in self._values.items()}
        return batch._replace(teacher_states=padded.get("hidden"), teacher_scores=padded.get("scores"))

    def output(self, batch: Batch, hidden_layers: Sequence[int], attention_layers: Sequence[int]) -> TinyBertOutput:
        """What the teacher would say of a fetched batch, in these of the layers."""
        return TinyBertOutput(
            None,
            _chosen(batch.teacher_scores, self._attention_layers, attention_layers),
            _chosen(batch.teacher_states, self._hidden_layers, hidden_layers),
        )


def _chosen(fetched: Tensor | None, held: tuple[int, ...], wanted: Sequence[int]) -> tuple[Tensor, ...]:
    if not wanted:
        return ()
    assert fetched is not None  # `fetch` was called, and what is wanted is kept
    return tuple(fetched[:, held.index(layer)] for layer in wanted)


def load_or_compute_states(question: TeacherQuery, key: str, cache: Cache) -> CachedStates | None:
    """What is kept under a key; where that is nothing the teacher is asked first, on each machine that lacks it.

    Returns:
        What is kept, in every process, or None in all of them: a line then says why.
    """
    process, examples, layout = question.process, len(question.features), question.layout()
    known = _find(cache, key, layout)
    found = process.gather(known is not None)
    if all(found):
        logger.info("the teacher's states of %d examples are kept from an earlier run", examples)
    else:
        peers = _peers(process)
        try:
            _ask(question, layout, key, cache, peers, asks=not all(found[rank] for rank in peers))
            with process.raise_on_all_ranks(), _told(cache):
                known = _find(cache, key, layout)
                if known is None:
                    raise OSError("what was kept there is gone")
        except UserError as error:
            logger.warning("--cache_teacher_states: %s; the teacher is asked in every step instead", error)
            return None
    assert known is not None
    return CachedStates(layout, known, question.hidden_layers, question.attention_layers)


def _ask(question: TeacherQuery, layout: Layout, key: str, cache: Cache, peers: range, asks: bool) -> None:
    """Makes the entry, unless this machine has it (`asks`).

    Raises:
        UserError: in all processes, where one of them cannot do its part; nothing is left.
    """
    process, examples = question.process, len(question.features)
    with contextlib.ExitStack() as stack:
        making = None
        with process.raise_on_all_ranks(), _told(cache):
            if cache.folder is None:
                raise UserError("nothing is kept, for --cache_limit is 0 or there is no --cache_dir")
            probe = question.answers(layout.order[-1:])
            files = {
                part.name: (int(layout.starts(part)[-1]), _STORED[probe[part.name].dtype]) for part in layout.parts
            }
            size = sum(count * dtype.itemsize for count, dtype in files.values())
            if size > cache.limit:
                raise UserError(
                    f"the states of {examples} examples are {size / 1e9:.3g} GB, "
                    f"--cache_limit allows {cache.limit / 1e9:.3g}"
                )
            if asks and process.is_local_rank_zero:
                making = cache.make(_KIND, key, files)
                stack.callback(making.discard)  # which does nothing to what is kept
        logger.info(
            "the teacher is asked about %d examples, once for all epochs; %.3g GB of states and scores are kept in %s",
            examples,
            size / 1e9,
            cache.folder,
        )
        folder = process.gather(making.folder if making else None)[peers.start]
        begin = time.monotonic()
        with process.raise_on_all_ranks(), _told(cache):
            if asks:
                question.write_answers(layout, folder, peers)
        with process.raise_on_all_ranks(), _told(cache):
            if making:
                making.keep()
    logger.info("the teacher was asked about %d examples in %s", examples, clock(time.monotonic() - begin))


def _find(cache: Cache, key: str, layout: Layout) -> dict[str, np.ndarray] | None:
    """The files' arrays under a key, where all are there and whole."""
    known = cache.get(_KIND, key, [part.name for part in layout.parts])
    if known is None or any(known[part.name].shape != (layout.starts(part)[-1],) for part in layout.parts):
        return None
    return known


def _peers(process: Process) -> range:
    """The ranks of the processes on this one's machine."""
    firsts = [rank for rank, is_first in enumerate(process.gather(process.is_local_rank_zero)) if is_first]
    return next(
        range(first, after)
        for first, after in zip(firsts, [*firsts[1:], process.world_size], strict=True)
        if first <= process.rank < after
    )


@contextlib.contextmanager
def _told(cache: Cache) -> Iterator[None]:
    """Makes of what may go wrong with a disk or a device a UserError, which `Process.together` tells all processes."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or cache.folder}: {error.strerror or error}") from None
    except (RuntimeError, MemoryError) as error:  # a device's memory is a RuntimeError
        raise UserError(str(error).partition("\n")[0] or type(error).__name__) from None
