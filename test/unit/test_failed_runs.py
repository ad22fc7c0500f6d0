"""Runs that failed, that were stopped early, or whose folder has changed: what a plain start and --resume make of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Workplace
from stopped_runs import attempt, dropout_place, signal_in_step

from distillation import jobs
from distillation.trainer import Trainer

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
            patched.setattr(jobs, "say_settings", lambda *_: os.kill(os.getpid(), signal.SIGINT))
            assert again(place).status == 128 + signal.SIGINT
        assert states(place) == []
        assert again(place, resume=True, seed=3).status == 0

    def test_what_a_kill_has_left_counts_as_nothing(self, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(jobs, "say_settings", lambda *_: os.kill(os.getpid(), signal.SIGINT))
            patched.setattr("distillation.resume.RunFolder.forget_unless_saved", lambda self: None)
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
    """Stopped after three of its eight steps."""
    with signal_in_step(3):
        assert again(place).status == 128 + signal.SIGTERM
    return place


def test_a_refusal_of_other_settings_names_the_way_out(stopped: Workplace) -> None:
    refused = again(stopped, resume=True, seed=7)
    assert refused.status == 2
    assert "--seed was 42, is 7; --overwrite_output_dir without --resume (with the scripts: without " in refused.err
    assert refused.err.endswith("RESUME=1) begins anew\n")
