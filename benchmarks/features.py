"""Command: how long text takes to become token ids, how much memory, and how long when it is found again.

    python benchmarks/features.py --data_dir glue_dir/SST-2 --vocabulary bert_base_uncased --rows 67349,1100000

More rows than train.tsv has are made of its own words, as augmentation makes them. Each figure comes from a process
of its own; the first includes reading the file, the second finds what the first has kept.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import machine
from data_processing.cache import Cache
from data_processing.features import load_features
from data_processing.tasks import find_task
from distillation.flags import OneLineParser, path
from distillation.launch import run_entry
from transformer.tokenization import BertTokenizer


def write_rows(target: Path, source: Path, count: int) -> None:
    """train.tsv's rows; beyond their number, rows in which some words are others of the file's."""
    header, *lines = source.read_text(encoding="utf-8").rstrip("\n").split("\n")
    words = [word for line in lines for word in line.split("\t")[0].split()]
    draw = random.Random(0)
    with target.open("w", encoding="utf-8") as file:
        print(header, file=file)
        for number in range(count):
            text, label = lines[number % len(lines)].split("\t")
            if number >= len(lines):
                text = " ".join(draw.choice(words) if draw.random() < 0.4 else word for word in text.split())
            print(text, label, sep="\t", file=file)


def once(file: Path, vocabulary: Path, cache: Path) -> dict[str, float]:
    """Loads the file's features: the seconds, and the process's peak memory in MB."""
    tokenizer = BertTokenizer.from_pretrained(vocabulary)
    begin = time.perf_counter()
    features = load_features(file, find_task("SST-2"), tokenizer, 64, Cache(cache, 10**12))
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"seconds": seconds, "peak": peak, "rows": len(features), "tokens": float(features.lengths.mean())}


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = OneLineParser(prog="features.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_dir", type=path, required=True, help="SST-2's folder; its train.tsv is read")
    parser.add_argument("--vocabulary", type=path, required=True, help="a folder with an uncased vocab.txt")
    parser.add_argument("--rows", default="67349,1100000", help="numbers of rows, split by commas")
    parser.add_argument("--once", nargs=2, type=Path, metavar=("FILE", "CACHE"), help="load one file, print JSON")
    flags = parser.parse_args(list(arguments))
    if flags.once:
        print(json.dumps(once(flags.once[0], flags.vocabulary, flags.once[1])))
        return
    print(machine())
    print(f"{'rows':>9}  {'tokens':>6}  {'tokenized':>9}  {'found again':>11}  {'peak memory':>11}  {'on disk':>8}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for count in map(int, flags.rows.split(",")):
            write_rows(work / "train.tsv", flags.data_dir / "train.tsv", count)
            command = [
                sys.executable,
                __file__,
                "--data_dir",
                str(flags.data_dir),
                "--vocabulary",
                str(flags.vocabulary),
            ]
            command += ["--once", str(work / "train.tsv"), str(work / f"cache{count}")]
            runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
            first, second = map(json.loads, runs)
            disk = sum(file.stat().st_size for file in (work / f"cache{count}").rglob("*.npy")) / 1e6
            print(
                f"{first['rows']:9}  {first['tokens']:6.1f}  {first['seconds']:7.2f} s  {second['seconds']:9.3f} s  "
                f"{first['peak']:8.0f} MB  {disk:5.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(run_entry("features.py", main))
