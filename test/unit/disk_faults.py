"""Not a test: processes that are killed before a call that changes the disk, and disks that are full."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

CALLS = ("open", "fsync", "replace", "unlink")


def killed_before(call: int, action: Callable[[], object]) -> bool:
    """Run an action in a process that is killed before the so-many-th of its `CALLS`; return whether it was."""

    def run() -> None:
        torch.set_num_threads(1)  # a forked process has none of OpenMP's other threads, and would wait for them
        left = call

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def counting(*given: object, **named: object) -> object:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return function(*given, **named)

            return counting

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        action()
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let this process write no file beyond so many bytes, as on a disk that fills up."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
