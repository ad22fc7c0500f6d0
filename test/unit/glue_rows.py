"""Not a test: files of each task of GLUE, with rows of a small vocabulary.

The tasks are described here independently of the project's own table, which the tests compare with it. All words are
in the vocabulary, so that each word is one WordPiece.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cases import Golden, Workplace, encoder_shapes, linear, weights_of, write_model, write_rows
from torch import Tensor

import task_distill
from transformer.heads import TinyBertForSequenceClassification

VOCABULARY = Golden("sst2_small").case["vocab"]
MARKS = ("good", "bad", "dull")  # the word that determines the label, by its id
WORDS = [word for word in VOCABULARY[6:56] if word.isalpha() and word not in MARKS]
TRAIN, DEV, TEST = 12, 10, 7  # rows; not divisible by the batches of 4 in several tests
LONG = 50  # three times as many words exceed every task's length


class Row(NamedTuple):
    """An example: its id in a test file, its label as files write it, and its one or two texts."""

    id: str
    label: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """The form of a task's files, with columns split by `|`. The row of names is empty if GLUE writes none.

    train, dev, test: the row of names, and the template of the other rows.
    labels: as the files write them; empty for scores.
    epochs, length: the defaults of the intermediate stage and of all stages.
    """

    train: tuple[str, str]
    test: tuple[str, str]
    labels: tuple[str, ...]
    epochs: int
    length: int
    metrics: tuple[str, ...]
    chosen_by: str
    submission: dict[str, str]
    dev: tuple[str, str] | None = None
    dev_files: tuple[str, ...] = ("dev.tsv",)
    words: tuple[str, ...] = ()

    @property
    def texts(self) -> int:
        return 2 if "{b}" in self.train[1] else 1


TWO = ("0", "1")
ENTAILED = ("entailment", "not_entailment")
PAIR = ("index|sentence1|sentence2|label", "7|{a}|{b}|{label}"), ("index|sentence1|sentence2", "{id}|{a}|{b}")
ACCURACY = ("acc",), "acc"
PAIR_ACCURACY = ("acc", "f1", "acc_and_f1"), "acc"
MNLI_START = "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse"
MNLI_NAMES = f"{MNLI_START}|sentence1|sentence2"
MNLI_CELLS = "rock|people|never|rock|people|never|rock|{a}|{b}"
MNLI: dict[str, Any] = {
    "train": (f"{MNLI_NAMES}|label1|gold_label", f"9|{MNLI_CELLS}|neutral|{{label}}"),
    "dev": (
        f"{MNLI_NAMES}|label1|label2|label3|label4|label5|gold_label",
        f"9|{MNLI_CELLS}|neutral|neutral|entailment|neutral|neutral|{{label}}",
    ),
    "test": (MNLI_NAMES, f"{{id}}|{MNLI_CELLS}"),
    "labels": ("contradiction", "entailment", "neutral"),
    "metrics": ("acc",),
    "chosen_by": "acc",
}
FORMS = {
    "CoLA": Form(
        ("", "gj04|{label}|rock|{a}"),
        ("index|sentence", "{id}|{a}"),
        TWO,
        50,
        64,
        ("mcc",),
        "mcc",
        {"test.tsv": "CoLA.tsv"},
        words=("unacceptable", "acceptable"),
    ),
    "MNLI": Form(
        **MNLI,
        epochs=5,
        length=128,
        submission={"test_matched.tsv": "MNLI-m.tsv", "test_mismatched.tsv": "MNLI-mm.tsv"},
        dev_files=("dev_matched.tsv", "dev_mismatched.tsv"),
    ),
    "MNLI-mm": Form(
        **MNLI,
        epochs=3,
        length=128,
        submission={"test_mismatched.tsv": "MNLI-mm.tsv"},
        dev_files=("dev_mismatched.tsv",),
    ),
    "MRPC": Form(
        ("Quality|#1 ID|#2 ID|#1 String|#2 String", "{label}|701|702|{a}|{b}"),
        ("index|#1 ID|#2 ID|#1 String|#2 String", "{id}|703|704|{a}|{b}"),
        TWO,
        20,
        128,
        *PAIR_ACCURACY,
        {"test.tsv": "MRPC.tsv"},
        words=("not_equivalent", "equivalent"),
    ),
    "SST-2": Form(
        ("sentence|label", "{a}|{label}"),
        ("index|sentence", "{id}|{a}"),
        TWO,
        10,
        64,
        *ACCURACY,
        {"test.tsv": "SST-2.tsv"},
        words=("negative", "positive"),
    ),
    "STS-B": Form(
        (
            "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
            "3|rock|people|2012|never|rock|people|{a}|{b}|{label}",
        ),
        (
            "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2",
            "{id}|rock|people|2012|never|rock|people|{a}|{b}",
        ),
        (),
        20,
        128,
        ("pearson", "spearmanr", "corr"),
        "corr",
        {"test.tsv": "STS-B.tsv"},
        words=("score",),
    ),
    "QQP": Form(
        ("id|qid1|qid2|question1|question2|is_duplicate", "5|rock|people|{a}|{b}|{label}"),
        ("id|question1|question2", "{id}|{a}|{b}"),
        TWO,
        5,
        128,
        *PAIR_ACCURACY,
        {"test.tsv": "QQP.tsv"},
        words=("not_duplicate", "duplicate"),
    ),
    "QNLI": Form(*PAIR, ENTAILED, 10, 128, *ACCURACY, {"test.tsv": "QNLI.tsv"}),
    "RTE": Form(*PAIR, ENTAILED, 20, 128, *ACCURACY, {"test.tsv": "RTE.tsv"}),
    "WNLI": Form(*PAIR, TWO, 3, 128, *ACCURACY, {"test.tsv": "WNLI.tsv"}, words=("not_entailment", "entailment")),
}


def rows_of(form: Form, count: int, seed: int) -> list[Row]:
    """Return rows whose last text holds the word of their label; for scores, more often the higher the score."""
    choose = random.Random(seed)
    rows = []
    for number in range(count):
        id_of_label = number % max(1, len(form.labels))
        label = form.labels[id_of_label] if form.labels else f"{5 * number / (count - 1):.2f}"
        marks = [MARKS[id_of_label]] if form.labels else [MARKS[0]] * number
        last = " ".join(["the", *marks, *choose.choices(WORDS, k=choose.randint(1, 6))])
        # In these files a quotation mark is a character like any other.
        texts = (f'" {choose.choice(("a", "one"))} story', last) if form.texts == 2 else (f'" {last}',)
        rows.append(Row(str(100 * seed + 7 * number), label, texts))
    return rows


def write_file(path: Path, form: tuple[str, str], rows: Sequence[Row]) -> None:
    """Write a .tsv file: a row of names and a template, as in `Form`."""
    names, template = form
    lines = [names.split("|")] if names else []
    for row in rows:
        cells = {"id": row.id, "label": row.label, "a": row.texts[0], "b": row.texts[-1]}
        lines.append([cell.format_map(cells) for cell in template.split("|")])
    write_rows(path, lines)


def workplace(folder: Path, name: str) -> tuple[Workplace, dict[str, list[Row]]]:
    """Write a task's files, a teacher's encoder of two layers, and a student of one; return the rows by file."""
    form, golden = FORMS[name], Golden("sst2_small")
    place = Workplace(folder, name, form.length)
    place.entry = task_distill
    for role, layers in (("teacher", 2), ("student", 1)):
        config = golden.config(role) | {
            "num_hidden_layers": layers,
            "max_position_embeddings": 128,
            "initializer_range": 0.5,
        }
        projection = linear("fit_dense", config["hidden_size"], 48) if role == "student" else {}
        weights = weights_of(encoder_shapes(config) | projection)
        for key in weights:
            if key.endswith("weight") and "LayerNorm" not in key:
                weights[key] *= 4  # so that predictions depend on all tokens, and a few training steps suffice
        write_model(folder / role, config, weights, VOCABULARY)
    rows = {"train.tsv": rows_of(form, TRAIN, 0)}
    rows |= {file: rows_of(form, DEV, seed) for seed, file in enumerate(form.dev_files, start=1)}
    rows |= {file: rows_of(form, TEST, seed) for seed, file in enumerate(form.submission, start=3)}
    for file in (form.dev_files[0], *form.submission):
        first = rows[file][0]
        rows[file][0] = first._replace(texts=(*first.texts[:-1], " ".join(["film", "story", "fun"] * LONG)))
    for file, content in rows.items():
        kind = form.train if file == "train.tsv" else form.dev or form.train if file in form.dev_files else form.test
        write_file(place.data / file, kind, content)
    return place, rows


def inputs_of(row: Row, length: int) -> tuple[Tensor, Tensor]:
    """Return ids and segments [1, length] of [CLS] first [SEP] second [SEP]; the last text is truncated."""
    ids, segments = [VOCABULARY.index("[CLS]")], [0]
    for number, text in enumerate(row.texts):
        pieces = [*text.split()[: length - len(ids) - 1], "[SEP]"]
        ids += [VOCABULARY.index(piece if piece in VOCABULARY else "[UNK]") for piece in pieces]
        segments += [number] * len(pieces)
    return torch.tensor([ids]), torch.tensor([segments])


def logits_of(folder: Path, rows: Sequence[Row], length: int) -> np.ndarray:
    """Return a model's logits [rows, outputs], one row per batch."""
    model = TinyBertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return np.stack([model(*inputs_of(row, length)).logits[0].numpy() for row in rows])
