"""Seconds by part of a run: what a benchmark reads, and what costs a run next to nothing.

The parts of a start are "models", "tokenizing", "evaluation" and "teacher cache"; those of training are "data" (waiting
for batches), "teacher", "student" (its forward pass and the loss), "backward", "optimizer", "evaluation" and "saving".
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Timings:
    """Measure the seconds that this process spends in named parts.

    Parts may be nested: the time of an inner part does not count for the outer one. They belong to one thread.

    Args:
        synchronize: called at the start and the end of each part, so that work queued on an accelerator counts where it
            was queued; this makes the steps slower. With None no device is waited for.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the context for this part."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def iterate(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count the time until each is there for this part."""
        iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def steps_done(self, step: int) -> None:
        """Do nothing; a benchmark overrides this. Called before the first step and after each with the steps so far."""

    def _count(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
