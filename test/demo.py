"""Command: print a student's predictions for some texts, and check that its logits are the same 20 times.

    python test/demo.py --do_lower_case
    python test/demo.py --do_lower_case --model TinyBERT_dir --text "A film to remember."
    python test/demo.py --model my_student --task_name MNLI --data_dir glue_dir/MNLI

It runs on the CPU, where the same input gives the same bits, and writes no file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_processing.batching import Batch, Collator
from data_processing.examples import Examples, read_examples, unlabelled
from data_processing.features import make_features
from data_processing.task_files import read_task_file
from data_processing.tasks import Task, find_task
from distillation.flags import OneLineParser, path
from distillation.launch import run_entry
from distillation.models import LoadedModel, check_lengths, choose_case, label_names, load_complete
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


def any_task(folder: Path) -> Task:
    """Return a task of single texts for the model, with the labels of its config.json, otherwise 0, 1, …"""
    names = BertConfig.from_pretrained(folder).id2label
    count = num_labels_of(read_weights(folder)) or len(names)
    labels = () if count == 1 else tuple(names.get(index, str(index)) for index in range(count))
    return Task(name="the demo", text_columns=(0,), label_column=1, labels=labels)


def dev_rows(task: Task, data_dir: Path) -> Examples:
    """Return as many rows of the task's dev file as there are SENTENCES, evenly spaced."""
    rows = read_examples(data_dir / task.dev_files[0], task)
    chosen = np.unique(np.linspace(0, len(rows) - 1, len(SENTENCES)).astype(int))
    return Examples(tuple([side[row] for row in chosen] for side in rows.texts), rows.labels[chosen])


def given_texts(texts: Sequence[str], seconds: Sequence[str] | None, task: Task, task_named: bool) -> Examples:
    """Return the user's texts, in pairs if there are second texts.

    Raises:
        UserError: the numbers of first and second texts differ, or the task has the other form.
    """
    if seconds is not None and len(seconds) != len(texts):
        raise UserError(f"there are {len(texts)} --text and {len(seconds)} --text_b: a pair needs one of each")
    if task_named and (seconds is not None) != (len(task.text_columns) == 2):
        raise UserError(f"{task.name} has {'pairs: give --text_b too' if seconds is None else 'single texts'}")
    return unlabelled(texts, task, seconds)


def make_batch(examples: Examples, loaded: LoadedModel, max_seq_length: int) -> Batch:
    """Return all examples as one batch, cut to max_seq_length WordPieces."""
    features = make_features(examples, loaded.tokenizer, max_seq_length)
    padding = Collator(False, max_seq_length, loaded.tokenizer.pad_token_id)
    return padding.collate(features, np.arange(len(examples)))


@torch.no_grad()
def logits_of(loaded: LoadedModel, batch: Batch) -> torch.Tensor:
    """Return the logits, [examples, outputs]."""
    return loaded.model(batch.input_ids, batch.token_type_ids, batch.attention_mask).logits


def printable(text: str, most: int = 80) -> str:
    """Return the text on one line, cut to `most` characters, with escapes for unprintable characters."""
    start = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return start[:most] + ("…" if len(text) > most or len(start) > most else "")


def table(task: Task, logits: torch.Tensor, examples: Examples, labelled: bool) -> list[list[str]]:
    """Return rows of cells, headings first: prediction, probability, the label in the file, the texts."""
    pairs = len(examples.texts) == 2
    names = [printable(name, 30) for name in label_names(task)]
    headings = ["score"] if task.is_regression else ["label", "probability"]
    headings += (["in the file"] if labelled else []) + (["first text", "second text"] if pairs else ["text"])
    rows = [headings]
    for number, (output, label) in enumerate(zip(logits, examples.labels, strict=True)):
        if task.is_regression:
            cells, right = [f"{float(output):.2f}"], f"{label:.2f}"
        else:
            best = int(output.argmax())
            cells, right = [names[best], f"{output.softmax(dim=0)[best]:.4f}"], names[label]
        cells += ([right] if labelled else []) + [
            printable(side[number], 50 if pairs else 80) for side in examples.texts
        ]
        rows.append(cells)
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the flags.

    Raises:
        UserError: a flag is invalid.
    """
    parser = OneLineParser(prog="demo.py", description=(__doc__ or "TinyBERT").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=path, default=Path("TinyBERT_dir"), help="the student's folder")
    parser.add_argument(
        "--max_seq_length",
        type=int,
        help="maximum number of WordPieces, including special tokens (default: the task's, or 64)",
    )
    parser.add_argument("--do_lower_case", action="store_true", help="the model is uncased")
    parser.add_argument("--text", action="append", help="a text; may be given several times")
    parser.add_argument("--text_b", action="append", help="the second text of a pair, one for each --text")
    parser.add_argument("--task_name", help="the GLUE task of the model")
    parser.add_argument("--task_file", type=path, help="the JSON file of your own task, instead of --task_name")
    parser.add_argument("--data_dir", type=path, help="the task's data; shows rows of its dev file")
    flags = parser.parse_args(list(arguments))
    if flags.max_seq_length is not None and flags.max_seq_length < 8:
        raise UserError(f"--max_seq_length {flags.max_seq_length}: expected 8 or more")
    if flags.task_name is not None and flags.task_file is not None:
        raise UserError("give only one of --task_name and --task_file")
    if flags.data_dir is not None and flags.task_name is None and flags.task_file is None:
        raise UserError("--data_dir needs --task_name or --task_file")
    if flags.text_b is not None and flags.text is None:
        raise UserError("--text_b is the second text of a pair; give --text too")
    return flags


def main(arguments: Sequence[str]) -> None:
    """Run the model on the texts 20 times, compare the logits, print the predictions."""
    flags = parse_flags(arguments)
    task = (
        read_task_file(flags.task_file) if flags.task_file else find_task(flags.task_name) if flags.task_name else None
    )
    task_named, task = task is not None, task or any_task(flags.model)
    lower = choose_case(True if flags.do_lower_case else task.lower_case, (flags.model,))
    loaded = load_complete(flags.model, task, lower)
    length = flags.max_seq_length or task.max_seq_length or 64
    check_lengths(loaded.model.config, flags.model, task, length)
    data_dir = flags.data_dir or (flags.task_file.parent if flags.task_file else None)
    labelled = flags.text is None and data_dir is not None
    if flags.text is None and data_dir is not None:
        examples = dev_rows(task, data_dir)
    else:
        examples = given_texts(flags.text or SENTENCES, flags.text_b, task, task_named)
    batch = make_batch(examples, loaded, length)

    first = logits_of(loaded, batch)
    for repetition in range(2, REPETITIONS + 1):
        if not torch.equal(logits_of(loaded, batch), first):
            sys.exit(f"demo.py: repetition {repetition} gave other logits than the first")

    print(aligned(table(task, first, examples, labelled)))
    print(f"the logits were the same, bit for bit, in all {REPETITIONS} repetitions")


if __name__ == "__main__":
    sys.exit(run_entry("demo.py", main))
