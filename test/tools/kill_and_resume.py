"""Command: kills training runs with SIGKILL at random moments, some inside savings, and resumes them to the end.

    python test/tools/kill_and_resume.py --kills 30

For each setting a run is left alone and another is killed again and again, and each time resumed by the same command
with --resume. At its end the weights must equal the first one's bit for bit, and so must all lines of the logs
but for times and speeds. The runs are main.py's on a tiny case; so that many of the kills hit a saving, every fsync
takes some milliseconds more. It ends with a table, and with status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from cases import ROOT
from stopped_runs import dropout_place, outcome

import main as entry
from distillation.launch import run_entry

SETTINGS: dict[str, dict[str, Any]] = {
    "intermediate stage": {"eval_step": 20},
    "intermediate stage, amp, accumulation": {"amp": True, "amp_dtype": "bf16", "gradient_accumulation_steps": 2},
    "intermediate stage, teacher's states kept": {"cache_teacher_states": True, "group_by_length": True, "workers": 2},
    "prediction stage": {"pred_distill": True},
    "prediction stage, O2 in fp16, dynamic scale": {
        **{"pred_distill": True, "amp": True, "amp_dtype": "fp16", "opt_level": "O2", "loss_scale": "dynamic"},
        "gradient_accumulation_steps": 2,
    },
    "fine-tuning": {"do_finetune": True, "student_model": None, "group_by_length": True, "workers": 2},
    "two processes, prediction stage": {"pred_distill": True, "device_list": "0,1", "gradient_accumulation_steps": 2},
    "two processes, intermediate stage, amp": {"device_list": "0,1", "amp": True, "amp_dtype": "bf16"},
}
SLOW = """
import os, pathlib, time
fsync, marks = os.fsync, pathlib.Path({marks!r})
def slow(descriptor):
    mark = marks / str(os.getpid())
    mark.touch()
    time.sleep({seconds})
    fsync(descriptor)
    mark.unlink()
os.fsync = slow
"""


class Journey:
    """The runs of one setting in a folder of their own."""

    def __init__(self, folder: Path, changes: dict[str, Any], steps: int, seconds_of_a_write: float) -> None:
        self.place = dropout_place(folder, copies=4)  # 32 texts: seven steps an epoch, the last one short
        common = {"padding": "longest", "train_batch_size": 5, "num_train_epochs": steps / 7, "learning_rate": 1e-3}
        times = {"save_steps": 3, "eval_step": 10, "output_txt_step": 2, "cache_dir": folder / "cache"}
        self.changes = {**common, **times, **changes}
        self.marks = folder / "marks"
        self.marks.mkdir()
        (folder / "slow").mkdir()
        hook = SLOW.format(marks=str(self.marks), seconds=seconds_of_a_write)
        (folder / "slow" / "sitecustomize.py").write_text(hook, encoding="utf-8")
        self.hook, self.said, self.write = hook, folder / "said.txt", seconds_of_a_write

    def flags(self, name: str) -> list[str]:
        folder = self.place.folder
        own = {"output_dir": folder / name, "fps_acc_dir": folder / f"{name}_logs", "resume": True}
        if name == "alone":  # it saves nothing to go on from either
            own["save_steps"] = None
        return self.place.flags(**{**self.changes, **own})

    def start(self, name: str) -> int:
        """Starts a run in a process of its own, which need not import everything anew; returns its id."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        status = 70
        try:
            with self.said.open("ab", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if name == "killed":
                os.environ["PYTHONPATH"] = f"{self.place.folder / 'slow'}:{ROOT}"  # of the processes it may spawn
                exec(self.hook, {})
            sys.argv = ["main.py", *self.flags(name)]
            status = run_entry("main.py", entry.main)
        except BaseException:
            self.said.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(status)

    def finish(self, name: str) -> None:
        """Runs to the end, undisturbed."""
        status = wait_for(self.start(name))
        assert status == 0, self.said.read_text(encoding="utf-8")

    def kill_once(self, name: str, chance: random.Random, window: float) -> tuple[bool, bool]:
        """Starts a run and kills it, or one of its processes, at a random moment.

        Args:
            window: the most seconds between its first line of this start and the kill; most often that
                is what is chosen, at times a moment while it starts, and at times the next write is waited for.

        Returns:
            Whether it was still running, and whether a process of it was inside a write.
        """
        log = self.place.folder / f"{name}_logs" / "metrics.jsonl"
        child, begin = self.start(name), time.monotonic()
        if chance.random() < 0.85:
            before = log.stat().st_mtime_ns if log.exists() else 0
            while not (log.exists() and log.stat().st_mtime_ns > before) and time.monotonic() - begin < 60:
                if ended(child):
                    return False, False
                time.sleep(0.002)
        time.sleep(chance.uniform(0, window))
        if chance.random() < 0.3:  # one moment more, and a write has begun
            deadline = time.monotonic() + 5
            while not (any(self.marks.iterdir()) or ended(child)) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, self.write))
        if ended(child):
            return False, False
        victims = [child, *children_of(child)]
        everyone = [*victims]
        victim = chance.choice(victims)
        os.kill(victim, signal.SIGKILL)  # where it is one of several the others end by themselves
        inside = bool(list(self.marks.iterdir()))
        status = wait_for(child)
        assert status in (-signal.SIGKILL, 1), self.said.read_text(encoding="utf-8")
        while any(alive(process) for process in everyone):
            time.sleep(0.01)
        for mark in self.marks.iterdir():
            mark.unlink()
        return True, inside

    def differences(self) -> list[str]:
        """What is not equal of the run that was left alone and the one that was killed."""
        folder = self.place.folder
        expected, found = (outcome(folder / name, folder / f"{name}_logs") for name in ("alone", "killed"))
        return [part for part in expected if expected[part] != found[part]]

    def forget(self) -> None:
        """Lets the run that was killed begin from nothing."""
        for name in ("killed", "killed_logs"):
            shutil.rmtree(self.place.folder / name)


def ended(child: int) -> bool:
    """Whether a child has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(process: int) -> list[int]:
    """The processes that it has spawned."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except FileNotFoundError:  # one has ended meanwhile
        return []


def travel(name: str, kills: int, steps: int, chance: random.Random, window: float, write: float) -> dict[str, Any]:
    """One setting: the run that is left alone, the one that is killed so often, and what differs."""
    with tempfile.TemporaryDirectory() as folder:
        journey = Journey(Path(folder) / "place", SETTINGS[name], steps, write)
        journey.finish("alone")
        done = inside = 0
        differs: list[str] = []
        for _ in range(4 * kills + 4):
            if done == kills:
                break
            killed, in_write = journey.kill_once("killed", chance, window)
            if not killed:  # it came to its end before: the next kills are another one's
                differs += journey.differences()
                journey.forget()
            done, inside = done + killed, inside + in_write
        journey.finish("killed")
        return {"setting": name, "kills": done, "inside": inside, "differs": differs + journey.differences()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=32, help="in all, shared among the settings")
    parser.add_argument("--steps", type=int, default=105, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--window", type=float, default=1.0, help="the most seconds from a first line to a kill")
    parser.add_argument("--write", type=float, default=0.05, help="the seconds that a write takes longer")
    parser.add_argument("--only", default="", help="settings whose names hold this")
    parser.add_argument("--json", type=Path, help="a file for the counts")
    flags = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: more threads only wait for one another
    torch.set_num_threads(1)
    chance, begin = random.Random(flags.seed), time.monotonic()
    names = [name for name in SETTINGS if flags.only in name]
    results = []
    for number, name in enumerate(names):
        kills = flags.kills // len(names) + (number < flags.kills % len(names))
        results.append(travel(name, kills, flags.steps, chance, flags.window, flags.write))
        last = results[-1]
        outcome = f"DIFFERS: {', '.join(last['differs'])}" if last["differs"] else "equal bit for bit"
        print(f"{name}: {last['kills']} kills, {last['inside']} of them inside a write: {outcome}", flush=True)
    killed, inside = (sum(result[part] for result in results) for part in ("kills", "inside"))
    same = sum(not result["differs"] for result in results)
    seconds = time.monotonic() - begin
    print(f"{killed} kills, {inside} inside a write; {same} of {len(results)} settings equal; {seconds:.0f} s")
    if flags.json:
        flags.json.write_text(json.dumps(results), encoding="utf-8")
    return 0 if same == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
