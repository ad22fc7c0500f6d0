"""SIGINT (Ctrl-C) and SIGTERM: a run that trains finishes its step, or gives up its evaluation, and saves; any other
ends at once, with one line.

A second signal ends a run at once whatever it does. Nothing here knows what is saved.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM)
# torchrun passes on to its processes a signal that the terminal has already sent to all of them.
_SECONDS_OF_ONE_SIGNAL = 1.0


class Stopped(BaseException):
    """A signal has ended the run. No Exception, so that nothing takes it for a fault.

    Args:
        number: of the signal.
        where: how far the run came, where there is more to say than that it ended.
    """

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{where and ' '}{where}")
        self.number, self.where = number, where

    @property
    def status(self) -> int:
        """The exit status, as shells have it."""
        return 128 + self.number


class Signals:
    """What has been sent to this process.

    received: the first of `ENDING` that came; 0 where none did.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0
        self._holds: Callable[[], None] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """A part of a program that a signal ends by `Stopped`, raised wherever it is."""
        if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in ENDING}
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def held(self, on_first: Callable[[], None] = lambda: None) -> Iterator[None]:
        """A part of a run in which a signal is only noted, in `received`, and `on_first` is called for the first."""
        before, self._holds = self._holds, on_first
        try:
            yield
        finally:
            self._holds = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received:
            if now - self._at > _SECONDS_OF_ONE_SIGNAL:
                os._exit(128 + number)
            return
        self.received, self._at = number, now
        if self._holds is None:
            raise Stopped(number)
        self._holds()


@contextmanager
def deferred() -> Iterator[None]:
    """A part of a program in which signals wait, and with them the processes that it starts, until they handle them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows has no such masks
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_quietly(prog: str) -> None:
    """From now on a Ctrl-C ends this process with a line: for the seconds in which an entry imports what it needs."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        os.write(2, f"{prog}: stopped by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    for number in ENDING:
        signal.signal(number, end)
