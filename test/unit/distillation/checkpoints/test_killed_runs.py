"""Runs killed by SIGKILL (trap 22), and disks that are full or may not be written.

`test/tools/kill_and_resume.py` kills more often, in more settings, and several processes too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from cases import ROOT, Workplace
from disk_faults import no_file_beyond
from stopped_runs import attempt, dropout_place, refused, signal_in_step

FLAGS = {"padding": "longest", "train_batch_size": 5, "num_train_epochs": 4, "pred_distill": True, "eval_step": 3}


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_like_a_run_that_was_not(tmp_path: Path) -> None:
    """Weights, files, best metric and logs; some of the kills come inside a write."""
    counts = tmp_path / "counts.json"
    settings = ["--only", "prediction stage, O2", "--kills", "3", "--steps", "56", "--window", "0.4", "--write", "0.03"]
    command = [sys.executable, str(ROOT / "test" / "tools" / "kill_and_resume.py"), *settings, "--json", str(counts)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(counts.read_text(encoding="utf-8"))
    assert (result["kills"], result["differs"]) == (3, [])


@pytest.fixture
def stopped(tmp_path: Path) -> Workplace:
    """A run that was stopped after three of its eight steps."""
    place = dropout_place(tmp_path)
    with signal_in_step(3):
        assert attempt(place, **FLAGS, save_steps=1).status == 128 + signal.SIGTERM
    return place


def test_a_full_disk_leaves_the_last_checkpoint_and_whole_log_lines(stopped: Workplace) -> None:
    checkpoint, log = stopped.model / "training_state.bin", stopped.output / "metrics.jsonl"
    before = checkpoint.read_bytes()
    for size, full in ((len(before) // 2, checkpoint), (log.stat().st_size + 10, log)):
        (stopped.output / "debug_layer_loss.log").unlink()  # so that the log of this turn is the largest
        with no_file_beyond(size):
            line = refused(stopped, **FLAGS, save_steps=1, resume=True)
        assert f"{full}: " in line
        assert "File too large" in line
        assert checkpoint.read_bytes() == before
    assert attempt(stopped, **FLAGS, resume=True).status == 0
    assert [event["step"] for event in stopped.events("train")] == list(range(1, 9))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "closed"])
def test_a_folder_without_permission_is_named_and_unchanged(stopped: Workplace, mode: int) -> None:
    """In a process of a user to whom permissions apply; they do not apply to root."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    before = {path.name: path.read_bytes() for path in stopped.model.iterdir()}
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may be entered by its owner alone
        copy = Path(shutil.copytree(stopped.folder, f"{folder}/place"))
        place = Workplace(copy, stopped.task, stopped.max_seq_length)
        for opened, bits in ((Path(folder), 0o755), (copy, 0o755), (place.model, mode)):
            opened.chmod(bits)

        def resume() -> None:
            torch.set_num_threads(1)  # a forked process has none of OpenMP's other threads
            if os.geteuid() == 0:
                os.setuid(65534)
            sender.send(refused(place, **FLAGS, save_steps=1, resume=True, cache_limit=0))

        child = multiprocessing.get_context("fork").Process(target=resume)
        child.start()
        child.join(60)
        place.model.chmod(0o755)
        assert receiver.poll()
        assert f"{place.model}: " in receiver.recv()
        assert {path.name: path.read_bytes() for path in place.model.iterdir()} == before
