"""What loading one file's features takes: the benchmarks that tell of it run this in a process of its own.

    python -m benchmarks.loading FILE VOCABULARY CACHE [--hold]

Prints one line of JSON: `rows`, their mean length in `tokens`, the `seconds`, and bytes of memory: `imports` held
before, `peak` the most. With --hold it reads all of the features and keeps them until its standard input ends.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, forget_peak, peak, read_lines, resident
from data_processing.cache import Cache
from data_processing.features import load_features
from data_processing.tasks import find_task
from transformer.errors import UserError
from transformer.tokenization import BertTokenizer


def write_rows(target: Path, source: Path, count: int) -> None:
    """train.tsv's rows; beyond their number, rows in which some words are others of the file's."""
    header, *lines = read_lines(source)
    words = [word for line in lines for word in line.split("\t")[0].split()]
    draw = random.Random(0)
    with target.open("w", encoding="utf-8") as file:
        print(header, file=file)
        for number in range(count):
            text, label = lines[number % len(lines)].split("\t")
            if number >= len(lines):
                text = " ".join(draw.choice(words) if draw.random() < 0.4 else word for word in text.split())
            print(text, label, sep="\t", file=file)


def command(file: Path, vocabulary: Path, cache: Path, *flags: str) -> list[str]:
    """The command line of a process that loads a file; it is to be started in the repository's root."""
    places = [str(place.absolute()) for place in (file, vocabulary, cache)]
    return [sys.executable, "-m", "benchmarks.loading", *places, *flags]


def loaded(file: Path, vocabulary: Path, cache: Path) -> dict[str, float]:
    """What loading a file takes in a process of its own.

    Raises:
        UserError: it failed.
    """
    done = subprocess.run(command(file, vocabulary, cache), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError((done.stderr.strip() or f"{file}: cannot be loaded").splitlines()[-1])
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def bytes_on_disk(cache: Path) -> int:
    """The bytes of a cache's arrays."""
    return sum(file.stat().st_size for file in cache.rglob("*.npy"))


def main(arguments: Sequence[str]) -> None:
    """Loads the file and prints what it took."""
    file, vocabulary, cache = map(Path, arguments[:3])
    tokenizer = BertTokenizer.from_pretrained(vocabulary)
    imports = resident()
    forget_peak()
    begin = time.perf_counter()
    features = load_features(file, find_task("SST-2"), tokenizer, 64, Cache(cache, 10**12))
    seconds = time.perf_counter() - begin
    figures: dict[str, Any] = {"rows": len(features), "tokens": float(features.lengths.mean())}
    held = "--hold" in arguments
    if held:
        features.tokens.max(), features.first_lengths.max(), features.labels.max()
    print(json.dumps({**figures, "seconds": seconds, "imports": imports, "peak": peak()}), flush=True)
    if held:
        sys.stdin.read()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
