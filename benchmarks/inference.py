"""Command: examples per second of the student and of its teacher.

    python benchmarks/inference.py --data_dir glue_dir/SST-2 --vocabulary bert_base_uncased

BERT-base and TinyBERT4 with random weights predict SST-2's dev set: as the original implementation does (padded to 64,
fp32), and as this one does (padded to the longest, similar lengths together, with and without bf16). The models take
turns, so that other work on the machine slows both; the medians count, without the first.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import build_parser, machine, make_models, number
from data_processing.batching import Collator
from data_processing.cache import Cache
from data_processing.features import load_features
from data_processing.tasks import find_task
from distillation.evaluation import Predictor
from distillation.launch import run_entry
from distillation.runtime.device import Process, choose_device, open_device
from distillation.runtime.precision import choose_precision
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

NAMES = ("teacher", "student")
# The title of each row, and whether it uses bf16 and pads to the longest only.
ROWS = (
    ("padded to 64, fp32", False, False),
    ("padded to the longest, similar lengths together, fp32", False, True),
    ("padded to the longest, similar lengths together, bf16", True, True),
)


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    parser = build_parser("inference.py", __doc__)
    parser.add_argument("--repetitions", type=number, default=3)
    flags = parser.parse_args(list(arguments))
    process = Process(open_device(choose_device(flags.device), 0))
    tokenizer = BertTokenizer.from_pretrained(flags.vocabulary)
    features = load_features(flags.data_dir / "dev.tsv", find_task("SST-2"), tokenizer, 64, Cache(None, 0))
    print(machine())
    print(f"{'examples per second':54}  {'teacher':>9}  {'student':>9}  ratio")
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), flags.vocabulary, flags.size)
        for title, amp, longest in ROWS:
            precision = choose_precision(process.device, amp, "O1", 128.0)
            collator = Collator(not longest, 64, bucketed_lengths=precision.bucketed_lengths)
            predictor = Predictor(collator, 32, process, precision)
            models = [TinyBertForSequenceClassification.from_pretrained(Path(folder) / name).eval() for name in NAMES]
            for model in models:
                precision.prepare_for_inference(model.to(process.device))
            seconds: list[list[float]] = [[], []]
            for _ in range(flags.repetitions + 1):
                for model, own in zip(models, seconds, strict=True):
                    begin = time.perf_counter()
                    predictor.logits(model, features)
                    own.append(time.perf_counter() - begin)
            teacher, student = (len(features) / statistics.median(own[1:]) for own in seconds)
            print(f"{title:54}  {teacher:9.1f}  {student:9.1f}  {student / teacher:5.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(run_entry("inference.py", main))
