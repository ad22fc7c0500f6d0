"""Commands end by signals, kills and dead peers with one line, all processes together, and can be resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import ROOT, Workplace
from stopped_runs import dropout_place
from test_processes import alive, children_in_training, free_port

from distillation.checkpoints.folder_state import read_checkpoint

ENDLESS = {"train_batch_size": 5, "num_train_epochs": 100_000, "eval_step": 10**6, "padding": "longest"}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return dropout_place(tmp_path)


def start(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    """Start a command as the leader of a process group, as a terminal does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_saved(place: Workplace) -> bool:
    path = place.model / "training_state.bin"
    return path.exists() and read_checkpoint(path)["trainer"] is not None


def trains(place: Workplace) -> bool:
    log = place.output / "metrics.jsonl"
    return log.exists() and '"event": "train"' in log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_spawned_processes_stop_together(place: Workplace) -> None:
    """A Ctrl-C reaches all of them; they end after the same step, with a checkpoint."""
    run = start([str(ROOT / "main.py"), *place.flags(**ENDLESS, device_list="0,1")], place.folder)
    children = children_in_training(run.pid, place, 2)
    os.killpg(run.pid, signal.SIGINT)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT
    assert output.count("stopping after this step") == 1
    (line,) = errors.splitlines()
    assert line.startswith("main.py: stopped by SIGINT after step ")
    assert "--resume" in line
    assert not any(alive(pid) for pid in children)
    assert has_saved(place)
    last = json.loads((place.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert f"after step {last['step']} of" in line


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["all", "one worker"])
def test_processes_of_torchrun_stop_together(place: Workplace, victim: str) -> None:
    """torchrun passes signals on; when one of its processes is killed the other one reports it."""
    port = ["--master_port", str(free_port())]
    run = start([*TORCHRUN, *port, str(ROOT / "main.py"), *place.flags(**ENDLESS, save_steps=1)], place.folder)
    wait_until(lambda: has_saved(place))
    workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    assert len(workers) == 2
    if victim == "all":
        run.send_signal(signal.SIGTERM)
    else:
        os.kill(workers[1], signal.SIGKILL)
    _, errors = run.communicate(timeout=100)
    assert run.returncode != 0
    ours = [line for line in errors.splitlines() if line.startswith("main.py: ")]
    if victim == "all":
        (line,) = ours
        assert line.startswith("main.py: stopped by SIGTERM after step ")
    else:
        (line,) = ours
        assert line.startswith("main.py: process 0 ended because another process of the run did")
    # torchrun shows a traceback of its own, whose files lie in site-packages, which may be inside this folder.
    frames = re.findall(r'File "(.*?)"', errors)
    assert not [frame for frame in frames if frame.startswith(f"{ROOT}/") and "site-packages" not in frame]
    assert (place.model / "training_state.bin").exists()
    assert not any(alive(pid) for pid in workers)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 0.5), (signal.SIGTERM, 2.0)])
def test_a_signal_during_the_start_ends_a_command_with_one_line(place: Workplace, number: int, seconds: float) -> None:
    """While it imports, reads or runs its teacher: no traceback."""
    run = start([str(ROOT / "main.py"), *place.flags(**ENDLESS)], place.folder)
    time.sleep(seconds)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert errors.startswith(f"main.py: stopped by {signal.Signals(number).name}")
    assert errors.count("\n") == 1


def test_a_second_signal_ends_a_run_at_once(place: Workplace) -> None:
    """Even while saving after the first one hangs."""
    (place.folder / "sitecustomize.py").write_text(
        "import os, pathlib, time\n"
        "fsync = os.fsync\n"
        "def hangs(descriptor):\n"
        "    fsync(descriptor)\n"
        "    if pathlib.Path('trains').exists():\n"
        "        pathlib.Path('hangs').touch()\n"
        "        time.sleep(600)\n"
        "os.fsync = hangs\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place.folder)}
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *place.flags(**ENDLESS, do_finetune=True, save_steps=5)],
        cwd=place.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: trains(place))
    (place.folder / "trains").touch()
    wait_until((place.folder / "hangs").exists)
    run.send_signal(signal.SIGTERM)
    time.sleep(1.2)  # two signals in one second are one
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 128 + signal.SIGTERM
