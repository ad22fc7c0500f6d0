"""Standard streams that are closed, full, or lack characters; messages and progress bars; names that are not UTF-8."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from cases import ROOT, Workplace, command
from stopped_runs import dropout_place
from test_stopped_commands import ENDLESS, has_saved, start, trains, wait_until

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STAGES = {"training": {"pred_distill": True}, "evaluation": {"do_eval": True, "teacher_model": None}}


def shell(place: Workplace, redirection: str, **flags: object) -> tuple[int, str]:
    """Run main.py in bash with its streams redirected; return its status and what reached standard error."""
    arguments = [sys.executable, str(ROOT / "main.py"), *place.flags(**flags)]
    script = f'set -o pipefail; "$@" {redirection}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("redirection", ["2>&-", ">&-", ">&- 2>&- <&-", "| head -1", "> /dev/full", "> /dev/full 2>&1"])
def test_a_run_ends_well_whatever_its_streams_are(sst2: Workplace, redirection: str, stage: str) -> None:
    status, errors = shell(sst2, redirection, **STAGES[stage])
    assert (status, errors) == (0, "")
    assert (sst2.model / "eval_results.txt").is_file()
    assert (sst2.model / "run.json").is_file() == (stage == "training")


def test_a_character_that_the_terminal_lacks_is_escaped(sst2: Workplace) -> None:
    model = sst2.student.rename(sst2.folder / "modèle")
    flags = sst2.flags(do_eval=True, teacher_model=None, student_model=model)
    done = command(str(ROOT / "main.py"), *flags, cwd=sst2.folder, PYTHONIOENCODING="ascii")
    assert (done.status, done.err) == (0, "")
    assert r"mod\xe8le: dev.tsv: acc" in done.out


@pytest.mark.parametrize("role", ["data", "model", "output"])
def test_a_folder_may_have_a_name_that_is_not_utf8(sst2: Workplace, role: str) -> None:
    folder = sst2.folder / os.fsdecode(b"caf\xe9")
    if role == "data":
        sst2.data.rename(folder)
    setattr(sst2, role, folder)
    sst2.run(pred_distill=True)
    record = json.loads((sst2.model / "run.json").read_text(encoding="utf-8"))
    assert str(folder) in record["flags"].values()


def test_python_without_docstrings_runs_and_prints_help(sst2: Workplace) -> None:
    for file in ("main.py", "task_distill.py", "data_processing/download.py", "test/demo.py"):
        assert command("-OO", str(ROOT / file), "--help", cwd=sst2.folder).status == 0
    assert command("-OO", str(ROOT / "main.py"), *sst2.flags(), cwd=sst2.folder).status == 0


def test_paths_begin_with_the_home_folder(sst2: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(sst2.folder))
    sst2.run(output_dir="~/m", fps_acc_dir="~/logs", teacher_model="~/teacher", cache_dir="~/cache")
    assert (sst2.folder / "m" / "run.json").is_file()
    assert (sst2.folder / "logs" / "metrics.jsonl").is_file()
    assert (sst2.folder / "cache").is_dir()


def test_messages_appear_above_the_bar(sst2: Workplace) -> None:
    """In a terminal each message is alone on its line."""
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))  # lines, columns
    flags = sst2.flags(pred_distill=True, num_train_epochs=20, train_batch_size=4, eval_step=1)
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *flags], env=ENVIRONMENT, stdout=its_end, stderr=its_end
    )
    os.close(its_end)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    assert run.wait(timeout=60) == 0
    text = shown.decode()
    assert "prediction-layer distillation: 100%" in text
    log = (sst2.output / "debug_layer_loss.log").read_text(encoding="utf-8")
    messages = [line.split(" ", 2)[2] for line in log.splitlines()]
    assert sum(": dev.tsv: " in message for message in messages) >= 40
    assert [message for message in messages if not re.search(rf"(^|[\r\n]){re.escape(message)}\r?\n", text)] == []


@pytest.mark.slow
@pytest.mark.parametrize("ids", ["0", "0,1"])
def test_a_closed_terminal_stops_a_run_as_sigterm_does(tmp_path: Path, ids: str) -> None:
    place = dropout_place(tmp_path)
    run = start([str(ROOT / "main.py"), *place.flags(**ENDLESS, device_list=ids)], place.folder)
    wait_until(lambda: trains(place))
    os.killpg(run.pid, signal.SIGHUP)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGHUP
    assert errors.startswith("main.py: stopped by SIGHUP after step ")
    assert has_saved(place)


@pytest.mark.slow
def test_nohup_lets_a_run_outlive_its_terminal(tmp_path: Path) -> None:
    place = dropout_place(tmp_path)
    arguments = [sys.executable, str(ROOT / "main.py"), *place.flags(**ENDLESS)]
    run = subprocess.Popen(
        ["nohup", *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: trains(place))
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in errors
