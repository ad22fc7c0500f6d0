"""A file that is written over hours, so that a stop at any moment loses a block and no more.

What is done so far lies beside the file in a folder FILE.unfinished: `rows`, the file's beginning, and `journal.json`:
what the run depends on, how many blocks are done and how many bytes of `rows` they are. The journal is replaced whole,
once the bytes that it tells of are on the disk; what follows them is cut off when the run is gone on with. The file
itself appears at the end, by a rename, which the journal tells of beforehand.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from transformer.errors import UserError
from transformer.file_utils import write_atomically

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_ROWS, _JOURNAL, _LOCK = "rows", "journal.json", "lock"
_GO_ON = "--resume goes on with it, --overwrite_output_file begins anew"


class UnfinishedFile:
    """The file `path` while it is made: opened, begun, added to, finished, and closed whatever happens.

    `blocks` are done, and `tally` is what was counted in them. `folder` is for what else the run keeps until its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.with_name(path.name + ".unfinished")
        self.blocks = 0
        self.tally: Counter[str] = Counter()
        self._identity: dict[str, Any] = {}
        self._rows: BinaryIO | None = None
        self._lock: int | None = None
        self._size = 0
        self._finished = False

    def open(self, resume: bool, overwrite: bool) -> None:
        """Makes the folder this run's own. Of a run that is not finished nothing in it is changed yet.

        Raises:
            UserError: the file is there already, or an unfinished one is, and the flags do not say what to do with it;
                another run is at work; or it cannot be written.
        """
        if not self.path.parent.is_dir():
            raise UserError(f"{self.path.parent}: no such folder; it holds the task's files")
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a folder where the augmented file is to be written")
        if resume and overwrite:
            raise UserError("give either --resume or --overwrite_output_file")
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._failed(error) from None
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._lock)
                self._lock = None
                raise UserError(f"{self.path}: another run is making it at this moment") from None
        before = None if overwrite else self._read()
        done = resume and before is not None and self._is_done(before)
        if before is not None and self._is_left_behind(before) and not done:
            try:
                self._clear()
            except OSError as error:
                raise self._failed(error) from None
            before = None
        if before is not None and not resume:
            raise UserError(
                f"{self.folder}: holds an unfinished run ({before['blocks']} blocks of rows done); {_GO_ON}"
            )
        may_replace = overwrite or done or (before is not None and before["identity"].get("overwrite"))
        if self.path.exists() and not may_replace:
            raise UserError(f"{self.path}: is there already; --overwrite_output_file makes it anew")
        if resume and before is None:
            raise UserError(f"{self.path}: there is no unfinished run to go on with; leave out --resume")

    def begin(self, identity: Mapping[str, Any], resume: bool, overwrite: bool) -> bool:
        """Goes on with what is there, or begins anew.

        Args:
            identity: what the content depends on: JSON's own values, by the names that messages give them.
            resume, overwrite: as for `open`.

        Returns:
            Whether there is anything left to do; not so where the run had put its file in its place already.

        Raises:
            UserError: the unfinished run depended on other values; nothing is changed.
        """
        self._identity = json.loads(json.dumps({**identity, "overwrite": overwrite}))
        before = self._read() if resume else None
        if before is not None:
            self._compare(before["identity"])
            if self._is_done(before):
                shutil.rmtree(self.folder, ignore_errors=True)
                return False
            self._identity = before["identity"]
            self.blocks, self._size = before["blocks"], before["bytes"]
            self.tally = Counter(before["tally"])
        try:
            if before is None:
                self._clear()
                self._write_journal()
            self._rows = (self.folder / _ROWS).open("ab")
            short = os.path.getsize(self.folder / _ROWS) < self._size
            if not short:
                self._rows.truncate(self._size)
        except OSError as error:
            raise self._failed(error) from None
        if short:
            raise UserError(f"{self.folder}: is broken ({_ROWS} is too short); --overwrite_output_file begins anew")
        return True

    def add(self, text: bytes, **counts: int) -> None:
        """Writes a block. It is done once this returns. counts: are added to the tally.

        Raises:
            UserError: it cannot be written; what was written before stays.
        """
        assert self._rows is not None
        try:
            self._rows.write(text)
            self._rows.flush()
            os.fsync(self._rows.fileno())
            self.blocks, self._size = self.blocks + 1, self._size + len(text)
            self.tally.update(counts)
            self._write_journal()
        except OSError as error:
            raise self._failed(error) from None

    def finish(self) -> None:
        """Puts the file in its place; the folder goes.

        Raises:
            UserError: it cannot be put there.
        """
        assert self._rows is not None
        try:
            self._rows.close()
            self._finished = True
            self._write_journal()
            os.replace(self.folder / _ROWS, self.path)
            opened = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)
        except OSError as error:
            raise self._failed(error) from None
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the folder. It stays where something of a file that is not finished is in it."""
        if self._rows is not None:
            with suppress(OSError):  # of what a full disk has refused already; the journal does not tell of it
                self._rows.close()
        if self._lock is None:
            return
        if self.folder.is_dir() and not self._holds_anything():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def _holds_anything(self) -> bool:
        """Whether blocks are done, or the run has kept anything else, or it cannot be told."""
        try:
            found = self._read()
        except UserError:
            return True
        others = {child.name for child in self.folder.iterdir()} - {_ROWS, _JOURNAL, _LOCK}
        return bool(others) or (found is not None and found["blocks"] > 0)

    def _is_left_behind(self, journal: Mapping[str, Any]) -> bool:
        """Whether a stop came between the rename and the end of the folder."""
        return journal.get("finished") is True and not (self.folder / _ROWS).exists()

    def _is_done(self, journal: Mapping[str, Any]) -> bool:
        """Whether, besides, the file is where it was put."""
        there = self._is_left_behind(journal) and self.path.is_file()
        return there and self.path.stat().st_size == journal["bytes"]

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.folder / _JOURNAL).read_text(encoding="utf-8"))
            whole = isinstance(found["identity"], dict) and found["blocks"] >= 0 and found["bytes"] >= 0
            Counter(found["tally"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{self.folder / _JOURNAL}: is broken; --overwrite_output_file begins anew")
        return found

    def _compare(self, before: Mapping[str, Any]) -> None:
        for name in sorted(before.keys() | self._identity.keys()):
            old, new = before.get(name), self._identity.get(name)
            if name != "overwrite" and old != new:
                raise UserError(
                    f"--resume: {self.folder} was begun with {name} {_shown(old)}, now it is {_shown(new)}; "
                    "give the same, or begin anew with --overwrite_output_file"
                )

    def _clear(self) -> None:
        for child in self.folder.iterdir():
            if child.name == _LOCK:
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

    def _write_journal(self) -> None:
        state = {"identity": self._identity, "blocks": self.blocks, "bytes": self._size, "tally": self.tally}
        content = json.dumps({**state, "finished": self._finished}, indent=1)
        write_atomically(self.folder / _JOURNAL, lambda file: file.write(content.encode("utf-8")))

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written ({error.strerror or error})")


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
