"""Runs that failed, that were stopped early, or whose folder was changed: what the next command does."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Run, Workplace
from disk_faults import killed_before, no_file_beyond
from stopped_runs import attempt, dropout_place, in_step, refused, signal_in_step
from torch.nn.modules.module import register_module_forward_pre_hook

import task_distill
from distillation.runs import train
from distillation.runtime.signals import Stopped
from transformer.errors import UserError

SAVES_OFTEN: dict[str, Any] = {
    **{"padding": "longest", "train_batch_size": 5, "num_train_epochs": 4, "eval_step": 3, "pred_distill": True},
    "save_steps": 2,
}
CHECKPOINT, FROM_SCRATCH = "training_state.bin", "--overwrite_output_dir without --resume"


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return dropout_place(tmp_path)


def flags(place: Workplace, **changes: Any) -> dict[str, Any]:
    return {**SAVES_OFTEN, "cache_dir": place.folder / "cache", **changes}


def run(place: Workplace, **changes: Any) -> Run:
    return attempt(place, **flags(place, **changes))


def refusal(place: Workplace, **changes: Any) -> str:
    return refused(place, **flags(place, resume=True, **changes))


def raises(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


class TestBeforeTheFirstSave:
    """The corrected command begins as if the failed one had not run."""

    def test_a_fault_leaves_no_checkpoint(self, place: Workplace) -> None:
        with in_step(1, raises(torch.OutOfMemoryError())), pytest.raises(torch.OutOfMemoryError):
            run(place)
        assert list(place.model.iterdir()) == []
        assert run(place, train_batch_size=4).status == 0

    def test_a_signal_during_the_teachers_evaluation_leaves_no_checkpoint(self, place: Workplace) -> None:
        hook = register_module_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
        ended = run(place)
        hook.remove()
        assert ended.status == 128 + signal.SIGINT
        assert list(place.model.iterdir()) == []
        assert run(place, resume=True, seed=3).status == 0

    @pytest.mark.parametrize("fault", [RuntimeError(), Stopped(signal.SIGTERM), UserError("")], ids=repr)
    def test_log_lines_are_removed_unless_the_user_made_a_mistake(self, place: Workplace, fault: BaseException) -> None:
        """After a mistake they may show what went wrong."""
        is_mistake = isinstance(fault, UserError)
        place.output.mkdir()
        log = place.output / "metrics.jsonl"
        log.write_text('{"event": "of another run"}\n', encoding="utf-8")
        with in_step(2, raises(fault)):
            if isinstance(fault, RuntimeError):
                with pytest.raises(RuntimeError):
                    run(place)
            else:
                assert run(place).status != 0
        assert not (place.model / CHECKPOINT).exists()
        events = [json.loads(line)["event"] for line in log.read_text(encoding="utf-8").splitlines()]
        assert events == ["of another run", *(["teacher", "teacher_cache", "train"] if is_mistake else [])]
        assert run(place, resume=True).status == 0
        assert [event["step"] for event in place.events("train")] == [*([1] if is_mistake else []), *range(1, 9)]

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_killed_run_does_not_make_the_folder_count_as_used(self, place: Workplace) -> None:
        with signal_in_step(1, signal.SIGKILL):
            assert killed_before(10**6, lambda: run(place))
        assert [path.name for path in place.model.iterdir()] == [CHECKPOINT]
        assert run(place, seed=3).status == 0

    def test_a_full_disk_in_the_first_save_does_not_make_the_folder_count_as_used(self, place: Workplace) -> None:
        with no_file_beyond(20_000):
            failed = run(place, eval_step=1)
        assert (failed.status, "cannot be saved" in failed.err) == (2, True)
        assert list(place.model.iterdir()) == []
        assert run(place).status == 0

    def test_a_saved_model_can_be_resumed(self, place: Workplace) -> None:
        """A fault after an evaluation has saved a model, and before a checkpoint has."""
        with in_step(5, raises(RuntimeError())), pytest.raises(RuntimeError):
            run(place, save_steps=100)
        assert {CHECKPOINT, "pytorch_model.bin"} <= {path.name for path in place.model.iterdir()}
        assert "--resume" in refused(place, **flags(place))
        assert run(place, resume=True).status == 0
        assert [event["step"] for event in place.events("train")] == list(range(1, 9))


@pytest.fixture
def stopped(place: Workplace) -> Workplace:
    """A run that was stopped after four of its eight steps, and one evaluation."""
    with signal_in_step(4):
        assert run(place).status == 128 + signal.SIGTERM
    return place


def test_a_changed_task_file_is_refused(place: Workplace) -> None:
    """Its metric chooses the checkpoint and its labels number the scores; the task's name shows neither."""
    place.entry = task_distill
    file = place.data / "task.json"
    described = {"name": "Mine", "train": "train.tsv", "dev": "dev.tsv", "text": 0, "label": 1, "labels": ["0", "1"]}
    task: dict[str, Any] = {"task_name": None, "task_file": file}
    file.write_text(json.dumps(described), encoding="utf-8")
    with signal_in_step(3):
        assert run(place, **task).status == 128 + signal.SIGTERM
    for change, named in (({"metric": "matthews"}, "was acc, is mcc"), ({"labels": ["1", "0"]}, "task's description")):
        file.write_text(json.dumps(described | change), encoding="utf-8")
        assert named in refusal(place, **task)
    file.write_text(json.dumps(described), encoding="utf-8")
    assert run(place, **task, resume=True).status == 0


def test_resuming_a_finished_run_completes_the_copy_and_replaces_nothing_else(place: Workplace) -> None:
    """A signal or a full disk may have ended the copy to --data_url; RESUME=1 may always be given."""
    place.entry = task_distill
    assert run(place).status == 0
    target = place.folder / "copy"
    for damage in (lambda: None, (target / "pytorch_model.bin").unlink):
        damage()
        assert run(place, resume=True, data_url=target).status == 0
        for path in place.model.iterdir():
            assert (target / path.name).read_bytes() == path.read_bytes()
        (target / ".run.json.abcdefgh.tmp").write_text("{", encoding="utf-8")
    (target / "run.json").write_text("of another run", encoding="utf-8")
    assert f"--data_url {target}: " in refusal(place, data_url=target)


def test_a_missing_model_is_reported(stopped: Workplace) -> None:
    """The model of a stopped run that had saved one, then that of the finished run."""
    weights = stopped.model / "pytorch_model.bin"
    content = weights.read_bytes()
    for _ in range(2):
        weights.unlink()
        line = refusal(stopped)
        assert f"{stopped.model}: " in line
        assert FROM_SCRATCH in line
        weights.write_bytes(content)
        assert run(stopped, resume=True).status == 0


def test_a_run_that_ends_before_the_folder_is_locked_is_not_repeated(
    stopped: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run resumes and ends while this one reads its data."""
    load = train.load_datasets

    def load_while_another_runs(*given: Any) -> Any:
        monkeypatch.setattr(train, "load_datasets", load)
        assert run(stopped, resume=True).status == 0
        return load(*given)

    monkeypatch.setattr(train, "load_datasets", load_while_another_runs)
    assert run(stopped, resume=True).status == 0
    assert [event["step"] for event in stopped.events("train")] == list(range(1, 9))
    assert not (stopped.model / CHECKPOINT).exists()


@pytest.mark.parametrize("step", [1, 3, 4], ids=["before the first save", "before an evaluation", "before a save"])
@pytest.mark.parametrize("becomes", ["gone", "empty", "another run's"])
def test_a_run_whose_folder_is_removed_ends_and_writes_nothing_there(place: Workplace, becomes: str, step: int) -> None:
    """A user removes it, and begins from scratch, while the earlier run still works."""

    def remove() -> None:
        place.model.rename(place.folder / "away")
        if becomes != "gone":
            place.model.mkdir()
        if becomes == "another run's":
            for path in (place.folder / "away").iterdir():
                (place.model / path.name).write_bytes(b"its own")

    with in_step(step, remove):
        assert f"{place.model}: " in refused(place, **flags(place))
    left = {path.name: path.read_bytes() for path in place.model.iterdir()} if place.model.exists() else {}
    assert place.model.exists() is (becomes != "gone")
    assert set(left.values()) <= {b"its own"}
    assert (CHECKPOINT in left) is (becomes == "another run's")


def test_a_damaged_checkpoint_is_reported(stopped: Workplace) -> None:
    """torch itself reads a file with a changed bit: the weights would differ, without an error."""
    checkpoint = stopped.model / CHECKPOINT
    content = checkpoint.read_bytes()
    key = "bert.pooler.dense.weight"
    weights = torch.load(checkpoint, weights_only=True)["trainer"]["weights"][key]
    flipped = bytearray(content)
    flipped[content.index(weights.numpy().tobytes()) + 3] ^= 0x40
    checkpoint.write_bytes(flipped)
    assert not torch.load(checkpoint, weights_only=True)["trainer"]["weights"][key].equal(weights)
    for wrong in (flipped, content[:-1], content + b"0", content[:40], b"", b"PK\x03\x04", b"\x80\x04cposix\nsystem\n"):
        checkpoint.write_bytes(wrong)
        line = refusal(stopped)
        assert str(checkpoint) in line
        assert FROM_SCRATCH in line
        assert "mmap" not in line  # torch's advice to whoever saves a file
        assert checkpoint.read_bytes() == wrong
    checkpoint.write_bytes(content)
    assert run(stopped, resume=True).status == 0


def test_a_checkpoint_of_another_version_or_a_missing_one_is_reported(stopped: Workplace) -> None:
    """The first beside the model of an older, finished run; nothing begins from scratch without being asked for."""
    assert run(stopped, resume=True).status == 0
    with signal_in_step(2):
        assert run(stopped, overwrite_output_dir=True).status == 128 + signal.SIGTERM
    checkpoint, log = stopped.model / CHECKPOINT, (stopped.output / "metrics.jsonl").read_bytes()
    for other in (torch.load(checkpoint, weights_only=True) | {"form": 0}, {"weights": torch.zeros(2)}, [1, 2]):
        torch.save(other, checkpoint)
        line = refusal(stopped)
        assert f"{checkpoint}: " in line
        assert "another program" in line
    (stopped.model / "run.json").unlink()
    checkpoint.unlink()
    assert f"{stopped.model}: " in refusal(stopped)
    assert (stopped.output / "metrics.jsonl").read_bytes() == log


def test_the_logs_are_on_the_disk_before_a_checkpoint_is(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a checkpoint must not count lines that are gone."""
    synced: list[str] = []
    fsync = os.fsync

    def note(file: int) -> None:
        synced.append(re.sub(r"\.[a-z0-9_]{8}\.tmp", "", Path(os.readlink(f"/proc/self/fd/{file}")).name))
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    assert run(place, save_steps=5).status == 0
    first, second = (number for number, name in enumerate(synced) if name == f".{CHECKPOINT}")
    assert {"metrics.jsonl", "train_full_1p_2.txt", "eval_results.txt"} <= set(synced[first:second])


def test_a_signal_in_the_last_step_gives_its_status_and_the_run_is_finished(place: Workplace) -> None:
    """A script must not continue with its next command; --resume then makes the copy."""
    place.entry = task_distill
    changes = {"pred_distill": None, "data_url": place.folder / "copy"}  # an evaluation could still be stopped
    with signal_in_step(8, signal.SIGINT):
        done = run(place, **changes)
    assert done.status == 128 + signal.SIGINT
    assert "--resume" in done.err
    assert not (place.model / CHECKPOINT).exists()
    assert not (place.folder / "copy").exists()
    assert run(place, **changes, resume=True).status == 0
    assert (place.folder / "copy" / "pytorch_model.bin").is_file()
