"""Several processes stop together, whichever of them a signal reaches, and go on together.

Equality is tried with gloo on the CPU; each number of processes is started once and does all runs
(`stopped_processes.py`). How commands end by signals, disks and dead peers has its own tests below.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import ROOT, Workplace
from stopped_runs import dropout_place, outcome

HERE = Path(__file__).parents[2]
COMMON = {
    **{"padding": "longest", "train_batch_size": 5, "num_train_epochs": 4, "learning_rate": 1e-3, "eval_step": 3},
    **{"save_steps": 2, "group_by_length": True, "eval_batch_size": 1},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "intermediate, amp": {"amp": True, "amp_dtype": "bf16"},
    "prediction, accumulation": {"pred_distill": True, "gradient_accumulation_steps": 2},
}


def runs_of(place: Workplace, name: str, last: int) -> list[dict[str, Any]]:
    """One that is left alone; one that is stopped, by a signal to the last process and by one to the first.

    And, of a stage that is evaluated, once more by one to the last, in the evaluation after step 6.
    """
    flags = {**COMMON, "cache_dir": place.folder / "cache", **SETTINGS[name]}
    alone, stopped = (
        {"output_dir": place.folder / f"{name} {kind}", "fps_acc_dir": place.folder / f"{name} {kind} logs"}
        for kind in ("alone", "stopped")
    )
    in_evaluations = []
    if "pred_distill" in flags:
        in_evaluations = [{"flags": place.flags(**flags, **stopped, resume=True), "rank": last, "evaluation": 1}]
    return [
        {"flags": place.flags(**flags, **alone)},
        {"flags": place.flags(**flags, **stopped), "rank": last, "step": 3},
        {"flags": place.flags(**flags, **stopped, resume=True), "rank": 0, "step": 1},
        *in_evaluations,
        {"flags": place.flags(**flags, **stopped, resume=True)},
    ]


@pytest.fixture(scope="module", params=[2, 3])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A folder in which so many processes have done all runs."""
    count = request.param
    place = dropout_place(tmp_path_factory.mktemp(f"processes{count}"))
    names = list(SETTINGS) if count == 2 else ["prediction, accumulation"]
    file = place.folder / "runs.json"
    file.write_text(json.dumps([run for name in names for run in runs_of(place, name, count - 1)]), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(HERE / "stopped_processes.py"), str(file), str(place.folder / "store")]
    processes = [
        subprocess.Popen([*command, str(rank), str(count)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    told = [json.loads(Path(f"{file}.{rank}").read_text(encoding="utf-8")) for rank in range(count)]
    assert told == [told[0]] * count
    words = "stopped by SIGTERM after step {} of 8; the same command with --resume goes on from there"
    steps = {name: (3, 4, 6) if "prediction" in name else (3, 4) for name in names}
    assert told[0] == [line for name in names for line in ("", *map(words.format, steps[name]), "")]
    return place


@pytest.mark.slow
def test_processes_that_were_stopped_end_as_those_that_were_not(place: Workplace) -> None:
    """Equal to the bit, though the wrapper that averages gradients orders them anew after its first step."""
    names = [name for name in SETTINGS if (place.folder / f"{name} alone").is_dir()]
    assert names
    for name in names:
        alone, stopped = (
            outcome(place.folder / f"{name} {kind}", place.folder / f"{name} {kind} logs")
            for kind in ("alone", "stopped")
        )
        assert stopped == alone, name
