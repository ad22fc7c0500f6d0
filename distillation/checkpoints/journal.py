"""Which lines of its logs a run has written since its state was last saved.

A run that is killed has told of steps that the resumed run makes again. Log files may be other runs' too, so lines
are not cut off after a place: each is noted, with its text, before it is written, and exactly these are taken back.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from transformer.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


class Appended:
    """A text file that several runs append to: a line comes after what is there, whole.

    Args:
        path: its folder exists.
        journal: notes what is written; None where nothing is to be taken back.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, path: Path, journal: Journal | None = None) -> None:
        self.path, self._journal = path, journal
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{path}: the log cannot be written ({error.strerror})") from None

    def write(self, text: str) -> None:
        """Adds lines, each with its end.

        Raises:
            UserError: they cannot be written.
        """
        if self._journal is not None:
            self._journal.note(self.path, text)
        content = text.encode("utf-8")
        try:
            with _locked(self._file):
                while content:
                    content = content[os.write(self._file, content) :]
        except OSError as error:
            raise UserError(f"{self.path}: the log cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


class Journal:
    """The lines that a run has written since its state was saved for the last time.

    Args:
        path: where they are noted.
        save: the number of that saving; 0 is the beginning.
        check: raises an error where the journal's folder is no longer this run's.
    """

    def __init__(self, path: Path, save: int = 0, check: Callable[[], None] = lambda: None) -> None:
        self.path, self._save, self._check = path, save, check

    def begin(self, save: int) -> None:
        """Forgets them: the state of that number is on the disk."""
        self._save = save
        self._write("w", json.dumps({"save": save}) + "\n")

    def saves(self) -> int:
        """How many savings there were, by what `begin` has noted; 0 where that is not known."""
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
            return int(json.loads(self.path.read_text(encoding="utf-8").splitlines()[0])["save"])
        return 0

    def note(self, file: Path, text: str) -> None:
        """Notes lines that are about to be written.

        Raises:
            UserError: the journal cannot be written.
        """
        self._check()
        self._write("a", json.dumps({"save": self._save, "file": str(file.absolute()), "text": text}) + "\n")

    def _write(self, mode: str, content: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(content)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def noted(self) -> dict[Path, list[str]]:
        """The lines, by their file, in the order in which they were written."""
        found: dict[Path, list[str]] = {}
        with contextlib.suppress(OSError):
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the last one may be cut off
                    entry = json.loads(line)
                    if entry["save"] == self._save:
                        found.setdefault(Path(entry["file"]), []).append(entry["text"])
        return found


def sizes_of(files: Mapping[str, int], journal: Journal | None = None) -> dict[str, int]:
    """The sizes that these files, by their paths, have now; and those that a journal notes lines of."""
    paths = {Path(name) for name in files} | set(journal.noted() if journal else ())
    return {str(path.absolute()): path.stat().st_size if path.is_file() else 0 for path in paths}


def sync(files: Iterable[Path]) -> None:
    """Waits until what these files hold is on the disk: of those that are there.

    Raises:
        UserError: it cannot be written.
    """
    for path in files:
        try:
            opened = os.open(path, os.O_RDWR)
        except OSError:  # it was taken away, or another user's now: then nothing is appended any more
            continue
        try:
            os.fsync(opened)
        except OSError as error:
            raise UserError(f"{path}: the log cannot be written ({error.strerror})") from None
        finally:
            os.close(opened)


def take_back(journal: Journal, sizes: Mapping[str, int]) -> list[Path]:
    """Removes from the logs what was written since the state was saved.

    Args:
        sizes: of the files at that time; lines are looked for behind it.

    Returns:
        The files in which another run has written since: its lines are left.

    Raises:
        UserError: a file cannot be written.
    """
    mixed = []
    for path, texts in journal.noted().items():
        try:
            if _take_back(path, texts, sizes.get(str(path), 0)):
                mixed.append(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return mixed


def _take_back(path: Path, texts: list[str], size: int) -> bool:
    """Removes these texts, each once, from what stands in a file behind its first `size` bytes; whether more is."""
    with path.open("rb+", buffering=0) as file, _locked(file.fileno()):
        file.seek(size if size <= path.stat().st_size else 0)  # a shorter one is another file
        begin, rest = file.tell(), b"\n" + file.read()
        for number, text in enumerate(texts):
            content = text.encode("utf-8")
            place = rest.find(b"\n" + content)
            if place >= 0:
                rest = rest[: place + 1] + rest[place + 1 + len(content) :]
            elif number == len(texts) - 1:  # the kill, or a full disk, may have let through a part of it
                cut = rest[rest.rfind(b"\n") + 1 :]
                if cut and content.startswith(cut):
                    rest = rest[: len(rest) - len(cut)]
        # What is left first: a kill in between leaves a line twice, and none missing.
        file.seek(begin)
        left = memoryview(rest)[1:]
        while left:
            left = left[file.write(left) :]
        file.truncate(begin + len(rest) - 1)
        return len(rest) > 1


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    """Keeps other runs from writing the file meanwhile, where there are such locks."""
    locked = False
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
    try:
        yield
    finally:
        if locked:
            fcntl.flock(file, fcntl.LOCK_UN)
