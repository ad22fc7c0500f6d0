"""Command: main.py's training with timings, for the other benchmarks.

    python -m benchmarks.timed_run ...flags of main.py

It trains in this process and writes timed_run.json beside the logs, with these keys:

    steps: before the first step and after each, the seconds of each part so far, and `time`, since 1970.
    started, imported: when the process was started and had its imports, since 1970.
    memory, device memory: the most bytes that the process held, and that its tensors on an accelerator did.

An accelerator is synchronized around each part, which makes its steps slower: the FPS of such a run are not main.py's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.common import STARTED, TIMES, peak_memory
from distillation.launch import run_entry
from distillation.options import parse_options
from distillation.runs.train import train
from distillation.runtime.device import Process, choose_device, open_device, synchronize
from distillation.runtime.timings import Timings
from main import ENTRY

IMPORTED = time.time()

# The parts of a step; student: its forward pass and the loss; data: waiting for batches.
STEP_PARTS = ("teacher", "student", "backward", "optimizer", "data", "rest")
PAUSES = ("evaluation", "saving")  # no part of a step


class StepTimings(Timings):
    """Timings, and their state after each step."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(partial(synchronize, device))
        self.steps: list[dict[str, float]] = []

    def steps_done(self, step: int) -> None:
        """Note the seconds so far."""
        self.steps.append({"time": time.time(), **self.seconds})


def step_shares(times: Mapping[str, Any], since: int) -> dict[str, float]:
    """Return the percentages of the parts in the time of the steps after the first `since`."""
    first, last = times["steps"][since], times["steps"][-1]
    passed = {name: last[name] - first.get(name, 0.0) for name in last}
    seconds = {name: passed.get(name, 0.0) for name in STEP_PARTS[:-1]}
    total = passed["time"] - sum(passed.get(name, 0.0) for name in PAUSES)
    seconds["rest"] = total - sum(seconds.values())
    return {name: 100 * value / total for name, value in seconds.items()}


def start_parts(times: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds from the start of the process to the end of its first step, by part, and the `whole`."""
    before, after = times["steps"][:2]
    parts = {"imports": times["imported"] - times["started"]}
    parts |= {name: before.get(name, 0.0) for name in ("models", "tokenizing", "evaluation")}
    parts["first step"] = after["time"] - before["time"]
    whole = after["time"] - times["started"]
    return parts | {"rest": whole - sum(parts.values()), "whole": whole}


def main(arguments: Sequence[str]) -> None:
    """Train, and write timed_run.json."""
    options = parse_options(arguments, ENTRY)
    kind = choose_device(options.device)
    process = Process(open_device(kind, options.device_list[0]))
    timings = StepTimings(process.device)
    train(options, process, timings=timings)
    times = {
        "started": float(os.environ.get(STARTED, IMPORTED)),
        "imported": IMPORTED,
        "steps": timings.steps,
        "memory": peak_memory(),
        "device memory": 0 if kind == "cpu" else getattr(torch, kind).max_memory_allocated(),
    }
    (options.fps_acc_dir / TIMES).write_text(json.dumps(times), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_entry("main.py", main))
