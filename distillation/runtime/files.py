"""Folders and files that runs write: checks before a run, appended logs, locks."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_processing.files import lock, open_own
from transformer.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_MOST_JSON = 2**24  # bytes of a file that holds a few kilobytes


def check_can_make(folder: Path, flag: str) -> None:
    """Check, without making anything, that a folder exists or can be made, and may be written to.

    Raises:
        UserError: a file is in its way, or the user may not write there.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{folder}: the folder of {flag} cannot be made ({existing} is a file)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: the folder of {flag} cannot be written ({existing}: no permission)")


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder and its parents where they are missing.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder of {flag} cannot be made ({error.strerror})") from None


def check_can_append(path: Path) -> None:
    """Check, without making anything, that a log can be appended to where it exists.

    Raises:
        UserError: it is a link, is no file, or the user may not write it.
    """
    reason = None
    if path.is_symlink():
        reason = "it is a link, which is not followed"
    elif path.is_dir():
        reason = "it is a folder"
    elif path.exists() and not path.is_file():
        reason = "it is no regular file"
    elif path.exists() and not os.access(path, os.W_OK):
        reason = "it is another user's, or read-only"
    if reason is not None:
        raise UserError(f"{path}: the log cannot be written ({reason})")


def check_is_in_place(descriptor: int, path: Path) -> None:
    """Check that an open log is still the file of its name, so that no line is lost.

    Raises:
        UserError: the file or its folder was removed or replaced.
    """
    try:
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return
    except (FileNotFoundError, NotADirectoryError):
        pass
    raise UserError(f"{path}: was removed or moved while the run wrote there; the run ends")


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is no such file or it holds something else.

    Raises:
        UserError: it is no regular file, or far larger than such a file can be.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file")
        if path.exists() and path.stat().st_size > _MOST_JSON:
            raise UserError(f"{path}: has {path.stat().st_size / 1e6:.0f} MB; no run wrote such a file")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class AppendedFile:
    """A text file to which several runs may append: each write adds whole lines behind what is there.

    Args:
        path: its folder exists.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            raise self._failed(error) from None

    def write(self, text: str) -> None:
        """Append lines, each with its line break.

        Raises:
            UserError: they cannot be written, and none of them is; or the file was removed.
        """
        check_is_in_place(self._file, self.path)
        content = text.encode("utf-8")
        try:
            with locked(self._file):
                size = os.fstat(self._file).st_size
                try:
                    while content:
                        content = content[os.write(self._file, content) :]
                except OSError:  # a full disk takes a part of a line, which the next run's would follow
                    os.ftruncate(self._file, size)
                    raise
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> AppendedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: the log cannot be written ({error.strerror})")


@contextlib.contextmanager
def locked(descriptor: int) -> Iterator[None]:
    """Hold a file's exclusive lock, where the file system has locks, so that other runs do not write meanwhile."""
    held = False
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = True
    try:
        yield
    finally:
        if held:
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed; None where the file system has no locks.

    Raises:
        UserError: another process holds the lock.
    """
    try:
        return lock(folder)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is writing there") from None
