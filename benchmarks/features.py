"""Command: time, memory and disk that a training file takes: tokenized, loaded from the cache, in further processes.

    python benchmarks/features.py --data_dir glue_dir/SST-2 --vocabulary bert_base_uncased --rows 67349,1100000

The rows of train.tsv are repeated where it has fewer. Each figure comes from a process of
its own: `at first` reads and tokenizes the file, `again` loads it from the cache. Memory is how far loading raised the
most that the process had held before (VmHWM of Linux, with the pages of mapped files that it has read). Processes that
load one file share its mapped pages: the second table has what each further one adds, and what it adds with a file of
one row. MB are millions of bytes.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, build_parser, machine, number, numbers, peak_memory, read_lines
from data_processing.cache import Cache
from data_processing.features import load_features
from data_processing.tasks import find_task
from distillation.launch import run_entry
from transformer.errors import UserError
from transformer.tokenization import BertTokenizer


def write_rows(target: Path, source: Path, count: int) -> None:
    """Write so many rows of a .tsv file, which are repeated where it has fewer."""
    header, *lines = read_lines(source)
    rows = itertools.islice(itertools.cycle(lines), count)
    target.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def load(file: Path, vocabulary: Path, cache: Path) -> None:
    """Load a file, print the figures as a line of JSON, and keep the features until the standard input ends."""
    tokenizer = BertTokenizer.from_pretrained(vocabulary)
    memory, begin = peak_memory(), time.perf_counter()
    features = load_features(file, find_task("SST-2"), tokenizer, 64, Cache(cache, 10**12))
    seconds, memory = time.perf_counter() - begin, peak_memory() - memory
    features.tokens.max(), features.first_lengths.max(), features.labels.max()  # reads all mapped pages
    print(json.dumps({"tokens": float(features.lengths.mean()), "seconds": seconds, "memory": memory}), flush=True)
    sys.stdin.read()


def load_in_processes(file: Path, vocabulary: Path, cache: Path, count: int) -> tuple[dict[str, float], list[int]]:
    """Load a file in so many processes; return the first one's figures, and the bytes that each adds.

    Raises:
        UserError: a process failed.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.features",
        *(str(path.absolute()) for path in (file, vocabulary, cache)),
    ]
    printed: list[str] = []
    totals = [0]
    with ExitStack() as stack:
        processes: list[subprocess.Popen[str]] = []
        for _ in range(count):
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            assert process.stdout is not None
            processes.append(process)
            printed.append(process.stdout.readline())
            if not printed[-1]:
                error = process.communicate()[1].strip().splitlines()[-1]
                raise UserError(error.removeprefix("features.py: error: "))
            stack.callback(process.communicate)  # ends its standard input, and so the process
            totals.append(sum(proportional_share(one.pid) for one in processes))
    figures: dict[str, float] = json.loads(printed[0])
    return figures, [after - before for before, after in itertools.pairwise(totals)]


def proportional_share(pid: int) -> int:
    """Return a process's memory in bytes, a page of n processes counting 1/n; 0 where the system has no figure."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    found = re.search(r"^Pss:\s+(\d+) kB$", rollup.read_text(encoding="ascii"), re.M) if rollup.exists() else None
    return 0 if found is None else 1024 * int(found[1])


def main(arguments: Sequence[str]) -> None:
    """Print the tables; as `load_in_processes` starts it, with three paths, load a file."""
    if len(arguments) == 3 and not arguments[0].startswith("-"):
        load(*map(Path, arguments))
        return
    parser = build_parser("features.py", __doc__, runs=False)
    parser.add_argument("--rows", type=numbers, default="67349,1100000", help="of the first table, separated by commas")
    parser.add_argument("--processes", type=number, default=3, help="of the second table, with the last number of rows")
    flags = parser.parse_args(list(arguments))
    print(machine())
    print("     rows  tokens |  at first         memory |     again         memory |    on disk  bytes per row")
    with tempfile.TemporaryDirectory() as work:
        added = []
        for count in (*flags.rows, 1):
            file, cache = Path(work) / "rows.tsv", Path(work) / f"cache{count}"
            write_rows(file, flags.data_dir / "train.tsv", count)
            first = load_in_processes(file, flags.vocabulary, cache, 1)[0]
            again, added_bytes = load_in_processes(file, flags.vocabulary, cache, flags.processes)
            added.append(added_bytes)
            disk = sum(array.stat().st_size for array in cache.rglob("*.npy"))
            cells = [f"{run['seconds']:8.3f} s  {run['memory'] / 1e6:9.1f} MB" for run in (first, again)]
            cells += [f"{disk / 1e6:8.1f} MB", f"{disk / count:13.1f}"]
            print(f"{count:9}  {first['tokens']:6.1f}", *cells, sep="  ", flush=True)
    print(f"\nprocess   adds with {flags.rows[-1]:9} rows   with 1 row")
    for place, figures in enumerate(zip(*added[-2:], strict=True), start=1):
        print(f"{place:7}  {figures[0] / 1e6:18.1f} MB  {figures[1] / 1e6:10.1f} MB")


if __name__ == "__main__":
    sys.exit(run_entry("features.py", main))
