"""Not a test: what the tests of data augmentation share: a small masked LM, word vectors, and the command."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import numpy as np
import torch
from cases import Golden, Run, encoder_shapes, linear, weights_of, write_model, write_rows
from torch import Tensor

from data_processing import data_augmentation
from transformer.heads import BertForMaskedLM
from transformer.tokenization import BertTokenizer

VOCABULARY = Golden("sst2_small").case["vocab"]
VECTORS = {  # words of several pieces, words near them, and a word that no text holds
    "slowly": (1.0, 0.1, 0.0),
    "slow": (0.9, 0.2, 0.0),
    "quickly": (0.8, 0.3, 0.1),
    "hating": (0.0, 1.0, 0.1),
    "loving": (0.1, 0.9, 0.1),
    "hate": (0.0, 0.9, 0.3),
    "café": (0.2, 0.2, 1.0),
    "two words": (0.0, 0.99, 0.12),
    "unwantable": (0.1, 0.0, 1.0),
    "unwanted": (0.15, 0.0, 0.9),
}
SENTENCES = [
    ("the movie is slowly good", "1"),
    ("Hating THE Sad warm film , never dull", "0"),
    ("the unwantable plot was ZZZ bad", "0"),
    ('a "great" story and rock acting', "1"),
    ("it is not", "0"),
]


def head_shapes(config: dict[str, Any]) -> cases.Shapes:
    """The keys and shapes of a masked-LM head whose output weights are the word embeddings."""
    hidden = config["hidden_size"]
    norm = "cls.predictions.transform.LayerNorm"
    shapes = {"cls.predictions.bias": (config["vocab_size"],), f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    return shapes | linear("cls.predictions.transform.dense", hidden, hidden)


def config_of(**changes: Any) -> dict[str, Any]:
    """The shape of the small masked LM."""
    return Golden("sst2_small").config("teacher") | {"num_hidden_layers": 2} | changes


def masked_lm(folder: Path, head: bool = True, **changes: Any) -> Path:
    """The folder of a masked LM whose predictions depend on all of the text."""
    config = config_of(**changes)
    weights = weights_of(encoder_shapes(config) | (head_shapes(config) if head else {}))
    for key in weights:
        if key.endswith("weight") and "LayerNorm" not in key:
            weights[key] *= 5
    return write_model(folder, config, weights, VOCABULARY)


def glove(path: Path) -> Path:
    """A file of VECTORS."""
    lines = [" ".join([word, *(f"{value:g}" for value in values)]) for word, values in VECTORS.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def likeliest(
    model: BertForMaskedLM, tokenizer: BertTokenizer, words: Sequence[str], place: int, m: int, with_original: bool
) -> tuple[set[str], float]:
    """The plain way: one forward of the whole input for one word, all scores sorted.

    Returns the whole words among the `m` likeliest, and how far the last of these is from the next.
    """
    pieces = [tokenizer.tokenize(word) for word in words]
    start = sum(map(len, pieces[:place])) + 1
    flat = [piece for word in pieces for piece in word]
    masked = [*flat[: start - 1], "[MASK]", *flat[start:]]
    tokens = ["[CLS]", *masked, "[SEP]", *([*flat, "[SEP]"] if with_original else [])]
    segments = [0] * (len(masked) + 2) + [1] * (len(tokens) - len(masked) - 2)
    with torch.no_grad():
        scores: Tensor = model(torch.tensor([tokenizer.convert_tokens_to_ids(tokens)]), torch.tensor([segments]))[
            0, start
        ]
    values, ids = scores.sort(descending=True)
    found = tokenizer.convert_ids_to_tokens(ids[:m].tolist())
    return {t for t in found if not t.startswith("##") and not t.startswith("[")}, float(values[m - 1] - values[m])


def nearest(word: str, m: int) -> list[str]:
    """The plain way: all cosines sorted."""

    def cosine(other: str) -> float:
        a, b = np.array(VECTORS[word]), np.array(VECTORS[other])
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    others = sorted((other for other in VECTORS if other != word), key=cosine, reverse=True)
    return [other for other in others[:m] if " " not in other]


class Place:
    """A user's folders: `bert`, `vectors.txt`, `glue/SST-2`, and the command on them."""

    def __init__(self, folder: Path, rows: Sequence[Sequence[str]] = (("sentence", "label"), *SENTENCES)) -> None:
        self.folder = folder
        self.bert, self.vectors = masked_lm(folder / "bert"), glove(folder / "vectors.txt")
        self.data = folder / "glue" / "SST-2"
        write_rows(self.data / "train.tsv", rows)
        self.made = self.data / "train_aug.tsv"

    def flags(self, **changes: Any) -> list[str]:
        """The command's flags; None leaves one out, True is a bare flag."""
        values = {
            "pretrained_bert_model": self.bert,
            "glove_embs": self.vectors,
            "glue_dir": self.folder / "glue",
            "task_name": "SST-2",
            "device": "cpu",
            **changes,
        }
        flags: list[str] = []
        for name, value in values.items():
            if value is True:
                flags.append(f"--{name}")
            elif value is not None and value is not False:
                flags += [f"--{name}", str(value)]
        return flags

    def call(self, **changes: Any) -> Run:
        """The command in this process."""
        return cases.call(data_augmentation.main, self.flags(**changes), data_augmentation.PROG)

    def run(self, **changes: Any) -> Run:
        """The command in this process, which must succeed."""
        done = self.call(**changes)
        assert done.status == 0, done.err
        return done

    def fails(self, **changes: Any) -> str:
        """The command in this process, which must refuse and write nothing: its one line."""
        before = sorted(self.folder.rglob("*"))
        done = self.call(**changes)
        assert (done.status, done.err.count("\n")) == (2, 1), done
        assert sorted(self.folder.rglob("*")) == before, "something was written"
        return done.err.strip()

    def command(self, **changes: Any) -> list[str]:
        """What a process of its own is started with."""
        return [sys.executable, str(cases.ROOT / "data_processing" / "data_augmentation.py"), *self.flags(**changes)]

    def lines(self) -> list[str]:
        """What was made."""
        return self.made.read_text(encoding="utf-8").splitlines()


def many_rows(count: int) -> list[tuple[str, str]]:
    """A header and so many rows of a few words."""
    choose = random.Random(3)
    words = [word for word in VOCABULARY[5:60] if word.isalpha()] + ["slowly", "hating"]
    rows = [(" ".join(choose.choices(words, k=choose.randint(1, 5))), str(n % 2)) for n in range(count)]
    return [("sentence", "label"), *rows]
