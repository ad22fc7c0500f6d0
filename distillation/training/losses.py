"""The losses of TinyBERT (paper, section 3.1) as sums over a micro-batch.

Each function returns Σ over the examples it is given, divided by what the whole optimizer step
holds (`Totals`). So the parts that processes and micro-batches compute add up to the loss of the
step, and its gradient is the same however the step was cut. No weights, no state, no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from data_processing.batching import LossDenominators
from transformer.errors import UserError


def uniform_layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher's layer g(m) = k·m for each student layer m = 1..M, with k = teacher / student layers.

    Raises:
        UserError: the teacher's depth is no multiple of the student's.
    """
    block, rest = divmod(teacher_layers, student_layers)
    if rest:
        raise UserError(
            f"the teacher has {teacher_layers} layers and the student {student_layers}: the uniform layer map "
            "needs a teacher whose depth is a multiple of the student's; --layer_map gives another"
        )
    return tuple(block * layer for layer in range(1, student_layers + 1))


def choose_layer_map(choice: str | tuple[int, ...], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher's layer g(m) for each student layer m = 1..M.

    Args:
        choice: `uniform`; `top` or `bottom`, the teacher's last or first M layers (paper, section 4.5);
            or the layers themselves.

    Raises:
        UserError: the choice does not fit the two models.
    """
    if choice == "uniform":
        return uniform_layer_map(student_layers, teacher_layers)
    if isinstance(choice, tuple):
        given = ",".join(map(str, choice))
        if len(choice) != student_layers:
            raise UserError(f"--layer_map {given}: names {len(choice)} layers, the student has {student_layers}")
        if max(choice) > teacher_layers:
            raise UserError(f"--layer_map {given}: the teacher has {teacher_layers} layers, numbered from 1")
        return choice
    if student_layers > teacher_layers:
        raise UserError(f"--layer_map {choice}: the student has {student_layers} layers, the teacher {teacher_layers}")
    first = teacher_layers - student_layers if choice == "top" else 0
    return tuple(range(first + 1, first + student_layers + 1))


def squared_error(ours: Tensor, theirs: Tensor, counted: Tensor) -> Tensor:
    """Σ (ours - theirs)² where `counted` is 1, in fp32; where it is 0 nothing counts. Only ours has a gradient.

    Args:
        ours, theirs: of one shape, in any types.
        counted: zeros and ones, of a shape that broadcasts to theirs.
    """
    return _SquaredError.apply(ours, theirs, counted)


class _SquaredError(torch.autograd.Function):
    """Half the passes over memory that autograd would make of the same: the gradient is the kept error, scaled."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, counted: Tensor) -> Tensor:
        error = ours.float() - theirs.float()
        error *= counted
        ctx.save_for_backward(error)
        ctx.dtype = ours.dtype
        return error.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (error,) = ctx.saved_tensors
        return (error * (2 * gradient)).to(ctx.dtype), None, None


def attention_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    key_mask: Tensor,
    query_mask: Tensor,
    denominators: LossDenominators,
) -> Tensor:
    """Equation 7: squared error of the unnormalised attention scores, summed over layers.

    Args:
        student, teacher: a tensor [batch, heads, query, key] a layer, the scores before the softmax.
        key_mask: [batch, length], 0 at keys whose scores count as equal (padding), else 1.
        query_mask: [batch, length], 0 at queries that do not count, else 1.
        totals: of the whole optimizer step.
    """
    counted = (query_mask[:, None, :, None] * key_mask[:, None, None, :]).float()
    loss = counted.new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        loss = loss + squared_error(ours, theirs, counted) / (denominators.pairs * ours.shape[1])
    return loss


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_mask: Tensor, denominators: LossDenominators
) -> Tensor:
    """Equations 8 and 9: squared error of the hidden states, the embedding output's included.

    Args:
        student, teacher: a tensor [batch, length, teacher hidden] a layer; the student's projected.
        token_mask: [batch, length], 0 at tokens that do not count, else 1.
        totals: of the whole optimizer step.
    """
    counted = token_mask[:, :, None].float()
    loss = counted.new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        loss = loss + squared_error(ours, theirs, counted) / (denominators.tokens * theirs.shape[-1])
    return loss


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float, denominators: LossDenominators) -> Tensor:
    """Equation 10: cross-entropy with the teacher's softened prediction, a mean over examples and classes.

    Args:
        student, teacher: logits [batch, classes].
        temperature: both are divided by it before the softmax.
        totals: of the whole optimizer step.
    """
    target = functional.softmax(teacher.float() / temperature, dim=-1)
    predicted = functional.log_softmax(student.float() / temperature, dim=-1)
    return -(target * predicted).sum() / (denominators.examples * student.shape[-1])


def label_loss(logits: Tensor, labels: Tensor, denominators: LossDenominators) -> Tensor:
    """Cross-entropy of logits [batch, classes] with label ids [batch], a mean over examples."""
    return functional.cross_entropy(logits.float(), labels, reduction="sum") / denominators.examples


def regression_loss(scores: Tensor, targets: Tensor, denominators: LossDenominators) -> Tensor:
    """Squared error of scores [batch, 1] against targets, [batch] or [batch, 1]; a mean over examples."""
    return (scores.float().flatten() - targets.float().flatten()).square().sum() / denominators.examples


def all_tokens(mask: Tensor) -> Tensor:
    """A mask [batch, length] that lets padding count, as the original's means do."""
    return torch.ones_like(mask)
