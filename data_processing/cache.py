"""A folder of what need not be worked out twice: tokenized files, what a teacher has said of examples.

An entry is a few arrays under a key that is a digest of all that they depend on, so an entry is never
out of date: where anything changes there is another key. Entries are made whole or not at all, read by
mapping them into memory (one copy for all processes of a machine), and the ones not used for longest
go when the folder grows beyond its limit. Nothing here is needed: any failure means working it out again.

What fits into memory is kept by `put`. What does not is written piece by piece, by several processes if
need be, into the files that `make` has reserved.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_SECONDS_UNTIL_STALE = 24 * 3600.0  # a temporary folder that nobody works on any more
_TEMPORARY = "making-"
_HASHING_THREADS = 4
_HEADER = 128  # bytes of a file of numpy's before the values
KINDS = ("features", "teacher_logits", "teacher_states")  # of entries: the folders that they lie in
_ENTRY_NAME = re.compile(f"[0-9a-f]{{32}}|{_TEMPORARY}.*")


def default_folder() -> Path | None:
    """XDG_CACHE_HOME/tinybert, or ~/.cache/tinybert; None where there is no home."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(home) / "tinybert"


def digest(**parts: Any) -> str:
    """A key for what depends on these values: JSON's own, bytes, or arrays, whose bytes count."""

    def plain_part(part: Any) -> Any:
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        return hashlib.sha256(part).hexdigest() if isinstance(part, (bytes, memoryview)) else part

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # of large arrays, which release the interpreter
        plain = dict(zip(parts, pool.map(plain_part, parts.values()), strict=True))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    result = hashlib.sha256()  # Python 3.10
    while piece := file.read(2**20):
        result.update(piece)
    return result.hexdigest()


@dataclass(frozen=True)
class Cache:
    """The folder; None keeps nothing. limit: its most bytes."""

    folder: Path | None
    limit: int

    def get(self, kind: str, key: str, names: Iterable[str]) -> dict[str, np.ndarray] | None:
        """The arrays of an entry, mapped into memory and not to be written; None where it is not there or broken."""
        if self.folder is None:
            return None
        entry = self.folder / kind / key
        try:
            arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in names}
        except (OSError, ValueError, EOFError):
            return None
        with suppress(OSError):  # another user's
            os.utime(entry)
        return arrays

    def put(self, kind: str, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps arrays as an entry; where that fails a warning says why, and nothing is kept."""
        if self.folder is None:
            return
        size = sum(array.nbytes for array in arrays.values())
        if size > self.limit:
            logger.info("%d MB more than --cache_limit allows are not kept for the next run", size / 1e6)
            return
        entry = self.folder / kind / key
        temporary = None
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.mkdtemp(prefix=_TEMPORARY, dir=entry.parent)
            os.chmod(temporary, entry.parent.stat().st_mode)  # mkdtemp lets only its owner in
            for name, array in arrays.items():
                with open(os.path.join(temporary, f"{name}.npy"), "wb") as file:
                    np.save(file, array, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
            shutil.rmtree(entry, ignore_errors=True)  # broken, or just made by another run
            os.rename(temporary, entry)
        except OSError as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            if not entry.is_dir():
                logger.warning("%s: cannot be kept for the next run (%s)", entry, error.strerror or error)
            return
        self._make_room(entry)

    def make(self, kind: str, key: str, arrays: Mapping[str, tuple[int, np.dtype]]) -> Making:
        """Reserves the files of an entry that is written piece by piece; room is made for it at once.

        Args:
            arrays: of each array, which has one dimension, how many values of which type.

        Raises:
            OSError: the folder cannot be written or the disk is full; nothing is left.
        """
        assert self.folder is not None
        entry = self.folder / kind / key
        entry.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(entry, sum(_HEADER + count * dtype.itemsize for count, dtype in arrays.values()))
        temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{key}{_here()}", dir=entry.parent))
        making = Making(temporary, entry, _locked(temporary))
        try:
            os.chmod(temporary, entry.parent.stat().st_mode)  # mkdtemp lets only its owner in
            for name, (count, dtype) in arrays.items():
                _reserve(temporary / f"{name}.npy", count, dtype)
        except BaseException:
            making.discard()
            raise
        return making

    def _make_room(self, newest: Path, needed: int = 0) -> None:
        """Removes the entries that were not used for longest until the folder is within its limit.

        Args:
            newest: an entry that stays.
            needed: the bytes of one that is still to be written; these are to fit on the disk too.

        Raises:
            OSError: other runs are making entries that leave no room for it.
        """
        assert self.folder is not None
        entries, begun = [], 0
        for entry in self.folder.glob("*/*"):
            with suppress(OSError):
                if not _is_ours(entry):
                    continue
                used = entry.stat().st_mtime
                size = sum(file.stat().st_size for file in entry.iterdir())
                if not entry.name.startswith(_TEMPORARY):
                    entries.append((used, entry, size))
                elif time.time() - used > _SECONDS_UNTIL_STALE or (_here() in entry.name and _is_abandoned(entry)):
                    # Another machine's lock may not be seen, so its beginnings are left until they are stale.
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    begun += size
        if needed and needed + begun > self.limit:
            raise OSError(errno.EDQUOT, "other runs are writing there what --cache_limit allows", str(self.folder))
        total = begun + sum(size for _, _, size in entries)
        limit = self.limit
        if needed and needed + begun <= (
            most := total + shutil.disk_usage(self.folder).free
        ):  # else it fits in no case
            limit = min(self.limit, most) - needed
        for _, entry, size in sorted(entries, key=lambda found: found[0]):
            if total <= limit or entry == newest:
                break
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


def _here() -> str:
    """Stands in the names of this machine's beginnings that hold a lock."""
    return f"-{platform.node()}-"


@dataclass
class Making:
    """An entry whose files are there, their values not yet.

    Who has begun it keeps or discards it; any process of the machine may `write_values` into its folder.
    """

    folder: Path
    _entry: Path
    _lock: int | None  # held while the beginning is somebody's
    _open: bool = field(default=True, init=False)

    def keep(self) -> None:
        """Makes it an entry, whole or not at all.

        Raises:
            OSError: that cannot be done.
        """
        for file in self.folder.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        shutil.rmtree(self._entry, ignore_errors=True)  # broken, or just made by another run
        try:
            os.rename(self.folder, self._entry)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            self.discard()  # another run has just made the same
        else:
            self._end()

    def discard(self) -> None:
        """Removes what there is of it, unless it was kept."""
        if self._open:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._end()

    def _end(self) -> None:
        self._open = False
        if self._lock is not None:
            os.close(self._lock)


def write_values(path: Path, place: int, values: np.ndarray) -> None:
    """Writes values into an array's file, reserved by `make`, from the value of number `place` on.

    Not through a memory map: there a full disk would kill the process.

    Raises:
        OSError: the disk is full, or the file is gone.
    """
    with path.open("rb+", buffering=0) as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.seek(place * values.itemsize, os.SEEK_CUR)
        left = np.ascontiguousarray(values).data.cast("B")
        while left:
            left = left[file.write(left) :]
    os.utime(path.parent)  # somebody works on it


def _reserve(path: Path, count: int, dtype: np.dtype) -> None:
    """Makes the file of an array whose values are all 0, with its whole room on the disk."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        size = file.tell() + count * dtype.itemsize
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
        file.truncate(size)  # where room cannot be reserved a full disk is met later


def _locked(folder: Path) -> int | None:
    """Locks a folder for as long as this process lives; None where there are no such locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_abandoned(folder: Path) -> bool:
    """Whether nobody on this machine holds the lock of a folder that was begun here."""
    try:
        descriptor = _locked(folder)
    except OSError:  # gone meanwhile
        return False
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def _is_ours(entry: Path) -> bool:
    """Whether it is an entry, or the beginning of one, and not something of the user's in the same folder."""
    return (
        entry.parent.name in KINDS
        and bool(_ENTRY_NAME.fullmatch(entry.name))
        and entry.is_dir()
        and all(file.suffix == ".npy" and file.is_file() for file in entry.iterdir())
    )
