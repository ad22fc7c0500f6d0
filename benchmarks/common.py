"""What the benchmarks share: the machine, models of random weights, rows of real text, runs of main.py, memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distillation.checkpoints.outputs import save_model
from distillation.flags import OneLineParser, path
from distillation.runtime.device import seed_process
from transformer.configuration import RELU_HEAD_ARCHITECTURE, BertConfig
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("intermediate", "prediction")
REFERENCE = ("--padding", "max_length")
ASK = ("--no_teacher_cache",)
# The shapes of teacher and student: BERT-base and TinyBERT4, or models that only show that a benchmark runs.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {"num_hidden_layers": 4, "hidden_size": 312, "intermediate_size": 1200}),
    "tiny": (
        {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
        {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    ),
}
BEGAN = "BENCHMARK_BEGAN"  # the environment's name for when a run was started, in seconds since 1970
TIMES = "timed_run.json"  # what benchmarks/timed_run.py writes beside the logs


def build_parser(prog: str, description: str | None) -> OneLineParser:
    """A parser with the flags of every benchmark."""
    parser = OneLineParser(prog=prog, description=(description or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_dir", type=path, required=True, help="SST-2's folder, with train.tsv and dev.tsv")
    parser.add_argument("--vocabulary", type=path, required=True, help="a folder with an uncased vocab.txt")
    return parser


def add_run_flags(parser: OneLineParser) -> None:
    """The flags of the benchmarks that run main.py."""
    parser.add_argument("--device", default="cpu", choices=("npu", "gpu", "cpu", "auto"))
    parser.add_argument(
        "--size", default="base", choices=tuple(SIZES), help="tiny: small models, which only show that it runs"
    )


def numbers(text: str, flag: str) -> list[int]:
    """The positive numbers that a flag gives, split by commas.

    Raises:
        UserError: they are none.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{flag} {text}: give positive numbers, split by commas")
    return [int(part) for part in parts]


def make_models(folder: Path, vocabulary: Path, size: str = "base") -> None:
    """Writes `teacher` and `student` with random weights, in the shapes of a size, with a real vocabulary."""
    tokenizer = BertTokenizer.from_pretrained(vocabulary)
    seed_process(0, 0)
    both: dict[str, Any] = {"vocab_size": len(tokenizer), "architectures": [RELU_HEAD_ARCHITECTURE]}
    teacher, student = (BertConfig(**both, **shape) for shape in SIZES[size])
    for name, config, taught in (("teacher", teacher, 0), ("student", student, teacher.hidden_size)):
        model = TinyBertForSequenceClassification(config, 2, taught)
        save_model(folder / name, config, model.state_dict(), tokenizer)


def read_lines(file: Path) -> list[str]:
    """The header and the rows of a .tsv file.

    Raises:
        UserError: it is not there, or holds no rows.
    """
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if len(lines) < 2:
        raise UserError(f"{file}: holds no examples")
    return lines


def make_data(folder: Path, source: Path, count: int, length: int = 0) -> None:
    """`count` rows from all over train.tsv, and a few for dev.tsv.

    Args:
        length: where it is not 0, each text is repeated until it has so many words, which are as many WordPieces
            or more: a run whose --max_seq_length that is cuts all of them to exactly that length.
    """
    header, *lines = read_lines(source / "train.tsv")
    if length:
        lines = [_repeated(line, length) for line in lines if line.split("\t")[0].split()]
    chosen = np.random.default_rng(0).choice(len(lines), size=min(count, len(lines)), replace=False)
    folder.mkdir()
    (folder / "train.tsv").write_text("\n".join([header, *(lines[n] for n in chosen)]) + "\n", encoding="utf-8")
    (folder / "dev.tsv").write_text("\n".join([header, *lines[:64]]) + "\n", encoding="utf-8")


def _repeated(line: str, length: int) -> str:
    text, *rest = line.split("\t")
    words = text.split()
    return "\t".join([" ".join((words * -(-length // len(words)))[:length]), *rest])


@dataclass(frozen=True)
class Finished:
    """What a run of main.py has left.

    events: of its metrics.jsonl. times: of benchmarks/timed_run.py (see there); None where it did not run under it.
    """

    events: list[dict[str, Any]]
    times: dict[str, Any] | None


def run_main(
    work: Path,
    data: Path,
    flags: Sequence[str],
    *,
    timed: bool = True,
    tree: Path = ROOT,
    environment: dict[str, str] | None = None,
    cache: Path | None = None,
) -> Finished:
    """Runs main.py on the models in `work`, in a process of its own, and removes what it has written.

    Args:
        timed: whether under the stopwatch of benchmarks/timed_run.py; only this tree's own main.py can be.
        tree: whose main.py.
        environment: variables that it is given beside this process's.
        cache: its --cache_dir; without one nothing is found, and nothing kept for the next run.

    Raises:
        UserError: it failed.
    """
    output = Path(tempfile.mkdtemp(dir=work))
    command = [sys.executable, *(["-m", "benchmarks.timed_run"] if timed else ["main.py"])]
    command += ["--task_name", "SST-2", "--do_lower_case", "--data_dir", str(data), "--eval_step", "1000000"]
    command += ["--teacher_model", str(work / "teacher"), "--student_model", str(work / "student")]
    command += ["--output_dir", str(output / "model"), "--fps_acc_dir", str(output)]
    if tree == ROOT:  # an older revision may not have the flag
        command += ["--cache_dir", str(cache or output / "cache")]
    variables = {**os.environ, **(environment or {}), BEGAN: repr(time.time())}
    done = subprocess.run(
        [*command, *flags], cwd=tree, env=variables, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"a run of main.py failed with status {done.returncode}: {said}")
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times = json.loads((output / TIMES).read_text(encoding="utf-8")) if timed else None
    shutil.rmtree(output)
    return Finished([json.loads(line) for line in lines], times)


def stage_flags(stage: str) -> list[str]:
    """What makes main.py run a stage."""
    return ["--pred_distill"] if stage == "prediction" else []


def resident() -> int:
    """The bytes of memory that this process holds now; where the system does not tell, the most it has held."""
    with suppress(OSError):
        return _status("VmRSS")
    return _most_ever()


def peak() -> int:
    """The most bytes of memory that this process has held, since its start or since `forget_peak`."""
    with suppress(OSError):
        return _status("VmHWM")
    return _most_ever()


def forget_peak() -> None:
    """Makes `peak` begin anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> int:
    # Not getrusage's: Linux begins a process's ru_maxrss with that of the process that started it.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _most_ever() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def machine() -> str:
    """What the figures were measured on."""
    model = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {cores} cores{gpu}, torch {torch.__version__}"


def threads() -> str:
    """How many threads a process has, as far as the environment says."""
    return f"{os.environ.get('OMP_NUM_THREADS', 'default')} threads a process"
