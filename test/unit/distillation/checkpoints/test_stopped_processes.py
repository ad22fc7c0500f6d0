"""Several processes stop together, whichever of them receives a signal, and are resumed together.

With gloo on the CPU; each number of processes is started once and does all runs (`stopped_processes.py`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import ROOT, Workplace
from stopped_runs import dropout_place, outcome

COMMON = {
    **{"padding": "longest", "train_batch_size": 5, "num_train_epochs": 4, "learning_rate": 1e-3, "eval_step": 3},
    **{"save_steps": 2, "group_by_length": True, "eval_batch_size": 1},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "intermediate, amp": {"amp": True, "amp_dtype": "bf16"},
    "prediction, accumulation": {"pred_distill": True, "gradient_accumulation_steps": 2},
}


def folders(place: Workplace, name: str) -> dict[str, Path]:
    return {"output_dir": place.folder / name, "fps_acc_dir": place.folder / f"{name} logs"}


def runs_of(place: Workplace, name: str, last: int) -> list[dict[str, Any]]:
    """Return a run that is not stopped, and one that is: in the last process, the first, and an evaluation."""
    flags = {**COMMON, "cache_dir": place.folder / "cache", **SETTINGS[name]}
    stopped = {**flags, **folders(place, f"{name} stopped")}
    resumed = place.flags(**stopped, resume=True)
    evaluates = "pred_distill" in flags
    return [
        {"flags": place.flags(**flags, **folders(place, f"{name} whole"))},
        {"flags": place.flags(**stopped), "rank": last, "step": 3},
        {"flags": resumed, "rank": 0, "step": 1},
        *([{"flags": resumed, "rank": last, "evaluation": 1}] if evaluates else []),  # after step 6
        {"flags": resumed},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_stopped_and_resumed_processes_end_with_the_same_bits(tmp_path: Path, count: int) -> None:
    """DDP reorders the gradients in its buckets after its first step, which changes how they are summed."""
    place = dropout_place(tmp_path)
    names = list(SETTINGS)[count - 2 :]  # three processes do the second only
    file = place.folder / "runs.json"
    file.write_text(json.dumps([run for name in names for run in runs_of(place, name, count - 1)]), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    script = ROOT / "test" / "unit" / "stopped_processes.py"
    command = [sys.executable, str(script), str(file), str(place.folder / "store")]
    processes = [
        subprocess.Popen([*command, str(rank), str(count)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    steps = {"intermediate, amp": ["", "3", "4", ""], "prediction, accumulation": ["", "3", "4", "6", ""]}
    for rank in range(count):
        endings = json.loads(Path(f"{file}.{rank}").read_text(encoding="utf-8"))
        assert ["".join(re.findall(r"after step (\d+)", line)) for line in endings] == [
            step for name in names for step in steps[name]
        ]
    for name in names:
        whole, stopped = (outcome(*folders(place, f"{name} {kind}").values()) for kind in ("whole", "stopped"))
        assert stopped == whole, name
