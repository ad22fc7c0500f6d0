"""Work shared out among processes: results in order, and an end also where there is nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from distillation.runtime.worker_pool import in_order
from transformer.errors import UserError


@dataclass(frozen=True)
class Squares:
    """Squares numbers; one of them it does not like."""

    disliked: int = -1

    def build(self, device: torch.device, threads: int) -> Callable[[Any], Any]:
        def square(number: int) -> int:
            if number == self.disliked:
                raise UserError(f"{number}: not this one")
            return number * number

        return square


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 20])
@pytest.mark.parametrize("ids", [(0,), (0, 1)], ids=["one process", "two processes"])
def test_results_come_in_order_and_end(ids: tuple[int, ...], count: int) -> None:
    assert list(in_order(Squares(), "cpu", ids, range(count))) == [number * number for number in range(count)]


def test_a_mistake_in_a_process_is_told() -> None:
    with pytest.raises(UserError, match="7: not this one"):
        list(in_order(Squares(7), "cpu", (0, 1), range(20)))


class TinyNumbers:
    """Counts what is left of numbers too small for full speed."""

    def build(self, device: torch.device, threads: int) -> Callable[[Any], Any]:
        return lambda count: int((torch.full((count,), 1e-39) * 0.9).count_nonzero())


def test_a_process_takes_tiny_numbers_for_0() -> None:
    assert list(in_order(TinyNumbers(), "cpu", (0, 1), [100, 100, 100])) == [0, 0, 0]
