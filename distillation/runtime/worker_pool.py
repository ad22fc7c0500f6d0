"""Work that falls into items, shared out among processes and devices, its results in order.

The processes do not speak with each other, unlike those of a training run (`launch.py`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch

from distillation.launch import RunFailed
from distillation.runtime.device import open_device, prepare_process, share_cores
from transformer.errors import UserError

_AHEAD = 2  # items that a process is given before it has answered the first
_SECONDS_TO_END = 5.0


class Plan(Protocol):
    """How a process makes ready for its items; it is sent to the processes."""

    def build(self, device: torch.device, threads: int) -> Callable[[Any], Any]:
        """What works on an item. threads: how many this process may use."""


def in_order(plan: Plan, kind: str, ids: tuple[int, ...], items: Iterable[Any]) -> Iterator[Any]:
    """The results of the items, in their order; few items are read ahead.

    On a CPU every operation is one thread's, whatever the number of processes: a work that uses more threads shares
    out operations among them. So its results do not depend on that number.

    Args:
        kind: torch's name of the devices.
        ids: one for each process; one alone is this process.

    Raises:
        UserError: as the work raises it.
        RunFailed: a process died.
    """
    if len(ids) > 1:
        yield from _spawned(plan, kind, ids, items)
        return
    before, threads = torch.get_num_threads(), share_cores(1)
    try:
        torch.set_num_threads(1 if kind == "cpu" else threads)
        yield from map(plan.build(open_device(kind, ids[0]), threads), items)
    finally:
        torch.set_num_threads(before)


def _spawned(plan: Plan, kind: str, ids: tuple[int, ...], items: Iterable[Any]) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    children: list[BaseProcess] = []
    waiting: dict[Connection, list[int]] = {}
    threads = share_cores(len(ids))
    try:
        with _without_interrupts():
            for index in ids:
                ours, theirs = context.Pipe()
                child = context.Process(target=_serve, args=(plan, kind, index, threads, theirs), daemon=True)
                child.start()
                theirs.close()
                children.append(child)
                waiting[ours] = []
        yield from _exchanged(waiting, enumerate(items))
    finally:
        _end(children)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started within it never hears of a Ctrl-C, which reaches the parent too: that ends its children."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exchanged(waiting: dict[Connection, list[int]], items: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Hands items out to whoever has the fewest, and yields results as soon as it is their turn."""
    results: dict[int, Any] = {}
    turn, more = 0, True
    most = _AHEAD * len(waiting)
    while more or any(waiting.values()):
        # What is held back by a slow item counts as read ahead, too.
        while more and sum(map(len, waiting.values())) + len(results) < most:
            number, item = next(items, (-1, None))
            more = number >= 0
            if more:
                connection = min(waiting, key=lambda c: len(waiting[c]))
                _send(connection, item)
                waiting[connection].append(number)
        busy = [connection for connection, numbers in waiting.items() if numbers]
        if not busy:  # there was no item, or none is left: to wait for nothing has no end
            return
        ready = wait(busy)
        for connection in (c for c in busy if c in ready):
            results[waiting[connection][0]] = _received(connection)
            del waiting[connection][0]
        while turn in results:
            yield results.pop(turn)
            turn += 1


def _send(connection: Connection, item: Any) -> None:
    try:
        connection.send(item)
    except OSError:
        _received(connection)  # says why it ended
        raise RunFailed("a process ended") from None


def _received(connection: Connection) -> Any:
    try:
        kind, content = connection.recv()
    except (EOFError, OSError):
        raise RunFailed("a process was killed or ran out of memory; --resume goes on with what is done") from None
    if kind == "mistake":
        raise UserError(content)
    if kind == "fault":
        raise RunFailed(f"a process failed\n{content}")
    return content


def _serve(plan: Plan, kind: str, index: int, threads: int, connection: Connection) -> None:
    """What a spawned process does. It reports how it failed, and prints nothing itself."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.ERROR, force=True)
    prepare_process()
    try:
        torch.set_num_threads(1 if kind == "cpu" else threads)
        work = plan.build(open_device(kind, index), threads)
        while True:
            connection.send(("result", work(connection.recv())))
    except EOFError:
        pass
    except UserError as error:
        connection.send(("mistake", str(error)))
    except Exception:
        connection.send(("fault", traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _end(children: list[BaseProcess]) -> None:
    for child in children:
        child.terminate()
    for child in children:
        child.join(_SECONDS_TO_END)
        if child.is_alive():
            child.kill()
            child.join()
