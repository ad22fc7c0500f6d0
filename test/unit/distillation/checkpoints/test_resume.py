"""A stopped and resumed run ends with the weights, to the bit, of one that was not stopped (trap 22).

A signal stops these runs in a chosen step; `test_killed_runs.py` kills them.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Golden, Workplace, edit_weights
from stopped_runs import attempt, dropout_place, in_step, outcome, refused, signal_in_evaluation, signal_in_step
from test_apex import NvidiasApex, install
from torch.optim.optimizer import register_optimizer_step_pre_hook

from data_processing.cache import checksum
from distillation.checkpoints.folder_state import read_checkpoint
from distillation.runtime.mixed_precision import ApexMixedPrecision

COMMON = {
    **{"padding": "longest", "train_batch_size": 5, "num_train_epochs": 4, "learning_rate": 1e-3, "eval_step": 3},
    "save_steps": 2,
}
# 8 texts: two steps an epoch, eight in all. Stopped in the middle of two epochs and at the end of one.
STOPS = (1, 2, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return dropout_place(tmp_path_factory.mktemp("resume"))


def folders(place: Workplace, name: str) -> dict[str, Path]:
    return {"output_dir": place.folder / name, "fps_acc_dir": place.folder / f"{name} logs"}


def assert_equal_outcomes(
    place: Workplace, name: str, stops: tuple[int, ...], skipped: int = 0, **changes: Any
) -> dict[str, Any]:
    """Run once without a stop, and once stopped after so many further steps each time; return their outcome.

    Args:
        skipped: steps before the first stop that the optimizer does not take.
    """
    flags = {**COMMON, "cache_dir": place.folder / "cache", **changes}
    whole, stopped = (folders(place, f"{name} {kind}") for kind in ("whole", "stopped"))
    assert attempt(place, **flags, **whole).status == 0
    done = skipped
    for number, steps in enumerate(stops):
        done += steps
        with signal_in_step(steps):
            ended = attempt(place, **flags, **stopped, resume=number > 0)
        assert ended.status == 128 + signal.SIGTERM, ended.err
        assert f"step {done} of 8; the same command with --resume" in ended.err
    assert attempt(place, **flags, **stopped, resume=True).status == 0
    assert outcome(*stopped.values()) == outcome(*whole.values())
    return outcome(*whole.values())


SETTINGS: dict[str, dict[str, Any]] = {
    "intermediate": {},
    "cached states": {"cache_teacher_states": True, "group_by_length": True, "workers": 2},
    "amp, accumulation": {"amp": True, "amp_dtype": "bf16", "gradient_accumulation_steps": 2},
    "prediction": {"pred_distill": True},
    "fp16, O2": {
        **{"pred_distill": True, "amp": True, "amp_dtype": "fp16", "opt_level": "O2"},
        "loss_scale": "dynamic",
    },
    "bf16, O3": {"pred_distill": True, "amp": True, "amp_dtype": "bf16", "opt_level": "O3"},
    "fine-tuning": {"do_finetune": True, "student_model": None, "group_by_length": True},
    "deterministic": {"deterministic": True, "pred_distill": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_resume_reproduces_weights_files_and_log_lines(place: Workplace, setting: str) -> None:
    try:
        assert_equal_outcomes(place, setting, STOPS, **SETTINGS[setting])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", ["prediction", "fine-tuning"])
def test_a_signal_interrupts_an_evaluation_and_the_resumed_run_repeats_it(place: Workplace, setting: str) -> None:
    """The first evaluation twice, and the last one, after which no step is left."""
    flags = {**COMMON, **SETTINGS[setting], "cache_dir": place.folder / "cache", "eval_batch_size": 2}
    whole, stopped = (folders(place, f"{setting} {kind}") for kind in ("evaluated", "interrupted"))
    assert attempt(place, **flags, **whole).status == 0
    for number, (evaluation, batch, step, earlier) in enumerate([(1, 2, 2, []), (1, 1, 2, []), (4, 3, 8, [4, 4, 4])]):
        with signal_in_evaluation(evaluation, batch) as batches:
            ended = attempt(place, **flags, **stopped, resume=number > 0)
        assert ended.status == 128 + signal.SIGTERM
        assert f"step {step} of 8" in ended.err
        assert batches == [*earlier, batch]
    assert attempt(place, **flags, **stopped, resume=True).status == 0
    assert outcome(*stopped.values()) == outcome(*whole.values())


def test_metrics_after_the_last_checkpoint_are_written_once(tmp_path: Path) -> None:
    """Those of MNLI's second dev file too; the run ends by a fault."""
    mnli = Golden("mnli_small").workplace(tmp_path)
    flags = {**COMMON, "pred_distill": True, "eval_step": 1, "save_steps": 3, "cache_dir": tmp_path / "cache"}
    whole, failed = folders(mnli, "whole"), folders(mnli, "failed")
    assert attempt(mnli, **flags, **whole).status == 0
    with in_step(6, fail), pytest.raises(ZeroDivisionError):
        attempt(mnli, **flags, **failed)
    assert attempt(mnli, **flags, **failed, resume=True).status == 0
    assert outcome(*failed.values()) == outcome(*whole.values())
    texts = [tmp_path / f"{name}-MM" / "eval_results.txt" for name in ("whole", "failed")]
    assert texts[0].read_text(encoding="utf-8") == texts[1].read_text(encoding="utf-8")


def fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_resume_restores_apexs_loss_scale(place: Workplace, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """After an overflow has halved it."""

    class ResumableApex(NvidiasApex):
        def initialize(self, *given: Any, **named: Any) -> Any:
            self.copies = []
            checkpoint = place.folder / f"apex {level} stopped" / "training_state.bin"
            if not checkpoint.exists() or read_checkpoint(checkpoint)["trainer"] is None:
                self.steps = 0  # a run begins
            return super().initialize(*given, **named)

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.scale = state["loss_scaler0"]["loss_scale"]

    amp = ResumableApex()
    install(monkeypatch, amp)
    monkeypatch.setattr("distillation.evaluation.choose_precision", lambda *_: ApexMixedPrecision(amp, level, None))
    amp.overflow_at.add(2)
    found = assert_equal_outcomes(place, f"apex {level}", (3, 2), skipped=1)
    assert next(line for line in found["metrics.jsonl"] if line["event"] == "end")["skipped"] == 1


@pytest.mark.parametrize(("seconds", "expected"), [(61, [0, 0, 2, 3, 4, 4, 6, 6]), (21, [0, 0, 0, 3, 3, 3, 6, 6])])
def test_checkpoints_are_due_at_evaluations_and_ends_of_epochs_once_a_minute(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, seconds: int, expected: list[int]
) -> None:
    """Without --save_steps, in a run whose steps take so many seconds: the last checkpoint before each of them."""
    now, saved, run = 0.0, [], folders(place, f"steps of {seconds} s")

    def count(*_: object) -> None:
        nonlocal now
        now += seconds
        state = read_checkpoint(run["output_dir"] / "training_state.bin")["trainer"]
        saved.append(0 if state is None else state["step"])

    monkeypatch.setattr(time, "monotonic", lambda: now)
    hook = register_optimizer_step_pre_hook(count)
    done = attempt(place, **{**COMMON, "save_steps": None}, **run)
    hook.remove()
    assert done.status == 0, done.err
    assert saved == expected


class TestResumableRuns:
    """A run is resumed with the settings, data and models that it began with, and with no others."""

    @pytest.fixture
    def stopped(self, tmp_path: Path) -> Workplace:
        place = dropout_place(tmp_path)
        with signal_in_step(3):
            assert attempt(place, **self.flags(place), resume=True).status == 128 + signal.SIGTERM
        return place

    def flags(self, place: Workplace, **changes: Any) -> dict[str, Any]:
        return {**COMMON, "pred_distill": True, "cache_dir": place.folder / "cache", **changes}

    def resume(self, place: Workplace, **changes: Any) -> str:
        done = attempt(place, **self.flags(place, resume=True, **changes))
        assert done.status == 0, done.err
        return done.out

    def refusal(self, place: Workplace, **changes: Any) -> str:
        return refused(place, **{**self.flags(place, resume=True), **changes})

    def test_changed_settings_are_refused_by_name(self, stopped: Workplace) -> None:
        before = {path: path.read_bytes() for path in stopped.model.iterdir()}
        for changes, named in [
            ({"train_batch_size": 4}, "--train_batch_size was 5, is 4"),
            ({"learning_rate": 2e-3, "seed": 7}, "--learning_rate was 0.001, is 0.002; --seed was 42, is 7"),
            ({"no-group_by_length": True}, "--group_by_length was on, is off"),
            ({"pred_distill": None}, "was prediction-layer distillation, is intermediate-layer distillation"),
            ({"amp": True, "amp_dtype": "bf16"}, "the precision was fp32, is bfloat16-O1"),
        ]:
            line = self.refusal(stopped, **changes)
            assert named in line
            assert "--overwrite_output_dir without --resume" in line
        other = shutil.copytree(stopped.data, stopped.folder / "other data")
        with (other / "train.tsv").open("a", encoding="utf-8") as file:
            file.write("a new film\t1\n")
        assert "the training set has changed" in self.refusal(stopped, data_dir=other)
        edit_weights(stopped.teacher, lambda weights: weights.update({k: v + 1 for k, v in weights.items()}))
        assert "the teacher has changed" in self.refusal(stopped)
        assert {path: path.read_bytes() for path in stopped.model.iterdir()} == before

    def test_settings_that_change_no_weight_may_change(self, stopped: Workplace) -> None:
        """Other folders of the same content, other logs, other checkpoints."""
        others = {
            "data_dir": shutil.copytree(stopped.data, stopped.folder / "moved data"),
            "teacher_model": shutil.copytree(stopped.teacher, stopped.folder / "moved teacher"),
            "fps_acc_dir": stopped.folder / "other logs",
        }
        self.resume(stopped, output_dir=stopped.folder / "whole")
        with in_step(3, fail), pytest.raises(ZeroDivisionError):  # steps 3 to 5 are logged after the save
            self.resume(stopped, **others, save_steps=100)
        self.resume(stopped, **others, workers=2, save_steps=None)
        weights = [(folder / "pytorch_model.bin").read_bytes() for folder in (stopped.model, stopped.folder / "whole")]
        assert weights[0] == weights[1]
        lines = (stopped.folder / "other logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [line["step"] for line in map(json.loads, lines) if line["event"] == "train"] == [3, 4, 5, 6, 7, 8]

    def test_metrics_in_a_moved_output_folder_are_written_once(self, stopped: Workplace) -> None:
        """The run has written metrics after its last save, by a fault; then its folder is moved."""
        self.resume(stopped, output_dir=stopped.folder / "whole")
        with in_step(4, fail), pytest.raises(ZeroDivisionError):  # after the evaluation of step 6
            self.resume(stopped, save_steps=100)
        moved = stopped.model.rename(stopped.folder / "moved")
        self.resume(stopped, output_dir=moved)
        texts = [
            (folder / "eval_results.txt").read_text(encoding="utf-8") for folder in (moved, stopped.folder / "whole")
        ]
        assert texts[0] == texts[1]

    def test_a_log_that_was_emptied_keeps_whole_lines_once(self, stopped: Workplace) -> None:
        log = stopped.output / "metrics.jsonl"
        log.write_text("", encoding="utf-8")
        with in_step(5, fail), pytest.raises(ZeroDivisionError):
            self.resume(stopped, save_steps=100)
        self.resume(stopped)
        assert [event["step"] for event in stopped.events("train")] == [3, 4, 5, 6, 7, 8]

    def test_a_stopped_run_is_not_overwritten_unless_asked_for(self, stopped: Workplace) -> None:
        assert "--resume" in self.refusal(stopped, resume=None)
        assert attempt(stopped, **self.flags(stopped, overwrite_output_dir=True, seed=1)).status == 0
        assert not (stopped.model / "training_state.bin").exists()

    def test_resuming_a_finished_run_changes_nothing(self, stopped: Workplace) -> None:
        checkpoint = stopped.model / "training_state.bin"
        content = checkpoint.read_bytes()
        self.resume(stopped)
        written = [stopped.output / "metrics.jsonl", stopped.output / "train_full_1p_2.txt", *stopped.model.iterdir()]
        times = {path: path.stat().st_mtime_ns for path in written}
        assert "ended already" in self.resume(stopped)
        assert "--seed was 42, is 7" in self.refusal(stopped, seed=7)
        checkpoint.write_bytes(content)  # a kill in the last moment leaves it
        assert "ended already" in self.resume(stopped)
        assert not checkpoint.exists()
        assert {path: path.stat().st_mtime_ns for path in written} == times
        assert len(json.loads((stopped.model / "run.json").read_text(encoding="utf-8"))["resumed"]) == 1

    def test_a_folder_with_other_files_is_refused(self, stopped: Workplace) -> None:
        other = stopped.folder / "other" / "mine.txt"
        other.parent.mkdir()
        other.write_text("mine", encoding="utf-8")
        assert f"{other.parent}: " in self.refusal(stopped, output_dir=other.parent)
        assert list(other.parent.iterdir()) == [other]

    def test_missing_teacher_outputs_are_computed_again_to_the_same_bits(self, stopped: Workplace) -> None:
        """Other outputs than those that the run began with give a warning."""
        self.resume(stopped, output_dir=stopped.folder / "whole")
        shutil.rmtree(stopped.folder / "cache")
        kept = shutil.copytree(stopped.model, stopped.folder / "kept")
        assert "cached outputs differ" not in self.resume(stopped)
        weights = [(folder / "pytorch_model.bin").read_bytes() for folder in (stopped.model, stopped.folder / "whole")]
        assert weights[0] == weights[1]
        for entry in (stopped.folder / "cache" / "teacher_logits").iterdir():
            others = np.load(entry / "logits.npy") + 1
            np.save(entry / "logits.npy", others)
            np.save(entry / "checksums.npy", np.array([checksum(others)], dtype=np.uint32))
        assert "cached outputs differ" in self.resume(stopped, output_dir=kept)

    def test_two_runs_do_not_write_in_one_folder(self, stopped: Workplace) -> None:
        lines = []
        with in_step(1, lambda: lines.append(self.refusal(stopped))):
            self.resume(stopped)
        assert "another run" in lines[0]


def test_lines_of_other_runs_stay_in_shared_logs(tmp_path: Path) -> None:
    """Two runs of one name log into the same files, and fail after a save; then each is resumed."""
    place = dropout_place(tmp_path)
    runs = [{**COMMON, "output_dir": tmp_path / name, "save_steps": 4} for name in ("first", "second")]
    for flags in runs:
        with in_step(6, fail), pytest.raises(ZeroDivisionError):
            attempt(place, **flags)
    text = place.output / "train_full_1p_1.txt"
    before = text.read_text(encoding="utf-8")
    assert attempt(place, **runs[0], resume=True).status == 0
    first = place.events("train")[0]["id"]
    own = [event["step"] for event in place.events("train") if event["id"] == first]
    others = [event["step"] for event in place.events("train") if event["id"] != first]
    assert (own, others) == (list(range(1, 9)), list(range(1, 6)))
    assert text.read_text(encoding="utf-8").startswith(before)  # its lines name no run
    assert attempt(place, **runs[1], resume=True).status == 0
    assert {event["step"] for event in place.events("train") if event["id"] != first} == set(range(1, 9))
    assert [event["step"] for event in place.events("train") if event["id"] == first] == own
