"""Command: how long a run takes from its start to the end of its first step.

    python benchmarks/start.py --data_dir glue_dir/SST-2 --vocabulary general_tinybert

main.py's intermediate stage on the whole of train.tsv and dev.tsv, BERT-base teaching TinyBERT4 with random weights,
batch 32, maximum length 64, in its default settings: at first, nothing being cached, and once more, when tokens and
what the teacher reaches on dev.tsv are remembered. The time begins when the process is started. The models' files
have just been written: a disk that must be read first takes longer. Of several repetitions the medians count.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    add_run_flags,
    build_parser,
    machine,
    make_models,
    numbers,
    read_lines,
    run_main,
    threads,
)
from benchmarks.timed_run import START_PARTS
from distillation.launch import run_entry

TITLES = {
    "imports": "Python and its imports",
    "models": "loading the models",
    "tokenizing": "reading and tokenizing train.tsv and dev.tsv",
    "evaluation": "evaluating the teacher on dev.tsv",
    "asking": "asking the teacher for all epochs",
    "first step": "the first step",
    "rest": "the rest",
}


def medians(starts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median seconds of each part that any of the starts has, and of the `whole`."""
    parts = [part for part in START_PARTS if part == "rest" or any(start[part] for start in starts)]
    result = {part: statistics.median(start[part] for start in starts) for part in parts}
    return result | {"whole": statistics.median(sum(start.values()) for start in starts)}


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = build_parser("start.py", __doc__)
    add_run_flags(parser)
    parser.add_argument("--repeat", default="1", help="how many times both runs are taken")
    flags = parser.parse_args(list(arguments))
    repeat = numbers(flags.repeat, "--repeat")[0]
    # An epoch's share that is one step: the rest of the epoch is of no interest here.
    steps = max(1, len(read_lines(flags.data_dir / "train.tsv")) // 32)
    given = ["--num_train_epochs", repr(1 / steps), "--max_seq_length", "64", "--device", flags.device]
    starts: tuple[list[dict[str, float]], ...] = ([], [])
    print(f"{machine()}, {threads()}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_models(work, flags.vocabulary, flags.size)
        for number in range(repeat):
            for start in starts:
                times = run_main(work, flags.data_dir.absolute(), given, cache=work / f"cache{number}").times
                assert times is not None  # it was asked to be timed
                start.append(times["start"])
    first, second = map(medians, starts)
    print(f"{'seconds':46}  {'first run':>9}  {'second run':>10}")
    for part in first:
        title = TITLES.get(part, "to the end of the first step")
        print(f"{title:46}  {first[part]:9.2f}  {second.get(part, 0.0):10.2f}")


if __name__ == "__main__":
    sys.exit(run_entry("start.py", main))
