"""Not a test: a process of `test_stopped_processes.py`, which does many runs of main.py one after the other.

    python stopped_processes.py RUNS.json STORE RANK WORLD_SIZE

RUNS.json is a list of objects: `flags`, main.py's; `rank` of the process that is sent a SIGTERM; in which `step` of
its, or in which `evaluation`. Starting Python and torch takes seconds, a run of a tiny model does not.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
from stopped_runs import signal_in_evaluation, signal_in_step
from torch import distributed

import main
from distillation.options import parse_options
from distillation.runs.train import train
from distillation.runtime.device import Process
from distillation.runtime.signals import Signals, Stopped, leave

if __name__ == "__main__":
    file, store, rank, world_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    process = Process(torch.device("cpu"), rank, world_size)
    told = []
    for run in json.loads(Path(file).read_text(encoding="utf-8")):
        signals = Signals()
        hit: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if run.get("rank") == rank:
            hit = signal_in_step(run["step"]) if "step" in run else signal_in_evaluation(run["evaluation"])
        with signals.handled(), hit:
            try:
                train(parse_options(run["flags"], main.ENTRY), process, signals)
                told.append("")
            except Stopped as stopped:
                told.append(str(stopped))
    Path(f"{file}.{rank}").write_text(json.dumps(told), encoding="utf-8")
    distributed.destroy_process_group()
    leave()
