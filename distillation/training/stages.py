"""What each kind of training computes for a batch: its loss terms, its schedule, the parameters that it trains.

The loop (`trainer.py`) is the same for all of them.
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

LossTerms = dict[str, Tensor]


class TrainingStage(Protocol):
    """One kind of training.

    schedule: the name of a BertAdam schedule.
    unused: prefixes of the parameters that the loss does not reach; they are frozen.
    by_metric: whether the dev metric chooses the checkpoint that is kept; otherwise the last one is kept.
    """

    @property
    def schedule(self) -> str: ...

    @property
    def unused(self) -> tuple[str, ...]: ...

    @property
    def by_metric(self) -> bool: ...

    def prepare(self, batch: Batch) -> Batch:
        """Add what the losses read from the disk; called ahead of the step, in the threads that prepare batches."""
        ...

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, denominators: LossDenominators) -> LossTerms:
        """Return the loss terms by their names in the logs; training minimizes their sum."""
        ...


@dataclass(frozen=True)
class IntermediateStage:
    """Attention scores, hidden states and embeddings (paper, equation 11 with m <= M); constant learning rate.

    layer_map: for each student layer the teacher's layer, counted from 1.
    padding_counts: whether the means run over padding too, as the original's do.
    loss_names: the losses in use, of `attention`, `hidden` and `embedding`.
    """

    teacher: Teacher
    layer_map: tuple[int, ...]
    padding_counts: bool
    loss_names: tuple[str, ...] = ("attention", "hidden", "embedding")
    schedule: str = "none"
    by_metric: bool = False

    @property
    def unused(self) -> tuple[str, ...]:
        own = range(1, len(self.layer_map) + 1)
        unused = ["classifier.", "bert.pooler."]
        if "hidden" not in self.loss_names:
            unused += [f"fit_denses.{layer}." for layer in own]
            if "attention" in self.loss_names:  # the last layer's scores need its queries and keys only
                last = f"bert.encoder.layer.{len(self.layer_map) - 1}."
                unused += [last + part for part in ("attention.self.value.", "attention.output.", "intermediate.")]
                unused += [last + "output."]
            else:
                unused += ["bert.encoder."]
        if "embedding" not in self.loss_names:
            unused += ["fit_denses.0."]
        if self.loss_names == ("attention",):
            unused += ["fit_dense."]
        return tuple(unused)

    @property
    def teacher_layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The teacher's layers whose hidden states are read (0 is the embedding output), and whose scores are."""
        return self._hidden_layers()[1], self.layer_map if "attention" in self.loss_names else ()

    def prepare(self, batch: Batch) -> Batch:
        return self.teacher.add_cached_states(batch)

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, denominators: LossDenominators) -> LossTerms:
        attention = "attention" in self.loss_names
        student_layers = self._hidden_layers()[0]
        teacher = self.teacher.states(batch, *self.teacher_layers)
        student = model(
            *batch.inputs,
            is_student=True,
            hidden_layers=student_layers,
            attention_layers=range(1, len(self.layer_map) + 1) if attention else (),
            with_logits=False,
        )
        tokens = losses.all_tokens(batch.attention_mask) if self.padding_counts else batch.attention_mask
        terms = {}
        if attention:
            terms["att_loss"] = losses.attention_loss(
                student.attention_scores, teacher.attention_scores, batch.attention_mask, tokens, denominators
            )
        if student_layers:
            terms["rep_loss"] = losses.hidden_loss(student.hidden_states, teacher.hidden_states, tokens, denominators)
        return terms

    def _hidden_layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The student's layers whose hidden states are compared (0 is the embedding output), and the teacher's."""
        embedding = (0,) if "embedding" in self.loss_names else ()
        if "hidden" not in self.loss_names:
            return embedding, embedding
        return (*embedding, *range(1, len(self.layer_map) + 1)), (*embedding, *self.layer_map)


@dataclass(frozen=True)
class PredictionStage:
    """The teacher's soft logits (paper, equation 11 with m = M + 1); warm-up, then linear decay.

    regression_target: for a regression, what the squared error compares with: the `labels`, as in the original, or
        the `teacher`'s scores; None for a classification.
    """

    teacher: Teacher
    temperature: float
    regression_target: str | None = None
    schedule: str = "warmup_linear"
    unused: tuple[str, ...] = ("fit_dense.", "fit_denses.")
    by_metric: bool = True

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, denominators: LossDenominators) -> LossTerms:
        if self.regression_target == "labels":
            return {"cls_loss": losses.regression_loss(_logits(model, batch), batch.labels, denominators)}
        target = self.teacher.logits(batch)
        if self.regression_target == "teacher":
            return {"cls_loss": losses.regression_loss(_logits(model, batch), target, denominators)}
        return {"cls_loss": losses.prediction_loss(_logits(model, batch), target, self.temperature, denominators)}


@dataclass(frozen=True)
class FineTuning:
    """Training on the labels, without a teacher: how a teacher is made; warm-up, then linear decay.

    regression: whether the labels are scores.
    """

    regression: bool = False
    schedule: str = "warmup_linear"
    unused: tuple[str, ...] = ("fit_dense.", "fit_denses.")
    by_metric: bool = True

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def losses(self, model: Callable[..., TinyBertOutput], batch: Batch, denominators: LossDenominators) -> LossTerms:
        loss = losses.regression_loss if self.regression else losses.label_loss
        return {"cls_loss": loss(_logits(model, batch), batch.labels, denominators)}


def _logits(model: Callable[..., TinyBertOutput], batch: Batch) -> Tensor:
    logits = model(*batch.inputs, hidden_layers=(), attention_layers=()).logits
    assert logits is not None  # the call asks for logits
    return logits


def freeze_unused(model: nn.Module, unused: tuple[str, ...]) -> None:
    """Freeze the parameters that a stage's loss does not reach, so that DDP does not wait for their gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(unused))
