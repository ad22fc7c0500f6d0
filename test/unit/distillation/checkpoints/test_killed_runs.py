"""Trap 22, with SIGKILL at moments nobody chose, and with disks that take nothing more.

The short form of `test/tools/kill_and_resume.py`, which kills more often, in more settings, and several processes too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cases import ROOT, Workplace
from stopped_runs import attempt, dropout_place, signal_in_step

FLAGS = {"padding": "longest", "train_batch_size": 5, "num_train_epochs": 4, "pred_distill": True, "eval_step": 3}


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_those_left_alone(tmp_path: Path) -> None:
    """Weights, files, best metric and logs; some of the kills come inside a write."""
    counts = tmp_path / "counts.json"
    settings = ["--only", "prediction stage, O2", "--kills", "3", "--steps", "56", "--window", "0.4", "--write", "0.03"]
    command = [sys.executable, str(ROOT / "test" / "tools" / "kill_and_resume.py"), *settings, "--json", str(counts)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(counts.read_text(encoding="utf-8"))
    assert result["kills"] == 3
    assert result["differs"] == []


@pytest.fixture
def stopped(tmp_path: Path) -> Workplace:
    """A run that was stopped after three of its eight steps."""
    place = dropout_place(tmp_path)
    with signal_in_step(3):
        assert attempt(place, **FLAGS, save_steps=1).status == 128 + signal.SIGTERM
    return place


def test_a_full_disk_leaves_what_was_saved(stopped: Workplace) -> None:
    """The state is the largest file: at the next saving it does not fit. One line, and the run goes on later."""
    state, log = stopped.model / "training_state.bin", stopped.output / "metrics.jsonl"
    before = state.read_bytes()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        failed = attempt(stopped, **FLAGS, save_steps=1, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.status == 2
    assert failed.err == f"main.py: error: {state}: cannot be written (File too large); the one before it is whole\n"
    assert state.read_bytes() == before
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 10, hard))
    try:
        failed = attempt(stopped, **FLAGS, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.status == 2
    assert failed.err.count("\n") == 1
    assert "(File too large)" in failed.err
    assert state.read_bytes() == before
    assert attempt(stopped, **FLAGS, resume=True).status == 0
    steps = [event["step"] for event in stopped.events("train")]
    assert steps == list(range(1, 9))
    assert all(line.endswith("}") for line in log.read_text(encoding="utf-8").splitlines())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_folder_that_may_not_be_written_is_named(stopped: Workplace) -> None:
    """Of a stopped run: one line, and all of it stays. Tried as a user to whom permissions apply, which root is not."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    before = {path: path.read_bytes() for path in stopped.model.iterdir()}
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may be entered by its owner alone
        copy = Path(shutil.copytree(stopped.folder, f"{folder}/place"))
        place = Workplace(copy, stopped.task, stopped.max_seq_length)
        for opened, mode in ((Path(folder), 0o755), (copy, 0o755), (place.model, 0o555)):
            opened.chmod(mode)

        def resume() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            sender.send(attempt(place, **FLAGS, save_steps=1, resume=True, cache_limit=0))

        child = multiprocessing.get_context("fork").Process(target=resume)
        child.start()
        assert receiver.poll(60)
        failed = receiver.recv()
        child.join()
        assert failed.status == 2
        assert failed.err == (
            f"main.py: error: {place.model}: the folder of --output_dir cannot be written "
            f"({place.model}: no permission)\n"
        )
        assert {path.name: path.read_bytes() for path in place.model.iterdir()} == {
            path.name: content for path, content in before.items()
        }
        place.model.chmod(0o755)
