"""What each kind of training asks of a batch: its loss, its schedule, the parameters it trains.

The loop (`trainer.py`) is one for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from data_processing.batching import Batch, LossDenominators
from distillation.teacher.teacher import Teacher
from distillation.training import losses
from transformer.heads import TinyBertOutput

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

    def fetch(self, batch: Batch) -> Batch:
        """The batch with all that its losses read from the disk; called ahead, by the threads that prepare batches."""
        ...

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, denominators: LossDenominators) -> Losses:
        """The terms of the loss by the names that logs give them; their sum is what is minimised."""
        ...


@dataclass(frozen=True)
class IntermediateStage:
    """Attention scores, hidden states and embeddings (paper, equation 11 with m <= M); constant rate.

    layer_map: the teacher's layer for each of the student's layers, from 1.
    padding_counts: whether the means run over padding too, as the original's do.
    parts: which of `attention`, `hidden` and `embedding` are learned.
    """

    teacher: Teacher
    layer_map: tuple[int, ...]
    padding_counts: bool
    parts: tuple[str, ...] = ("attention", "hidden", "embedding")
    schedule: str = "none"
    by_metric: bool = False

    @property
    def unused(self) -> tuple[str, ...]:
        own = range(1, len(self.layer_map) + 1)
        unused = ["classifier.", "bert.pooler."]
        if "hidden" not in self.parts:
            unused += [f"fit_denses.{layer}." for layer in own]
            if "attention" in self.parts:  # of the last layer only what its scores are made of
                last = f"bert.encoder.layer.{len(self.layer_map) - 1}."
                unused += [last + part for part in ("attention.self.value.", "attention.output.", "intermediate.")]
                unused += [last + "output."]
            else:
                unused += ["bert.encoder."]
        if "embedding" not in self.parts:
            unused += ["fit_denses.0."]
        if self.parts == ("attention",):
            unused += ["fit_dense."]
        return tuple(unused)

    @property
    def taught_layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The teacher's layers whose hidden states are read, the embedding output being 0, and those of its scores."""
        return self._hidden_layers()[1], self.layer_map if "attention" in self.parts else ()

    def fetch(self, batch: Batch) -> Batch:
        return self.teacher.fetch(batch)

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, denominators: LossDenominators) -> Losses:
        attention = "attention" in self.parts
        learned_layers = self._hidden_layers()[0]
        taught = self.teacher.states(batch, *self.taught_layers)
        learned = model(
            *batch.inputs,
            is_student=True,
            hidden_layers=learned_layers,
            attention_layers=range(1, len(self.layer_map) + 1) if attention else (),
            with_logits=False,
        )
        tokens = losses.all_tokens(batch.attention_mask) if self.padding_counts else batch.attention_mask
        terms = {}
        if attention:
            terms["att_loss"] = losses.attention_loss(
                learned.attention_scores, taught.attention_scores, batch.attention_mask, tokens, denominators
            )
        if learned_layers:
            terms["rep_loss"] = losses.hidden_loss(learned.hidden_states, taught.hidden_states, tokens, denominators)
        return terms

    def _hidden_layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The student's layers whose states are compared, the embedding output being 0, and the teacher's."""
        embedding = (0,) if "embedding" in self.parts else ()
        if "hidden" not in self.parts:
            return embedding, embedding
        return (*embedding, *range(1, len(self.layer_map) + 1)), (*embedding, *self.layer_map)


@dataclass(frozen=True)
class PredictionStage:
    """The teacher's soft logits (paper, equation 11 with m = M + 1); warm-up, then linear decay.

    regression_target: where the task is a regression, whose scores are learned, by squared error: the
    `labels`, as in the original, or the `teacher`'s; None where it is none.
    """

    teacher: Teacher
    temperature: float
    regression_target: str | None = None
    schedule: str = "warmup_linear"
    unused: tuple[str, ...] = ("fit_dense.", "fit_denses.")
    by_metric: bool = True

    def fetch(self, batch: Batch) -> Batch:
        return batch

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, denominators: LossDenominators) -> Losses:
        if self.regression_target == "labels":
            return {"cls_loss": losses.regression_loss(_logits(model, batch), batch.labels, denominators)}
        target = self.teacher.logits(batch)
        if self.regression_target == "teacher":
            return {"cls_loss": losses.regression_loss(_logits(model, batch), target, denominators)}
        return {"cls_loss": losses.prediction_loss(_logits(model, batch), target, self.temperature, denominators)}


@dataclass(frozen=True)
class FineTuning:
    """The labels themselves, no teacher: how a teacher is made; warm-up, then linear decay.

    regression: whether the labels are scores.
    """

    regression: bool = False
    schedule: str = "warmup_linear"
    unused: tuple[str, ...] = ("fit_dense.", "fit_denses.")
    by_metric: bool = True

    def fetch(self, batch: Batch) -> Batch:
        return batch

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, denominators: LossDenominators) -> Losses:
        loss = losses.regression_loss if self.regression else losses.label_loss
        return {"cls_loss": loss(_logits(model, batch), batch.labels, denominators)}


def _logits(model: Callable[..., TinyBertOutput], batch: Batch) -> Tensor:
    logits = model(*batch.inputs, hidden_layers=(), attention_layers=()).logits
    assert logits is not None  # they were asked for
    return logits


def freeze_unused(model: nn.Module, unused: tuple[str, ...]) -> None:
    """Freezes what a stage's loss does not reach, so that no process waits for its gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(unused))
