"""Parts that the benchmarks share: flags, models with random weights, rows of real text, runs of main.py, memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from distillation.checkpoints.outputs import save_model
from distillation.flags import OneLineParser, path
from distillation.runtime.device import seed_process
from transformer.configuration import RELU_HEAD_ARCHITECTURE, BertConfig
from transformer.errors import UserError
from transformer.heads import TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

ROOT = Path(__file__).resolve().parent.parent
# The shapes of teacher and student: BERT-base and TinyBERT4, or models that only show that a benchmark runs.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {"num_hidden_layers": 4, "hidden_size": 312, "intermediate_size": 1200}),
    "tiny": (
        {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
        {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    ),
}
STARTED = "BENCHMARK_STARTED"  # environment variable: when the run was started, in seconds since 1970
TIMES = "timed_run.json"  # benchmarks/timed_run.py writes it beside the logs


def build_parser(prog: str, description: str | None, runs: bool = True) -> OneLineParser:
    """Return a parser with the flags of every benchmark.

    Args:
        runs: whether the benchmark trains or predicts, and takes --device and --size.
    """
    parser = OneLineParser(prog=prog, description=(description or prog).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_dir", type=path, required=True, help="SST-2's folder, with train.tsv and dev.tsv")
    parser.add_argument("--vocabulary", type=path, required=True, help="a folder with an uncased vocab.txt")
    if runs:
        parser.add_argument("--device", default="cpu", choices=("npu", "gpu", "cpu", "auto"))
        parser.add_argument("--size", default="base", choices=tuple(SIZES), help="tiny: only to see that it runs")
    return parser


def numbers(text: str) -> list[int]:
    """Return the positive numbers of a flag, separated by commas."""
    parts = [int(part) for part in text.split(",")]
    if min(parts) < 1:
        raise ValueError(text)
    return parts


def number(text: str) -> int:
    """Return the positive number of a flag."""
    (value,) = numbers(text)
    return value


def make_models(folder: Path, vocabulary: Path, size: str) -> None:
    """Write `teacher` and `student` with random weights, in the shapes of a size, with a real vocabulary."""
    tokenizer = BertTokenizer.from_pretrained(vocabulary)
    seed_process(0, 0)
    both: dict[str, Any] = {"vocab_size": len(tokenizer), "architectures": [RELU_HEAD_ARCHITECTURE]}
    teacher, student = (BertConfig(**both, **shape) for shape in SIZES[size])
    for name, config, fit_size in (("teacher", teacher, 0), ("student", student, teacher.hidden_size)):
        model = TinyBertForSequenceClassification(config, 2, fit_size)
        save_model(folder / name, config, model.state_dict(), tokenizer)


def read_lines(file: Path) -> list[str]:
    """Return the header and the rows of a .tsv file.

    Raises:
        UserError: it cannot be read, or has no rows.
    """
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if len(lines) < 2:
        raise UserError(f"{file}: has no examples")
    return lines


def make_data(folder: Path, source: Path, count: int, length: int = 0) -> None:
    """Write `count` random rows of train.tsv, and a few for dev.tsv.

    Args:
        length: if not 0, each text is repeated until it has so many words. Each word is one WordPiece or more, so
            --max_seq_length cuts all texts to exactly this length.
    """
    header, *lines = read_lines(source / "train.tsv")
    if length:
        rows = [line.split("\t") for line in lines if line.split("\t")[0].split()]
        lines = ["\t".join([" ".join((text.split() * length)[:length]), *rest]) for text, *rest in rows]
    chosen = np.random.default_rng(0).choice(len(lines), size=min(count, len(lines)), replace=False)
    folder.mkdir()
    for name, part in (("train.tsv", [lines[n] for n in chosen]), ("dev.tsv", lines[:64])):
        (folder / name).write_text("\n".join([header, *part]) + "\n", encoding="utf-8")


def run_main(
    work: Path,
    data: Path,
    stage: str,
    flags: Sequence[str],
    *,
    timed: bool = True,
    tree: Path = ROOT,
    environment: Mapping[str, str] = MappingProxyType({}),
    cache: Path | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run main.py on the models in `work`, in a process of its own; return its metrics.jsonl and timed_run.json.

    Args:
        timed: whether through benchmarks/timed_run.py, which only this revision has; else the second result is empty.
        tree: the folder of main.py. environment: further environment variables.
        cache: its --cache_dir; without one the run finds nothing there and leaves nothing.

    Raises:
        UserError: it failed.
    """
    output = Path(tempfile.mkdtemp(dir=work))
    command = [sys.executable, *(["-m", "benchmarks.timed_run"] if timed else ["main.py"])]
    command += ["--task_name", "SST-2", "--do_lower_case", "--data_dir", str(data), "--eval_step", "1000000"]
    command += ["--teacher_model", str(work / "teacher"), "--student_model", str(work / "student")]
    command += ["--output_dir", str(output / "model"), "--fps_acc_dir", str(output), *flags]
    command += ["--pred_distill"] if stage == "prediction" else []
    if tree == ROOT:  # an older revision may not have the flag
        command += ["--cache_dir", str(cache or output / "cache")]
    variables = {**os.environ, **environment, STARTED: repr(time.time())}
    done = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"a run of main.py failed with status {done.returncode}: {last}")
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times = json.loads((output / TIMES).read_text(encoding="utf-8")) if timed else {}
    shutil.rmtree(output)
    return [json.loads(line) for line in lines], times


def peak_memory() -> int:
    """Return the most bytes that this process has held so far."""
    with suppress(OSError):  # Linux's ru_maxrss begins with that of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def machine() -> str:
    """Describe the machine and the threads of a process, for the first line of a benchmark."""
    model = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    return f"{model}, {cores} cores{gpu}, torch {torch.__version__}, {threads} threads a process"
