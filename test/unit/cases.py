"""What the tests share: the golden cases, small models in folders, and runs of the project's commands.

The golden figures were measured by running the original public implementation in fp32 on a CPU, with
dropout 0 and everything padded to the maximum. A state dict's tensors are made from their keys alone,
so no weights are stored: `data/NAME/case.json` has shapes, vocabulary, rows and hyper-parameters,
`data/NAME/golden.npz` what came out.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import main
from distillation.launch import run_entry

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"
LACKING = "this machine lacks "

Shapes = dict[str, tuple[int, ...]]


def encoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """The keys and shapes of a BERT encoder, as the released checkpoints have them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "bert.embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "bert.embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "bert.embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
        "bert.embeddings.LayerNorm.weight": (hidden,),
        "bert.embeddings.LayerNorm.bias": (hidden,),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{number}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= linear(f"{layer}.{name}", hidden, hidden)
        shapes |= linear(f"{layer}.intermediate.dense", hidden, inner)
        shapes |= linear(f"{layer}.output.dense", inner, hidden)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}.{name}.weight": (hidden,), f"{layer}.{name}.bias": (hidden,)}
    return shapes | linear("bert.pooler.dense", hidden, hidden)


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    """The keys and shapes of one linear map."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def value_of(key: str, shape: tuple[int, ...]) -> Tensor:
    """The golden cases' rule: a tensor from its key alone."""
    generator = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    values = generator.standard_normal(shape).astype(np.float32) * np.float32(0.05)
    return torch.from_numpy(values + np.float32("LayerNorm.weight" in key))


def weights_of(shapes: Shapes) -> dict[str, Tensor]:
    """A state dict of these shapes."""
    return {key: value_of(key, shape) for key, shape in shapes.items()}


def write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], vocab: Sequence[str]) -> Path:
    """A model's folder in the form of the original releases."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    torch.save(dict(weights), folder / "pytorch_model.bin")
    return folder


def write_rows(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    """A .tsv file, written as GLUE writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of FOLDER/config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Lets `change` alter the tensors of FOLDER/pytorch_model.bin in place."""
    weights = read_bin(folder)
    change(weights)
    torch.save(weights, folder / "pytorch_model.bin")


def read_bin(folder: Path) -> dict[str, Tensor]:
    """The tensors of FOLDER/pytorch_model.bin, by torch alone."""
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


class Golden:
    """A golden case: `case` is its case.json, `figures` its golden.npz."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.case = json.loads((DATA / name / "case.json").read_text(encoding="utf-8"))

    @cached_property
    def figures(self) -> dict[str, np.ndarray]:
        with np.load(DATA / self.name / "golden.npz") as archive:
            return dict(archive)

    def tensor(self, name: str) -> Tensor:
        """One of the figures."""
        return torch.from_numpy(np.asarray(self.figures[name]))

    def config(self, role: str) -> dict[str, Any]:
        """The config.json of `teacher` or `student`."""
        return {
            "attention_probs_dropout_prob": self.case["dropout"],
            "hidden_act": "gelu",
            "hidden_dropout_prob": self.case["dropout"],
            "initializer_range": 0.02,
            "max_position_embeddings": self.case["max_position_embeddings"],
            "type_vocab_size": 2,
            "vocab_size": len(self.case["vocab"]),
            **self.case[role],
        }

    def weights(self, role: str) -> dict[str, Tensor]:
        """The state dict of `teacher` or `student`, projection included."""
        config, labels = self.config(role), self.case["num_labels"]
        hidden = config["hidden_size"]
        heads = linear("classifier", hidden, labels)
        heads |= linear("fit_dense", hidden, self.case["teacher"]["hidden_size"])
        return weights_of(encoder_shapes(config) | heads)

    def workplace(self, folder: Path) -> Workplace:
        """Writes both models and the data under a folder."""
        for path, content in _files(self.name).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return Workplace(folder, "MNLI" if self.case["task"] == "mnli" else "SST-2", self.case["max_seq_length"])

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The golden features as a model takes them: ids, segments, mask, each [rows, length]."""
        return tuple(self.tensor(f"feat_{name}") for name in ("input_ids", "segment_ids", "input_mask"))


@cache
def _files(name: str) -> dict[Path, bytes]:
    """What a golden case's workplace holds, made once: most tests begin with it."""
    golden = Golden(name)
    dev_files = ("dev_matched", "dev_mismatched") if golden.case["task"] == "mnli" else ("dev",)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for role in ("teacher", "student"):
            write_model(folder / role, golden.config(role), golden.weights(role), golden.case["vocab"])
        for file in ("train", *dev_files):
            write_rows(folder / "data" / f"{file}.tsv", golden.case["rows"])
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Run(NamedTuple):
    """What came of a command."""

    status: int
    out: str
    err: str


@dataclass
class Workplace:
    """A folder that holds `teacher`, `student`, `data`, and what runs write: `model`, `output`."""

    folder: Path
    task: str
    max_seq_length: int

    def __post_init__(self) -> None:
        self.teacher, self.student, self.data = (self.folder / name for name in ("teacher", "student", "data"))
        self.entry: ModuleType = main  # or task_distill
        self.model, self.output = self.folder / "model", self.folder / "output"

    def flags(self, **changes: Any) -> list[str]:
        """The flags of a short intermediate run that notes every step; None leaves one out, True is a bare flag."""
        values = {
            "data_dir": self.data,
            "task_name": self.task,
            "teacher_model": self.teacher,
            "student_model": self.student,
            "output_dir": self.model,
            "fps_acc_dir": self.output,
            "max_seq_length": self.max_seq_length,
            "do_lower_case": True,
            "padding": "max_length",
            "train_batch_size": 32,
            "num_train_epochs": 1,
            "output_txt_step": 1,
            "workers": 0,
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

    def run(self, **changes: Any) -> Run:
        """The entry in this process; fails the test where the entry fails."""
        done = call(self.entry.main, self.flags(**changes), self.entry.ENTRY.prog)
        assert done.status == 0, done.err
        return done

    def fails(self, **changes: Any) -> str:
        """The entry in this process, which must refuse to run: its one line on standard error."""
        before = sorted(self.folder.rglob("*"))
        done = call(self.entry.main, self.flags(**changes), self.entry.ENTRY.prog)
        assert done.status == 2
        assert sorted(self.folder.rglob("*")) == before, "something was written"
        assert done.err.startswith(f"{self.entry.ENTRY.prog}: error: ")
        assert done.err.endswith("\n")
        assert done.err.count("\n") == 1
        return done.err.strip()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The objects of metrics.jsonl that tell of this event."""
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def series(self, name: str) -> list[float]:
        """A value of every training step's line in metrics.jsonl, such as `rep_loss`."""
        return [event[name] for event in self.events("train")]


def next_run(place: Workplace, name: str, **folders) -> Workplace:
    """The same folders, with output folders of another run."""
    later = Workplace(place.folder, place.task, place.max_seq_length)
    later.teacher, later.student, later.data = place.teacher, place.student, place.data
    later.model, later.output = place.folder / f"{name}_model", place.folder / f"{name}_output"
    for role, folder in folders.items():
        setattr(later, role, folder)
    return later


def call(entry: Callable[[Sequence[str]], None], flags: Sequence[str], prog: str = "main.py") -> Run:
    """Runs an entry in this process as the command line would."""
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with own_logging(), streams[0], streams[1], mock.patch.object(sys, "argv", [prog, *flags]):
        status = run_entry(prog, entry)
    return Run(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def own_logging() -> Iterator[None]:
    """Keeps what a run sets up in the root logger from outliving it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    try:
        yield
    finally:
        root.handlers, root.level = handlers, level


def command(*arguments: str, cwd: Path, **environment: str) -> Run:
    """Runs Python on the arguments in a process of its own; modules of the project can be imported."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def assert_close(actual: Any, expected: Any, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Asserts that two arrays have the same shape and are as close as both tolerances together allow."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=atol, rtol=rtol)
    assert np.asarray(actual).shape == np.asarray(expected).shape


def report_lack(what: str) -> None:
    """Report that this machine lacks something, so that a test checked what happens without it (see conftest.py)."""
    print(f"{LACKING}{what}")


def assert_same_weights(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Asserts that two state dicts are equal to the bit."""
    assert actual.keys() == expected.keys()
    different = [key for key in actual if not torch.equal(actual[key], expected[key])]
    assert not different
