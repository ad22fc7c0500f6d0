"""Command: seconds of a run from its start to the end of its first step.

    python benchmarks/start.py --data_dir glue_dir/SST-2 --vocabulary general_tinybert

main.py's intermediate stage on the whole of train.tsv and dev.tsv, BERT-base and TinyBERT4 with random weights, batch
32, maximum length 64, other flags at their defaults: a first run with an empty cache, and a second one that finds the
tokens and the teacher's outputs there. The time begins when the process is started. The models' files have just been
written: a disk that must be read first takes longer. With --repeat the medians count. The parts are Python's imports,
loading the models, reading and tokenizing both files, evaluating the teacher on dev.tsv, the first step, and the rest.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import build_parser, machine, make_models, number, read_lines, run_main
from benchmarks.timed_run import start_parts
from distillation.launch import run_entry


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    parser = build_parser("start.py", __doc__)
    parser.add_argument("--repeat", type=number, default=1, help="how many times both runs are made")
    flags = parser.parse_args(list(arguments))
    # The share of an epoch that is one step.
    steps = max(1, len(read_lines(flags.data_dir / "train.tsv")) // 32)
    flags_of_run = ["--num_train_epochs", repr(1 / steps), "--max_seq_length", "64", "--device", flags.device]
    starts: tuple[list[dict[str, float]], ...] = ([], [])
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_models(work, flags.vocabulary, flags.size)
        for repetition in range(flags.repeat):
            for start in starts:
                cache = work / f"cache{repetition}"
                times = run_main(work, flags.data_dir.absolute(), "intermediate", flags_of_run, cache=cache)[1]
                start.append(start_parts(times))
    print(f"{'seconds':12}  {'first run':>9}  {'second run':>10}")
    for part in starts[0][0]:
        first, second = (statistics.median(run[part] for run in start) for start in starts)
        print(f"{part:12}  {first:9.2f}  {second:10.2f}")


if __name__ == "__main__":
    sys.exit(run_entry("start.py", main))
