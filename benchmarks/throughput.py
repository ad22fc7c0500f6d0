"""Command: examples per second that both stages train, beside the settings of the original implementation.

    python benchmarks/throughput.py --data_dir glue_dir/SST-2 --vocabulary general_tinybert
    python benchmarks/throughput.py ... --reference_revision c25c186 --steps 40 --repeat 3
    python benchmarks/throughput.py ... --lengths 16,32,64,128     # cost by the length of the texts
    python benchmarks/throughput.py ... --processes 1,2            # speed-up of several processes
    python benchmarks/throughput.py ... --batches 32,128,512       # speed by the size of the batch

Lengths come from real text, weights are random: BERT-base and TinyBERT4, batch 32, maximum length 64. Each row is a run
of main.py with different flags, in a process of its own, on rows of the same train.tsv. The reference pads to 64,
computes in fp32, in random order, and runs the teacher in every step; with --reference_revision it is that revision's
main.py. Rows "alone" change one switch of the reference settings, rows "together" add one after the other.

FPS are those of main.py's log; for a run of two epochs those of the second. "First epoch" includes caching the
teacher's outputs. Ratios are to each stage's first row. Tokens are those of the texts, without padding. TFLOP/s are the
operations of matrix products that the texts need, without padding; the limit is what products of large matrices in the
row's precision reach just before and after the row. The percentages are the parts of a step's time, MB the most memory
of the process, both of runs of one process (benchmarks/timed_run.py); on an accelerator, which timings slow down, they
come from a second run.

Compare ratios of one run, between rows with similar limits: shared machines change from minute to minute. --repeat
makes the whole table several times and ends with the medians.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.operations import matrix_rate, step_operations
from benchmarks.throughput_rows import STAGES, Row, choose_rows
from benchmarks.timed_run import STEP_PARTS, step_shares
from data_processing.cache import Cache
from data_processing.features import load_features
from data_processing.tasks import find_task
from distillation.launch import run_entry
from distillation.runtime.device import choose_device, open_device
from distillation.runtime.precision import choose_precision
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

Line = dict[str, float]
# The columns and their decimals.
COLUMNS = {"FPS": 1, "ratio": 2, "first epoch": 1, "its ratio": 2, "tokens/s": 0, "TFLOP/s": 3, "limit": 3}
COLUMNS |= {**{f"{name} %": 1 for name in STEP_PARTS}, "MB": 0, "device MB": 0}


def speeds(events: list[dict[str, Any]], examples: int, epochs: int, epoch_steps: int) -> Line:
    """Return a run's FPS and, if it has several epochs, the first one's, from the events of its metrics.jsonl."""
    (end,) = [event for event in events if event["event"] == "end"]
    if epochs == 1:
        return {"FPS": end["fps"], "first epoch": math.nan}
    first = next(event["fps"] for event in events if event["event"] == "train" and event["step"] == epoch_steps)
    caching = sum(event["seconds"] for event in events if event["event"] == "teacher_cache")
    later = examples * (epochs - 1)
    seconds = end["fps_examples"] / end["fps"] - (end["fps_examples"] - later) / first
    return {"FPS": later / seconds, "first epoch": examples / (examples / first + caching)}


def measure(row: Row, tree: Path, work: Path, flags: argparse.Namespace) -> Line:
    """Run a row and return its figures; `tree` is the folder of the reference's main.py.

    Raises:
        UserError: the run failed, or did not cache the teacher's outputs as it should have.
    """
    steps = flags.steps * (1 if row.slow else 4)
    data = work / f"data_{steps * row.examples}_{row.length}"
    if not data.exists():
        common.make_data(data, flags.data_dir, steps * row.examples, row.length)
    examples = len(common.read_lines(data / "train.tsv")) - 1
    epoch_steps = -(-examples // row.examples)
    ids = ",".join(map(str, range(row.processes))) or flags.device_list
    given = ["--max_seq_length", str(row.length or 64), "--num_train_epochs", str(row.epochs), "--device_list", ids]
    given += ["--train_batch_size", str(row.examples), "--device", flags.device, *row.flags]
    given += ["--output_txt_step", str(epoch_steps)]  # a log line at the end of each epoch
    device = open_device(choose_device(flags.device), 0)
    environment = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1") if row.processes else {}
    here = tree if row.is_reference else common.ROOT
    has_timings, slows = here == common.ROOT and "," not in ids, device.type != "cpu"
    limits = [_limit(row, device, ids)]
    try:
        run = partial(common.run_main, work, data, row.stage, given, tree=here, environment=environment)
        events, times = run(timed=has_timings and not slows)
        limits.append(_limit(row, device, ids))
        if has_timings and slows:
            times = run()[1]
    except UserError as error:
        raise UserError(f"{row.stage}, {row.title}: {error}") from None
    if row.cached and not any(event["event"] == "teacher_cache" for event in events):
        raise UserError(f"{row.stage}, {row.title}: the teacher's outputs were not cached; is there room for them?")
    line = speeds(events, examples, row.epochs, epoch_steps)
    tokenizer = BertTokenizer.from_pretrained(flags.vocabulary)
    lengths = load_features(data / "train.tsv", find_task("SST-2"), tokenizer, row.length or 64, Cache(None, 0)).lengths
    load = TinyBertForSequenceClassification.from_pretrained
    teacher, student = (load(work / name).eval() for name in ("teacher", "student"))
    operations = step_operations(row.stage, teacher, student, lengths, row.cached) / len(lengths)
    line |= {"tokens/s": line["FPS"] * float(lengths.mean()), "TFLOP/s": line["FPS"] * operations / 1e12}
    line["limit"] = statistics.mean(limits) / 1e12
    if times:  # without the first epoch, or the first steps of the only one
        shares = step_shares(times, epoch_steps if row.epochs > 1 else epoch_steps // 4)
        line |= {f"{name} %": share for name, share in shares.items()}
        line |= {"MB": times["memory"] / 1e6, "device MB": times["device memory"] / 1e6 or math.nan}
    return line


def _limit(row: Row, device: torch.device, ids: str) -> float:
    """Return the rate of products of large matrices in the row's precision, on all of its devices or threads."""
    kind = choose_precision(device, "--amp" in row.flags, "O1", 1.0).name.partition("-")[0]
    dtype = {"bfloat16": torch.bfloat16, "fp32": torch.float32}.get(kind, torch.float16)  # apex computes in fp16
    devices = 1 if device.type == "cpu" else len(ids.split(","))
    return devices * matrix_rate(device, dtype, row.processes or torch.get_num_threads())


def print_line(stage: str, title: str, line: Line | None) -> None:
    """Print a row's figures, or without figures the names of the columns."""
    cells = list(COLUMNS)
    if line is not None:
        cells = [f"{line.get(name, math.nan):.{decimals}f}".replace("nan", "-") for name, decimals in COLUMNS.items()]
    aligned = [f"{cell:>{max(8, len(name))}}" for cell, name in zip(cells, COLUMNS, strict=True)]
    print(f"{stage:12}  {title:34}", *aligned, sep="  ", flush=True)


def reference_tree(revision: str | None, work: Path) -> Path:
    """Return the folder of the reference's main.py: another revision's, or this one."""
    if revision is None:
        return common.ROOT
    archive = work / "reference.tar"
    if subprocess.run(
        ["git", "archive", "-o", str(archive), revision], cwd=common.ROOT, capture_output=True
    ).returncode:
        raise UserError(f"--reference_revision {revision}: git has no such revision here")
    shutil.unpack_archive(archive, work / "reference")
    return work / "reference"


def main(arguments: Sequence[str]) -> None:
    """Run all rows and print the table."""
    parser = common.build_parser("throughput.py", __doc__)
    parser.add_argument("--steps", type=common.number, default=30, help="of slow rows; others have four times as many")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--reference_revision", help="the git revision whose main.py is the reference (default: this)")
    kind.add_argument("--lengths", type=common.numbers, help="instead: texts of so many tokens, as 16,32,64,128")
    kind.add_argument("--processes", type=common.numbers, help="instead: so many processes of one thread, as 1,2")
    kind.add_argument("--batches", type=common.numbers, help="instead: so many examples per step, as 32,128,512")
    parser.add_argument("--device_list", default="0")
    parser.add_argument("--only", default="", help="rows whose title contains this text, and each stage's first")
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--repeat", type=common.number, default=1, help="how many times the whole table is made")
    flags = parser.parse_args(list(arguments))
    rows = choose_rows(flags)
    lines: dict[Row, list[Line]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tree = reference_tree(flags.reference_revision, work)
        common.make_models(work, flags.vocabulary, flags.size)
        print(common.machine())
        for repetition in range(1, flags.repeat + 1):
            if flags.repeat > 1:
                print(f"run {repetition} of {flags.repeat}")
            print_line("stage", "", None)
            bases: dict[str, float] = {}
            for row in rows:
                line = measure(row, tree, work, flags)
                base = bases.setdefault(row.stage, line["FPS"])
                line |= {"ratio": line["FPS"] / base, "its ratio": line["first epoch"] / base}
                lines[row].append(line)
                print_line(row.stage, row.title, line)
    if flags.repeat > 1:
        print(f"medians of {flags.repeat} runs")
        print_line("stage", "", None)
        for row in rows:
            medians = {name: statistics.median(line[name] for line in lines[row]) for name in lines[row][0]}
            print_line(row.stage, row.title, medians)


if __name__ == "__main__":
    sys.exit(run_entry("throughput.py", main))
