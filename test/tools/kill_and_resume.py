"""Command: kill training runs with SIGKILL at random moments, also during saves, and resume them to the end.

    python test/tools/kill_and_resume.py --kills 30

For each setting one run is not interrupted; another is killed several times and resumed by the same command. Their
weights must be equal to the bit, and so must all lines of the logs except for times and speeds. The runs are main.py's
on a tiny case. Each fsync takes some milliseconds longer, so that many kills are during a save. The status is 1 if
anything differs.
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
    "intermediate stage, cached teacher states": {"cache_teacher_states": True, "group_by_length": True, "workers": 2},
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


class RunPair:
    """The two runs of one setting, in their own folder: `alone` is not interrupted, `killed` is."""

    def __init__(self, folder: Path, changes: dict[str, Any], steps: int, seconds_of_a_write: float) -> None:
        self.place = dropout_place(folder, copies=4)  # 32 texts: seven steps per epoch, the last one short
        common = {"padding": "longest", "train_batch_size": 5, "num_train_epochs": steps / 7, "learning_rate": 1e-3}
        times = {"save_steps": 3, "eval_step": 10, "output_txt_step": 2, "cache_dir": folder / "cache"}
        self.changes = {**common, **times, **changes}
        self.marks = folder / "marks"
        self.marks.mkdir()
        (folder / "slow").mkdir()
        hook = SLOW.format(marks=str(self.marks), seconds=seconds_of_a_write)
        (folder / "slow" / "sitecustomize.py").write_text(hook, encoding="utf-8")
        self.hook, self.output, self.write = hook, folder / "output.txt", seconds_of_a_write

    def flags(self, name: str) -> list[str]:
        folder = self.place.folder
        own = {"output_dir": folder / name, "fps_acc_dir": folder / f"{name}_logs", "resume": True}
        if name == "alone":  # it needs no checkpoints
            own["save_steps"] = None
        return self.place.flags(**{**self.changes, **own})

    def start(self, name: str) -> int:
        """Fork a process that does a run without importing everything again; return its id."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        status = 70
        try:
            with self.output.open("ab", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if name == "killed":
                os.environ["PYTHONPATH"] = f"{self.place.folder / 'slow'}:{ROOT}"  # for the processes that it spawns
                exec(self.hook, {})
            sys.argv = ["main.py", *self.flags(name)]
            status = run_entry("main.py", entry.main)
        except BaseException:
            self.output.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(status)

    def finish(self, name: str) -> None:
        """Do a run to its end without interruption."""
        status = wait_for(self.start(name))
        assert status == 0, self.output.read_text(encoding="utf-8")

    def kill_once(self, name: str, chance: random.Random, window: float) -> tuple[bool, bool]:
        """Start a run and kill it, or one of its processes, at a random moment.

        Args:
            window: the maximum of seconds before the kill, counted from the first logged line in 85 % of the calls and
                from the start in the others; in 30 % of the calls the kill waits for the next write.

        Returns:
            Whether it was still running, and whether one of its processes was writing.
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
        if chance.random() < 0.3:  # wait for a write
            deadline = time.monotonic() + 5
            while not (any(self.marks.iterdir()) or ended(child)) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, self.write))
        if ended(child):
            return False, False
        victims = [child, *children_of(child)]
        everyone = [*victims]
        victim = chance.choice(victims)
        os.kill(victim, signal.SIGKILL)  # the other processes of the run then end
        inside = bool(list(self.marks.iterdir()))
        status = wait_for(child)
        assert status in (-signal.SIGKILL, 1), self.output.read_text(encoding="utf-8")
        while any(alive(process) for process in everyone):
            time.sleep(0.01)
        for mark in self.marks.iterdir():
            mark.unlink()
        return True, inside

    def differences(self) -> list[str]:
        """Return the names of the outputs that differ between the two runs."""
        folder = self.place.folder
        expected, found = (outcome(folder / name, folder / f"{name}_logs") for name in ("alone", "killed"))
        return [part for part in expected if expected[part] != found[part]]

    def remove_killed(self) -> None:
        """Remove the outputs of the killed run, so that it begins from scratch."""
        for name in ("killed", "killed_logs"):
            shutil.rmtree(self.place.folder / name)


def ended(child: int) -> bool:
    """Return whether a child has ended, without reaping it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(process: int) -> list[int]:
    """Return the ids of the processes that a process has spawned."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except FileNotFoundError:  # a process has ended
        return []


def compare_runs(
    name: str, kills: int, steps: int, chance: random.Random, window: float, write: float
) -> dict[str, Any]:
    """Do both runs of a setting with this number of kills; return the counts and the differences."""
    with tempfile.TemporaryDirectory() as folder:
        runs = RunPair(Path(folder) / "place", SETTINGS[name], steps, write)
        runs.finish("alone")
        done = inside = 0
        differs: list[str] = []
        for _ in range(4 * kills + 4):
            if done == kills:
                break
            killed, in_write = runs.kill_once("killed", chance, window)
            if not killed:  # it ended before the kill: compare it and start another one
                differs += runs.differences()
                runs.remove_killed()
            done, inside = done + killed, inside + in_write
        runs.finish("killed")
        return {"setting": name, "kills": done, "inside": inside, "differs": differs + runs.differences()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=32, help="number of kills, shared among the settings")
    parser.add_argument("--steps", type=int, default=105, help="steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    parser.add_argument("--window", type=float, default=1.0, help="maximum seconds from the first line to a kill")
    parser.add_argument("--write", type=float, default=0.05, help="seconds that each fsync takes longer")
    parser.add_argument("--only", default="", help="only the settings whose names contain this")
    parser.add_argument("--json", type=Path, help="file for the counts")
    flags = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads are slower with tiny models
    torch.set_num_threads(1)
    chance, begin = random.Random(flags.seed), time.monotonic()
    names = [name for name in SETTINGS if flags.only in name]
    results = []
    for number, name in enumerate(names):
        kills = flags.kills // len(names) + (number < flags.kills % len(names))
        results.append(compare_runs(name, kills, flags.steps, chance, flags.window, flags.write))
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
