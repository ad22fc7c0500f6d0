"""A teacher's hidden states and attention scores of all examples, cached on disk and read in every epoch.

They take some hundred kilobytes per example, more than memory has room for. They lie in the cache as two flat files,
`hidden` and `scores`: each example's values side by side, without padding, the longest example first. A training
step copies those of its examples out of memory maps. `checksums` has one of each example's values in each file; a run
that finds the entry of an earlier one compares them once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_processing.batching import Batch
from data_processing.cache import CHECKSUMS, Cache, checksum, digest, write_values
from distillation.runtime.device import Process
from distillation.runtime.logs import Progress, clock
from distillation.teacher.query import TeacherQuery
from transformer.errors import UserError
from transformer.heads import TinyBertOutput

logger = logging.getLogger(__name__)

_KIND = "teacher_states"
_LENGTH = -1  # in a shape: the example's length
_CHECKED_TOGETHER = 64  # examples, by one thread
_SAMPLE = 64  # examples whose values are compared when a run is resumed
# numpy has no bf16: the file holds its bits.
_STORED: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.uint16),
}
_TYPES = {stored: dtype for dtype, stored in _STORED.items()}


@dataclass(frozen=True)
class Part:
    """One of the two files.

    shape: of an example's values, with _LENGTH for its length: [layers, length, hidden] or
        [layers, heads, query, key].
    """

    name: str
    shape: tuple[int, ...]

    def of(self, length: int) -> tuple[int, ...]:
        """Return the shape for an example of this length."""
        return tuple(length if size == _LENGTH else size for size in self.shape)

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        """Return the number of values of examples of these lengths."""
        return np.prod([lengths if size == _LENGTH else np.full_like(lengths, size) for size in self.shape], axis=0)


@dataclass(frozen=True)
class Layout:
    """Where each example's values lie in the files.

    hidden_layers, attention_layers: those cached, ascending. parts: of the layers, those that are not empty.
    lengths: [examples].
    """

    hidden_layers: tuple[int, ...]
    attention_layers: tuple[int, ...]
    parts: tuple[Part, ...]
    lengths: np.ndarray

    @classmethod
    def of(cls, query: TeacherQuery, layers: tuple[tuple[int, ...], tuple[int, ...]]) -> Layout:
        """Return the layout of these hidden and attention layers of a teacher."""
        hidden, attention = (tuple(sorted(set(wanted))) for wanted in layers)
        config = query.model.config
        parts = (
            Part("hidden", (len(hidden), _LENGTH, config.hidden_size)),
            Part("scores", (len(attention), config.num_attention_heads, _LENGTH, _LENGTH)),
        )
        lengths = query.features.lengths.astype(np.int64)
        return cls(hidden, attention, tuple(part for part in parts if part.shape[0]), lengths)

    @cached_property
    def order(self) -> np.ndarray:
        """The examples [examples] in the order of the files and of the computation."""
        # The longest first: if memory suffices for them, it suffices for all.
        return np.argsort(-self.lengths, kind="stable")

    def bounds(self, part: Part) -> np.ndarray:
        """Return [examples + 1]: where the values of each example of `order` begin, and where the last ones end."""
        return np.concatenate([[0], np.cumsum(part.sizes(self.lengths[self.order]))])

    def starts(self, part: Part) -> np.ndarray:
        """Return [examples + 1]: the position of each example's first value, and the number of all values."""
        bounds = self.bounds(part)
        starts = np.empty_like(bounds)
        starts[self.order], starts[-1] = bounds[:-1], bounds[-1]
        return starts


@dataclass(frozen=True)
class _Values:
    """A part's values: flat, mapped into memory, with the start of each example's; and the mapped file."""

    part: Part
    values: np.ndarray
    starts: np.ndarray
    path: str
    size: int

    def check_is_whole(self) -> None:
        """Raise a UserError if the file was cut since it was mapped: reading the lost part would kill the process."""
        with contextlib.suppress(FileNotFoundError):  # removed to make room: what is mapped stays
            if os.stat(self.path).st_size < self.size:
                raise UserError(f"{self.path}: was cut while the run read it; the same command makes it again")

    def padded(self, examples: np.ndarray, lengths: np.ndarray, width: int) -> Tensor:
        """Return [batch, *shape] with 0 at padding."""
        padded = np.zeros((len(examples), *self.part.of(width)), dtype=self.values.dtype)
        starts = self.starts[examples]
        ends = starts + self.part.sizes(lengths)
        for row, start, end, length in zip(padded, starts.tolist(), ends.tolist(), lengths.tolist(), strict=True):
            shape = self.part.of(length)
            row[tuple(map(slice, shape))] = self.values[start:end].reshape(shape)
        return torch.from_numpy(padded).view(_TYPES[padded.dtype])


class CachedStates:
    """The cached states and scores of all examples; several threads may read them.

    Args:
        arrays: the files' flat values, by the parts' names.
    """

    def __init__(self, layout: Layout, arrays: dict[str, np.ndarray]) -> None:
        self._layout = layout
        self._values = {}
        for part in layout.parts:
            file = arrays[part.name]
            assert isinstance(file, np.memmap)
            # A plain view of the map: slicing numpy's memmap class takes longer.
            values, size = file.view(np.ndarray), file.offset + file.nbytes
            self._values[part.name] = _Values(part, values, layout.starts(part), str(file.filename), size)

    def add_to(self, batch: Batch) -> Batch:
        """Return a batch, in CPU memory, together with the cached values of its examples."""
        padded = self._padded(batch.examples.numpy(), batch.input_ids.shape[1])
        return batch._replace(teacher_states=padded.get("hidden"), teacher_scores=padded.get("scores"))

    def output(self, batch: Batch, hidden_layers: Sequence[int], attention_layers: Sequence[int]) -> TinyBertOutput:
        """Return what the teacher would output for these layers of a batch that `add_to` returned."""
        return TinyBertOutput(
            None,
            _chosen(batch.teacher_scores, self._layout.attention_layers, attention_layers),
            _chosen(batch.teacher_states, self._layout.hidden_layers, hidden_layers),
        )

    def sample_digest(self) -> str:
        """Return a digest of some examples' values, spread over the training set; all may be many gigabytes."""
        lengths = self._layout.lengths
        examples = np.unique(np.linspace(0, len(lengths) - 1, _SAMPLE).astype(np.int64))
        padded = self._padded(examples, int(lengths[examples].max()))
        return digest(**{name: part.view(torch.uint8).numpy() for name, part in padded.items()})

    def _padded(self, examples: np.ndarray, width: int) -> dict[str, Tensor]:
        lengths = self._layout.lengths[examples]
        for values in self._values.values():
            values.check_is_whole()
        return {name: values.padded(examples, lengths, width) for name, values in self._values.items()}


def _chosen(values: Tensor | None, cached: tuple[int, ...], wanted: Sequence[int]) -> tuple[Tensor, ...]:
    if not wanted:
        return ()
    assert values is not None  # `add_to` was called, and all wanted layers are cached
    return tuple(values[:, cached.index(layer)] for layer in wanted)


def load_or_compute_states(query: TeacherQuery, layers: tuple[tuple[int, ...], tuple[int, ...]]) -> CachedStates | None:
    """Return the cached states of every example; on each machine that lacks them, compute them first.

    Args:
        layers: the hidden layers and the attention layers that a stage reads.

    Returns:
        The states, in every process; or None in all of them where they cannot be cached, and a warning says why.
    """
    process, examples, layout = query.predictor.process, len(query.features), Layout.of(query, layers)
    key = query.key(states=[layout.hidden_layers, layout.attention_layers])
    peers = _ranks_of_this_machine(process)
    arrays = _find(query.cache, key, layout)
    if arrays is not None and not _is_intact(arrays, layout, process.rank - peers.start, len(peers)):
        query.cache.report_damage(_KIND, key)
        arrays = None
    found = process.gather(arrays is not None)
    if all(found):
        logger.info("the teacher's states of %d examples were cached by an earlier run", examples)
    else:
        try:
            _compute(query, layout, key, peers, needed=not all(found[rank] for rank in peers))
            with process.raise_on_all_ranks(), _as_user_errors(query.cache):
                arrays = _find(query.cache, key, layout)
                if arrays is None:
                    raise OSError("the new cache entry is gone")
        except UserError as error:
            logger.warning("--cache_teacher_states: %s; the teacher runs in every step instead", error)
            return None
    assert arrays is not None
    return CachedStates(layout, arrays)


def _compute(query: TeacherQuery, layout: Layout, key: str, peers: range, needed: bool) -> None:
    """Make the cache entry; where this machine has it already (not `needed`), only wait for the others.

    Raises:
        UserError: in all processes, where one of them fails; no entry stays.
    """
    cache, process, examples = query.cache, query.predictor.process, len(query.features)
    with contextlib.ExitStack() as stack:
        entry = None
        with process.raise_on_all_ranks(), _as_user_errors(cache):
            if cache.folder is None:
                raise UserError("there is no cache, since --cache_limit is 0 or there is no --cache_dir")
            files, size = _files(query, layout)
            if size > cache.limit:
                raise UserError(
                    f"the states of {examples} examples are {size / 1e9:.3g} GB, "
                    f"--cache_limit allows {cache.limit / 1e9:.3g}"
                )
            if needed and process.is_local_rank_zero:
                entry = cache.make(_KIND, key, files)
                stack.callback(entry.discard)  # does nothing once the entry is complete
        logger.info(
            "computing the teacher's states of %d examples, once for all epochs; %.3g GB are cached in %s",
            examples,
            size / 1e9,
            cache.folder,
        )
        folder = process.gather(entry.folder if entry else None)[peers.start]
        begin = time.monotonic()
        with process.raise_on_all_ranks(), _as_user_errors(cache):
            if needed:
                _write(query, layout, folder, peers)
        with process.raise_on_all_ranks(), _as_user_errors(cache):
            if entry:
                entry.keep()
    logger.info("computed the teacher's states of %d examples in %s", examples, clock(time.monotonic() - begin))


def _files(query: TeacherQuery, layout: Layout) -> tuple[dict[str, tuple[int, np.dtype]], int]:
    """Return each file's number of values and type, which one short batch shows, and the bytes of all."""
    probe = _outputs(query, layout, layout.order[-1:])
    files = {part.name: (int(layout.bounds(part)[-1]), _STORED[probe[part.name].dtype]) for part in layout.parts}
    files[CHECKSUMS] = len(layout.order) * len(layout.parts), np.dtype(np.uint32)
    return files, sum(count * dtype.itemsize for count, dtype in files.values())


def _write(query: TeacherQuery, layout: Layout, folder: Path, peers: range) -> None:
    """Compute this process's share of the batches, and write the values into the reserved files.

    Args:
        peers: the ranks of this machine's processes, which take turns at the batches.

    Raises:
        OSError: a file cannot be written.
    """
    process, size = query.predictor.process, query.predictor.batch_size
    bounds = {part.name: layout.bounds(part) for part in layout.parts}
    own = range(0, len(layout.order), size)[process.rank - peers.start :: len(peers)]
    progress = Progress("teacher states", len(own), process.is_main, unit="batch")
    with contextlib.closing(progress):
        for first in own:
            examples = layout.order[first : first + size]
            outputs = _outputs(query, layout, examples)
            checksums = np.empty((len(examples), len(layout.parts)), dtype=np.uint32)
            for number, part in enumerate(layout.parts):
                values = _without_padding(part, _as_stored(outputs[part.name]), layout.lengths[examples])
                ends = bounds[part.name][first : first + len(examples) + 1]
                write_values(folder / f"{part.name}.npy", int(ends[0]), values)
                checksums[:, number] = [checksum(of_one) for of_one in np.split(values, ends[1:-1] - ends[0])]
            write_values(folder / f"{CHECKSUMS}.npy", first * len(layout.parts), checksums)
            progress.advance()


@torch.no_grad()
def _outputs(query: TeacherQuery, layout: Layout, examples: np.ndarray) -> dict[str, Tensor]:
    """Return `hidden` [batch, layers, length, hidden] and `scores` [batch, layers, heads, query, key] of a batch."""
    batch = query.collator.collate(query.features, examples).to(query.predictor.process.device)
    layers = {"hidden_layers": layout.hidden_layers, "attention_layers": layout.attention_layers}
    with query.predictor.precision.autocast():
        output = query.model(*batch.inputs, **layers, with_logits=False)
    found = {"hidden": output.hidden_states, "scores": output.attention_scores}
    return {name: _stacked(tensors) for name, tensors in found.items() if tensors}


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    """Stack tensors [batch, ...] to [batch, layers, ...], in a type that holds the values of all of them exactly."""
    dtype = reduce(torch.promote_types, (layer.dtype for layer in layers))
    return torch.stack([layer.to(dtype) for layer in layers], dim=1)


def _as_stored(tensor: Tensor) -> np.ndarray:
    stored = tensor.contiguous().cpu()
    return (stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored).numpy()


def _without_padding(part: Part, padded: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the values of a batch's examples side by side; `lengths` never increases."""
    pieces = []
    ends = [*(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):  # examples of one length
        real = (slice(begin, end), *map(slice, part.of(int(lengths[begin]))))
        pieces.append(padded[real].reshape(-1))
    return np.concatenate(pieces)


def _find(cache: Cache, key: str, layout: Layout) -> dict[str, np.ndarray] | None:
    """Return the files' arrays where all of them exist in their full size."""
    shapes = {part.name: (layout.bounds(part)[-1],) for part in layout.parts}
    shapes[CHECKSUMS] = (len(layout.order) * len(layout.parts),)
    arrays = cache.open(_KIND, key, shapes)
    if arrays is None:
        return None
    if any(arrays[name].shape != shape for name, shape in shapes.items()):
        cache.report_damage(_KIND, key)
        return None
    return arrays


def _is_intact(arrays: dict[str, np.ndarray], layout: Layout, share: int, shares: int) -> bool:
    """Return whether the values of a share of the examples are those that were saved."""
    checksums = arrays[CHECKSUMS].reshape(-1, len(layout.parts))
    files = [(arrays[part.name].view(np.ndarray), layout.bounds(part)) for part in layout.parts]

    def check(places: np.ndarray) -> bool:
        return all(
            checksum(values[bounds[place] : bounds[place + 1]]) == checksums[place, number]
            for place in places.tolist()
            for number, (values, bounds) in enumerate(files)
        )

    own = np.array_split(np.arange(len(layout.order)), shares)[share]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return all(pool.map(check, np.array_split(own, len(own) // _CHECKED_TOGETHER + 1)))


def _ranks_of_this_machine(process: Process) -> range:
    firsts = [rank for rank, is_first in enumerate(process.gather(process.is_local_rank_zero)) if is_first]
    return next(
        range(first, after)
        for first, after in zip(firsts, [*firsts[1:], process.world_size], strict=True)
        if first <= process.rank < after
    )


@contextlib.contextmanager
def _as_user_errors(cache: Cache) -> Iterator[None]:
    """Turn errors of the disk or the device into a UserError, which `raise_on_all_ranks` sends to all processes."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or cache.folder}: {error.strerror or error}") from None
    except (RuntimeError, MemoryError) as error:  # a device that is out of memory raises RuntimeError
        raise UserError(str(error).partition("\n")[0] or type(error).__name__) from None
