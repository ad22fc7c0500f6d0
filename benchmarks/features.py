"""Command: how long text takes to become token ids, how much memory, and how long when it is found again.

    python benchmarks/features.py --data_dir glue_dir/SST-2 --vocabulary bert_base_uncased --rows 67349,1100000

More rows than train.tsv has are made of its own words, as augmentation makes them. Each figure comes from a process
of its own; the first includes reading the file, the second finds what the first has kept. The memory is the first
process's at its most, imports included (benchmarks/memory.py tells more of it).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import build_parser, machine, numbers
from benchmarks.loading import bytes_on_disk, loaded, write_rows
from distillation.launch import run_entry


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = build_parser("features.py", __doc__)
    parser.add_argument("--rows", default="67349,1100000", help="numbers of rows, split by commas")
    flags = parser.parse_args(list(arguments))
    counts = numbers(flags.rows, "--rows")
    print(machine())
    print(f"{'rows':>9}  {'tokens':>6}  {'tokenized':>9}  {'found again':>11}  {'peak memory':>11}  {'on disk':>8}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.tsv"
        for count in counts:
            cache = Path(folder) / f"cache{count}"
            write_rows(file, flags.data_dir / "train.tsv", count)
            first, second = (loaded(file, flags.vocabulary, cache) for _ in range(2))
            print(
                f"{first['rows']:9}  {first['tokens']:6.1f}  {first['seconds']:7.2f} s  {second['seconds']:9.3f} s  "
                f"{first['peak'] / 1e6:8.0f} MB  {bytes_on_disk(cache) / 1e6:5.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(run_entry("features.py", main))
