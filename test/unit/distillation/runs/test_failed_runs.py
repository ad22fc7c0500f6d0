"""Runs that failed, that were stopped early, or whose folder has changed: what the next command makes of it."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Workplace
from stopped_runs import attempt, dropout_place, signal_in_step

import task_distill
from distillation.runs import train
from distillation.runtime.signals import Stopped
from distillation.training.trainer import Trainer
from transformer.errors import UserError

FLAGS = {
    **{"padding": "longest", "train_batch_size": 5, "num_train_epochs": 4, "eval_step": 3, "pred_distill": True},
    "save_steps": 2,
}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return dropout_place(tmp_path)


def again(place: Workplace, **changes: Any) -> Any:
    return attempt(place, **{**FLAGS, "cache_dir": place.folder / "cache", **changes})


def states(place: Workplace) -> list[str]:
    return sorted(path.name for path in place.model.glob("training_state*"))


class TestBeforeTheFirstSaving:
    """The command, corrected, then begins as if the failed one had never been."""

    def test_a_fault_leaves_nothing(self, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_learn", fail)
            with pytest.raises(torch.OutOfMemoryError):
                again(place)
        assert states(place) == []
        assert again(place, train_batch_size=4).status == 0

    def test_a_signal_leaves_nothing(self, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(train, "say_settings", lambda *_: os.kill(os.getpid(), signal.SIGINT))
            assert again(place).status == 128 + signal.SIGINT
        assert states(place) == []
        assert again(place, resume=True, seed=3).status == 0

    @pytest.mark.parametrize(
        "fault", [RuntimeError("a lost peer"), Stopped(signal.SIGTERM), UserError("a mistake")], ids=repr
    )
    def test_no_line_of_the_logs_is_there_twice(
        self, place: Workplace, monkeypatch: pytest.MonkeyPatch, fault: BaseException
    ) -> None:
        """But for those before a user's mistake, which may show what went wrong."""
        learn = Trainer._learn

        def fail_in_the_second(self: Trainer, *given: Any) -> Any:
            if self.outcome.steps == 1:
                raise fault
            return learn(self, *given)

        place.output.mkdir()
        log = place.output / "metrics.jsonl"
        log.write_text('{"event": "of another run"}\n', encoding="utf-8")
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_learn", fail_in_the_second)
            with pytest.raises(RuntimeError) if isinstance(fault, RuntimeError) else nullcontext():
                assert again(place, output_txt_step=1).status != 0
        assert states(place) == []
        before = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        assert before[0] == {"event": "of another run"}
        assert ([line["step"] for line in before if line["event"] == "train"] == [1]) is isinstance(fault, UserError)
        assert len(before) == 1 or isinstance(fault, UserError)
        assert again(place, output_txt_step=1, resume=True).status == 0
        steps = [event["step"] for event in place.events("train")]
        assert steps == [*([1] if isinstance(fault, UserError) else []), *range(1, 9)]

    def test_what_a_kill_has_left_counts_as_nothing(self, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(train, "say_settings", lambda *_: os.kill(os.getpid(), signal.SIGINT))
            patched.setattr(
                "distillation.checkpoints.resume.RunFolder.forget_unless_saved", lambda self, and_lines: None
            )
            assert again(place).status == 128 + signal.SIGINT
        assert states(place) == ["training_state.json", "training_state.log"]
        assert again(place, seed=3).status == 0
        assert states(place) == []

    def test_a_model_is_not_forgotten(self, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
        """A fault after an evaluation has saved a model: the same command may begin again in its place."""
        learn, steps = Trainer._learn, []

        def fail_later(self: Trainer, *given: Any) -> Any:
            steps.append(None)
            if len(steps) == 5:
                raise RuntimeError("a fault")
            return learn(self, *given)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_learn", fail_later)
            with pytest.raises(RuntimeError, match="a fault"):
                again(place, save_steps=100)
        assert states(place) == ["training_state.json", "training_state.log"]
        assert again(place).status == 2
        assert again(place, resume=True).status == 0


@pytest.fixture
def stopped(place: Workplace) -> Workplace:
    """Stopped after four of its eight steps, and one evaluation."""
    with signal_in_step(4):
        assert again(place).status == 128 + signal.SIGTERM
    return place


def test_a_refusal_of_other_settings_names_the_way_out(stopped: Workplace) -> None:
    refused = again(stopped, resume=True, seed=7)
    assert refused.status == 2
    assert "--seed was 42, is 7; --overwrite_output_dir without --resume (with the scripts: without " in refused.err
    assert refused.err.endswith("RESUME=1) begins anew\n")


def test_a_task_file_that_says_something_else_is_refused(place: Workplace) -> None:
    """Its metric chooses the checkpoint, its labels number the scores: the name of the task alone tells neither."""
    place.entry = task_distill
    file = place.data / "task.json"
    described = {"name": "Mine", "train": "train.tsv", "dev": "dev.tsv", "text": 0, "label": 1, "labels": ["0", "1"]}
    file.write_text(json.dumps(described), encoding="utf-8")
    flags: dict[str, Any] = {"task_name": None, "task_file": file}
    with signal_in_step(3):
        assert again(place, **flags).status == 128 + signal.SIGTERM
    file.write_text(json.dumps(described | {"metric": "matthews"}), encoding="utf-8")
    refused = again(place, **flags, resume=True)
    assert "the metric that chooses was acc, is mcc" in refused.err
    file.write_text(json.dumps(described | {"labels": ["1", "0"]}), encoding="utf-8")
    assert "the task's description has changed" in again(place, **flags, resume=True).err
    file.write_text(json.dumps(described), encoding="utf-8")
    assert again(place, **flags, resume=True).status == 0


class TestTheCopy:
    """Of --data_url, which a stop between the end of the run and its copying, or a full disk, has kept away."""

    @pytest.fixture
    def ended(self, place: Workplace) -> Workplace:
        place.entry = task_distill
        assert again(place).status == 0
        return place

    def test_is_made_by_resuming_the_run_that_has_ended(self, ended: Workplace) -> None:
        target = ended.folder / "copy"
        for _ in range(2):  # RESUME=1 may always be given
            done = again(ended, resume=True, data_url=target)
            assert done.status == 0, done.err
            assert "this run has ended already" in done.out
        (target / "pytorch_model.bin").unlink()  # it was broken off
        (target / ".run.json.abcdefgh.tmp").write_text("{", encoding="utf-8")
        assert again(ended, resume=True, data_url=target).status == 0
        names = {path.name for path in ended.model.iterdir()}
        assert names <= {path.name for path in target.iterdir()}
        for name in names - {"model_manifest.json"}:
            assert (target / name).read_bytes() == (ended.model / name).read_bytes()

    def test_replaces_nothing_else(self, ended: Workplace) -> None:
        target = ended.folder / "copy"
        target.mkdir()
        (target / "run.json").write_text("of another run", encoding="utf-8")
        refused = again(ended, resume=True, data_url=target)
        assert refused.status == 2
        assert f"--data_url {target}: is not empty" in refused.err


def test_a_model_that_is_gone_is_told(stopped: Workplace) -> None:
    """Of a run that was stopped after it had chosen one, and of a run that has ended."""
    weights = stopped.model / "pytorch_model.bin"
    content = weights.read_bytes()
    for _ in range(2):
        weights.unlink()
        refused = again(stopped, resume=True)
        assert refused.status == 2
        assert refused.err == (
            f"main.py: error: {stopped.model}: the model of the run there is gone; "
            "--overwrite_output_dir without --resume begins anew\n"
        )
        weights.write_bytes(content)
        assert again(stopped, resume=True).status == 0


def test_a_folder_that_changes_before_it_is_locked_is_told(stopped: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run takes up the stopped one, and ends, while this one reads its data."""
    read = train.TrainingParts.read

    def and_another(*given: Any) -> Any:
        monkeypatch.setattr(train.TrainingParts, "read", read)
        assert again(stopped, resume=True).status == 0
        return read(*given)

    monkeypatch.setattr(train.TrainingParts, "read", and_another)
    refused = again(stopped, resume=True)
    assert refused.status == 2
    assert refused.err.endswith("what it holds of a run has changed meanwhile; start again\n")
    assert states(stopped) == []


@pytest.mark.parametrize("step", [1, 4], ids=["before the first saving", "after it"])
@pytest.mark.parametrize("becomes", ["gone", "empty", "another run's"])
def test_a_run_whose_folder_is_taken_away_ends_and_writes_nothing_there(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, becomes: str, step: int
) -> None:
    """A user removes it, and begins anew, while the run before is still at work."""
    learn, steps = Trainer._learn, []

    def and_take_away(self: Trainer, *given: Any) -> Any:
        steps.append(None)
        if len(steps) == step:
            place.model.rename(place.folder / "away")
            if becomes != "gone":
                place.model.mkdir()
            if becomes == "another run's":
                for path in (place.folder / "away").iterdir():
                    (place.model / path.name).write_bytes(b"its own")
        return learn(self, *given)

    monkeypatch.setattr(Trainer, "_learn", and_take_away)
    ended = again(place)
    assert ended.status == 2
    assert ended.err == f"main.py: error: {place.model}: was removed or moved while the run wrote there; the run ends\n"
    there = {path.name: path.read_bytes() for path in place.model.iterdir()} if place.model.exists() else {}
    assert set(there.values()) <= {b"its own"}
    assert ("training_state.json" in there) is (becomes == "another run's")


def test_a_state_that_is_gone_is_told(stopped: Workplace) -> None:
    """The run does not begin again as if it had never been, with hours of work and every line of the logs twice."""
    (stopped.model / "training_state.bin").rename(stopped.folder / "state")
    log = (stopped.output / "metrics.jsonl").read_bytes()
    refused = again(stopped, resume=True)
    assert refused.status == 2
    assert refused.err == (
        f"main.py: error: {stopped.model}/training_state.bin: what the run there had saved is gone; "
        "--overwrite_output_dir without --resume begins anew\n"
    )
    assert (stopped.output / "metrics.jsonl").read_bytes() == log
    (stopped.folder / "state").rename(stopped.model / "training_state.bin")
    assert again(stopped, resume=True).status == 0
    assert [event["step"] for event in stopped.events("train")] == list(range(1, 9))


@pytest.mark.parametrize("content", [b"", b'{"id": "0', b"[]", b'{"id": 3, "run": {}, "logs": {}}'])
def test_a_record_that_is_damaged_is_told(stopped: Workplace, content: bytes) -> None:
    record = stopped.model / "training_state.json"
    record.write_bytes(content)
    refused = again(stopped, resume=True)
    assert refused.status == 2
    told = f"; --resume cannot go on with the run that was stopped there, since {record} is damaged\n"
    assert refused.err.endswith(told)


def test_a_state_with_a_changed_bit_is_told(stopped: Workplace) -> None:
    """torch itself reads it: the weights of a stopped run would be others, without a word."""
    state = stopped.model / "training_state.bin"
    content = state.read_bytes()
    weights = torch.load(state, weights_only=True)["weights"]
    place = content.index(weights["bert.pooler.dense.weight"].numpy().tobytes())
    broken = bytearray(content)
    broken[place + 3] ^= 0x40
    state.write_bytes(broken)
    assert not torch.load(state, weights_only=True)["weights"]["bert.pooler.dense.weight"].equal(
        weights["bert.pooler.dense.weight"]
    )
    for wrong in (bytes(broken), content[:-1], content + b"0", content[:40]):
        state.write_bytes(wrong)
        refused = again(stopped, resume=True)
        assert refused.status == 2
        assert "training_state.bin: cannot be gone on from (it is not what was saved" in refused.err
        assert refused.err.count("\n") == 1
    state.write_bytes(content)
    assert again(stopped, resume=True).status == 0


def test_the_logs_are_on_the_disk_before_a_state_is(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a state must not tell of lines that are gone."""
    synced: list[str] = []
    fsync = os.fsync

    def note(file: int) -> None:
        synced.append(re.sub(r"\.[a-z0-9_]{8}\.tmp", "", Path(os.readlink(f"/proc/self/fd/{file}")).name))
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    assert again(place, save_steps=5).status == 0
    before = synced[: synced.index(".training_state.bin")]
    assert {"metrics.jsonl", "train_full_1p_2.txt", "eval_results.txt"} <= set(before)


def test_a_signal_in_the_last_step_is_no_success(place: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    """A script does not go on with what comes next; the run has ended, and its copy can be made."""
    place.entry = task_distill
    flags = {"pred_distill": None, "data_url": place.folder / "copy"}  # with an evaluation it could still be stopped
    with signal_in_step(8, signal.SIGINT):
        done = again(place, **flags)
    assert done.status == 128 + signal.SIGINT
    assert done.err == (
        "task_distill.py: stopped by SIGINT when the run had ended; "
        "the same command with --resume copies it to --data_url\n"
    )
    assert capfd.readouterr().out == "stopping after this step; once more ends at once\n"
    assert states(place) == []
    assert again(place, **flags, resume=True).status == 0
    assert (place.folder / "copy" / "pytorch_model.bin").is_file()
