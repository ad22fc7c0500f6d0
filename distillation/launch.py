"""Starts a run: makes the processes that the flags ask for, and turns a user's mistake into one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from distillation import jobs
from distillation.device import Process
from distillation.logs import show_messages
from distillation.options import Options
from transformer.errors import UserError

USER_ERROR_STATUS = 2


def launch(options: Options) -> None:
    """Runs on one device, in this process."""
    jobs.run(options, Process(torch.device("cpu")))


def run_entry(prog: str, entry: Callable[[Sequence[str]], None]) -> int:
    """Runs an entry on the command line's arguments; returns the exit status.

    A UserError is printed to standard error as one line and gives 2. Any other exception is a fault
    of this project and keeps its traceback.
    """
    show_messages()
    try:
        entry(sys.argv[1:])
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    return 0
