"""Writing a weight file: whole or not at all, whenever the disk fails or the process is killed."""

import multiprocessing
import os
import signal

import pytest

from transformer.file_utils import write_atomically


@pytest.mark.parametrize("moment", ["while writing", "before it is on the disk", "before the rename"])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment):
    """Trap 21."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    def write(file) -> None:
        file.write(b"new")
        if moment == "while writing":
            fail()

    if moment == "before it is on the disk":
        monkeypatch.setattr("transformer.saving.os.fsync", fail)
    if moment == "before the rename":
        monkeypatch.setattr("transformer.saving.os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_a_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """Trap 21: without the fsync a power cut could leave the new name with no content."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("transformer.saving.os.fsync", lambda fd: (done.append("fsync"), fsync(fd)))
    monkeypatch.setattr("transformer.saving.os.replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert done[:2] == ["fsync", "replace"]


def test_a_saved_file_has_the_users_ordinary_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def killed(action) -> None:
    """Runs an action in a forked process that is killed, or kills itself, and waits for its end."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("moment", ["while writing", "before the rename", "after the rename"])
def test_a_kill_while_saving_leaves_the_old_or_the_new_file_whole(tmp_path, moment):
    """Trap 21: torch.save to the final name leaves half a file when it is killed."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"old")

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def action() -> None:
        replace = os.replace
        if moment == "before the rename":
            os.replace = die
        if moment == "after the rename":
            os.replace = lambda *names: (replace(*names), die())

        def write(file) -> None:
            file.write(b"ne")
            file.flush()
            if moment == "while writing":
                die()
            file.write(b"w")

        write_atomically(path, write)

    killed(action)
    assert path.read_bytes() == (b"new" if moment == "after the rename" else b"old")
