"""The benchmarks: what they compute from given figures, and that each command prints its whole table; no time."""

import argparse
import os
import re
import subprocess
from pathlib import Path

import pytest
from augmentation_cases import Place, many_rows
from cases import ROOT, Golden, call, command, report_lack, write_rows

from benchmarks import augmentation, features, inference, start, throughput, timed_run
from benchmarks.common import make_data
from benchmarks.throughput_rows import choose_rows

COMMANDS = {
    "throughput.py": throughput.main,
    "inference.py": inference.main,
    "features.py": features.main,
    "start.py": start.main,
    "augmentation.py": augmentation.main,
}
NO_CHOICE = {"lengths": None, "processes": None, "batches": None, "stage": None, "only": ""}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """The flags that name SST-2's folder, of 320 short sentences, and a vocabulary."""
    place = Golden("sst2_small").workplace(tmp_path_factory.mktemp("benchmarks"))
    header, *rows = (place.data / "train.tsv").read_text(encoding="utf-8").splitlines()
    (place.data / "train.tsv").write_text("\n".join([header, *(rows * 320)[:320]]) + "\n", encoding="utf-8")
    return ["--data_dir", str(place.data), "--vocabulary", str(place.teacher)]


def table(name: str, *flags: str) -> list[str]:
    """The lines that a benchmark prints after the machine's."""
    done = call(COMMANDS[name], flags, name)
    assert done.status == 0, done.err
    return done.out.splitlines()[1:]


def throughput_lines(*flags: str) -> dict[str, list[dict[str, float]]]:
    """The figures by column of each row of throughput.py, by the row's title; unknown ones are left out."""
    lines = table("throughput.py", "--size", "tiny", *flags)
    header = next(line for line in lines if line.startswith("stage"))
    columns = re.split(r"  +", header[48:].strip())
    rows: dict[str, list[dict[str, float]]] = {}
    for line in lines:
        if line.startswith(("intermediate", "prediction")):
            cells = zip(columns, line[48:].split(), strict=True)
            rows.setdefault(line[14:48].strip(), []).append({name: float(c) for name, c in cells if c != "-"})
    return rows


def shares(row: dict[str, float]) -> list[float]:
    return [row[f"{name} %"] for name in timed_run.STEP_PARTS]


def test_shares_are_of_the_steps_that_count_without_evaluation_and_saving():
    steps = [
        {"time": 100.0, "models": 9.0},
        {"time": 106.0, "models": 9.0, "teacher": 5.0},  # the first step, which does not count
        {"time": 120.0, "models": 9.0, "teacher": 8.0, "student": 1.0, "saving": 10.0},
        {
            "time": 136.0,
            "models": 9.0,
            "teacher": 11.0,
            "student": 2.0,
            "backward": 1.0,
            "saving": 10.0,
            "evaluation": 10.0,
        },
    ]
    result = timed_run.step_shares({"steps": steps}, 1)
    assert result == {"teacher": 60.0, "student": 20.0, "backward": 10.0, "optimizer": 0.0, "data": 0.0, "rest": 10.0}


def test_the_parts_of_a_start_add_up_to_the_whole():
    before = {"time": 111.0, "models": 2.0, "tokenizing": 1.0, "evaluation": 4.0}
    after = {**before, "time": 112.5, "teacher": 0.5}
    assert timed_run.start_parts({"started": 100.0, "imported": 103.0, "steps": [before, after]}) == {
        "imports": 3.0,
        "models": 2.0,
        "tokenizing": 1.0,
        "evaluation": 4.0,
        "first step": 1.5,
        "rest": 1.0,
        "whole": 12.5,
    }


def test_the_speed_of_two_epochs_is_the_second_ones_and_the_first_includes_the_cache():
    events = [
        {"event": "teacher_cache", "seconds": 10.0},
        {"event": "train", "step": 10, "fps": 10.0},  # 90 examples, without ten of warm-up, in 9 s
        {"event": "train", "step": 20, "fps": 13.57},
        {"event": "end", "fps": 190 / 14, "fps_examples": 190},  # the other 100 in 5 s
    ]
    assert throughput.speeds(events, 100, 2, 10) == pytest.approx({"FPS": 20.0, "first epoch": 100 / (10 + 10)})
    assert throughput.speeds(events[1:], 100, 2, 10)["first epoch"] == pytest.approx(10.0)
    assert throughput.speeds(events[3:], 100, 1, 20)["FPS"] == 190 / 14


@pytest.mark.parametrize("stage", ["intermediate", "prediction"])
def test_each_switch_has_a_row_alone_and_rows_that_add_them_up(stage):
    rows = choose_rows(argparse.Namespace(**NO_CHOICE | {"stage": stage}))
    assert [row.is_reference for row in rows] == [True] + [False] * 8
    assert sum(row.title.startswith("alone: ") for row in rows) == 4
    first, amp, cached = (set(row.flags) for row in rows if row.title.startswith("together: "))
    assert amp - first == {"--amp"}
    assert cached - amp == {"--cache_teacher_states"} or amp - cached == {"--no_teacher_cache"}
    assert [row.title for row in rows if row.cached] == ["alone: teacher cached", "together: and teacher cached"]
    assert all(row.epochs == 2 for row in rows if row.cached)


def test_processes_have_32_examples_each():
    rows = choose_rows(argparse.Namespace(**NO_CHOICE | {"processes": [1, 2], "stage": "prediction"}))
    assert [(row.processes, row.examples) for row in rows] == [(1, 32), (2, 64)]


def test_texts_of_a_length_have_exactly_this_many_words(folders, tmp_path):
    make_data(tmp_path / "data", Path(folders[1]), 20, length=24)
    content = (tmp_path / "data" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(content) == 20
    assert {len(line.split("\t")[0].split()) for line in content} == {24}


def test_a_process_has_a_proportional_share_of_memory_where_the_system_has_figures():
    share = features.proportional_share(os.getpid())
    if not Path("/proc/self/smaps_rollup").exists():
        report_lack("/proc/PID/smaps_rollup, which shows what processes share")
        assert share == 0
    else:
        assert share > 50_000_000  # Python with torch holds more


@pytest.mark.slow
def test_throughput_prints_its_rows_and_medians(folders):
    flags = ("--steps", "4", "--stage", "prediction", "--repeat", "2", "--only", "alone: teacher")
    rows = throughput_lines(*folders, *flags)
    assert {title: len(lines) for title, lines in rows.items()} == {"reference": 3, "alone: teacher cached": 3}
    reference, cached = rows["reference"], rows["alone: teacher cached"]
    for row in (*reference[:2], *cached[:2]):
        assert sum(shares(row)) == pytest.approx(100, abs=0.5)
        assert min(row["FPS"], row["limit"], row["MB"]) > 0
    assert all(share > 0 for share in shares(reference[0])[:4]), "the trainer's parts have other names now"
    assert reference[2]["ratio"] == 1
    assert "first epoch" in cached[2]
    assert "first epoch" not in reference[2]


@pytest.mark.slow
def test_throughput_runs_another_revision_without_timings(folders):
    flags = ("--steps", "2", "--stage", "intermediate", "--only", "alone: teacher", "--reference_revision", "HEAD")
    if subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=False).returncode:
        report_lack("the repository's git history, with which the revisions would be compared")
        assert call(throughput.main, [*folders, *flags], "throughput.py").status == 2
        return
    rows = throughput_lines(*folders, *flags)
    assert "rest %" not in rows["reference"][0]
    assert rows["reference"][0]["FPS"] > 0
    assert sum(shares(rows["alone: teacher cached"][0])) == pytest.approx(100, abs=0.5)


@pytest.mark.slow
def test_throughput_by_length_processes_and_batch(folders):
    tiny = (*folders, "--steps", "1", "--stage", "prediction")
    assert list(throughput_lines(*tiny, "--lengths", "16")) == ["16 tokens"]
    assert list(throughput_lines(*tiny, "--batches", "4")) == ["batches of 4"]
    rows = throughput_lines(*tiny, "--processes", "1,2")
    assert list(rows) == ["1 x 1 thread", "2 x 1 thread"]
    assert rows["2 x 1 thread"][0]["ratio"] > 0


@pytest.mark.slow
def test_start_prints_its_parts(folders):
    _, *lines = table("start.py", *folders, "--size", "tiny")
    seconds = {line[:12].strip(): list(map(float, line[12:].split())) for line in lines}
    assert list(seconds) == ["imports", "models", "tokenizing", "evaluation", "first step", "rest", "whole"]
    for run in (0, 1):
        *parts, whole = (column[run] for column in seconds.values())
        assert sum(parts) == pytest.approx(whole, abs=0.05)
        assert parts[0] > 0


@pytest.mark.slow
def test_features_prints_each_number_of_rows_and_each_process(folders):
    lines = table("features.py", *folders, "--rows", "400", "--processes", "1")
    assert [line.split()[0] for line in lines if line] == ["rows", "400", "1", "process", "1"]


@pytest.mark.slow
def test_inference_prints_both_models(folders):
    _, *lines = table("inference.py", *folders, "--size", "tiny", "--repetitions", "1")
    lines = [line for line in lines if not line.endswith("stays in fp32")]  # on a processor without bf16
    assert len(lines) == 3
    assert all(float(figure) > 0 for line in lines for figure in line[54:].split()[:2])


@pytest.mark.slow
def test_augmentation_prints_every_way_with_each_context(tmp_path):
    place = Place(tmp_path)
    write_rows(place.data / "train.tsv", many_rows(60))
    flags = ["--data_dir", str(place.data), "--vocabulary", str(place.bert), "--size", "tiny", "--sentences", "20"]
    lines = table("augmentation.py", *flags, "--glove_embs", str(place.vectors), "--one_at_a_time", "5")
    assert [line for line in lines if line.startswith("-")] == ["--mlm_context original", "--mlm_context masked"]
    assert sum("one word at a time" in line and line.endswith(" 1.0x") for line in lines) == 2
    assert all(float(line.split()[-3]) > 0 for line in lines if line.startswith("  "))


@pytest.mark.slow
def test_a_command_runs_by_its_file_name():
    done = command("benchmarks/throughput.py", "--help", cwd=ROOT)
    assert done.status == 0
    assert "--size" in done.out


@pytest.mark.parametrize(
    ("name", "flags", "named"),
    [
        ("throughput.py", ["--steps", "none"], "--steps"),
        ("throughput.py", ["--only", "nothing"], "--only nothing"),
        ("throughput.py", ["--lengths", "16,0"], "--lengths"),
        ("throughput.py", ["--lengths", "16", "--processes", "2"], "--processes"),
        ("throughput.py", ["--reference_revision", "no-such-revision"], "--reference_revision"),
        ("throughput.py", ["--data_dir", "nowhere", "--size", "tiny"], "nowhere"),
        ("throughput.py", ["--vocabulary", "nowhere"], "nowhere"),
        ("throughput.py", ["--size", "tiny", "--steps", "1", "--lengths", "600"], "intermediate, 600 tokens"),
        ("start.py", ["--repeat", "0"], "--repeat"),
        ("start.py", ["--data_dir", "nowhere"], "nowhere"),
        ("features.py", ["--rows", ""], "--rows"),
        ("features.py", ["--data_dir", "nowhere"], "nowhere"),
        ("features.py", ["--vocabulary", "nowhere", "--rows", "1"], "nowhere"),
        ("inference.py", ["--data_dir", "nowhere"], "nowhere"),
        ("augmentation.py", ["--sentences", "0"], "--sentences"),
        ("augmentation.py", ["--data_dir", "nowhere", "--size", "tiny"], "nowhere"),
    ],
)
def test_a_mistake_ends_with_status_2_and_one_line(folders, name, flags, named):
    done = call(COMMANDS[name], [*folders, *flags], name)
    assert done.status == 2
    assert done.err.startswith(f"{name}: error: ")
    assert named in done.err
    assert done.err.count("\n") == 1
