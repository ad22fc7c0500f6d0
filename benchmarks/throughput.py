"""Command: how many examples a second both stages train, beside the settings of the original implementation.

    python benchmarks/throughput.py --data_dir glue_dir/SST-2
    python benchmarks/throughput.py --data_dir glue_dir/SST-2 --reference_revision c25c186 --steps 40

Lengths come from real text, weights are random: BERT-base teaches TinyBERT4, batch 32, maximum length 64. Every
row is a run of main.py with other flags, in a process of its own, on the same rows of train.tsv. The reference pads
to 64, computes in fp32, in random order, and asks the teacher in every step; with --reference_revision it is
that revision's main.py. Compare ratios of one run: machines are shared and differ from day to day.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, machine, make_data, make_models
from distillation.flags import OneLineParser, path
from distillation.launch import run_entry
from transformer.errors import UserError

REFERENCE = ["--padding", "max_length"]
ASK = ["--ask_teacher_always"]
LONGEST = ["--padding", "longest"]
GROUPED = [*LONGEST, "--group_by_length"]
FAST = [*GROUPED, "--amp"]


@dataclass(frozen=True)
class Row:
    """A line of the table: a run of main.py.

    tree: whose main.py. slow: whether it has few steps. epochs: passes over the rows; more than one lets the
    prediction stage remember its teacher.
    """

    title: str
    stage: str
    flags: list[str]
    tree: Path = ROOT
    slow: bool = False
    epochs: int = 1


def rows(reference: Path) -> list[Row]:
    """The runs, each stage's reference first."""
    asks = [] if reference != ROOT else ASK
    table = []
    for stage in ("intermediate", "prediction"):
        ask = ASK if stage == "prediction" else []
        table += [
            Row("reference", stage, [*REFERENCE, *(asks if ask else [])], reference, slow=True),
            Row("reference settings, today's code", stage, [*REFERENCE, *ask], slow=True),
            Row("padded to the batch's longest", stage, [*LONGEST, *ask], slow=True),
            Row("batches of like length", stage, [*GROUPED, *ask], slow=True),
            Row("and bf16", stage, [*FAST, *ask]),
        ]
    return [*table, Row("and the teacher remembered", "prediction", FAST, epochs=2)]


def run(row: Row, work: Path, flags: argparse.Namespace) -> dict[str, float]:
    """Runs a row; FPS as its log says, and with the time that the teacher was asked beforehand."""
    output = Path(tempfile.mkdtemp(dir=work))
    count = flags.steps * 32 * (1 if row.slow else 4)
    data = work / f"data{count}"
    if not data.exists():
        make_data(data, flags.data_dir, count)
    command = [sys.executable, "main.py", "--task_name", "SST-2", "--do_lower_case", "--data_dir", str(data)]
    command += ["--teacher_model", str(work / "teacher"), "--student_model", str(work / "student")]
    command += ["--output_dir", str(output / "model"), "--fps_acc_dir", str(output), "--max_seq_length", "64"]
    command += ["--num_train_epochs", str(row.epochs), "--eval_step", "1000000", "--device", flags.device]
    command += ["--device_list", flags.device_list, *row.flags]
    if row.tree == ROOT:
        command += ["--cache_dir", str(output / "cache")]
    if row.stage == "prediction":
        command += ["--pred_distill"]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=row.tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the run of {row.title!r} failed: {done.stderr.strip().splitlines()[-1:]}")
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (end,) = [event for event in events if event["event"] == "end"]
    asked = sum(event["seconds"] for event in events if event["event"] == "teacher_asked_once")
    rows_read = sum(1 for _ in (data / "train.tsv").open(encoding="utf-8")) - 1
    first = rows_read / (rows_read / end["fps"] + asked)
    return {"fps": end["fps"], "first": first, "wall": time.monotonic() - begin}


def reference_tree(revision: str | None, work: Path) -> Path:
    """The tree whose main.py is the reference: another revision's, or this one."""
    if revision is None:
        return ROOT
    tree = work / "reference"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise UserError(f"--reference_revision {revision}: git has no such revision here")
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    return tree


def main(arguments: Sequence[str]) -> None:
    """Runs all rows and prints the table."""
    parser = OneLineParser(prog="throughput.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_dir", type=path, required=True, help="SST-2's folder; its train.tsv is read")
    parser.add_argument("--vocabulary", type=path, required=True, help="a folder with an uncased vocab.txt")
    parser.add_argument(
        "--steps", type=int, default=30, help="steps of the slow rows; the others take four times as many"
    )
    parser.add_argument(
        "--reference_revision", help="the git revision whose main.py is the reference; default: today's"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--device_list", default="0")
    parser.add_argument("--only", help="rows whose title holds this text, and the references")
    flags = parser.parse_args(list(arguments))
    print(f"{machine()}, {os.environ.get('OMP_NUM_THREADS', 'default')} threads a process")
    print(f"{'stage':12}  {'':34}  {'FPS':>8}  {'ratio':>6}  {'first epoch':>11}  {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_models(work, flags.vocabulary)
        references: dict[str, float] = {}
        for row in rows(reference_tree(flags.reference_revision, work)):
            if flags.only and flags.only not in row.title and row.title != "reference":
                continue
            figures = run(row, work, flags)
            base = references.setdefault(row.stage, figures["fps"])
            ratios = figures["fps"] / base, figures["first"] / base
            print(
                f"{row.stage:12}  {row.title:34}  {figures['fps']:8.1f}  {ratios[0]:6.1f}  "
                f"{figures['first']:11.1f}  {ratios[1]:6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(run_entry("throughput.py", main))
