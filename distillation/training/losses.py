"""The losses of TinyBERT (paper, section 3.1) as sums over a micro-batch.

Each function sums over the examples of its micro-batch and divides by the denominators of the whole optimizer step
(`LossDenominators`). The terms of all processes and micro-batches therefore add up to the loss of the step, and its
gradient does not depend on how the step was split. Pure functions: no weights, no state, no models.
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
    """Return the teacher's layer g(m) = k·m for each student layer m = 1..M, with k = teacher / student layers.

    Raises:
        UserError: the teacher's depth is no multiple of the student's.
    """
    block, rest = divmod(teacher_layers, student_layers)
    if rest:
        spread = [-(-layer * teacher_layers // student_layers) for layer in range(1, student_layers + 1)]
        raise UserError(
            f"the teacher has {teacher_layers} layers and the student {student_layers}: the uniform layer map "
            "needs a teacher whose depth is a multiple of the student's; give another, such as "
            f"--layer_map {','.join(map(str, spread))}"
        )
    return tuple(block * layer for layer in range(1, student_layers + 1))


def choose_layer_map(choice: str | tuple[int, ...], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Return the teacher's layer g(m) for each student layer m = 1..M.

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


def squared_error(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Return Σ (student - teacher)² over the elements where `counted` is 1, in fp32.

    Args:
        student, teacher: of one shape, of any types; only the student gets a gradient.
        counted: zeros and ones, of a shape that broadcasts to theirs.
    """
    return _SquaredError.apply(student, teacher, counted)


class _SquaredError(torch.autograd.Function):
    """Half as many passes over memory as autograd needs: the gradient is the saved error times a scalar."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        error = student.float() - teacher.float()
        error *= counted
        ctx.save_for_backward(error)
        ctx.dtype = student.dtype
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
    """Return equation 7: the squared error of the unnormalised attention scores, summed over layers.

    Args:
        student, teacher: for each layer the scores before the softmax, [batch, heads, query, key].
        key_mask: [batch, length], 0 at keys to leave out (padding), else 1.
        query_mask: [batch, length], 0 at queries to leave out, else 1.
        denominators: of the whole optimizer step.
    """
    counted = (query_mask[:, None, :, None] * key_mask[:, None, None, :]).float()
    loss = counted.new_zeros(())
    for student_layer, teacher_layer in zip(student, teacher, strict=True):
        heads = student_layer.shape[1]
        loss = loss + squared_error(student_layer, teacher_layer, counted) / (denominators.pairs * heads)
    return loss


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_mask: Tensor, denominators: LossDenominators
) -> Tensor:
    """Return equations 8 and 9: the squared error of the hidden states, the embedding output included.

    Args:
        student, teacher: for each layer [batch, length, teacher hidden]; the student's are projected.
        token_mask: [batch, length], 0 at tokens to leave out, else 1.
        denominators: of the whole optimizer step.
    """
    counted = token_mask[:, :, None].float()
    loss = counted.new_zeros(())
    for student_layer, teacher_layer in zip(student, teacher, strict=True):
        width = teacher_layer.shape[-1]
        loss = loss + squared_error(student_layer, teacher_layer, counted) / (denominators.tokens * width)
    return loss


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float, denominators: LossDenominators) -> Tensor:
    """Return equation 10: cross-entropy with the teacher's softened prediction, a mean over examples and classes.

    Args:
        student, teacher: logits [batch, classes].
        temperature: divides both before the softmax.
        denominators: of the whole optimizer step.
    """
    target = functional.softmax(teacher.float() / temperature, dim=-1)
    predicted = functional.log_softmax(student.float() / temperature, dim=-1)
    return -(target * predicted).sum() / (denominators.examples * student.shape[-1])


def label_loss(logits: Tensor, labels: Tensor, denominators: LossDenominators) -> Tensor:
    """Return the cross-entropy of logits [batch, classes] with label ids [batch], a mean over examples."""
    return functional.cross_entropy(logits.float(), labels, reduction="sum") / denominators.examples


def regression_loss(scores: Tensor, targets: Tensor, denominators: LossDenominators) -> Tensor:
    """Return the squared error of scores [batch, 1] against targets, [batch] or [batch, 1]; a mean over examples."""
    return (scores.float().flatten() - targets.float().flatten()).square().sum() / denominators.examples


def all_tokens(mask: Tensor) -> Tensor:
    """Return a mask [batch, length] that counts padding too, as the original's means do."""
    return torch.ones_like(mask)
