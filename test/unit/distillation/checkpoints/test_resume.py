"""Trap 22: a run that is stopped and resumed ends with the weights, to the bit, of one that was left alone.

Here runs are stopped by a signal in a step of the test's choice; `test_killed_runs.py` kills them.
"""

from __future__ import annotations

import importlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Workplace
from stopped_runs import attempt, dropout_place, outcome, signal_in_evaluation, signal_in_step
from test_apex import APEX, forget_apex

from distillation.checkpoints.journal import Journal, take_back
from distillation.runtime.precision import ApexMixedPrecision

COMMON = {
    **{"padding": "longest", "train_batch_size": 5, "num_train_epochs": 4, "learning_rate": 1e-3, "eval_step": 3},
    "save_steps": 2,
}
# 8 texts: two steps an epoch, eight in all. Stopped in the middle of two epochs and at the end of one.
STOPS = (1, 2, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return dropout_place(tmp_path_factory.mktemp("resume"))


def both(
    place: Workplace, name: str, stops: tuple[int, ...], skipped: int = 0, **changes: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came of a run that was left alone, and of one that was stopped after so many further steps each time.

    Args:
        skipped: steps before the first stop that the optimizer does not take.
    """
    flags = {**COMMON, "cache_dir": place.folder / "cache", **changes}

    def folders(kind: str) -> dict[str, Path]:
        return {"output_dir": place.folder / f"{name}_{kind}", "fps_acc_dir": place.folder / f"{name}_{kind}_logs"}

    alone = attempt(place, **flags, **folders("alone"))
    assert alone.status == 0, alone.err
    done = skipped
    for number, steps in enumerate(stops):
        done += steps
        with signal_in_step(steps):
            stopped = attempt(place, **flags, **folders("stopped"), resume=number > 0)
        assert stopped.status == 128 + signal.SIGTERM, stopped.err
        assert stopped.err == (
            f"main.py: stopped by SIGTERM after step {done} of 8; the same command with --resume goes on from there\n"
        )
    resumed = attempt(place, **flags, **folders("stopped"), resume=True)
    assert resumed.status == 0, resumed.err
    assert f"going on after step {done}" in resumed.out
    return tuple(outcome(*folders(kind).values()) for kind in ("alone", "stopped"))


SETTINGS: dict[str, dict[str, Any]] = {
    "intermediate": {},
    "states kept": {"cache_teacher_states": True, "group_by_length": True, "workers": 2},
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
def test_a_resumed_run_ends_as_one_that_was_left_alone(place: Workplace, setting: str) -> None:
    """Weights, files, best metric, and every line of the logs, once."""
    try:
        alone, stopped = both(place, setting, STOPS, **SETTINGS[setting])
    finally:
        torch.use_deterministic_algorithms(False)
    assert stopped == alone


@pytest.mark.parametrize("setting", ["prediction", "fine-tuning"])
def test_an_evaluation_is_broken_off_and_made_by_the_run_that_goes_on(place: Workplace, setting: str) -> None:
    """On a large dev set it takes minutes. The first one twice, and the last one, after which no step is left."""
    flags = {**COMMON, **SETTINGS[setting], "cache_dir": place.folder / "cache", "eval_batch_size": 2}
    alone, stopped = (
        {"output_dir": place.folder / f"{setting} {kind}", "fps_acc_dir": place.folder / f"{setting} {kind} logs"}
        for kind in ("evaluated", "broken off")
    )
    assert attempt(place, **flags, **alone).status == 0
    for number, (evaluation, batch, step, made) in enumerate([(1, 2, 3, []), (1, 1, 3, []), (3, 3, 8, [4, 4])]):
        with signal_in_evaluation(evaluation, batch) as batches:
            ended = attempt(place, **flags, **stopped, resume=number > 0)
        assert ended.status == 128 + signal.SIGTERM
        assert f"stopped by SIGTERM after step {step} of 8; the same command with --resume goes on" in ended.err
        assert batches == [*made, batch]
    resumed = attempt(place, **flags, **stopped, resume=True)
    assert resumed.status == 0, resumed.err
    assert outcome(*stopped.values()) == outcome(*alone.values())


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_run_with_apex_goes_on_too(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """Its loss scale too, after an overflow has halved it."""
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    loads = "\ndef load_state_dict(state):\n    for n, s in enumerate(loss_scalers):\n"
    loads += "        s.scale = state[f'loss_scaler{n}']['loss_scale']\n"
    (package / "amp.py").write_text(APEX.replace("{further}", "") + loads, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    forget_apex()
    amp = importlib.import_module("apex.amp")
    monkeypatch.setattr("distillation.runs.predict.choose_precision", lambda *_: ApexMixedPrecision(amp, level, None))
    amp.overflow_at.add(2)
    original = amp.initialize

    def initialize(*given: Any, **named: Any) -> Any:  # each run is one of its own
        if not (place.folder / f"apex {level}_stopped" / "training_state.bin").exists():
            amp.unscaled = 0
        return original(*given, **named)

    monkeypatch.setattr(amp, "initialize", initialize)
    alone, stopped = both(place, f"apex {level}", (3, 2), skipped=1)
    forget_apex()
    assert stopped == alone
    assert next(line for line in alone["metrics.jsonl"] if line["event"] == "end")["skipped"] == 1


def test_the_state_is_saved_at_evaluations_and_ends_of_epochs_once_a_minute(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --save_steps. What is gone on from then lies before the kill, so steps are made twice, and told once."""
    monkeypatch.setattr("distillation.checkpoints.resume._SECONDS_BETWEEN_SAVES", 0.0)
    saved = []
    save = importlib.import_module("distillation.checkpoints.resume").RunFolder.save
    monkeypatch.setattr(
        "distillation.checkpoints.resume.RunFolder.save",
        lambda self, state: (saved.append(state["step"]), save(self, state)),
    )
    alone, stopped = both(place, "by time", (3,), save_steps=None)
    assert stopped == alone
    assert saved == [2, 3, 4, 6, 2, 3, 4, 6]


class TestWhatMayBeResumed:
    """The same settings, and nothing else."""

    @pytest.fixture
    def stopped(self, tmp_path: Path) -> Workplace:
        place = dropout_place(tmp_path)
        with signal_in_step(3):
            assert attempt(place, **COMMON, pred_distill=True, cache_dir=tmp_path / "cache").status == 143
        return place

    def again(self, place: Workplace, **changes: Any) -> Any:
        flags = {**COMMON, "pred_distill": True, "cache_dir": place.folder / "cache", "resume": True}
        return attempt(place, **{**flags, **changes})

    def test_changed_settings_are_refused_with_the_difference(self, stopped: Workplace) -> None:
        def state() -> dict[str, bytes]:
            return {path.name: path.read_bytes() for path in stopped.model.iterdir()}

        before = state()
        for changes, words in [
            ({"train_batch_size": 4}, "--train_batch_size was 5, is 4"),
            ({"seed": 7}, "--seed was 42, is 7"),
            (
                {"learning_rate": 2e-3, "num_train_epochs": 5},
                "--learning_rate was 0.001, is 0.002; --num_train_epochs was 4",
            ),
            ({"no-group_by_length": True}, "--group_by_length was on, is off"),
            ({"pred_distill": None}, "the stage was prediction-layer distillation, is intermediate-layer distillation"),
            ({"amp": True, "amp_dtype": "bf16"}, "the precision was fp32, is bfloat16-O1"),
        ]:
            refused = self.again(stopped, **changes)
            assert refused.status == 2
            assert refused.err.count("\n") == 1
            assert words in refused.err
        other = shutil.copytree(stopped.data, stopped.folder / "other data")
        with (other / "train.tsv").open("a", encoding="utf-8") as file:
            file.write("a new film\t1\n")
        assert "the training set has changed" in self.again(stopped, data_dir=other).err
        torch.save(
            {k: v + 1 for k, v in torch.load(stopped.teacher / "pytorch_model.bin", weights_only=True).items()},
            stopped.teacher / "pytorch_model.bin",
        )
        assert "the teacher has changed; --overwrite_output_dir without --resume" in self.again(stopped).err
        assert state() == before

    def test_what_changes_no_weight_may_change(self, stopped: Workplace) -> None:
        """Other folders of the same content, other logs, other savings."""
        with_other_paths = {
            "data_dir": shutil.copytree(stopped.data, stopped.folder / "moved data"),
            "teacher_model": shutil.copytree(stopped.teacher, stopped.folder / "moved teacher"),
            "fps_acc_dir": stopped.folder / "other logs",
        }
        alone = self.again(stopped, output_dir=stopped.folder / "alone")
        assert "nothing to go on from, so the run begins" in alone.out
        done = self.again(stopped, **with_other_paths, workers=2, save_steps=None, output_txt_step=2)
        assert done.status == 0, done.err
        weights = [(folder / "pytorch_model.bin").read_bytes() for folder in (stopped.model, stopped.folder / "alone")]
        assert weights[0] == weights[1]

    def test_a_stopped_run_is_not_written_over(self, stopped: Workplace) -> None:
        """Unless that is asked for; then nothing of it counts."""
        refused = self.again(stopped, resume=None)
        assert refused.status == 2
        assert "--resume (with the scripts: RESUME=1) goes on with the run that was stopped there" in refused.err
        assert self.again(stopped, resume=None, overwrite_output_dir=True, seed=1).status == 0
        assert not list(stopped.model.glob("training_state*"))

    def test_a_finished_run_is_left_as_it_is(self, stopped: Workplace) -> None:
        assert self.again(stopped).status == 0
        folders = stopped.model, stopped.output / "metrics.jsonl", stopped.output / "train_full_1p_2.txt"
        files = {path: path.stat().st_mtime_ns for folder in folders for path in (folder, *folder.rglob("*"))}
        done = self.again(stopped)
        assert done.status == 0
        assert "this run has ended already" in done.out
        assert len(files) >= 10
        assert {path: path.stat().st_mtime_ns for path in files} == files
        assert "--seed was 42, is 7" in self.again(stopped, seed=7).err
        record = json.loads((stopped.model / "run.json").read_text(encoding="utf-8"))
        assert len(record["resumed"]) == 1
        (stopped.model / "training_state.json").write_text(  # killed before it could take this away
            json.dumps({"id": record["id"], "run": record, "logs": {}}), encoding="utf-8"
        )
        assert "this run has ended already" in self.again(stopped).out
        assert not list(stopped.model.glob("training_state*"))

    def test_a_folder_with_something_else_is_refused(self, stopped: Workplace, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mine.txt").write_text("mine", encoding="utf-8")
        refused = self.again(stopped, output_dir=tmp_path / "other")
        assert refused.status == 2
        assert "it holds no run that was stopped, for --resume to go on with" in refused.err
        assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"\x80\x04cposix\nsystem\n"])
    def test_a_broken_state_is_told(self, stopped: Workplace, content: bytes) -> None:
        (stopped.model / "training_state.bin").write_bytes(content)
        refused = self.again(stopped)
        assert refused.status == 2
        assert "training_state.bin: cannot be gone on from" in refused.err
        assert refused.err.count("\n") == 1

    def test_answers_that_are_gone_are_asked_for_again(self, stopped: Workplace) -> None:
        """In the batches that first made them: the same to the bit. Others are told of."""
        self.again(stopped, output_dir=stopped.folder / "alone", resume=None)
        expected = outcome(stopped.folder / "alone", stopped.output)["weights"]
        shutil.rmtree(stopped.folder / "cache")
        kept = shutil.copytree(stopped.model, stopped.folder / "kept")
        done = self.again(stopped)
        assert done.status == 0
        assert "not those that this run began with" not in done.out
        assert outcome(stopped.model, stopped.output)["weights"] == expected
        for entry in (stopped.folder / "cache" / "teacher_logits").iterdir():
            np.save(entry / "logits.npy", np.load(entry / "logits.npy") + 1)
        assert (
            "the teacher's answers are not those that this run began with" in self.again(stopped, output_dir=kept).out
        )

    def test_a_run_that_is_at_work_is_not_disturbed(self, stopped: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
        refused = []
        learn = importlib.import_module("distillation.training.trainer").Trainer._learn

        def and_again(self: Any, *given: Any) -> Any:
            if not refused:
                refused.append(None)
                refused[0] = test.again(stopped)
            return learn(self, *given)

        test = self
        monkeypatch.setattr("distillation.training.trainer.Trainer._learn", and_again)
        assert self.again(stopped).status == 0
        assert refused[0].status == 2
        assert "another run is writing there" in refused[0].err


def test_lines_of_other_runs_stay(tmp_path: Path) -> None:
    """Only what this run has written since its state was saved is taken back, wherever in the file it stands."""
    log, journal = tmp_path / "metrics.jsonl", Journal(tmp_path / "journal", save=3)
    log.write_text("ours 1\nours 2\n", encoding="utf-8")
    sizes = {str(log): log.stat().st_size}
    for line in ("ours 3\n", "ours 4\n", "ours 2\n"):
        journal.note(log, line)
    Journal(tmp_path / "journal", save=2).note(log, "theirs 1\n")  # of a saving before: does not count
    log.write_text("ours 1\nours 2\nours 3\ntheirs 1\nours 4\nours 4 too\nours 2\n", encoding="utf-8")
    assert take_back(journal, sizes) == [log]
    assert log.read_text(encoding="utf-8") == "ours 1\nours 2\ntheirs 1\nours 4 too\n"
    assert take_back(journal, sizes) == [log]  # a kill right after it: nothing more is taken
    assert log.read_text(encoding="utf-8") == "ours 1\nours 2\ntheirs 1\nours 4 too\n"
    log.write_text("ours 1\nours 2\nours 3\nours 4\nou", encoding="utf-8")  # a disk that was full
    assert take_back(journal, sizes) == []
    assert log.read_text(encoding="utf-8") == "ours 1\nours 2\n"
    log.unlink()
    assert take_back(journal, sizes) == []
