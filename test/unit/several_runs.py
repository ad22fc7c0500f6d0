"""Not a test: a process of `test_processes.py`, which does many runs of main.py one after the other.

    python several_runs.py RUNS.json STORE RANK WORLD_SIZE

RUNS.json is a list of objects: `flags`, main.py's; `gradients`, a file for the unclipped gradients of
the first step, by the parameters' order. Starting Python and torch takes seconds, a run of a tiny
model does not: so the processes are started once for all runs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import distributed
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

import main
from distillation.options import parse_options
from distillation.runs.train import train
from distillation.runtime.device import Process
from distillation.runtime.signals import leave


def run_all(runs: list[dict[str, Any]], process: Process) -> None:
    """Does the runs in order."""
    for run in runs:
        first: list[torch.Tensor] = []

        def keep(optimizer: Optimizer, *_: object, first: list[torch.Tensor] = first) -> None:
            if not first:
                first.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])

        hook = register_optimizer_step_pre_hook(keep)
        train(parse_options(run["flags"], main.ENTRY), process)
        hook.remove()
        if process.is_main:
            torch.save(first, run["gradients"])


if __name__ == "__main__":
    file, store, rank, world_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    with open(file, encoding="utf-8") as opened:
        told = json.load(opened)
    if world_size > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    run_all(told, Process(torch.device("cpu"), rank, world_size))
    if world_size > 1:
        distributed.destroy_process_group()
        leave()
