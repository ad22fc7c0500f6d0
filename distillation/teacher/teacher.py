"""The frozen teacher: run on every batch, or read from cached outputs.

A teacher's outputs for an example never change. Where the prediction stage meets examples more than once, their
logits are therefore computed beforehand, in batches that depend on neither seed nor number of processes, and stay
in the cache for later runs. The intermediate stage reads far more of each example; --cache_teacher_states caches
that on disk (`cached_states.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_processing.batching import Batch
from data_processing.cache import digest
from distillation.runtime.logs import clock
from distillation.runtime.timings import Timings
from distillation.teacher.cached_states import CachedStates
from distillation.teacher.query import TeacherQuery
from transformer.heads import TinyBertForSequenceClassification, TinyBertOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """A teacher in eval mode.

    model: frozen, on the process's device.
    cached_logits: of all training examples, [examples, outputs] on the device; None where the model computes them.
    cached_states: of all training examples; None where the model computes them.
    timings: collects the seconds of `logits` and `states`.
    """

    model: TinyBertForSequenceClassification
    cached_logits: Tensor | None = None
    cached_states: CachedStates | None = None
    timings: Timings = field(default_factory=Timings)

    @property
    def is_cached(self) -> bool:
        """Whether outputs of the training examples are cached."""
        return self.cached_logits is not None or self.cached_states is not None

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of a batch: [batch, outputs]."""
        if self.cached_logits is not None:
            return self.cached_logits[batch.examples]
        with self.timings.part("teacher"):
            logits = self.model(*batch.inputs, hidden_layers=(), attention_layers=()).logits
        assert logits is not None  # the call asks for logits
        return logits

    def add_cached_states(self, batch: Batch) -> Batch:
        """Return a batch, in CPU memory, together with the cached states of its examples where there are any."""
        return batch if self.cached_states is None else self.cached_states.add_to(batch)

    @torch.no_grad()
    def states(self, batch: Batch, hidden_layers: tuple[int, ...], attention_layers: tuple[int, ...]) -> TinyBertOutput:
        """Return hidden states and attention scores of these layers, without logits.

        Args:
            batch: returned by `add_cached_states`, on any device.
        """
        with self.timings.part("teacher"):
            if self.cached_states is not None:
                return self.cached_states.output(batch, hidden_layers, attention_layers)
            return self.model(
                *batch.inputs, hidden_layers=hidden_layers, attention_layers=attention_layers, with_logits=False
            )

    def digest_of_cache(self) -> str:
        """Return a digest of the cached outputs, "" where there are none: a resumed run should train on the same."""
        if self.cached_logits is not None:
            return digest(logits=self.cached_logits.cpu().numpy())
        return "" if self.cached_states is None else self.cached_states.sample_digest()


def load_or_compute_logits(
    query: TeacherQuery, before_computing: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, float | None]:
    """Return the teacher's logits, computed once per dataset and cached for later runs.

    Args:
        before_computing: called in every process where they are not in the cache.

    Returns:
        The logits [examples, outputs], and the seconds that computing them took, None where they were cached.
    """
    key, process = query.key(), query.predictor.process
    found = query.cache.get("teacher_logits", key, ["logits"])
    # Either all processes read the cache, or all take part in the computation.
    if all(process.gather(found is not None and len(found["logits"]) == len(query.features))):
        assert found is not None
        return np.array(found["logits"]), None
    before_computing()
    begin = time.monotonic()
    logits = query.unpadded.logits(query.model, query.features, "teacher logits")
    seconds = time.monotonic() - begin
    if process.is_local_rank_zero:
        query.cache.put("teacher_logits", key, {"logits": logits})
    return logits, seconds


def load_or_compute_training_logits(query: TeacherQuery) -> Tensor:
    """Return the logits of the training set, [examples, outputs] on the process's device; log where they came from."""
    examples = len(query.features)
    size = examples * query.model.num_labels * 4 / 1e6
    where = f"; {size:.1f} MB are cached in {query.cache.folder}" if query.cache.folder else ""

    def announce() -> None:
        logger.info("computing the teacher's logits of %d examples, once for all epochs%s", examples, where)

    logits, seconds = load_or_compute_logits(query, announce)
    if seconds is None:
        logger.info("the teacher's logits of %d examples were cached by an earlier run", examples)
    else:
        logger.info("computed the teacher's logits of %d examples in %s", examples, clock(seconds))
    return torch.from_numpy(logits).to(query.predictor.process.device)
