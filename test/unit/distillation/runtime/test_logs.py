"""Logs: FPS of training alone, lines in the original's form, files that are appended to and rolled back."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from cases import own_logging
from disk_faults import no_file_beyond

from distillation.runtime import logs
from distillation.runtime.device import Process
from distillation.runtime.logs import FpsMeter, Progress, RunLog, clock, roll_back, text_line
from transformer.errors import UserError

CPU = Process(torch.device("cpu"))


@pytest.fixture
def time(monkeypatch) -> SimpleNamespace:
    """A clock that a test sets by `now`."""
    fake = SimpleNamespace(now=1000.0)
    fake.perf_counter = fake.monotonic = fake.time = lambda: fake.now
    monkeypatch.setattr(logs, "time", fake)
    return fake


def started(steps: int) -> FpsMeter:
    meter = FpsMeter(CPU)
    meter.start(steps)
    return meter


def test_fps_is_the_examples_of_training_by_wall_time(time):
    """Trap 16: examples that were trained, whatever the batch size of evaluation is."""
    meter = started(4)
    assert meter.fps() == 0.0
    for examples in (32, 32, 8):
        time.now += 2.0
        meter.count(examples)
    assert meter.fps() == pytest.approx(72 / 6)


def test_evaluation_and_saving_do_not_count_as_training(time):
    """Trap 16."""
    meter = started(4)
    for _ in range(4):
        time.now += 2.0
        meter.count(10)
        with meter.pause("evaluation"):
            time.now += 50.0
        with meter.pause("saving"):
            time.now += 7.0
        assert meter.fps() == pytest.approx(5.0)
    assert meter.paused == {"evaluation": 200.0, "saving": 28.0}


@pytest.mark.parametrize(("total", "left_out"), [(4, 0), (9, 0), (10, 1), (55, 5), (100, 10), (100_000, 10)])
def test_the_first_steps_do_not_count(time, total, left_out):
    """Trap 16: they warm caches; a tenth of a short run at most, ten steps of a long one."""
    meter = started(total)
    for step in range(min(total, 40)):
        time.now += 100.0 if step < left_out else 1.0
        meter.count(5)
        assert meter.fps() == (0.0 if step < left_out else pytest.approx(5.0))


def test_a_pause_among_the_first_steps_counts_as_a_pause_only(time):
    """Evaluations before, at and after the last of the steps that are left out."""
    meter = started(30)
    for _ in range(8):
        time.now += 1.0
        meter.count(6)
        with meter.pause("evaluation"):
            time.now += 20.0
    assert meter.fps() == pytest.approx(6.0)
    assert meter.paused == {"evaluation": 160.0}


def test_an_error_in_a_pause_is_raised_and_its_time_counted(time):
    meter = started(4)

    def fail() -> None:
        with meter.pause("saving"):
            time.now += 3.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert meter.paused == {"saving": 3.0}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("NPU:0", 0, 99, 94.54, 0.9085), "[NPU:0]  epoch 0 step99 FPS94.54 acc0.9085"),
        (("GPU:3", 12, 7, 2308.891), "[GPU:3]  epoch 12 step7 FPS2308.89 "),
        (("CPU:0", 1, 0, 0.0, 0.0), "[CPU:0]  epoch 1 step0 FPS0.00 acc0.0000"),
    ],
)
def test_lines_have_the_originals_fields_in_its_order(arguments, line):
    assert text_line(*arguments) == line


def test_files_are_appended_to(tmp_path):
    """Trap 17: in the original only the last line survived."""
    folder = tmp_path / "not" / "there"
    for epoch in range(2):
        with own_logging(), RunLog(folder, "train_full_1p_2", CPU) as log:
            logging.getLogger().setLevel(logging.INFO)
            logging.getLogger("test").info("run %d", epoch)
            log.line(epoch, 99, 94.54, 0.9085)
            log.line(epoch, 199, 95.0)
            log.record("train", step=epoch, loss=math.nan, best=-math.inf, fps=1.5)
    text = (folder / "train_full_1p_2.txt").read_text(encoding="utf-8")
    lines = [f"[CPU:0]  epoch {e} step{s}" for e in range(2) for s in ("99 FPS94.54 acc0.9085", "199 FPS95.00 ")]
    assert text.splitlines() == lines
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(e["run"], e["event"], e["step"], e["loss"], e["best"], e["fps"]) for e in entries] == [
        ("train_full_1p_2", "train", step, None, None, 1.5) for step in range(2)
    ]
    messages = (folder / "debug_layer_loss.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in messages] == ["run 0", "run 1"]


def test_lines_are_written_at_once(tmp_path):
    with own_logging(), RunLog(tmp_path, "run", CPU) as log:
        log.line(0, 0, 1.0)
        log.record("train")
        assert (tmp_path / "run.txt").read_text(encoding="utf-8").endswith("FPS1.00 \n")
        assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").endswith("}\n")


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with own_logging(), RunLog(tmp_path, "run", CPU) as log:
        log.record("train", step=1)
        before = path.read_bytes()
        with no_file_beyond(len(before) + 10), pytest.raises(UserError, match=r"metrics\.jsonl: "):
            log.record("train", step=2)
        assert path.read_bytes() == before


def test_only_the_main_process_writes(tmp_path):
    """Trap 25."""
    with own_logging(), RunLog(tmp_path / "output", "run", Process(torch.device("cpu"), rank=1, world_size=2)) as log:
        log.line(0, 0, 1.0)
        log.record("train")
    assert not (tmp_path / "output").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"file: the folder of --fps_acc_dir cannot be made \(File exists\)"):
        RunLog(tmp_path / "file", "run", CPU)


def test_progress_is_a_line_every_ten_seconds_without_a_terminal(time, caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO):
        progress = Progress("fine-tuning", total=300)
        for step in range(1, 301):
            time.now += 0.1
            progress.advance(lambda step=step: {"loss": f"{step}", "FPS": "7.0"})
        progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "fine-tuning: step 100 of 300 (33 %), 20 s left, loss 100, FPS 7.0",
        "fine-tuning: step 200 of 300 (66 %), 10 s left, loss 200, FPS 7.0",
    ]


def test_only_the_main_process_shows_progress(time, caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO):
        progress = Progress("fine-tuning", total=3, enabled=False)
        time.now += 100.0
        progress.advance()
        progress.close()
    assert caplog.records == []


def write_logs(folder, name: str, run_id: str, *steps: int) -> None:
    with own_logging(), RunLog(folder, name, CPU, run_id) as log:
        for step in steps:
            log.line(0, step, 1.0)
            log.record("train", step=step)


def steps_in(folder) -> list[tuple[str, int]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(entry["id"], entry["step"]) for entry in map(json.loads, lines)]


def sizes_of(folder, *names: str) -> dict:
    return {folder / name: (folder / name).stat().st_size for name in names}


def test_roll_back_removes_a_runs_newer_lines_and_keeps_those_of_other_runs(tmp_path):
    write_logs(tmp_path, "run", "mine", 0)
    sizes = sizes_of(tmp_path, "run.txt", "metrics.jsonl")
    text = (tmp_path / "run.txt").read_text(encoding="utf-8")
    write_logs(tmp_path, "run", "mine", 1)
    write_logs(tmp_path, "other", "another", 7)
    write_logs(tmp_path, "run", "mine", 2)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"time": 1, "run": "ru')  # cut off by a kill
    assert roll_back(sizes, "mine") == []
    assert steps_in(tmp_path) == [("mine", 0), ("another", 7)]
    assert (tmp_path / "run.txt").read_text(encoding="utf-8") == text


def test_roll_back_leaves_an_fps_log_that_another_run_of_the_same_name_wrote(tmp_path):
    write_logs(tmp_path, "run", "mine", 0)
    sizes = sizes_of(tmp_path, "run.txt", "metrics.jsonl")
    write_logs(tmp_path, "run", "another", 1)
    text = (tmp_path / "run.txt").read_text(encoding="utf-8")
    assert roll_back(sizes, "mine") == [tmp_path / "run.txt"]
    assert (tmp_path / "run.txt").read_text(encoding="utf-8") == text
    assert steps_in(tmp_path) == [("mine", 0), ("another", 1)]


def test_roll_back_leaves_files_that_are_gone_or_shorter(tmp_path):
    (tmp_path / "shorter.txt").write_text("a line\n", encoding="utf-8")
    assert roll_back({tmp_path / "shorter.txt": 100, tmp_path / "gone.txt": 5}, "mine") == []
    assert (tmp_path / "shorter.txt").read_text(encoding="utf-8") == "a line\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (45.4, "45 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (720, "12 min"),
        (5399, "1 h 30 min"),
        (11_100, "3 h 05 min"),
    ],
)
def test_seconds_as_people_read_them(seconds, text):
    assert clock(seconds) == text


def test_a_process_is_labelled_by_its_device():
    assert CPU.label == "CPU:0"
    assert Process(torch.device("cpu"), rank=3, world_size=4).label == "CPU:3"
    assert Process(torch.device("cuda", 2), rank=1, world_size=2).label == "GPU:2"
