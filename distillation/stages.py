"""What each kind of training asks of a batch: its loss, its schedule, the parameters it trains.

The loop (`trainer.py`) is one for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from data_processing.batching import Batch, Totals
from distillation import losses
from transformer.heads import TinyBertForSequenceClassification, TinyBertOutput

Losses = dict[str, Tensor]


class TrainingStage(Protocol):
    """One kind of training.

    schedule: a name of BertAdam's schedules.
    unused: prefixes of the parameters that its loss does not reach; they are frozen.
    by_metric: whether the dev metric chooses the checkpoint that stays; otherwise it is the last.
    """

    @property
    def schedule(self) -> str: ...

    @property
    def unused(self) -> tuple[str, ...]: ...

    @property
    def by_metric(self) -> bool: ...

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, totals: Totals) -> Losses:
        """The terms of the loss by the names that logs give them; their sum is what is minimised."""
        ...


@dataclass(frozen=True)
class IntermediateStage:
    """Attention scores, hidden states and embeddings (paper, equation 11 with m <= M); constant rate.

    teacher: frozen.
    layer_map: the teacher's layer for each of the student's layers, from 1.
    padding_counts: whether the means run over padding too, as the original's do.
    """

    teacher: TinyBertForSequenceClassification
    layer_map: Sequence[int]
    padding_counts: bool
    schedule: str = "none"
    unused: tuple[str, ...] = ("classifier.", "bert.pooler.")
    by_metric: bool = False

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, totals: Totals) -> Losses:
        inputs = batch.input_ids, batch.token_type_ids, batch.attention_mask
        layers = (0, *self.layer_map)
        with torch.no_grad():
            taught = self.teacher(*inputs, hidden_layers=layers, attention_layers=self.layer_map, with_logits=False)
        learned = model(*inputs, is_student=True, with_logits=False)
        tokens = losses.all_tokens(batch.attention_mask) if self.padding_counts else batch.attention_mask
        return {
            "att_loss": losses.attention_loss(
                learned.attention_scores, taught.attention_scores, batch.attention_mask, tokens, totals
            ),
            "rep_loss": losses.hidden_loss(learned.hidden_states, taught.hidden_states, tokens, totals),
        }


@dataclass(frozen=True)
class PredictionStage:
    """The teacher's soft logits (paper, equation 11 with m = M + 1); warm-up, then linear decay."""

    teacher: TinyBertForSequenceClassification
    temperature: float
    schedule: str = "warmup_linear"
    unused: tuple[str, ...] = ("fit_dense.", "fit_denses.")
    by_metric: bool = True

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, totals: Totals) -> Losses:
        with torch.no_grad():
            target = _logits(self.teacher, batch)
        return {"cls_loss": losses.prediction_loss(_logits(model, batch), target, self.temperature, totals)}


@dataclass(frozen=True)
class FineTuning:
    """The labels themselves, no teacher: how a teacher is made; warm-up, then linear decay."""

    schedule: str = "warmup_linear"
    unused: tuple[str, ...] = ("fit_dense.", "fit_denses.")
    by_metric: bool = True

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, totals: Totals) -> Losses:
        return {"cls_loss": losses.label_loss(_logits(model, batch), batch.labels, totals)}


def _logits(model: Callable[..., TinyBertOutput], batch: Batch) -> Tensor:
    inputs = batch.input_ids, batch.token_type_ids, batch.attention_mask
    logits = model(*inputs, hidden_layers=(), attention_layers=()).logits
    assert logits is not None  # they were asked for
    return logits


def freeze_unused(model: nn.Module, unused: tuple[str, ...]) -> None:
    """Freezes what a stage's loss does not reach, so that no process waits for its gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(unused))
