"""Writing one file: whole or not at all, when the disk fails or the process is killed (trap 21)."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest
from disk_faults import killed_before

from transformer.file_utils import write_atomically


def write_new(path: Path) -> None:
    write_atomically(path, lambda file: file.write(b"new"))


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        if moment == "write":
            fail()

    if moment != "write":
        monkeypatch.setattr(os, moment, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_the_file_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fsync a power cut could leave the new name without content."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("replace"), replace(old, new)))
    write_new(tmp_path / "file")
    assert done == ["fsync", "replace", "fsync"]  # the last one is the folder's


def test_a_written_file_has_the_users_ordinary_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_new(tmp_path / "file")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_leaves_the_old_content_or_the_new_one(tmp_path: Path) -> None:
    path, seen = tmp_path / "pytorch_model.bin", []
    path.write_bytes(b"old")
    while killed_before(len(seen), lambda: write_new(path)):
        seen.append(path.read_bytes())
    assert seen == [b"old", b"old", b"old", b"new", b"new"]
