"""Command: shows what a student says of some sentences, and that it says the same twenty times.

    python test/demo.py --do_lower_case
    python test/demo.py --do_lower_case --model TinyBERT_dir --text "A film to remember."

It runs on the CPU, where equal input gives logits that are equal bit for bit, and writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_processing.batching import Batch, Padding
from data_processing.features import Examples, make_features
from data_processing.tasks import Task
from distillation.launch import run_entry
from distillation.models import LoadedModel, check_lengths, load_complete
from distillation.options import OneLineParser
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import read_weights
from transformer.loading import num_labels_of

REPETITIONS = 20
SENTENCES = (
    "a small, tender film that stays with you long after the lights come up .",
    "two hours of noise in search of a single idea .",
    "the cast has fun, and before long so do we .",
    "it wants to be a thriller, but every twist arrives ten minutes late .",
    "not without flaws, yet its honesty and its humour win in the end .",
    "even the dog looks as if it would rather be in another movie .",
)


def load_any(folder: Path, do_lower_case: bool, max_seq_length: int) -> tuple[LoadedModel, Task]:
    """Loads a classifier of single texts; its labels are named by its config.json, else 0, 1, …

    Raises:
        UserError: the folder holds no classifier, or it cannot read texts of that length.
    """
    names = BertConfig.from_pretrained(folder).id2label
    count = num_labels_of(read_weights(folder)) or len(names)
    labels = tuple(names.get(index, str(index)) for index in range(count))
    task = Task(name="the demo", text_columns=(0,), label_column=1, labels=labels)
    loaded = load_complete(folder, task, do_lower_case)
    check_lengths(loaded.model.config, folder, task, max_seq_length)
    return loaded, task


def make_batch(texts: Sequence[str], loaded: LoadedModel, max_seq_length: int) -> Batch:
    """All texts as one batch; each keeps what fits in max_seq_length WordPieces."""
    unlabelled = Examples((list(texts),), np.zeros(len(texts), dtype=np.int64))
    features = make_features(unlabelled, loaded.tokenizer, max_seq_length)
    padding = Padding(False, max_seq_length, loaded.tokenizer.pad_token_id)
    return padding.collate(features, np.arange(len(texts)))


@torch.no_grad()
def logits_of(loaded: LoadedModel, batch: Batch) -> torch.Tensor:
    """[texts, labels]."""
    return loaded.model(batch.input_ids, batch.token_type_ids, batch.attention_mask).logits


def shown(text: str, most: int = 80) -> str:
    """The text on one line, what cannot be printed as escapes, cut to `most` characters."""
    start = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return start[:most] + ("…" if len(text) > most or len(start) > most else "")


def main(arguments: Sequence[str]) -> None:
    """Loads, repeats, compares, prints."""
    parser = OneLineParser(prog="demo.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=Path("TinyBERT_dir"), help="the student's folder")
    parser.add_argument("--max_seq_length", type=int, default=64, help="in WordPieces, specials included")
    parser.add_argument("--do_lower_case", action="store_true", help="set for an uncased model")
    parser.add_argument("--text", action="append", help="a text of your own; may be given several times")
    flags = parser.parse_args(list(arguments))
    if flags.max_seq_length < 8:
        raise UserError(f"--max_seq_length {flags.max_seq_length}: expected 8 or more")
    loaded, task = load_any(flags.model, flags.do_lower_case, flags.max_seq_length)
    texts = flags.text or SENTENCES
    batch = make_batch(texts, loaded, flags.max_seq_length)

    first = logits_of(loaded, batch)
    for repetition in range(2, REPETITIONS + 1):
        if not torch.equal(logits_of(loaded, batch), first):
            sys.exit(f"demo.py: repetition {repetition} gave other logits than the first; on the CPU it must not")

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has not all letters ends no demo
    width = max(5, *map(len, task.labels))
    print(f"{'label':{width}}  probability  text")
    for text, probabilities in zip(texts, first.softmax(dim=1), strict=True):
        best = int(probabilities.argmax())
        print(f"{task.labels[best]:{width}}  {probabilities[best]:11.4f}  {shown(text)}")
    print(f"the logits were the same, bit for bit, in all {REPETITIONS} repetitions")


if __name__ == "__main__":
    sys.exit(run_entry("demo.py", main))
