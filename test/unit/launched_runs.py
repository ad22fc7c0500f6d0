"""Not a test: runs of `launch` with two processes that end in the ways that `test_launch.py` names.

    python launched_runs.py WAY…

Prints one JSON object per way: the type of the exception that `launch` raised, and its text.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import main
from distillation import launch
from distillation.options import Options, Stage, parse_options
from distillation.runtime.device import Process
from distillation.runtime.signals import Signals
from transformer.errors import UserError


def run(options: Options, process: Process, signals: Signals) -> None:
    """End as WAY says; process 0 waits for an exchange with process 1, unless the run ends well."""
    way = os.environ["WAY"]
    process.gather(None)
    if way == "signal":
        with signals.held():
            if process.rank == 0:
                os.kill(os.getppid(), signal.SIGTERM)
            while not signals.received:  # the parent passes it on
                time.sleep(0.01)
        return
    if process.rank == 1:
        if way == "mistake":
            raise UserError("a file is missing")
        if way == "fault":
            raise ValueError("x" * 100_000)
        os._exit(3)
    process.gather(None)


launch.RUNS[Stage.INTERMEDIATE] = run  # spawned processes import this module too

if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    flags = ["--data_dir", "d", "--teacher_model", "t", "--student_model", "s", "--output_dir", "o"]
    flags += ["--fps_acc_dir", "f", "--task_name", "SST-2", "--device", "cpu", "--device_list", "0,1"]
    for name in sys.argv[1:]:
        os.environ["WAY"] = name
        try:
            launch.launch(parse_options(flags, main.ENTRY))
        except (Exception, launch.Stopped) as error:
            print(json.dumps([type(error).__name__, str(error)]))
