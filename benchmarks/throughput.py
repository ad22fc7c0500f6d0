"""Command: how many examples a second both stages train, beside the settings of the original implementation.

    python benchmarks/throughput.py --data_dir glue_dir/SST-2 --vocabulary general_tinybert
    python benchmarks/throughput.py ... --reference_revision c25c186 --steps 40 --repeat 3
    python benchmarks/throughput.py ... --lengths 16,32,64,128     # how the cost grows with the length of the texts
    python benchmarks/throughput.py ... --processes 1,2            # how much faster several processes are
    python benchmarks/throughput.py ... --batches 32,128,512       # how the speed grows with the batch

Beside processes, which exchange gradients, stand as many runs apart at the same time, which exchange nothing: what
these are short of linear is the machine's own. Of them the percentages are the first's; the FPS, each by its own clock,
are added up, and the last to end has the machine to itself for a moment.

Lengths come from real text, weights are random: BERT-base teaches TinyBERT4, batch 32, maximum length 64. Every
row is a run of main.py with other flags, in a process of its own, on rows of the same train.tsv. The reference pads
to 64, computes in fp32, in random order, and asks the teacher in every step; with --reference_revision it is
that revision's main.py. Rows "alone" change one switch of the reference settings, rows "together" one after the other.

FPS are those of main.py's log; of a run of two epochs those of the second, the first and the asking of the teacher
being told apart. Tokens are those of the texts, [CLS] and [SEP] included and padding left out. The percentages are the
parts of a step's time (benchmarks/timed_run.py; student: its forward and the loss). On an accelerator they come
from a short run beside the one that is measured, which they would slow down. TFLOP/s are the operations of matrix
products that the texts need, padding left out; the limit is what products of large matrices in the row's precision
reach, measured just before and after the row.

Compare ratios of one run, of rows with like limits: machines are shared and differ from minute to minute. --repeat
takes the whole table several times in turn and ends with the medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as product
from benchmarks.common import (
    ROOT,
    STAGES,
    Finished,
    add_run_flags,
    build_parser,
    machine,
    make_data,
    make_models,
    numbers,
    run_main,
    stage_flags,
    threads,
)
from benchmarks.operations import matrix_rate, step_operations
from benchmarks.throughput_rows import KEEP, Row, rows, rows_of_batches, rows_of_lengths, rows_of_processes
from benchmarks.timed_run import STEP_PARTS, shares
from data_processing.cache import Cache
from data_processing.features import load_features
from data_processing.tasks import find_task
from distillation.flags import build_parser as build_main_parser
from distillation.launch import run_entry
from distillation.runtime.device import choose_device, open_device
from distillation.runtime.precision import choose_precision
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.tokenization import BertTokenizer

Line = dict[str, float]


@dataclass(frozen=True)
class Figures:
    """What a run came to.

    fps: examples a second, of several epochs in those after the first. first: in the first of several, the asking's
    time included. tokens: a second. shares: percentages of a step's time by part; empty where nothing tells them.
    operations: a second, of matrix products. limit: those of products of large matrices.
    """

    fps: float
    tokens: float
    first: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    operations: float = math.nan
    limit: float = math.nan


def speeds(
    events: list[dict[str, Any]], examples: int, epochs: int, epoch_steps: int, remembers: bool
) -> tuple[float, float | None]:
    """A run's examples a second, and those of the first of several epochs, by its metrics.jsonl.

    Args:
        events: in it a `train` line at the end of the first epoch, where there are several.
        examples, epoch_steps: of one epoch.
        remembers: whether the teacher is asked beforehand.

    Raises:
        UserError: the teacher was not asked beforehand, though it should have been.
    """
    (end,) = [event for event in events if event["event"] == "end"]
    if epochs == 1:
        return end["fps"], None
    first = next(event["fps"] for event in events if event["event"] == "train" and event["step"] == epoch_steps)
    asked = [event["seconds"] for event in events if event["event"] == "teacher_asked_once"]
    if remembers and not asked:
        raise UserError("the teacher was asked in every step; is there no room for what it says?")
    later = examples * (epochs - 1)
    seconds = end["fps_examples"] / end["fps"] - (end["fps_examples"] - later) / first
    return later / seconds, examples / (examples / first + sum(asked))


def measure(row: Row, work: Path, flags: argparse.Namespace) -> Figures:
    """Runs a row."""
    steps = flags.steps * (1 if row.slow else 4)
    mine = row.tree == ROOT
    device = open_device(choose_device(flags.device), 0)
    on_cpu = device.type == "cpu"
    limits = [_limit(row, device, flags.device_list)]
    runs, examples = _run(row, steps, work, flags, timed=mine and on_cpu)
    limits.append(_limit(row, device, flags.device_list))
    epoch_steps = -(-examples // row.batch)
    each = [speeds(run.events, examples, row.epochs, epoch_steps, row.remembers) for run in runs]
    fps = sum(fps for fps, _ in each)
    first = None if row.epochs == 1 else sum(first or math.nan for _, first in each)
    times = runs[0].times
    if mine and not on_cpu:
        short, examples = _run(row, flags.steps, work, flags, timed=True)
        times, epoch_steps = short[0].times, -(-examples // row.batch)
    parts = {}
    if times is not None:
        parts = shares(times["steps"], times["skipped"] if row.epochs == 1 else epoch_steps)
    lengths = _lengths(_data(row, steps, work, flags), row.length or 64, flags.vocabulary)
    kept = row.remembers or KEEP[0] in row.flags
    teacher, student = (BertConfig.from_pretrained(work / name) for name in ("teacher", "student"))
    operations = step_operations(row.stage, teacher, student, lengths, not kept) / len(lengths)
    return Figures(fps, fps * float(lengths.mean()), first, parts, fps * operations, statistics.mean(limits))


def _limit(row: Row, device: torch.device, device_list: str) -> float:
    """The rate of products of large matrices in the row's precision, on all of its devices or threads."""
    kind = choose_precision(device, "--amp" in row.flags, "O1", 1.0).name.partition("-")[0]
    dtype = {"bfloat16": torch.bfloat16, "fp32": torch.float32}.get(kind, torch.float16)  # apex's is fp16
    if device.type != "cpu":
        return (row.processes or len(device_list.split(","))) * matrix_rate(device, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(row.processes or before)
    rate = matrix_rate(device, dtype)
    torch.set_num_threads(before)
    return rate


def _run(row: Row, steps: int, work: Path, flags: argparse.Namespace, timed: bool) -> tuple[list[Finished], int]:
    """What the row's run has left, or its runs apart; and the examples of an epoch."""
    data = _data(row, steps, work, flags)
    examples = sum(1 for _ in (data / "train.tsv").open(encoding="utf-8")) - 1
    given = ["--max_seq_length", str(row.length or 64), "--num_train_epochs", str(row.epochs)]
    given += ["--train_batch_size", str(row.batch), "--device", flags.device]
    if row.epochs > 1:  # a line at the end of each epoch
        given += ["--output_txt_step", str(-(-examples // row.batch))]
    given += [*row.flags, *stage_flags(row.stage)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1") if row.processes else None
    ids = [str(number) for number in range(row.processes)]

    def run(device_list: str) -> Finished:
        command = [*given, "--device_list", device_list]
        return run_main(work, data, command, timed=timed, tree=row.tree, environment=one_thread)

    raise_on_all_ranks = ids if row.apart else [",".join(ids) or flags.device_list]
    try:
        with ThreadPoolExecutor(len(raise_on_all_ranks)) as pool:
            return list(pool.map(run, raise_on_all_ranks)), examples
    except UserError as error:
        raise UserError(f"{row.stage}, {row.title}: {error}") from None


def _data(row: Row, steps: int, work: Path, flags: argparse.Namespace) -> Path:
    data = work / f"data_{steps * row.batch}_{row.length}"
    if not data.exists():
        make_data(data, flags.data_dir, steps * row.batch, row.length)
    return data


def _lengths(data: Path, maximum: int, vocabulary: Path) -> np.ndarray:
    tokenizer = BertTokenizer.from_pretrained(vocabulary)
    return load_features(data / "train.tsv", find_task("SST-2"), tokenizer, maximum, Cache(None, 0)).lengths


def percent_of_linear(fps: float, processes: int, base_fps: float, base_processes: int) -> float:
    """How much of what so many processes could do at best, by what fewer did, they do."""
    return 100 * fps / (base_fps * processes / base_processes)


def compare(row: Row, figures: Figures, base_row: Row, base: Figures) -> Line:
    """A line of the table, beside the first of its stage; what is not known is left out."""
    line = {"FPS": figures.fps, "tokens/s": figures.tokens, **{f"{n} %": s for n, s in figures.shares.items()}}
    line |= {"TFLOP/s": figures.operations / 1e12, "limit": figures.limit / 1e12}
    if row.processes:
        line["% of linear"] = percent_of_linear(figures.fps, row.processes, base.fps, base_row.processes)
    elif row.length:
        line["cost"] = base.fps / figures.fps
    else:
        line["ratio"] = figures.fps / base.fps
    if figures.first is not None:
        line |= {"first epoch": figures.first, "its ratio": figures.first / base.fps}
    return line


def medians(lines: Sequence[Line]) -> Line:
    """The median of each figure of a row that was run several times."""
    return {name: statistics.median(line[name] for line in lines) for name in lines[0]}


class Table:
    """How lines are printed. `comparison` is the column that compares a row with its stage's first."""

    def __init__(self, comparison: str) -> None:
        decimals = {"FPS": 1, comparison: 0 if comparison == "% of linear" else 2, "tokens/s": 0}
        if comparison == "ratio":
            decimals |= {"first epoch": 1, "its ratio": 2}
        self._decimals = decimals | {"TFLOP/s": 3, "limit": 3} | {f"{name} %": 1 for name in STEP_PARTS}

    def head(self) -> None:
        """Prints the names of the columns."""
        self._print("stage", "", list(self._decimals))

    def line(self, row: Row, line: Line) -> None:
        """Prints a row."""
        values = (f"{line.get(name, math.nan):.{decimals}f}" for name, decimals in self._decimals.items())
        self._print(row.stage, row.title, [value.replace("nan", "-") for value in values])

    def _print(self, stage: str, title: str, cells: list[str]) -> None:
        widths = (max(8, len(name)) for name in self._decimals)
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{stage:12}  {title:33}", *aligned, sep="  ", flush=True)


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


def chosen(flags: argparse.Namespace, work: Path) -> list[Row]:
    """The rows that the flags ask for."""
    if flags.lengths is not None:
        table = rows_of_lengths(numbers(flags.lengths, "--lengths"))
    elif flags.processes is not None:
        table = rows_of_processes(numbers(flags.processes, "--processes"))
    elif flags.batches is not None:
        table = rows_of_batches(numbers(flags.batches, "--batches"))
    else:
        keeps = KEEP[0] in build_main_parser(product.ENTRY).format_help()
        table = rows(reference_tree(flags.reference_revision, work), keeps)
    table = [row for row in table if flags.stage in (None, row.stage)]
    if flags.only is None:
        return table
    bases = {row.stage: row for row in reversed(table)}.values()
    if not any(flags.only in row.title for row in table):
        raise UserError(f"--only {flags.only}: no row's title holds this text")
    return [row for row in table if flags.only in row.title or row in bases]


def main(arguments: Sequence[str]) -> None:
    """Runs all rows and prints the table."""
    parser = build_parser("throughput.py", __doc__)
    add_run_flags(parser)
    parser.add_argument("--steps", default="30", help="steps of the slow rows; the others take four times as many")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--reference_revision", help="the git revision whose main.py is the reference; default: today's")
    kind.add_argument("--lengths", help="instead: texts of exactly these many tokens, as 16,32,64,128")
    kind.add_argument("--processes", help="instead: so many processes of one thread, as 1,2")
    kind.add_argument("--batches", help="instead: so many examples a step, as 32,128,512")
    parser.add_argument("--device_list", default="0")
    parser.add_argument("--only", help="rows whose title holds this text, and each stage's first")
    parser.add_argument("--stage", choices=STAGES, help="this one alone")
    parser.add_argument("--repeat", default="1", help="how many times the whole table is taken")
    flags = parser.parse_args(list(arguments))
    (flags.steps,), (repeat,) = numbers(flags.steps, "--steps")[:1], numbers(flags.repeat, "--repeat")[:1]
    table = Table("% of linear" if flags.processes else "cost" if flags.lengths else "ratio")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        plan = chosen(flags, work)
        make_models(work, flags.vocabulary, flags.size)
        print(f"{machine()}, {'one thread a process' if flags.processes else threads()}")
        taken: list[list[Line]] = [[] for _ in plan]
        for number in range(1, repeat + 1):
            if repeat > 1:
                print(f"run {number} of {repeat}")
            table.head()
            bases: dict[str, tuple[Row, Figures]] = {}
            for row, lines in zip(plan, taken, strict=True):
                figures = measure(row, work, flags)
                lines.append(compare(row, figures, *bases.setdefault(row.stage, (row, figures))))
                table.line(row, lines[-1])
        if repeat > 1:
            print(f"medians of {repeat} runs")
            table.head()
            for row, lines in zip(plan, taken, strict=True):
                table.line(row, medians(lines))


if __name__ == "__main__":
    sys.exit(run_entry("throughput.py", main))
