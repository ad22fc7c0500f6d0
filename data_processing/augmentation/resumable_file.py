"""A file that is written block by block over hours; an interruption at any moment loses at most one block.

Until the file is complete a folder FILE.unfinished holds `rows`, the blocks so far, and `journal.json`: the values that
the content depends on, the number of blocks, and how many bytes of `rows` they are. The journal is replaced atomically
once these bytes are on the disk; resuming cuts off the bytes after them. At the end `rows` is renamed to the file; the
journal records before that the file is finished.
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

from data_processing.files import try_lock
from transformer.errors import UserError
from transformer.file_utils import write_atomically

_ROWS, _JOURNAL = "rows", "journal.json"
_OVERWRITE = "--overwrite_output_file starts from scratch"


class ResumableFile:
    """A context in which the file `path` is written: start, add blocks, finish.

    Entering locks the folder, and checks that the flags say what to do with an existing file or unfinished run; it
    changes no unfinished run. Leaving removes the folder unless it holds anything worth resuming.

    Attributes:
        folder: holds the unfinished file, and other files that the run keeps until its end.
        blocks: the number of finished blocks.
        tally: the sums of the counts given with the blocks.

    Raises:
        UserError: on entering: the file or an unfinished run exists and the flags do not say what to do with it;
            another run is writing the file; or it cannot be written.
    """

    def __init__(self, path: Path, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self._resume, self._overwrite = path, resume, overwrite
        self.folder = path.with_name(path.name + ".unfinished")
        self.blocks, self._size = 0, 0
        self.tally: Counter[str] = Counter()
        self._identity: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None  # the journal of the run to resume
        self._rows: BinaryIO | None = None
        self._lock: int | None = None

    def __enter__(self) -> ResumableFile:
        if not self.path.parent.is_dir():
            raise UserError(f"{self.path.parent}: no such folder; it holds the task's files")
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a folder; the augmented file is to be written there")
        if self._resume and self._overwrite:
            raise UserError("give either --resume or --overwrite_output_file")
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = try_lock(self.folder)
        except OSError as error:
            raise self._write_error(error) from None
        if self._lock is None and os.name == "posix":
            raise UserError(f"{self.path}: another run is writing it")
        try:
            self._saved = self._find_unfinished()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows is not None:
            with suppress(OSError):  # bytes that a full disk refused before; the journal does not count them
                self._rows.close()
        if not self.is_worth_resuming():
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def _find_unfinished(self) -> dict[str, Any] | None:
        """Return the journal of the run to resume, None to start from scratch. Raises UserError."""
        saved = None if self._overwrite else self._read_journal()
        complete = self._resume and self._is_complete(saved)
        if saved is not None and self._was_renamed(saved) and not complete:  # the file was removed or replaced since
            self._clear()
            saved = None
        if saved is not None and not self._resume:
            raise UserError(
                f"{self.folder}: holds an unfinished run ({saved['blocks']} blocks of rows done); --resume continues "
                f"it, {_OVERWRITE}"
            )
        may_replace = self._overwrite or complete or (saved is not None and saved["identity"].get("overwrite"))
        if self.path.exists() and not may_replace:
            raise UserError(f"{self.path}: exists already; --overwrite_output_file replaces it")
        if self._resume and saved is None:
            raise UserError(f"{self.path}: there is no unfinished run to resume; leave out --resume")
        return saved

    def start(self, identity: Mapping[str, Any]) -> bool:
        """Continue the unfinished run, or start from scratch; return False if the file is complete already.

        Args:
            identity: the values that the content depends on (JSON), by their names in messages.

        Raises:
            UserError: the unfinished run depended on other values, or is damaged; nothing is changed.
        """
        self._identity = json.loads(json.dumps({**identity, "overwrite": self._overwrite}))
        saved = self._saved
        if saved is not None:
            self._compare(saved["identity"])
            if self._is_complete(saved):  # a kill came between the rename and the removal of the folder
                shutil.rmtree(self.folder, ignore_errors=True)
                return False
            self._identity, self.blocks, self._size = saved["identity"], saved["blocks"], saved["bytes"]
            self.tally = Counter(saved["tally"])
        try:
            if saved is None:
                self._clear()
                self._write_journal()
            self._rows = (self.folder / _ROWS).open("ab")
            if os.path.getsize(self.folder / _ROWS) < self._size:
                raise UserError(f"{self.folder}: is damaged ({_ROWS} is too short); {_OVERWRITE}")
            self._rows.truncate(self._size)
        except OSError as error:
            raise self._write_error(error) from None
        return True

    def add(self, text: bytes, **counts: int) -> None:
        """Write a block to the disk, and add the counts to the tally.

        Raises:
            UserError: it cannot be written; the earlier blocks stay.
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
            raise self._write_error(error) from None

    def finish(self) -> None:
        """Rename `rows` to the file, and remove the folder. Raises UserError if that fails."""
        assert self._rows is not None
        try:
            self._rows.close()
            self._write_journal(finished=True)
            os.replace(self.folder / _ROWS, self.path)
            parent = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        except OSError as error:
            raise self._write_error(error) from None
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_worth_resuming(self) -> bool:
        """Return whether the folder holds blocks, other files of the run, or a journal that cannot be read."""
        if not self.folder.is_dir():
            return False
        try:
            saved = self._read_journal()
        except UserError:
            return True
        others = {child.name for child in self.folder.iterdir()} - {_ROWS, _JOURNAL}
        return bool(others) or (saved is not None and saved["blocks"] > 0)

    def _was_renamed(self, saved: Mapping[str, Any]) -> bool:
        return saved.get("finished") is True and not (self.folder / _ROWS).exists()

    def _is_complete(self, saved: Mapping[str, Any] | None) -> bool:
        if saved is None or not self._was_renamed(saved) or not self.path.is_file():
            return False
        return self.path.stat().st_size == saved["bytes"]

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            saved = json.loads((self.folder / _JOURNAL).read_text(encoding="utf-8"))
            valid = isinstance(saved["identity"], dict) and saved["blocks"] >= 0 and saved["bytes"] >= 0
            Counter(saved["tally"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise UserError(f"{self.folder / _JOURNAL}: is damaged; {_OVERWRITE}")
        return saved

    def _compare(self, before: Mapping[str, Any]) -> None:
        for name in sorted((before.keys() | self._identity.keys()) - {"overwrite"}):
            old, new = ("none" if value is None else value for value in (before.get(name), self._identity.get(name)))
            if old != new:
                raise UserError(
                    f"--resume: {self.folder} was started with {name} {old}, now it is {new}; give the same, or "
                    f"{_OVERWRITE}"
                )

    def _clear(self) -> None:
        try:
            for child in self.folder.iterdir():
                if child.is_dir() and not child.is_symlink():
                    shutil.rmtree(child)
                else:
                    child.unlink()
        except OSError as error:
            raise self._write_error(error) from None

    def _write_journal(self, finished: bool = False) -> None:
        state = {"identity": self._identity, "blocks": self.blocks, "bytes": self._size, "tally": self.tally}
        content = json.dumps({**state, "finished": finished}, indent=1).encode("utf-8")
        write_atomically(self.folder / _JOURNAL, lambda file: file.write(content))

    def _write_error(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written ({error.strerror or error})")
