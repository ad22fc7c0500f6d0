"""Everything that a teacher's outputs depend on: their key in the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from data_processing.batching import Collator
from data_processing.cache import Cache, digest
from data_processing.features import Features
from distillation.evaluation import Predictor
from transformer import heads, layers, modeling, packed_inference
from transformer.heads import TinyBertForSequenceClassification

_FORMAT = 2  # raise it when the cached values change their meaning


@dataclass(frozen=True)
class TeacherQuery:
    """A teacher and the examples it is run on.

    model: on the process's device, in eval mode, prepared for inference.
    weights: the digest of its weights before a precision cast them.
    predictor: how the run evaluates; cached outputs are always computed on batches padded to their longest example.
    """

    model: TinyBertForSequenceClassification
    weights: str
    features: Features
    predictor: Predictor
    cache: Cache

    @cached_property
    def unpadded(self) -> Predictor:
        """The predictor, with batches padded to their longest example."""
        return replace(self.predictor, collator=replace(self.predictor.collator, to_maximum=False))

    def on(self, features: Features) -> TeacherQuery:
        """Return the query of the same teacher on other examples."""
        return replace(self, features=features)

    @property
    def collator(self) -> Collator:
        """How the batches that the teacher reads are padded."""
        return self.unpadded.collator

    def key(self, **wanted: Any) -> str:
        """Return a digest of all that the outputs depend on.

        Args:
            wanted: which outputs, where these are not the logits.
        """
        collator, predictor = self.collator, self.predictor
        return digest(
            format=_FORMAT,
            code=_code(),
            weights=self.weights,
            config=self.model.config.to_json(),
            tokens=self.features.tokens,
            offsets=self.features.offsets,
            segments=self.features.first_lengths,
            batch=[predictor.batch_size, collator.pad_token_id, collator.bucketed_lengths],
            precision=predictor.precision.name,
            device=predictor.process.device.type,
            torch=torch.__version__,
            **wanted,
        )


@cache
def _code() -> bytes:
    """Return the source of the modules that compute outputs: a change of it invalidates cached ones."""
    return b"".join(Path(str(module.__file__)).read_bytes() for module in (layers, modeling, heads, packed_inference))


def weights_digest(model: TinyBertForSequenceClassification) -> str:
    """Return a digest of a model's tensors and their names."""
    return digest(**{name: tensor.detach().cpu().float().numpy() for name, tensor in model.state_dict().items()})
