"""data_augmentation.py stopped at any moment: what is done stays, and --resume comes to the undisturbed file."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from augmentation_cases import SENTENCES, Place, many_rows
from cases import write_rows

from data_processing.unfinished import UnfinishedFile


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
