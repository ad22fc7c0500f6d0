"""The frozen teacher as the stages ask it: in every step, or once for each example.

What it says of an example never changes, so where the prediction stage meets examples more than once
their logits are asked for beforehand, in batches of like length that depend on neither seed nor number
of processes, and are kept in the cache for the next run. The intermediate stage reads far more of each
example: what it reads is kept where the user asks for that (`teacher_states.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_processing.batching import Batch, Collator
from data_processing.cache import digest
from data_processing.features import Features
from distillation.evaluation import predict
from distillation.options import Options
from distillation.runtime.device import Process
from distillation.runtime.logs import clock
from distillation.runtime.precision import Precision
from distillation.teacher.cached_states import CachedStates, TeacherQuery, load_or_compute_states
from transformer import heads, modeling, packed_inference
from transformer.heads import TinyBertForSequenceClassification, TinyBertOutput

logger = logging.getLogger(__name__)

_CACHED_FORM = 1  # raised when what is kept changes its meaning


@dataclass(frozen=True)
class Teacher:
    """A teacher in eval mode.

    model: frozen, on the process's device.
    remembered: its logits for all examples, [examples, outputs] on the device; None where it is to be asked.
    kept: the states and scores of all examples that a stage reads; None where it is to be asked.
    """

    model: TinyBertForSequenceClassification
    remembered: Tensor | None = None
    kept: CachedStates | None = None

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """What it says of a batch: [batch, outputs]."""
        if self.remembered is not None:
            return self.remembered[batch.examples]
        logits = self.model(*batch.inputs, hidden_layers=(), attention_layers=()).logits
        assert logits is not None  # they were asked for
        return logits

    def fetch(self, batch: Batch) -> Batch:
        """A batch in memory with what is kept of its examples, where that is so, for `states` to give out."""
        return batch if self.kept is None else self.kept.fetch(batch)

    @torch.no_grad()
    def states(self, batch: Batch, hidden_layers: tuple[int, ...], attention_layers: tuple[int, ...]) -> TinyBertOutput:
        """Its hidden states and attention scores of these layers, no logits.

        Args:
            batch: what `fetch` gave, on any device.
        """
        if self.kept is not None:
            return self.kept.output(batch, hidden_layers, attention_layers)
        return self.model(
            *batch.inputs, hidden_layers=hidden_layers, attention_layers=attention_layers, with_logits=False
        )


def load_or_compute_logits(
    model: TinyBertForSequenceClassification,
    weights: str,
    features: Features,
    collator: Collator,
    options: Options,
    process: Process,
    precision: Precision,
) -> Tensor:
    """The teacher's logits for every example of the training set, [examples, outputs] on the process's device.

    Those of an earlier run are found in the cache. The arguments are those of `recall`.
    """
    size = len(features) * model.num_labels * 4 / 1e6
    where = f"; {size:.1f} MB are kept in {options.cache.folder}" if options.cache.folder else ""

    def told() -> None:
        logger.info("the teacher is asked about %d examples, once for all epochs%s", len(features), where)

    logits, seconds = recall(model, weights, features, collator, options, process, precision, told)
    if seconds is None:
        logger.info("the teacher's answers to %d examples are remembered from an earlier run", len(features))
    else:
        logger.info("the teacher was asked about %d examples in %s", len(features), clock(seconds))
    return torch.from_numpy(logits).to(process.device)


def recall(
    model: TinyBertForSequenceClassification,
    weights: str,
    features: Features,
    collator: Collator,
    options: Options,
    process: Process,
    precision: Precision,
    before_asking: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, float | None]:
    """The teacher's logits for every example, from the cache or asked for now, and kept then.

    Args:
        model: the teacher, ready to be asked.
        weights: the digest of its weights as they were before a precision cast them.
        features: a tokenized file.
        padding: the run's; here batches are padded to their longest whatever it is.
        options: the cache, and how many examples it is asked about at a time.
        before_asking: called in every process where the teacher is to be asked.

    Returns:
        The logits, [examples, outputs], and the seconds that the asking took, None where it was not needed.
    """
    key = _key(model, weights, features, collator, options, process, precision)
    known = options.cache.get("teacher_logits", key, ["logits"])
    # All processes have them, or all ask: a part of the question is each one's.
    if all(process.gather(known is not None and len(known["logits"]) == len(features))):
        assert known is not None
        return np.array(known["logits"]), None
    before_asking()
    begin = time.monotonic()
    title, collator = "the teacher's answers", replace(collator, to_maximum=False)
    logits = predict(model, features, collator, options.eval_batch_size, process, precision, title)
    seconds = time.monotonic() - begin
    if process.is_local_rank_zero:
        options.cache.put("teacher_logits", key, {"logits": logits})
    return logits, seconds


def keep_states(
    model: TinyBertForSequenceClassification,
    weights: str,
    features: Features,
    collator: Collator,
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    options: Options,
    process: Process,
    precision: Precision,
) -> CachedStates | None:
    """The teacher's hidden states and attention scores of every example, mapped into memory.

    Those of an earlier run are found in the cache. None, in every process, where they cannot be kept; a line
    says why.

    Args:
        model, weights, features, padding, options: as for `recall`.
        layers: those whose hidden states, and those whose attention scores are wanted.
    """
    hidden, attention = (tuple(sorted(set(wanted))) for wanted in layers)
    key = _key(model, weights, features, collator, options, process, precision, states=[hidden, attention])
    collator = replace(collator, to_maximum=False)
    question = TeacherQuery(model, features, collator, hidden, attention, options.eval_batch_size, process, precision)
    return load_or_compute_states(question, key, options.cache)


def _key(
    model: TinyBertForSequenceClassification,
    weights: str,
    features: Features,
    collator: Collator,
    options: Options,
    process: Process,
    precision: Precision,
    **wanted: Any,
) -> str:
    """A digest of all that a teacher's answers depend on."""
    return digest(
        version=_CACHED_FORM,
        code=_code(),
        weights=weights,
        config=model.config.to_json(),
        tokens=features.tokens,
        offsets=features.offsets,
        segments=features.first_lengths,
        batch=[options.eval_batch_size, collator.pad_token_id, *(["few lengths"] if collator.bucketed_lengths else [])],
        precision=precision.name,
        device=process.device.type,
        torch=torch.__version__,
        **wanted,
    )


@cache
def _code() -> bytes:
    """What computes a teacher's answers: after a change of it none of the old ones count."""
    return b"".join(Path(str(module.__file__)).read_bytes() for module in (modeling, heads, packed_inference))


def weights_digest(model: TinyBertForSequenceClassification) -> str:
    """A digest of a model's tensors under their names."""
    return digest(**{name: tensor.detach().cpu().float().numpy() for name, tensor in model.state_dict().items()})
