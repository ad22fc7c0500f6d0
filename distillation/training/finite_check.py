"""End a run whose loss or gradients are not finite, in all processes, with one line that names the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from distillation.runtime.device import Process
from distillation.runtime.precision import Precision
from transformer.errors import UserError

logger = logging.getLogger(__name__)


class FiniteCheck:
    """Raises a UserError, in every process, after a step without finite gradients.

    Where the precision does not synchronize with the device, such a step is noted there, and raised later.
    """

    def __init__(self, process: Process, precision: Precision) -> None:
        self._process, self._precision = process, precision
        self._noted: tuple[Tensor, tuple[str, ...]] | None = None  # [step or 0, its loss terms], and their names

    def note(self, step: int, skipped: Tensor, loss_terms: Mapping[str, Tensor]) -> None:
        """Note the first step that was skipped, without synchronizing with the device.

        Args:
            step: counted from 1.
            skipped: scalar, 1 where the optimizer skipped the step.
            loss_terms: of this process.
        """
        noted = torch.stack([skipped * step, *loss_terms.values()])
        if self._noted is None:
            self._noted = noted, tuple(loss_terms)
        else:
            known, names = self._noted
            self._noted = torch.where(known[0] > 0, known, noted), names

    def raise_if_noted(self) -> None:
        """Raise a UserError if a skipped step was noted since the last call."""
        if self._noted is None:
            return
        (step, *values), names = self._noted[0].cpu().tolist(), self._noted[1]
        self._noted = None
        if step > 0:
            terms = dict(zip(names, values, strict=True))
            _raise(int(step), sum_over_processes(self._process, terms))

    def raise_unless_overflow(self, step: int, loss_terms: Mapping[str, Tensor]) -> None:
        """After a skipped step, raise a UserError unless too large a loss scale may be the cause."""
        terms = sum_over_processes(self._process, loss_terms)
        finite = math.isfinite(sum(terms.values()))
        if not (self._precision.dynamic or (finite and self._precision.scale != 1.0)):
            _raise(step, terms)
        logger.info(
            "step %d: skipped because a gradient overflowed; %d skipped so far, the loss scale is %g",
            step,
            self._precision.skipped,
            self._precision.scale,
        )


def sum_over_processes(process: Process, loss_terms: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return each loss term summed over all processes."""
    gathered = process.gather({name: float(term) for name, term in loss_terms.items()})
    return {name: sum(terms[name] for terms in gathered) for name in loss_terms}


def _raise(step: int, loss_terms: Mapping[str, float]) -> NoReturn:
    finite = math.isfinite(sum(loss_terms.values()))
    values = ", ".join(f"{name} {value:g}" for name, value in loss_terms.items())
    raise UserError(
        f"step {step}: {'a gradient' if finite else 'the loss'} is not finite ({values}); "
        "what was saved before stays. A lower --learning_rate may help"
    )
