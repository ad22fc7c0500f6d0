"""Output folders that others may write: a run changes only its own files, and refuses what it did not write."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Workplace
from stopped_runs import attempt, dropout_place, in_step, refused, signal_in_step

from distillation.checkpoints.folder_state import read_checkpoint, write_checkpoint

FLAGS: dict[str, Any] = {
    **{"padding": "longest", "train_batch_size": 5, "num_train_epochs": 4, "eval_step": 3, "pred_distill": True},
    "save_steps": 2,
}
LOGS = ("output/metrics.jsonl", "output/train_full_1p_2.txt", "output/debug_layer_loss.log", "model/eval_results.txt")
STATES = ("model/training_state.bin", "model/run.json")


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return dropout_place(tmp_path)


def flags(place: Workplace, **changes: Any) -> dict[str, Any]:
    return {**FLAGS, "cache_dir": place.folder / "cache", **changes}


@pytest.fixture
def stopped(place: Workplace) -> Workplace:
    """A run that was stopped after four of its eight steps, and one evaluation."""
    with signal_in_step(4):
        assert attempt(place, **flags(place)).status == 128 + signal.SIGTERM
    return place


@pytest.mark.parametrize("name", [*LOGS, *STATES])
def test_a_link_in_place_of_a_log_or_a_state_is_refused(place: Workplace, name: str) -> None:
    """To a file, and to nothing, which opening would make."""
    path, mine = place.folder / name, place.folder / "mine.txt"
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(mine)
    for exists in (False, True):
        if exists:
            mine.write_text("mine\n", encoding="utf-8")
        for how in ({"overwrite_output_dir": True}, {"resume": True, "overwrite_output_dir": True}):
            assert f"{path}: " in place.fails(**flags(place, **how))
        assert (mine.read_text(encoding="utf-8") == "mine\n") if exists else not mine.exists()


@pytest.mark.parametrize("name", [*LOGS, *STATES])
def test_a_pipe_in_place_of_a_log_or_a_state_is_refused(place: Workplace, name: str) -> None:
    """Opening it would wait for ever."""
    path = place.folder / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    assert f"{path}: " in place.fails(**flags(place, overwrite_output_dir=True))


def test_a_run_record_of_gigabytes_is_not_read(place: Workplace) -> None:
    """In the output folder, and beside a teacher; a sparse file."""
    for folder in (place.model, place.teacher):
        folder.mkdir(exist_ok=True)
        with (folder / "run.json").open("wb") as file:
            file.truncate(10**12)
        assert f"{folder / 'run.json'}: " in place.fails(**flags(place, overwrite_output_dir=True))
        (folder / "run.json").unlink()


def test_a_link_that_appears_during_a_run_is_not_followed(place: Workplace) -> None:
    """In place of the metrics, which are opened at each evaluation."""
    mine = place.folder / "mine.txt"
    mine.write_text("mine\n", encoding="utf-8")
    with in_step(2, lambda: (place.model / "eval_results.txt").symlink_to(mine)):
        assert str(place.model / "eval_results.txt") in refused(place, **flags(place))
    assert mine.read_text(encoding="utf-8") == "mine\n"


def test_a_resumed_run_changes_no_file_that_only_its_checkpoint_names(stopped: Workplace) -> None:
    checkpoint, mine = stopped.model / "training_state.bin", stopped.folder / "mine.txt"
    mine.write_text("mine\n" * 100, encoding="utf-8")
    (stopped.folder / "metrics.jsonl").write_text("{}\n" * 100, encoding="utf-8")
    content = read_checkpoint(checkpoint)
    others = {str(mine): 0, str(stopped.folder / "metrics.jsonl"): 3, str(stopped.teacher / "vocab.txt"): 1}
    vocabulary = (stopped.teacher / "vocab.txt").read_bytes()
    write_checkpoint(checkpoint, {**content, "logs": {**content["logs"], **others}})
    assert attempt(stopped, **flags(stopped, resume=True)).status == 0
    assert mine.read_text(encoding="utf-8") == "mine\n" * 100
    assert (stopped.folder / "metrics.jsonl").read_text(encoding="utf-8") == "{}\n" * 100
    assert (stopped.teacher / "vocab.txt").read_bytes() == vocabulary


class Entry:
    """An entry of a checkpoint, to be changed or removed; `keys` lead to it."""

    def __init__(self, *keys: str | int, value: Any = None, change: Callable[[Any], Any] | None = None) -> None:
        self.keys, self.value, self.change = keys, value, change

    def apply(self, content: dict[str, Any]) -> None:
        for key in self.keys[:-1]:
            content = content[key]
        if self.change is not None:
            content[self.keys[-1]] = self.change(content[self.keys[-1]])
        elif self.value is not None:
            content[self.keys[-1]] = self.value
        else:
            del content[self.keys[-1]]

    def __repr__(self) -> str:
        return "-".join(map(str, self.keys)) + ("" if self.value is None else f"={self.value}")


@pytest.mark.parametrize(
    "entry",
    [
        *(Entry("trainer", name) for name in ("step", "metric", "paused", "random", "weights", "optimizer")),
        *(Entry(name) for name in ("run", "logs", "trainer", "model")),
        Entry("trainer", "step", value=10**12),
        Entry("trainer", "step", value=-1),
        Entry("trainer", "step", value="3"),
        Entry("trainer", "best", value="high"),
        Entry("trainer", "best_step", value=7),
        Entry("trainer", "paused", value={"saving": "long"}),
        Entry("trainer", "random", value=[]),
        Entry("trainer", "random", 0, "torch", value=torch.zeros(3)),
        Entry("trainer", "precision", "skipped", value="none"),
        Entry("trainer", "weights", "classifier.bias"),
        Entry("trainer", "weights", "bert.pooler.dense.bias", value=torch.zeros(1)),
        Entry("trainer", "weights", "bert.pooler.dense.bias", change=lambda bias: bias.to(torch.int64)),
        Entry("trainer", "optimizer", "steps_taken", value=10**12),
        Entry("trainer", "optimizer", "parameters", value=[]),
        Entry("trainer", "optimizer", "parameters", 0, "step", value=10**12),
        Entry("trainer", "optimizer", "parameters", 0, "next_m"),
        Entry("run", "resumed", value=3),
        Entry("run", "machine", value=[]),
        Entry("logs", value={"a": "b"}),
        Entry("model", value={"pytorch_model.bin": torch.zeros(2)}),
    ],
    ids=repr,
)
def test_a_checkpoint_with_wrong_entries_is_refused(stopped: Workplace, entry: Entry) -> None:
    """Its checksum is right: another program wrote it."""
    checkpoint = stopped.model / "training_state.bin"
    content = torch.load(checkpoint, weights_only=True)
    entry.apply(content)
    write_checkpoint(checkpoint, content)
    before = checkpoint.read_bytes()
    assert f"{checkpoint}: cannot be resumed from" in refused(stopped, **flags(stopped, resume=True))
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("name", ["output", "output/metrics.jsonl", "output/debug_layer_loss.log"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_log_that_is_removed_during_a_run_ends_it(place: Workplace, name: str, replaced: bool) -> None:
    """No line is lost without a word, and the run can be resumed."""
    path = place.folder / name

    def remove() -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if replaced and path != place.output:
            path.write_text("", encoding="utf-8")

    with in_step(5, remove):
        assert "was removed or moved" in refused(place, **flags(place))
    assert attempt(place, **flags(place, resume=True)).status == 0
    assert [event["step"] for event in place.events("train")][-1] == 8
