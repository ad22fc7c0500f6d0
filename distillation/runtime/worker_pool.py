"""A pool of processes, one for each device, that work on items independently of each other."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any

import torch

from distillation.runtime.console import show_messages
from distillation.runtime.device import open_device, prepare_process, share_cores
from distillation.runtime.signals import RunFailed, blocked, exit_with_parent, leave_signals_to_parent

_PENDING = 2  # items of each process that are read before the first of them is done

# Makes a process ready: given its device and how many threads it may use, it returns the function of an item.
Build = Callable[[torch.device, int], Callable[[Any], Any]]


def map_in_order(build: Build, kind: str, ids: tuple[int, ...], items: Iterable[Any]) -> Iterator[Any]:
    """Yield the results of the items, in the items' order; few items are read ahead.

    On a CPU every operation uses one thread, whatever the number of processes, so that results do not depend on that
    number; work that uses more threads distributes whole operations among them.

    Args:
        build: called in each process when its first item arrives; it is pickled, as are items and results.
        kind: torch's name of the devices.
        ids: of the devices, one for each process; one alone uses this process.

    Raises:
        UserError: raised by `build` or its function.
        RunFailed: a process died.
    """
    if len(ids) == 1:
        yield from _map_here(build, kind, ids[0], items)
        return
    context = multiprocessing.get_context("spawn")
    unused_ids = context.SimpleQueue()
    for index in ids:
        unused_ids.put(index)
    others = multiprocessing.active_children()
    arguments = (build, kind, unused_ids, share_cores(len(ids)))
    pool = ProcessPoolExecutor(len(ids), context, _start_worker, arguments)
    pending: deque[Future[Any]] = deque()
    try:
        for item in items:
            with blocked():  # while `submit` starts processes
                pending.append(pool.submit(_call, item))
            if len(pending) == _PENDING * len(ids):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise RunFailed("a process was killed or ran out of memory; --resume continues after what is done") from None
    finally:
        for child in set(multiprocessing.active_children()).difference(others):
            child.terminate()  # `shutdown` alone would wait until the pending items are done
        pool.shutdown(cancel_futures=True)


def _map_here(build: Build, kind: str, index: int, items: Iterable[Any]) -> Iterator[Any]:
    before, threads = torch.get_num_threads(), share_cores(1)
    try:
        torch.set_num_threads(1 if kind == "cpu" else threads)
        yield from map(build(open_device(kind, index), threads), items)
    finally:
        torch.set_num_threads(before)


_arguments: tuple[Any, ...]  # of `_start_worker`, in a worker


def _start_worker(*arguments: Any) -> None:
    """Prepare a process of the pool. A failure here would lose its message, so `_function` does the rest."""
    global _arguments
    exit_with_parent()
    leave_signals_to_parent()
    show_messages(enabled=False)
    prepare_process()
    _arguments = arguments


@cache
def _function() -> Callable[[Any], Any]:
    build, kind, unused_ids, threads = _arguments
    torch.set_num_threads(1 if kind == "cpu" else threads)
    return build(open_device(kind, unused_ids.get()), threads)


def _call(item: Any) -> Any:
    return _function()(item)
