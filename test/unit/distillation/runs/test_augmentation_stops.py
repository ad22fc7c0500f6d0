"""data_augmentation.py stopped at any moment: what is done stays, and --resume comes to the undisturbed file."""

import errno
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from augmentation_cases import SENTENCES, Place, many_rows
from cases import write_rows

from data_processing.augmentation.resumable_file import ResumableFile
from transformer.errors import UserError


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def run_and_stop(place: Place, seconds: float, how: int, **changes) -> tuple[int, str]:
    """Starts the command and stops it once it has worked for so long."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        place.command(**changes), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True
    )
    journal = place.data / "train_aug.tsv.unfinished" / "journal.json"
    before = journal.read_bytes() if journal.exists() else None
    while process.poll() is None and (not journal.exists() or journal.read_bytes() == before):
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "rows"), [("0", 2100), ("0,1", 1100)])
def test_killed_at_random_moments_it_goes_on_to_the_same_file(place, devices, rows):
    write_rows(place.data / "train.tsv", many_rows(rows))
    changes = {"N": 3, "precision": "fp32", "device_list": devices}
    place.run(**changes)
    undisturbed = place.made.read_bytes()
    place.made.unlink()
    choose, stops = random.Random(os.urandom(8)), 0
    while not place.made.exists():
        status, err = run_and_stop(place, choose.uniform(0.0, 0.3), signal.SIGKILL, resume=True, **changes)
        assert status in (0, -signal.SIGKILL), err
        stops += status != 0
    assert stops >= 1
    assert place.made.read_bytes() == undisturbed
    assert sorted(path.name for path in place.data.iterdir()) == ["train.tsv", "train_aug.tsv", "train_aug.tsv.json"]


def unfinished(place: Place) -> Path:
    """A run that was killed after its first block."""
    write_rows(place.data / "train.tsv", many_rows(2100))
    status, err = run_and_stop(place, 0.0, signal.SIGKILL, N=3)
    assert status == -signal.SIGKILL, err
    folder = place.data / "train_aug.tsv.unfinished"
    if json.loads((folder / "journal.json").read_text())["blocks"] == 0:
        run_and_stop(place, 0.0, signal.SIGKILL, N=3, resume=True)
    return folder


@pytest.mark.slow
def test_an_unfinished_run_is_kept_until_the_flags_say_what_to_do(place):
    folder = unfinished(place)
    line = place.fails(N=3)
    assert all(fact in line for fact in ("unfinished run", "--resume", "--overwrite_output_file"))
    assert "--N 3, now it is 4" in place.fails(N=4, resume=True)
    assert "either --resume or" in place.fails(N=3, resume=True, overwrite_output_file=True)
    rows = (folder / "rows").read_bytes()
    (folder / "rows").write_bytes(rows + b"half a li")
    place.run(N=3, resume=True)
    resumed = place.made.read_bytes()
    place.run(N=3, overwrite_output_file=True)
    assert place.made.read_bytes() == resumed
    assert resumed.startswith(rows[: len(rows) // 2])


@pytest.mark.slow
def test_changed_inputs_are_refused_by_name(place):
    unfinished(place)
    with (place.data / "train.tsv").open("a") as file:
        file.write("a new row\t1\n")
    assert "the content of train.tsv" in place.fails(N=3, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("devices", ["0", "0,1"])
def test_a_signal_ends_it_with_one_line(place, how, devices):
    write_rows(place.data / "train.tsv", many_rows(2100))
    status, err = run_and_stop(place, 0.1, how, N=3, device_list=devices)
    assert status == 128 + how, err
    assert err.count("\n") == 1
    assert f"stopped by {how.name}" in err


def test_an_existing_file_is_not_lost(place):
    place.made.write_text("mine\n")
    assert "--overwrite_output_file" in place.fails()
    assert "--overwrite_output_file" in place.fails(resume=True)
    assert place.made.read_text() == "mine\n"
    place.run(overwrite_output_file=True)
    assert len(place.lines()) > len(SENTENCES)


def test_two_runs_of_one_file_are_refused(place):
    with ResumableFile(place.made):
        assert "another run is writing it" in place.fails()
    place.run()


def test_a_file_system_without_locks_takes_the_file(tmp_path, monkeypatch):
    """NFS locks no folder that is open for reading only."""

    def refuse(*_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with ResumableFile(tmp_path / "made.tsv") as file:
        file.start({})
        file.add(b"a row\n")
        file.finish()
    assert (tmp_path / "made.tsv").read_bytes() == b"a row\n"


def test_a_full_disk_is_one_line_and_finished_blocks_stay(tmp_path):
    path, before = tmp_path / "made.tsv", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"made\.tsv: .*File too large"), ResumableFile(path) as file:  # noqa: PT012
            file.start({})
            file.add(b"a row\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
            file.add(b"x" * 20_000)  # the last part of it is still in memory
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with ResumableFile(path, resume=True) as file:
        file.start({})
        file.finish()
    assert path.read_bytes() == b"a row\n"


class TestFilesOfOthers:
    """Only files that a run wrote are changed or removed."""

    NAME = "train_aug.tsv.unfinished"

    @pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite_output_file": True}], ids=str)
    def test_a_link_in_place_of_the_unfinished_run_is_refused(self, place, flags):
        photos = place.folder / "photos"
        photos.mkdir()
        (photos / "rows").write_text("mine\n")
        (place.data / self.NAME).symlink_to(photos)
        assert f"{self.NAME}: is a link" in place.fails(**flags)
        assert (photos / "rows").read_text() == "mine\n"

    @pytest.mark.parametrize("name", ["notes.txt", "masked_lm/notes.txt", "masked_lm/more/config.json", "rows/a.txt"])
    def test_a_folder_with_a_file_of_the_users_is_refused(self, place, name):
        path = place.data / self.NAME / name
        path.parent.mkdir(parents=True)
        path.write_text("mine\n")
        for flags in ({}, {"resume": True}, {"overwrite_output_file": True}):
            assert self.NAME in place.fails(**flags)
        assert path.read_text() == "mine\n"

    @pytest.mark.parametrize("name", ["rows", "journal.json", "masked_lm", ".journal.json.abcdefgh.tmp"])
    def test_a_link_in_the_folder_is_refused(self, place, name):
        mine = place.folder / "mine.txt"
        mine.write_text("mine\n")
        (place.data / self.NAME).mkdir()
        (place.data / self.NAME / name).symlink_to(mine)
        assert f"{name}: " in place.fails(overwrite_output_file=True)
        assert mine.read_text() == "mine\n"

    def test_what_a_user_puts_there_during_a_run_stays(self, tmp_path):
        path = tmp_path / "made.tsv"
        with ResumableFile(path) as file:
            file.start({})
            (file.folder / "notes.txt").write_text("mine\n")
            file.add(b"a row\n")
            file.finish()
        assert path.read_bytes() == b"a row\n"
        assert [child.name for child in file.folder.iterdir()] == ["notes.txt"]

    def test_what_a_kill_left_while_the_folder_was_emptied_is_removed(self, place):
        folder = place.data / self.NAME
        (folder / "masked_lm").mkdir(parents=True)
        for name in ("rows", "masked_lm/config.json", "masked_lm/.vocab.txt.abcdefgh.tmp"):
            (folder / name).write_text("a part")
        place.run()
        assert not folder.exists()


def test_resume_may_always_be_given(place):
    """Where nothing was stopped it begins; where the run has ended, with these settings, it changes nothing."""
    place.run(resume=True)
    times = {path: path.stat().st_mtime_ns for path in place.data.iterdir()}
    assert "is complete already" in place.run(resume=True).out
    assert {path: path.stat().st_mtime_ns for path in place.data.iterdir()} == times
    assert "--N 20, now it is 3" in place.fails(resume=True, N=3)
    write_rows(place.data / "train.tsv", many_rows(3))
    assert "the content of train.tsv" in place.fails(resume=True)
    place.run(resume=False, overwrite_output_file=True)
    assert "is complete already" in place.run(resume=True).out
    place.made.unlink()
    place.run(resume=True)
    place.made.write_text("mine\n")
    assert "--overwrite_output_file" in place.fails(resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in ("identity", "blocks", "bytes", "tally")),
        *({"blocks": value} for value in ("1", 1.5, -1)),
        {"bytes": 10**12},
        {"tally": {"rows": "many"}},
        {"tally": []},
    ],
    ids=str,
)
def test_a_journal_with_wrong_entries_is_refused(tmp_path, changes):
    path, folder = tmp_path / "made.tsv", tmp_path / "made.tsv.unfinished"
    with suppress(KeyboardInterrupt), ResumableFile(path) as file:
        file.start({})
        file.add(b"a row\n", rows=1)
        raise KeyboardInterrupt
    journal = json.loads((folder / "journal.json").read_text()) | changes
    (folder / "journal.json").write_text(
        json.dumps({key: value for key, value in journal.items() if value is not None})
    )
    with pytest.raises(UserError, match="is damaged"), ResumableFile(path, resume=True) as file:
        file.start({})
    assert (folder / "rows").read_bytes() == b"a row\n"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.open("wb").truncate(10**12)], ids=["pipe", "huge"])
def test_a_pipe_or_a_huge_file_in_place_of_the_journal_is_refused(place, make):
    folder = place.data / "train_aug.tsv.unfinished"
    folder.mkdir()
    make(folder / "journal.json")
    assert "journal.json: " in place.fails(resume=True)


class Killed(BaseException):
    """Stands for a kill at that moment."""


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """Make a file of one block in a run that is killed just before the final rename, or just after it."""
    path, replace = tmp_path / "made.tsv", os.replace

    def killed(renamed: bool) -> Path:
        def kill(first, second):
            if second == (path.with_name("made.tsv.json") if renamed else path):
                raise Killed
            replace(first, second)

        with monkeypatch.context() as patch, pytest.raises(Killed), ResumableFile(path) as file:  # noqa: PT012
            assert file.start({"--N": 20})
            file.add(b"a row\n")
            patch.setattr(os, "replace", kill)
            file.finish()
        assert (file.folder.is_dir(), path.exists()) == (True, renamed)
        return path

    return killed


@pytest.mark.parametrize("renamed", [False, True])
def test_a_run_killed_around_the_rename_is_resumed(killed, renamed):
    with ResumableFile(killed(renamed), resume=True) as file:
        assert file.start({"--N": 20}) is not renamed
        if not renamed:
            assert file.blocks == 1
            file.finish()
    assert file.path.read_bytes() == b"a row\n"
    assert not file.folder.exists()


@pytest.mark.parametrize("renamed", [False, True])
def test_a_run_killed_around_the_rename_is_not_resumed_with_other_flags_nor_overwritten(killed, renamed):
    path = killed(renamed)
    with pytest.raises(UserError, match="--N 20"), ResumableFile(path, resume=True) as file:
        file.start({"--N": 3})
    with pytest.raises(UserError, match="--overwrite" if renamed else "unfinished run"), ResumableFile(path):
        pass
    assert file.folder.exists() is not renamed
    assert path.exists() is renamed


def test_a_users_file_in_place_of_a_finished_one_is_kept(killed):
    path = killed(renamed=True)
    path.write_text("mine, and longer\n")
    with pytest.raises(UserError, match="--overwrite"), ResumableFile(path, resume=True):
        pass
    path.unlink()
    with ResumableFile(path) as file:
        assert file.start({"--N": 3})
