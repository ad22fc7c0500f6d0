"""Command: how much memory the project needs, and how that grows.

    python benchmarks/memory.py --data_dir glue_dir/SST-2 --vocabulary general_tinybert
    python benchmarks/memory.py ... --only loading --rows 10000,100000,1000000

Three tables. Loading: what reading, tokenizing and mapping a training file takes at first, and when it is found again;
more rows than train.tsv has are made of its own words. Processes: what each further process that has the same file
loaded adds; what is mapped is there once for all of them. Training: the most that a short run of each stage holds,
BERT-base teaching TinyBERT4 with random weights, batch 32, maximum length 64.

MB are millions of bytes. "Beyond imports" leaves out what Python and the libraries take. The most of a process is
its resident memory (VmHWM of Linux), the pages of mapped files that it has touched included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    ASK,
    REFERENCE,
    ROOT,
    STAGES,
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
from benchmarks.loading import bytes_on_disk, command, loaded, write_rows
from distillation.launch import run_entry
from transformer.errors import UserError

SETTINGS = {
    "reference settings": (*REFERENCE, *ASK),
    "defaults of main.py": (),
    "--amp": ("--amp",),
}


def loading(flags: argparse.Namespace, counts: Sequence[int], work: Path) -> None:
    """Prints what loading files of so many rows takes."""
    print("\nloading, each in a process of its own          at first                found again")
    print("     rows  tokens   seconds   beyond imports    seconds   beyond imports     on disk  bytes an example")
    for count in counts:
        file, cache = work / "loaded.tsv", work / f"cache{count}"
        write_rows(file, flags.data_dir / "train.tsv", count)
        first, again = (loaded(file, flags.vocabulary, cache) for _ in range(2))
        disk = bytes_on_disk(cache)
        more = [(run["peak"] - run["imports"]) / 1e6 for run in (first, again)]
        print(
            f"{count:9}  {first['tokens']:6.1f}  {first['seconds']:8.2f}  {more[0]:12.1f} MB  {again['seconds']:9.3f}  "
            f"{more[1]:12.1f} MB  {disk / 1e6:7.1f} MB  {disk / count:16.1f}",
            flush=True,
        )


def rollup(text: str) -> dict[str, int]:
    """Bytes by name of a process's smaps_rollup, and `Uss`: those of its pages that no other process has."""
    found = {}
    for line in text.splitlines():
        name, *values = line.replace(":", " ", 1).split()
        if len(values) == 2 and values[1] == "kB":
            found[name] = 1024 * int(values[0])
    found["Uss"] = found["Private_Clean"] + found["Private_Dirty"]
    return found


def added(shares: Sequence[Sequence[int]]) -> list[int]:
    """What each further process adds to the memory of all.

    Args:
        shares: the proportional shares (Pss) of one process, of two, and so on; their sum is what all take.
    """
    denominators = [sum(ofall) for ofall in shares]
    return [now - before for before, now in zip([0, *denominators], denominators, strict=False)]


def processes(flags: argparse.Namespace, rows: int, count: int, work: Path) -> None:
    """Prints what each further process adds that has the same file loaded."""
    if not Path("/proc/self/smaps_rollup").exists():
        print("\nprocesses: this system does not tell what they share (it has no /proc/PID/smaps_rollup)")
        return
    empty, file, cache = work / "one.tsv", work / "shared.tsv", work / "shared"
    write_rows(file, flags.data_dir / "train.tsv", rows)
    write_rows(empty, flags.data_dir / "train.tsv", 1)
    for each in (file, empty):
        loaded(each, flags.vocabulary, cache)  # which keeps it for the others
    size = bytes_on_disk(cache) / 1e6
    print(f"\nprocesses that have the same {rows} rows loaded ({size:.1f} MB mapped), beside processes with one row")
    print("                  with all rows            with one row")
    print("process    its own     it adds     its own     it adds")
    figures = []
    for each in (file, empty):
        shares, own = [], []
        with running(command(each, flags.vocabulary, cache, "--hold")) as start:
            for _ in range(count):
                everyone = [rollup(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")) for pid in start()]
                shares.append([one["Pss"] for one in everyone])
                own.append(everyone[-1]["Uss"])
        figures.append((own, added(shares)))
    for number in range(count):
        cells = [f"{values[number] / 1e6:7.1f} MB" for kind in figures for values in kind]
        print(f"{number + 1:7}", *cells, sep="  ", flush=True)


class Starter:
    """Starts one process more each time that it is called; returns the ids of all, the newest last."""

    def __init__(self, line: list[str]) -> None:
        self._line, self.started = line, list[subprocess.Popen[str]]()

    def __call__(self) -> list[int]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(self._line, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        self.started.append(process)
        assert process.stdout is not None  # it is a pipe
        if not process.stdout.readline():
            raise UserError("a process that was to load the file ended without a word")
        return [one.pid for one in self.started]


@contextmanager
def running(line: list[str]) -> Iterator[Starter]:
    """A starter whose processes end with the context."""
    starter = Starter(line)
    try:
        yield starter
    finally:
        for process in starter.started:
            process.communicate()  # closes its input, at which it ends


def training(flags: argparse.Namespace, steps: int, work: Path) -> None:
    """Prints the most memory that a short run of each stage holds."""
    make_models(work, flags.vocabulary, flags.size)
    make_data(work / "data", flags.data_dir, steps * 32)
    print(f"\ntraining, {steps} steps, each in a process of its own")
    print(f"{'stage':12}  {'settings':23}  {'most':>10}  {'beyond imports':>14}  {'on the device':>13}")
    for stage in [flags.stage] if flags.stage else STAGES:
        for title, settings in SETTINGS.items():
            given = ["--num_train_epochs", "1", "--max_seq_length", "64", "--device", flags.device]
            times = run_main(work, work / "data", [*given, *settings, *stage_flags(stage)]).times
            assert times is not None  # it was asked to be timed
            print(f"{stage:12}  {title:23}  {told(times['memory'])}", flush=True)


def told(memory: Mapping[str, int]) -> str:
    """The cells of a run's memory."""
    figures = memory["peak"], memory["peak"] - memory["imports"], memory["device"]
    cells = (f"{figure / 1e6:.1f} MB" if figure else "-" for figure in figures)
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, (10, 14, 13), strict=True))


def main(arguments: Sequence[str]) -> None:
    """Prints the tables."""
    parser = build_parser("memory.py", __doc__)
    add_run_flags(parser)
    parser.add_argument("--rows", default="10000,100000,1000000", help="of the loaded files; the last for processes")
    parser.add_argument("--processes", default="3", help="how many have a file loaded")
    parser.add_argument("--steps", default="10", help="of each run of training")
    parser.add_argument("--stage", choices=STAGES, help="train this one alone")
    parser.add_argument("--only", choices=("loading", "processes", "training"), help="this table alone")
    flags = parser.parse_args(list(arguments))
    rows = numbers(flags.rows, "--rows")
    count, steps = numbers(flags.processes, "--processes")[0], numbers(flags.steps, "--steps")[0]
    print(f"{machine()}, {threads()}")
    with tempfile.TemporaryDirectory() as folder:
        if flags.only in (None, "loading"):
            loading(flags, rows, Path(folder))
        if flags.only in (None, "processes"):
            processes(flags, rows[-1], count, Path(folder))
        if flags.only in (None, "training"):
            training(flags, steps, Path(folder))


if __name__ == "__main__":
    sys.exit(run_entry("memory.py", main))
