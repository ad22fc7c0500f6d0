"""The benchmarks: what they work out of given figures, and that each command prints all of its table; no time."""

import itertools
import mmap
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cases import ROOT, Golden, call, command, report_lack

from benchmarks import features, inference, loading, memory, start, throughput, throughput_rows, timed_run
from benchmarks.common import Finished, forget_peak, make_data, numbers, peak, resident
from benchmarks.throughput import Figures
from benchmarks.throughput_rows import Row
from transformer.errors import UserError

COMMANDS = {
    "throughput.py": throughput.main,
    "inference.py": inference.main,
    "features.py": features.main,
    "memory.py": memory.main,
    "start.py": start.main,
}


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


def titles(lines: list[str]) -> list[str]:
    """The rows' titles in throughput's lines."""
    return [line[14:47].strip() for line in lines]


def figures(line: str) -> list[str]:
    """The figures of one of them."""
    return line[47:].split()


def percentages(line: str) -> list[float]:
    """The parts of a step's time, which end it."""
    return [float(figure) for figure in figures(line)[-len(timed_run.STEP_PARTS) :]]


def test_a_part_inside_another_has_its_own_time():
    moments = iter([0.0, 1.0, 3.0, 6.0, 10.0, 10.0])
    watch = timed_run.Stopwatch(lambda: next(moments))
    with watch.part("student"):  # from 0 to 10
        with watch.part("teacher"):  # from 1 to 3
            pass
        assert watch.read() == {"student": 4.0, "teacher": 2.0}  # at 6
    assert watch.read() == {"student": 8.0, "teacher": 2.0}


def test_the_parts_of_a_part_that_calls_itself_count_once():
    moments = iter([0.0, 1.0, 4.0, 5.0, 5.0])
    watch = timed_run.Stopwatch(lambda: next(moments))
    with watch.part("optimizer"), watch.part("optimizer"):
        pass
    assert watch.read() == {"optimizer": 5.0}


def test_shares_are_of_the_steps_that_count_and_leave_out_what_is_beside_training():
    steps = [
        {"models": 9.0},
        {"models": 9.0, "teacher": 5.0, "rest": 1.0},  # the first step, which does not count
        {"models": 9.0, "teacher": 8.0, "student": 1.0, "rest": 1.5, "beside training": 30.0},
        {"models": 9.0, "teacher": 11.0, "student": 2.0, "backward": 1.0, "rest": 2.0, "beside training": 60.0},
    ]
    shares = timed_run.shares(steps, 1)
    assert shares == {"teacher": 60.0, "student": 20.0, "backward": 10.0, "optimizer": 0.0, "data": 0.0, "rest": 10.0}
    assert sum(shares.values()) == pytest.approx(100)


def test_the_parts_of_a_start_add_up_to_the_whole():
    before = {"models": 2.0, "tokenizing": 1.0, "evaluation": 4.0}
    after = {**before, "teacher": 0.5, "backward": 0.25, "rest": 0.25, "beside training": 7.0}
    parts = timed_run.start_by_parts([before, after], began=100.0, imported=103.0, now=112.0)
    assert parts == {
        "imports": 3.0,
        "models": 2.0,
        "tokenizing": 1.0,
        "evaluation": 4.0,
        "asking": 0.0,
        "first step": 1.0,
        "rest": 1.0,
    }
    assert sum(parts.values()) == 12.0


def test_the_speed_of_one_epoch_is_its_logs():
    assert throughput.speeds([{"event": "end", "fps": 50.0, "fps_examples": 90}], 100, 1, 10, False) == (50.0, None)


def test_the_speed_of_two_epochs_is_the_seconds_one_and_the_first_includes_the_asking():
    events = [
        {"event": "teacher_asked_once", "seconds": 10.0},
        {"event": "train", "step": 10, "fps": 10.0},  # 90 examples, ten being left out, in 9 s
        {"event": "train", "step": 20, "fps": 13.57},
        {"event": "end", "fps": 190 / 14, "fps_examples": 190},  # the other 100 in 5 s
    ]
    fps, first = throughput.speeds(events, 100, 2, 10, True)
    assert fps == pytest.approx(20.0)
    assert first == pytest.approx(100 / (10 + 10))
    with pytest.raises(UserError, match="asked in every step"):
        throughput.speeds(events[1:], 100, 2, 10, True)
    assert throughput.speeds(events[1:], 100, 2, 10, False) == (pytest.approx(20.0), pytest.approx(10.0))


def test_two_processes_that_do_one_and_a_half_times_as_much_are_75_percent_of_linear():
    assert throughput.percent_of_linear(150.0, 2, 100.0, 1) == 75.0
    assert throughput.percent_of_linear(300.0, 6, 100.0, 2) == 100.0


def test_a_line_compares_a_row_with_the_first_of_its_stage():
    base = Figures(10.0, 130.0, None, {"teacher": 70.0, "rest": 30.0}, 1e12, 2e12)
    row = Row("reference", "prediction", ())
    assert throughput.compare(row, base, row, base) == {
        "FPS": 10.0,
        "tokens/s": 130.0,
        "TFLOP/s": 1.0,
        "limit": 2.0,
        "teacher %": 70.0,
        "rest %": 30.0,
        "ratio": 1.0,
    }
    remembered = throughput.compare(row, Figures(40.0, 520.0, 15.0, operations=3e12, limit=4e12), row, base)
    assert (remembered["TFLOP/s"], remembered["limit"]) == (3.0, 4.0)
    assert (remembered["ratio"], remembered["first epoch"], remembered["its ratio"]) == (4.0, 15.0, 1.5)
    longer = throughput.compare(Row("32 tokens", "prediction", (), length=32), Figures(4.0, 128.0), row, base)
    assert longer["cost"] == 2.5
    one, two = (Row("", "prediction", (), processes=count) for count in (1, 2))
    assert throughput.compare(two, Figures(18.0, 234.0), one, base)["% of linear"] == 90.0


def test_medians_are_taken_of_each_figure():
    lines = [{"FPS": 10.0, "ratio": 1.0}, {"FPS": 30.0, "ratio": 5.0}, {"FPS": 20.0, "ratio": 9.0}]
    assert throughput.medians(lines) == {"FPS": 20.0, "ratio": 5.0}
    starts = [dict.fromkeys(timed_run.START_PARTS, 0.0) | {"imports": seconds} for seconds in (3.0, 1.0, 2.0)]
    assert start.medians(starts) == {"imports": 2.0, "rest": 0.0, "whole": 2.0}


def test_each_switch_has_a_row_alone_and_rows_add_them_up():
    for stage, keeps, switches in (("intermediate", False, 3), ("intermediate", True, 4), ("prediction", True, 4)):
        rows = [row for row in throughput_rows.rows(Path("older"), keeps) if row.stage == stage]
        assert rows[0].tree == Path("older")
        assert all(row.tree == ROOT for row in rows[1:])
        assert sum(row.title.startswith("alone: ") for row in rows) == switches
        batched = [set(row.flags) for row in rows if row.title.startswith("together: ")]
        assert len(batched) == switches - 1  # the first has two
        added = [now - before for before, now in itertools.pairwise(batched)]
        assert added[0] == {"--amp"}
        assert sum(row.remembers for row in rows) == (0 if switches == 3 else 2)
        assert all("remembered" in row.title or "kept" in row.title for row in rows if row.remembers)
        assert {row.epochs for row in rows if row.title.startswith("together: ")} == {2}


def test_processes_stand_beside_as_many_runs_apart():
    rows = [row for row in throughput_rows.rows_of_processes([1, 2]) if row.stage == "prediction"]
    assert [(row.processes, row.apart, row.batch) for row in rows] == [(1, False, 32), (2, False, 64), (2, True, 32)]
    assert len({row.flags for row in rows}) == 1


@pytest.mark.parametrize(("apart", "started"), [(True, ["0", "1", "2"]), (False, ["0,1,2"])])
def test_runs_apart_are_as_many_runs(folders, tmp_path, monkeypatch, apart, started):
    lists = []

    def run(work, data, flags, **_):
        lists.append(flags[flags.index("--device_list") + 1])
        return Finished([], None)

    monkeypatch.setattr(throughput, "run_main", run)
    flags = SimpleNamespace(data_dir=Path(folders[1]), device="cpu", device_list="0")
    runs, _ = throughput._run(Row("", "prediction", (), processes=3, apart=apart), 1, tmp_path, flags, timed=False)
    assert sorted(lists) == started
    assert len(runs) == len(started)


def test_only_an_older_revision_is_not_told_to_ask_always():
    slow = [row for row in throughput_rows.rows(Path("older"), True) if row.slow]
    asks = {row.tree: "--no_teacher_cache" in row.flags for row in slow}
    assert not asks[Path("older")]
    assert "--no_teacher_cache" in next(
        row.flags for row in throughput_rows.rows(ROOT, True) if (row.stage, row.title) == ("prediction", "reference")
    )


def test_texts_of_a_length_are_exactly_that_long(folders, tmp_path):
    make_data(tmp_path / "data", Path(folders[1]), 20, length=24)
    content = (tmp_path / "data" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(content) == 20
    assert {len(line.split("\t")[0].split()) for line in content} == {24}
    assert set(throughput._lengths(tmp_path / "data", 24, Path(folders[3]))) == {24}


def test_rows_beyond_the_files_are_variations_of_them(tmp_path):
    source, target = tmp_path / "source.tsv", tmp_path / "target.tsv"
    source.write_text("sentence\tlabel\na fine film\t1\na dull film\t0\n")
    loading.write_rows(target, source, 6)
    header, *rows = target.read_text().splitlines()
    assert header == "sentence\tlabel"
    assert rows[:2] == ["a fine film\t1", "a dull film\t0"]
    assert [row[-1] for row in rows] == ["1", "0"] * 3
    assert {word for row in rows for word in row.split("\t")[0].split()} <= {"a", "fine", "dull", "film"}


def test_what_further_processes_add_is_told_by_their_proportional_shares():
    # 100 shared, and 20, 30 and 40 of their own.
    assert memory.added([[120], [70, 80], [53, 63, 74]]) == [120, 30, 40]


def test_a_processs_own_memory_is_its_private_pages():
    text = "55d0-7ffd ---p 00000000 00:00 0    [rollup]\nRss: 500 kB\nPss: 300 kB\nPss_Dirty: 90 kB\n"
    found = memory.rollup(text + "Private_Clean: 10 kB\nPrivate_Dirty: 90 kB\nSwap: 0 kB\n")
    assert (found["Pss"], found["Uss"]) == (300 * 1024, 100 * 1024)


def test_the_peak_is_of_what_was_held_and_is_forgotten():
    forget_peak()
    before = peak()
    with mmap.mmap(-1, 40_000_000) as block:  # new pages, whatever memory the process has kept
        block.write(b"x" * 40_000_000)
    assert peak() - before > 30_000_000
    if sys.platform != "linux":
        report_lack("/proc, which forgets a peak of memory")
        return
    forget_peak()
    assert peak() - resident() < 30_000_000


def test_numbers_are_positive_and_split_by_commas():
    assert numbers("1, 20,3", "--rows") == [1, 20, 3]
    for text in ("", "0", "1,,2", "-1", "two"):
        with pytest.raises(UserError, match="--rows"):
            numbers(text, "--rows")


@pytest.mark.slow
def test_throughput_prints_its_rows_and_medians(folders):
    flags = ("--size", "tiny", "--steps", "2", "--stage", "prediction", "--repeat", "2", "--only", "alone: teacher")
    lines = table("throughput.py", *folders, *flags)
    assert [line for line in lines if "run" in line] == ["run 1 of 2", "run 2 of 2", "medians of 2 runs"]
    lines = [line for line in lines if line.startswith("prediction")]
    assert titles(lines) == ["reference", "alone: teacher remembered"] * 3
    for line in lines[:2]:
        assert sum(percentages(line)) == pytest.approx(100, abs=0.5)
        assert all(share > 0 for share in percentages(line)[:4]), "a part of the product has another name now"
    reference, remembered = lines[4:]
    assert figures(reference)[1] == "1.00"
    assert figures(reference)[3:5] == ["-", "-"]
    assert all(float(figure) > 0 for figure in figures(remembered)[:5])
    assert all(float(figures(line)[6]) > 0 for line in lines)


@pytest.mark.slow
def test_throughput_compares_with_another_revision_which_nothing_times(folders):
    flags = ("--size", "tiny", "--steps", "2", "--stage", "intermediate", "--only", "alone: states kept")
    flags += ("--reference_revision", "HEAD")
    if subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=False).returncode:
        report_lack("the repository's git history, with which the revisions would be compared")
        assert call(throughput.main, [*folders, *flags], "throughput.py").status == 2
        return
    _, reference, kept = table("throughput.py", *folders, *flags)
    assert titles([reference, kept]) == ["reference", "alone: states kept (and longest)"]
    assert figures(reference)[-6:] == ["-"] * 6
    assert float(figures(reference)[0]) > 0
    assert all(float(figure) > 0 for figure in figures(kept)[:5])
    assert sum(percentages(kept)) == pytest.approx(100, abs=0.5)


@pytest.mark.slow
def test_throughput_by_length_and_by_processes(folders):
    tiny = ("--size", "tiny", "--steps", "1")
    lines = table("throughput.py", *folders, *tiny, "--stage", "intermediate", "--lengths", "16")
    assert titles(lines[1:]) == ["16 tokens"]
    assert figures(lines[1])[1] == "1.00"
    lines = table("throughput.py", *folders, *tiny, "--stage", "prediction", "--processes", "1,2")
    assert titles(lines[1:]) == ["1 x 1 thread", "2 x 1 thread", "2 x 1 thread, runs apart"]
    assert figures(lines[1])[1] == "100"
    for line in lines[2:]:
        assert sum(percentages(line)) == pytest.approx(100, abs=0.5)
        assert all(float(figure) > 0 for figure in figures(line)[:2])
    lines = table("throughput.py", *folders, *tiny, "--stage", "prediction", "--batches", "4,8")
    assert titles(lines[1:]) == ["batches of 4", "batches of 8"]
    assert figures(lines[1])[1] == "1.00"


@pytest.mark.slow
def test_memory_prints_its_tables(folders):
    flags = ("--size", "tiny", "--rows", "400", "--processes", "2", "--steps", "2", "--stage", "prediction")
    printed = table("memory.py", *folders, *flags)
    if not Path("/proc/self/smaps_rollup").exists():
        report_lack("/proc/PID/smaps_rollup, which shows what processes share")
        assert any("this system does not tell" in line for line in printed)
        return
    lines = [line for line in printed if re.search(r"\d+\.\d", line)]
    load, mapped, shared, trained = lines[0], lines[1], lines[2:4], lines[4:]
    assert load.split()[0] == "400"
    assert "same 400 rows" in mapped
    assert [line.split()[0] for line in shared] == ["1", "2"]
    assert [line[14:37].strip() for line in trained] == [*memory.SETTINGS]
    assert all(float(line[37:].split()[0]) > 50 for line in trained)  # MB: Python with torch alone has more


@pytest.mark.slow
def test_start_prints_its_parts(folders):
    _, *parts, whole = table("start.py", *folders, "--size", "tiny")
    assert [line[:46].strip() for line in parts] == [title for part, title in start.TITLES.items() if part != "asking"]
    for run in (0, 1):
        seconds = [float(line[46:].split()[run]) for line in (*parts, whole)]
        assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=0.05)
        assert seconds[0] > 0


@pytest.mark.slow
def test_features_prints_a_line_for_each_number_of_rows(folders):
    _, *lines = table("features.py", *folders, "--rows", "10")
    assert [line.split()[0] for line in lines] == ["10"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["throughput.py", "memory.py", "start.py"])
def test_a_command_runs_as_the_readme_types_it(name):
    done = command(f"benchmarks/{name}", "--help", cwd=ROOT)
    assert done.status == 0
    assert "--size" in done.out


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("throughput.py", ["--steps", "none"], "--steps none"),
        ("throughput.py", ["--only", "nothing"], "no row's title"),
        ("throughput.py", ["--lengths", "16,0"], "--lengths 16,0"),
        ("throughput.py", ["--lengths", "16", "--processes", "2"], "not allowed with"),
        ("throughput.py", ["--reference_revision", "no-such-revision"], "no such revision"),
        ("throughput.py", ["--data_dir", "nowhere", "--size", "tiny"], "nowhere"),
        ("throughput.py", ["--vocabulary", "nowhere"], "nowhere"),
        ("memory.py", ["--rows", "many"], "--rows many"),
        ("memory.py", ["--data_dir", "nowhere"], "nowhere"),
        ("memory.py", ["--vocabulary", "nowhere", "--rows", "1"], "nowhere"),
        ("start.py", ["--repeat", "0"], "--repeat 0"),
        ("start.py", ["--data_dir", "nowhere"], "nowhere"),
        ("features.py", ["--rows", ""], "--rows"),
        ("features.py", ["--data_dir", "nowhere"], "nowhere"),
        ("inference.py", ["--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_told_in_one_line(folders, name, flags, told):
    done = call(COMMANDS[name], [*folders, *flags], name)
    assert done.status == 2
    assert done.err.startswith(f"{name}: error: ")
    assert told in done.err
    assert done.err.count("\n") == 1


def test_a_run_that_fails_is_named_with_what_it_said(folders):
    flags = ["--size", "tiny", "--steps", "1", "--lengths", "600"]
    done = call(throughput.main, [*folders, *flags], "throughput.py")
    assert done.status == 2
    assert "intermediate, 600 tokens: a run of main.py failed with status 2: main.py: error: " in done.err
