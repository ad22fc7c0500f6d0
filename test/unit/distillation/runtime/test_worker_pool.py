"""The pool yields results in order, with the first error, and sets up its processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distillation.runtime.signals import RunFailed
from distillation.runtime.worker_pool import map_in_order
from transformer.errors import UserError


def build(device: torch.device, threads: int) -> Callable[[Any], Any]:
    """Return a function that squares numbers, refuses 7, is killed by 8, and counts tiny ones for 0.5."""

    def square(number: float) -> float:
        if number == 7:
            raise UserError("7 is refused")
        if number == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 0.5:
            return int((torch.full((100,), 1e-39) * 0.9).count_nonzero())
        return number * number

    return square


@pytest.mark.parametrize("ids", [(0,), (0, 1)], ids=["one process", "two processes"])
def test_results_are_in_order(ids: tuple[int, ...]) -> None:
    """Whatever the number of items; in other processes too the processor takes tiny numbers for 0."""
    for items in ([], [3], [1, 2, 3, 4, 5, 6, 9, 10, 11]):
        assert list(map_in_order(build, "cpu", ids, items)) == [item * item for item in items]
    if len(ids) > 1:
        assert list(map_in_order(build, "cpu", ids, [0.5, 0.5])) == [0, 0]


@pytest.mark.parametrize(("item", "error"), [(7, UserError), (8, RunFailed)])
def test_an_error_or_death_of_a_process_ends_the_iteration(item: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="7 is refused" if item == 7 else "killed"):
        list(map_in_order(build, "cpu", (0, 1), [1, 2, item, *range(10, 30)]))
