"""A file that is written block by block over hours; an interruption at any moment loses at most one block.

Until the file is complete a folder FILE.unfinished holds `rows`, the blocks so far, and `journal.json`: the values that
the content depends on, the number of blocks, and how many bytes of `rows` they are. The journal is replaced atomically
once these bytes are on the disk; resuming cuts off the bytes after them. At the end `rows` is renamed to the file, and
the journal, which records before that the file is finished, to FILE.json. Only files that a run wrote are removed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from data_processing.files import lock, open_own
from transformer.errors import UserError
from transformer.file_utils import temporary_files, write_atomically

_ROWS, _JOURNAL = "rows", "journal.json"
_OVERWRITE = "--overwrite_output_file starts from scratch"
_MOST_JOURNAL = 2**24  # bytes of a file that holds a few kilobytes


class ResumableFile:
    """A context in which the file `path` is written: start, add blocks, finish.

    Entering locks the folder, and checks that the flags say what to do with an existing file or unfinished run; it
    changes no unfinished run. Leaving removes the folder unless it holds anything worth resuming.

    Args:
        kept: the subfolders that the run keeps in the folder until its end, and the names of the files in each.

    Attributes:
        folder: holds the unfinished file, and other files that the run keeps until its end.
        blocks: the number of finished blocks.
        tally: the sums of the counts given with the blocks.

    Raises:
        UserError: on entering: the file or an unfinished run exists and the flags do not say what to do with it;
            another run is writing the file; the folder holds what no run wrote; or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        resume: bool = False,
        overwrite: bool = False,
        kept: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        self.path, self._resume, self._overwrite, self._kept = path, resume, overwrite, kept or {}
        self.folder = path.with_name(path.name + ".unfinished")
        self._record = path.with_name(path.name + ".json")  # the journal of the finished run
        self.blocks, self._size = 0, 0
        self.tally: Counter[str] = Counter()
        self._identity: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None  # the journal of the run to resume, or of the finished one
        self._rows: BinaryIO | None = None
        self._lock: int | None = None

    def __enter__(self) -> ResumableFile:
        if not self.path.parent.is_dir():
            raise UserError(f"{self.path.parent}: no such folder; it holds the task's files")
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a folder; the augmented file is to be written there")
        if self._resume and self._overwrite:
            raise UserError("give either --resume or --overwrite_output_file")
        if self.folder.is_symlink():
            raise UserError(f"{self.folder}: is a link, which is not followed; remove it")
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = lock(self.folder)
        except BlockingIOError:
            raise UserError(f"{self.path}: another run is writing it") from None
        except OSError as error:
            raise self._write_error(error) from None
        other = next((path for path in sorted(self.folder.rglob("*")) if not self._is_own(path)), None)
        if other is not None:
            self._unlock()
            raise UserError(
                f"{other}: no augmentation wrote it; move it elsewhere, the end of a run removes the folder"
            )
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
            self._remove()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _find_unfinished(self) -> dict[str, Any] | None:
        """Return the journal of the run to resume, or of the finished one; None to start from scratch.

        Raises:
            UserError: the flags do not say what to do with an existing file or run.
        """
        saved = None if self._overwrite else self._read_journal(self.folder / _JOURNAL)
        if saved is not None and not self._was_renamed(saved):
            if not self._resume:
                raise UserError(
                    f"{self.folder}: holds an unfinished run ({saved['blocks']} blocks of rows done); --resume "
                    f"continues it, {_OVERWRITE}"
                )
            if os.path.lexists(self.path) and not saved["identity"].get("overwrite"):
                raise UserError(f"{self.path}: exists already; --overwrite_output_file replaces it")
            return saved
        if saved is not None and self._is_complete(saved):  # a kill came after the rename of the rows
            os.replace(self.folder / _JOURNAL, self._record)
        if self._overwrite or not os.path.lexists(self.path):
            return None
        if self._resume:
            saved = self._read_journal(self._record)
            if saved is not None and self._is_complete(saved):
                return saved
        raise UserError(f"{self.path}: exists already; --overwrite_output_file replaces it")

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
            if self._is_complete(saved):
                return False
            self._identity, self.blocks, self._size = saved["identity"], saved["blocks"], saved["bytes"]
            self.tally = Counter(saved["tally"])
        try:
            if saved is None:
                self._clear()
                self._write_journal()
            self._rows = os.fdopen(open_own(self.folder / _ROWS, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")
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
            os.replace(self.folder / _JOURNAL, self._record)
            parent = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        except OSError as error:
            raise self._write_error(error) from None
        self._remove()

    def is_worth_resuming(self) -> bool:
        """Return whether the folder holds blocks, other files of the run, or a journal that cannot be read."""
        if not self.folder.is_dir():
            return False
        try:
            saved = self._read_journal(self.folder / _JOURNAL)
        except UserError:
            return True
        if any((self.folder / name).exists() for name in self._kept):
            return True
        return saved is not None and saved["blocks"] > 0 and (not self._was_renamed(saved) or self._is_complete(saved))

    def _was_renamed(self, saved: Mapping[str, Any]) -> bool:
        return saved.get("finished") is True and not (self.folder / _ROWS).exists()

    def _is_complete(self, saved: Mapping[str, Any] | None) -> bool:
        if saved is None or not self._was_renamed(saved) or not self.path.is_file():
            return False
        return self.path.stat().st_size == saved["bytes"]

    def _read_journal(self, path: Path) -> dict[str, Any] | None:
        if not os.path.lexists(path):
            return None
        try:
            valid = path.is_file() and not path.is_symlink() and path.stat().st_size < _MOST_JOURNAL
            saved = json.loads(path.read_text(encoding="utf-8")) if valid else {}
            counts = [saved["blocks"], saved["bytes"], *saved["tally"].values()]
            valid = isinstance(saved["identity"], dict) and all(type(count) is int and count >= 0 for count in counts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            valid = False
        if not valid:
            raise UserError(f"{path}: is damaged; {_OVERWRITE}")
        return saved

    def _compare(self, before: Mapping[str, Any]) -> None:
        for name in sorted((before.keys() | self._identity.keys()) - {"overwrite"}):
            old, new = ("none" if value is None else value for value in (before.get(name), self._identity.get(name)))
            if old != new:
                raise UserError(
                    f"--resume: {self.folder} was started with {name} {old}, now it is {new}; give the same, or "
                    f"{_OVERWRITE}"
                )

    def _is_own(self, path: Path) -> bool:
        """Return whether a run writes a path in the folder."""
        *parents, name = path.relative_to(self.folder).parts
        if path.is_symlink() or len(parents) > 1:
            return False
        if path.is_dir():
            return not parents and name in self._kept
        names = tuple(self._kept.get(parents[0], ()) if parents else (_ROWS, _JOURNAL))
        return path.is_file() and (name in names or path in temporary_files(path.parent, names))

    def _clear(self) -> None:
        """Remove the files that runs wrote into the folder, and no others."""
        for path in sorted(self.folder.rglob("*"), reverse=True):  # a folder comes after its files
            if self._is_own(path):
                path.rmdir() if path.is_dir() else path.unlink()

    def _remove(self) -> None:
        with suppress(OSError):  # something of the user's was put there meanwhile
            self._clear()
            self.folder.rmdir()

    def _write_journal(self, finished: bool = False) -> None:
        state = {"identity": self._identity, "blocks": self.blocks, "bytes": self._size, "tally": self.tally}
        content = json.dumps({**state, "finished": finished}, indent=1).encode("utf-8")
        write_atomically(self.folder / _JOURNAL, lambda file: file.write(content))

    def _write_error(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written ({error.strerror or error})")
