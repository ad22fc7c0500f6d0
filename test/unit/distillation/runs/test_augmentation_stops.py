"""data_augmentation.py stopped at any moment: what is done stays, and --resume comes to the undisturbed file."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from augmentation_cases import SENTENCES, Place, many_rows
from cases import write_rows

from data_processing.augmentation.resumable_file import UnfinishedFile
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
        resumed = (place.data / "train_aug.tsv.unfinished").exists()
        status, err = run_and_stop(place, choose.uniform(0.0, 0.3), signal.SIGKILL, resume=resumed, **changes)
        assert status in (0, -signal.SIGKILL), err
        stops += status != 0
    assert stops >= 1
    assert place.made.read_bytes() == undisturbed
    assert sorted(path.name for path in place.data.iterdir()) == ["train.tsv", "train_aug.tsv"]


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
    assert "holds an unfinished run" in (told := place.fails(N=3))
    assert "--resume goes on with it, --overwrite_output_file begins anew" in told
    assert "was begun with --N 3, now it is 4" in place.fails(N=4, resume=True)
    assert "either --resume or" in place.fails(N=3, resume=True, overwrite_output_file=True)
    rows = (folder / "rows").read_bytes()
    (folder / "rows").write_bytes(rows + b"half a li")
    place.run(N=3, resume=True)
    resumed = place.made.read_bytes()
    place.run(N=3, overwrite_output_file=True)
    assert place.made.read_bytes() == resumed
    assert resumed.startswith(rows[: len(rows) // 2])


@pytest.mark.slow
def test_changed_inputs_are_told(place):
    unfinished(place)
    with (place.data / "train.tsv").open("a") as file:
        file.write("a new row\t1\n")
    assert "the content of train.tsv" in place.fails(N=3, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("devices", ["0", "0,1"])
def test_a_signal_ends_it_with_a_line_that_says_how_to_go_on(place, how, devices):
    write_rows(place.data / "train.tsv", many_rows(2100))
    status, err = run_and_stop(place, 0.1, how, N=3, device_list=devices)
    assert status == 128 + how, err
    assert err.count("\n") == 1
    assert "stopped; " in err


def test_an_existing_file_is_not_lost(place):
    place.made.write_text("mine\n")
    assert "is there already; --overwrite_output_file" in place.fails()
    assert "is there already" in place.fails(resume=True)
    assert place.made.read_text() == "mine\n"
    place.run(overwrite_output_file=True)
    assert len(place.lines()) > len(SENTENCES)


def test_two_runs_at_once_are_refused(place):
    first = UnfinishedFile(place.made)
    first.open(False, False)
    assert "another run is making it" in place.fails()
    first.close()
    place.run()


def test_a_full_disk_is_one_line_and_what_is_done_stays(tmp_path):
    run = UnfinishedFile(tmp_path / "made.tsv")
    run.open(False, False)
    run.begin({}, False, False)
    run.add(b"a row\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    try:
        with pytest.raises(UserError, match=r"made\.tsv: cannot be written \(File too large\)"):
            run.add(b"x" * 20_000)  # of which the last part is still in memory
        run.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run = UnfinishedFile(tmp_path / "made.tsv")
    run.open(True, False)
    run.begin({}, True, False)
    run.finish()
    run.close()
    assert run.path.read_bytes() == b"a row\n"


class Killed(BaseException):
    """Stands for a kill at that moment."""


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """A file of one block whose run was killed as it was put in its place: before the rename, or right after it."""
    path, replace = tmp_path / "made.tsv", os.replace

    def killed(renamed: bool) -> Path:
        def kill(first, second=None, **_):
            if renamed or second == path:
                raise Killed
            replace(first, second)

        run = UnfinishedFile(path)
        run.open(False, False)
        assert run.begin({"--N": 20}, False, False)
        run.add(b"a row\n")
        with monkeypatch.context() as patch:
            patch.setattr(*((shutil, "rmtree") if renamed else (os, "replace")), kill)
            with pytest.raises(Killed):
                run.finish()
        os.close(run._lock)
        assert (run.folder.is_dir(), path.exists()) == (True, renamed)
        return path

    return killed


@pytest.mark.parametrize("renamed", [False, True])
def test_what_was_killed_around_the_rename_is_gone_on_with(killed, renamed):
    run = UnfinishedFile(killed(renamed))
    run.open(True, False)
    assert run.begin({"--N": 20}, True, False) is not renamed
    if not renamed:
        assert run.blocks == 1
        run.finish()
    run.close()
    assert run.path.read_bytes() == b"a row\n"
    assert not run.folder.exists()


@pytest.mark.parametrize("renamed", [False, True])
def test_what_was_killed_around_the_rename_is_neither_written_over_nor_taken_for_another(killed, renamed):
    run = UnfinishedFile(killed(renamed))
    run.open(True, False)
    with pytest.raises(UserError, match="was begun with --N 20, now it is 3"):
        run.begin({"--N": 3}, True, False)
    run.close()
    with pytest.raises(UserError, match="is there already; --overwrite" if renamed else "holds an unfinished run"):
        run.open(False, False)
    run.close()
    assert run.folder.exists() is not renamed
    assert run.path.exists() is renamed


def test_after_a_kill_another_file_in_its_place_is_the_users(killed):
    run = UnfinishedFile(killed(renamed=True))
    run.path.write_text("mine, and longer\n")
    with pytest.raises(UserError, match="is there already"):
        run.open(True, False)
    run.close()
    run.path.unlink()
    run.open(False, False)
    assert run.begin({"--N": 3}, False, False)
    run.close()
