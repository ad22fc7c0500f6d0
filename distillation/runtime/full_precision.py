"""Training steps in fp32, and the interface that the mixed precisions implement (`mixed_precision.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from transformer.errors import UserError
from transformer.optimization import BertAdam, gradient_norms


class Precision:
    """fp32, and the base class of the mixed precisions. One object serves one optimizer.

    name: identifies the arithmetic; outputs cached under one name are not read under another.
    dynamic: whether an overflow lowers the loss scale, so that a loss that is not finite is no error.
    skipped: the number of steps that were skipped because a gradient was not finite.
    bucket_views: whether gradients may be views of DDP's communication buckets.
    synchronizes: whether to step with `step`, which waits for the device to know whether the gradients are finite;
        otherwise `step_async`, which does not wait.
    takes_sparse_gradients: whether a gradient may hold only some rows of its parameter.
    bucketed_lengths: whether to round up the lengths of batches to a few values, because kernels are compiled for each.
    max_consecutive_skips: one skipped step more than this in a row is an error.
    """

    name = "fp32"
    dynamic = False
    bucket_views = True
    synchronizes = False
    takes_sparse_gradients = True
    bucketed_lengths = False
    max_consecutive_skips = 50

    def __init__(self) -> None:
        self.skipped = 0
        self._consecutive_skips = 0

    @property
    def scale(self) -> float:
        """The loss scale."""
        return 1.0

    def prepare(self, model: nn.Module, optimizer: BertAdam) -> nn.Module:
        """Prepare a model, on its device, for training; return the module to call in its place."""
        return model

    def prepare_for_inference(self, model: nn.Module) -> None:
        """Prepare a model that is not trained, in place; its parameters may be cast or packed."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context manager for forward passes."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradients of the scaled loss; `last` is true for a step's last micro-batch."""
        (loss * self.scale).backward()

    def step(self, optimizer: BertAdam) -> bool:
        """Update the weights unless a gradient is not finite; return whether they were updated."""
        norms = gradient_norms(optimizer.gradients())
        updated = all_finite(norms)
        if updated:
            optimizer.step(norms=norms, grad_scale=self.scale)
        return self._count_step(updated)

    def step_async(self, optimizer: BertAdam) -> Tensor:
        """Do as `step` without waiting for the device; return a scalar there, 1 where the step was skipped."""
        norms = gradient_norms(optimizer.gradients())
        skipped = (~torch.stack(norms).isfinite().all()).float()
        optimizer.step(norms=norms, grad_scale=self.scale, skip=skipped)
        return skipped

    def _count_step(self, updated: bool) -> bool:
        """Count skipped steps; return `updated`.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        self._consecutive_skips = 0 if updated else self._consecutive_skips + 1
        self.skipped += not updated
        if self._consecutive_skips > self.max_consecutive_skips:
            raise UserError(
                f"the gradients overflowed in {self._consecutive_skips} steps in a row, "
                f"the loss scale is {self.scale:g}; "
                "try a lower --loss_scale, --loss_scale dynamic, or another --opt_level"
            )
        return updated

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's state dict in fp32; a parameter in half precision gives its fp32 master copy."""
        return model.state_dict()

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Copy the result of `weights` into the model and into its fp32 master copies.

        Raises:
            ValueError: a tensor has another shape, or no floating-point numbers.
        """
        masters = self._master_weights()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if weights[name].shape != tensor.shape or not weights[name].is_floating_point():
                raise ValueError(f"{name} is not a weight of this model")
            tensor.copy_(weights[name])
            if tensor in masters:
                masters[tensor].copy_(weights[name])

    def _master_weights(self) -> Mapping[Tensor, Tensor]:
        """Return the fp32 copy of each parameter that has one."""
        return {}

    def export_state(self) -> dict[str, Any]:
        """Return the state that a checkpoint holds, as plain values."""
        return {"skipped": self.skipped, "skipped_in_a_row": self._consecutive_skips}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `export_state` returned; call it after `prepare`.

        Raises:
            ValueError: an entry has another type.
        """
        for name, own in self.export_state().items():
            if isinstance(own, (int, float)) and not isinstance(state[name], (int, float)):
                raise ValueError(f"{name} is no number")
        self.skipped, self._consecutive_skips = state["skipped"], state["skipped_in_a_row"]


def all_finite(norms: list[Tensor]) -> bool:
    """Return whether every norm is finite; waits for the device once."""
    return bool(torch.stack(norms).isfinite().all())
