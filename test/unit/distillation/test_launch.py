"""How spawned processes are waited for, and what their start does to signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cases import command, report_lack

from distillation import launch
from distillation.launch import Report, RunFailed, _spawn, _wait_for
from distillation.runtime.signals import Signals, Stopped
from transformer.errors import UserError

CONTEXT = multiprocessing.get_context("spawn")


def ends(status: int) -> None:
    os._exit(status)


class FoundLate:
    """A process whose end is seen only at the second look, as the kernel may tell it after its sentinel."""

    def __init__(self, process: BaseProcess) -> None:
        self.process, self.looks = process, 0
        self.name, self.sentinel = process.name, process.sentinel

    @property
    def exitcode(self) -> int | None:
        self.looks += 1
        return None if self.looks == 1 else self.process.exitcode


@pytest.mark.parametrize(("status", "reported"), [(2, True), (1, False), (0, False)])
def test_no_process_that_failed_is_taken_for_one_that_ended_well(status: int, reported: bool) -> None:
    receiver, sender = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=ends, args=(status,))
    child.start()
    child.join()
    if reported:
        sender.send(Report("mistake", "a file is missing", 2))
    sender.close()
    late: Any = FoundLate(child)
    if status == 0:
        _wait_for([late], [receiver])
    else:
        with pytest.raises(UserError if reported else RunFailed):
            _wait_for([late], [receiver])


def ends_well_though_it_is_told_to_stop(options: object, kind: str, rank: int, *_: object) -> None:
    """As a process does that had nothing left to do when its parent passed the signal on."""
    if rank == 0:
        os.kill(os.getppid(), signal.SIGTERM)
    signal.sigwait([signal.SIGTERM])  # a spawned process starts with signals held back
    os._exit(0)


def test_a_run_that_was_told_to_stop_never_ends_as_if_it_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what a script does next would begin."""
    monkeypatch.setattr(launch, "_run_as_child", ends_well_though_it_is_told_to_stop)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    options: Any = SimpleNamespace(device_list=(0, 1), addr="127.0.0.1", port=None)
    signals = Signals()
    with signals.handled(), pytest.raises(Stopped, match="stopped by SIGTERM when the run had ended") as caught:
        _spawn(options, "cpu", signals)
    assert caught.value.status == 128 + signal.SIGTERM


HELD_BACK = """
import re
from multiprocessing.process import BaseProcess
import main
from distillation import launch
from distillation.options import parse_options

start, masks = BaseProcess.start, []

def noted(self):
    start(self)
    with open(f"/proc/{self.pid}/status") as status:
        masks.append(int(re.search(r"SigBlk:.*?([0-9a-f]+)", status.read())[1], 16))

BaseProcess.start = noted
flags = ["--data_dir", "d", "--teacher_model", "t", "--student_model", "s", "--output_dir", "o", "--fps_acc_dir", "f"]
options = parse_options([*flags, "--task_name", "SST-2", "--device", "cpu", "--device_list", "0,1"], main.ENTRY)
try:
    launch.launch(options)
except Exception as error:
    print(type(error).__name__)
print(*masks)
"""


def test_each_process_starts_with_signals_held_back(tmp_path: Path) -> None:
    """A signal while it imports torch would otherwise end it without a word."""
    if sys.platform != "linux":
        report_lack("/proc, which shows the signals that a process holds back")
        return
    done = command("-c", HELD_BACK, cwd=tmp_path)
    assert done.out.splitlines()[0] == "UserError", done.err
    masks = [int(mask) for mask in done.out.splitlines()[1].split()]
    wanted = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1)
    assert len(masks) == 2
    assert all(mask & wanted == wanted for mask in masks)
