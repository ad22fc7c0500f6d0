"""How a process of a run ends early: by a signal, by another's failure, or with its parent process.

The signals are SIGINT (Ctrl-C), SIGTERM, and SIGHUP (a closed terminal) unless nohup has it ignored.

A run that trains finishes its step, or gives up its evaluation, and saves; any other run ends at once. Each prints one
line. A second signal ends the process at once. This module does not know what is saved.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import NoReturn

from distillation.runtime.console import prepare_streams

ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP; nohup has it ignored
    if hasattr(signal, name) and not (name == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
)
# torchrun sends its processes a signal that they already have from the terminal.
_SECONDS_OF_ONE_SIGNAL = 1.0


class RunFailed(Exception):
    """A process of the run died; the message says which one and how."""


class Stopped(BaseException):
    """A signal ended the run. It is no Exception, so that no handler of errors catches it.

    Args:
        number: of the signal.
        where: how far the run came, for the message.
    """

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(number, where)
        self.number, self.where = number, where

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}{self.where and ' '}{self.where}"

    @property
    def status(self) -> int:
        """The exit status that shells use."""
        return 128 + self.number


class Signals:
    """The signals sent to this process. `received` is the first one of `ENDING`, or 0."""

    def __init__(self) -> None:
        self.received = 0
        self._time = 0.0
        self._on_first: Callable[[], None] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Raise Stopped inside this context when a signal arrives."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in ENDING}
        _unblock()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def held(self, on_first: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Raise nothing inside this context: the first signal sets `received` and calls `on_first`."""
        before, self._on_first = self._on_first, on_first
        try:
            yield
        finally:
            self._on_first = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received:
            if now - self._time > _SECONDS_OF_ONE_SIGNAL:
                os._exit(128 + number)
            return
        self.received, self._time = number, now
        if self._on_first is None:
            raise Stopped(number)
        self._on_first()


@contextmanager
def blocked() -> Iterator[None]:
    """Block signals in this process, and in the processes that it starts meanwhile until they handle signals."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows has no signal masks
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing would start it now, which unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent() -> None:
    """Ignore signals that a terminal sends to the parent process too; let SIGTERM end this process at once."""
    for number in ENDING:  # SIGTERM never becomes SIG_IGN, which would discard one that was sent while it was blocked
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    _unblock()


def exit_with_parent() -> None:
    """Start a thread that ends this process when its parent process is gone.

    The signal that torch lets Linux send then (PR_SET_PDEATHSIG) does not come if the parent died while this process
    still imported, nor on other systems, and no handler runs while a process waits in C++. The workers of
    concurrent.futures would wait forever.
    """
    threading.Thread(target=_wait_and_exit, args=(multiprocessing.parent_process(),), daemon=True).start()


def _wait_and_exit(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def leave(status: int = 0) -> NoReturn:
    """End this process, which was in a process group, at once, with its output flushed.

    Python's normal exit runs while gloo's threads still do. A thread that then frees the tensors of its last exchange
    calls std::terminate, which is a SIGABRT after all work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_quietly(prog: str) -> None:
    """Let a signal end this process with one line while an entry imports its modules, which takes seconds.

    The standard streams are prepared too, before a module opens a file.
    """
    prepare_streams()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        with suppress(OSError):  # nobody reads the output any more
            os.write(2, f"{prog}: stopped by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    for number in ENDING:
        signal.signal(number, end)


def _unblock() -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
