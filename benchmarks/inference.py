"""Command: how much faster the student answers than its teacher.

    python benchmarks/inference.py --data_dir glue_dir/SST-2 --vocabulary bert_base_uncased

BERT-base and TinyBERT4 with random weights predict SST-2's dev set, in the settings of the original implementation
(padded to 64, fp32, in the file's order) and in this project's (examples of like length together; with and without
bf16). The models take turns, so that a busy machine is busy for both; the median counts.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.common import machine, make_models
from data_processing.batching import Collator
from data_processing.cache import Cache
from data_processing.features import Features, load_features
from data_processing.tasks import find_task
from distillation.evaluation import predict
from distillation.flags import OneLineParser, path
from distillation.launch import run_entry
from distillation.runtime.device import Process, choose_device, open_device
from distillation.runtime.precision import Precision, choose_precision
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer


def in_the_files_order(
    model: TinyBertForSequenceClassification, features: Features, padding: Collator, process: Process
) -> None:
    """Batches of 32 as the file has them."""
    with torch.no_grad():
        for start in range(0, len(features), 32):
            batch = padding.collate(features, np.arange(start, min(start + 32, len(features)))).to(process.device)
            model(*batch.inputs, hidden_layers=(), attention_layers=()).logits.cpu()


def measure(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The median seconds of each, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if repetition:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = OneLineParser(prog="inference.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_dir", type=path, required=True, help="SST-2's folder; its dev.tsv is read")
    parser.add_argument("--vocabulary", type=path, required=True, help="a folder with an uncased vocab.txt")
    parser.add_argument("--device", default="auto", choices=("npu", "gpu", "cpu", "auto"))
    parser.add_argument("--repetitions", type=int, default=3)
    flags = parser.parse_args(list(arguments))
    process = Process(open_device(choose_device(flags.device), 0))
    tokenizer = BertTokenizer.from_pretrained(flags.vocabulary)
    features = load_features(flags.data_dir / "dev.tsv", find_task("SST-2"), tokenizer, 64, Cache(None, 0))
    maximum = Collator(True, 64)
    print(f"{machine()}, {os.environ.get('OMP_NUM_THREADS', 'default')} threads")
    print(f"{'':44}  {'BERT-base':>9}  {'TinyBERT4':>9}  ratio   (examples a second)")
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), flags.vocabulary)
        names = ("teacher", "student")
        for title, amp, grouped in (
            ("padded to 64, fp32, the file's order", False, False),
            ("like lengths together, fp32", False, True),
            ("like lengths together, bf16", True, True),
        ):
            precision = choose_precision(process.device, True, "O1", 128.0) if amp else Precision()
            models = {n: TinyBertForSequenceClassification.from_pretrained(Path(folder) / n).eval() for n in names}
            ways: dict[str, Callable[[], object]] = {}
            for name, model in models.items():
                precision.prepare_for_inference(model.to(process.device))
                if grouped:
                    longest = Collator(False, 64, bucketed_lengths=precision.bucketed_lengths)
                    ways[name] = partial(predict, model, features, longest, 32, process, precision)
                else:
                    ways[name] = partial(in_the_files_order, model, features, maximum, process)
            seconds = measure(ways, flags.repetitions)
            rates = [len(features) / seconds[name] for name in names]
            print(f"{title:44}  {rates[0]:9.1f}  {rates[1]:9.1f}  {rates[1] / rates[0]:5.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(run_entry("inference.py", main))
