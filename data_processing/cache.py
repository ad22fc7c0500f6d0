"""A folder of arrays that runs compute once and reuse: tokenized files, a teacher's outputs.

An entry is a folder of .npy files, named by a digest of everything they depend on: if anything changes, so does the
name, and an entry is never outdated. Entries appear whole or not at all and are read through memory maps, one copy for
all processes of a machine. Checksums in them show damage. The least recently used are removed when the folder would
exceed its limit. The cache is optional: where it fails, a run computes the values again.
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
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_processing.files import lock

logger = logging.getLogger(__name__)

KINDS = ("features", "teacher_logits", "teacher_states")  # of entries: the subfolders of the cache
CHECKSUMS = "checksums"  # the array of an entry that has those of the others
_PENDING = "making-"  # begins the name of an entry that is being written
_ENTRY_NAME = re.compile(f"[0-9a-f]{{32}}|{_PENDING}.*")
_SECONDS_UNTIL_STALE = 24 * 3600.0
_HEADER = 128  # bytes of a .npy file before its values


def default_folder() -> Path | None:
    """Return XDG_CACHE_HOME/tinybert, or ~/.cache/tinybert; None without a home folder."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(home) / "tinybert"


def digest(**parts: Any) -> str:
    """Return a key for what depends on these values: JSON values, bytes, or arrays, of which the bytes count."""

    def plain(part: Any) -> Any:
        if isinstance(part, np.ndarray):
            part = _bytes_of(part)
        return hashlib.sha256(part).hexdigest() if isinstance(part, (bytes, memoryview)) else part

    values = json.dumps({name: plain(part) for name, part in parts.items()}, sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:32]


def checksum(array: np.ndarray) -> int:
    """Return a CRC-32 of an array's type, shape and values."""
    return zlib.crc32(_bytes_of(array), zlib.crc32(f"{array.dtype.str}{array.shape}".encode()))


@dataclass(frozen=True)
class Cache:
    """The cache in a folder; without a folder it keeps nothing. limit: the most bytes of all entries."""

    folder: Path | None
    limit: int

    def get(self, kind: str, key: str, names: Iterable[str]) -> dict[str, np.ndarray] | None:
        """Return the arrays of an entry that `put` made as read-only memory maps; None if it is missing or damaged."""
        arrays = self.open(kind, key, (*names, CHECKSUMS))
        if arrays is None:
            return None
        expected = arrays.pop(CHECKSUMS).tolist()
        if [checksum(array) for array in arrays.values()] != expected:
            self.report_damage(kind, key)
            return None
        return arrays

    def report_damage(self, kind: str, key: str) -> None:
        """Warn of an entry whose values are not those that were saved."""
        assert self.folder is not None
        logger.warning("%s: this cached entry is damaged; its values are computed again", self.folder / kind / key)

    def open(self, kind: str, key: str, names: Iterable[str]) -> dict[str, np.ndarray] | None:
        """Return arrays of an entry as read-only memory maps, unchecked; None if one is missing or cannot be read."""
        if self.folder is None:
            return None
        entry = self.folder / kind / key
        paths = {name: entry / f"{name}.npy" for name in names}
        try:
            if not all(path.is_file() for path in paths.values()):
                return None
            arrays: dict[str, np.ndarray] = {
                name: np.lib.format.open_memmap(path, mode="r") for name, path in paths.items()
            }
        except Exception:  # a damaged header can raise any exception
            self.report_damage(kind, key)
            return None
        with suppress(OSError):  # the entry may belong to another user
            os.utime(entry)
        return arrays

    def put(self, kind: str, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays as an entry; if that fails, log a warning and keep nothing."""
        if self.folder is None:
            return
        checksums = np.array([checksum(array) for array in arrays.values()], dtype=np.uint32)
        arrays = {**arrays, CHECKSUMS: checksums}
        size = sum(_HEADER + array.nbytes for array in arrays.values())
        if size > self.limit:
            logger.info("%d MB are not cached: --cache_limit is smaller", size / 1e6)
            return
        try:
            entry = self.make(kind, key, {name: (array.shape, array.dtype) for name, array in arrays.items()})
            try:
                for name, array in arrays.items():
                    write_values(entry.folder / f"{name}.npy", 0, array)
                entry.keep()
            finally:
                entry.discard()
        except OSError as error:
            logger.warning("%s: cannot be cached (%s)", self.folder / kind / key, error.strerror or error)

    def make(self, kind: str, key: str, arrays: Mapping[str, tuple[int | tuple[int, ...], np.dtype]]) -> PendingEntry:
        """Reserve the files of an entry, to be filled by `write_values`, and remove older entries to make room.

        Args:
            kind: one of KINDS.
            key: the entry's name, from `digest`.
            arrays: the shape, or length, and the type of each array.

        Raises:
            OSError: the folder cannot be written or the disk is full; nothing is left behind.
        """
        assert self.folder is not None
        parent = self.folder / kind
        parent.mkdir(parents=True, exist_ok=True)
        self._make_room(sum(_HEADER + int(np.prod(shape)) * dtype.itemsize for shape, dtype in arrays.values()))
        folder = Path(tempfile.mkdtemp(prefix=_pending_prefix(), dir=parent))
        entry = PendingEntry(folder, parent / key, lock(folder))
        try:
            folder.chmod(parent.stat().st_mode)  # mkdtemp lets only its owner in
            for name, (shape, dtype) in arrays.items():
                shape = shape if isinstance(shape, tuple) else (shape,)
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                with (folder / f"{name}.npy").open("wb") as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    file.truncate(file.tell() + int(np.prod(shape)) * dtype.itemsize)  # zeros, until values are written
        except BaseException:
            entry.discard()
            raise
        return entry

    def _make_room(self, needed: int) -> None:
        """Remove the least recently used entries until `needed` bytes fit within the limit and on the disk.

        Raises:
            OSError: they cannot fit, for all that may be removed; nothing was removed then.
        """
        assert self.folder is not None
        entries, pending = [], 0
        for entry in self.folder.glob("*/*"):
            with suppress(OSError):  # another process may be removing it
                if not _is_entry(entry):
                    continue
                size = sum(file.stat().st_size for file in entry.iterdir())
                if not entry.name.startswith(_PENDING):
                    entries.append((entry.stat().st_mtime, size, entry))
                elif _is_abandoned(entry):
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    pending += size
        total = sum(size for _, size, _ in entries)
        disk = total + shutil.disk_usage(self.folder).free
        if needed > disk:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        if needed > self.limit - pending:
            raise OSError(errno.EDQUOT, "other runs are writing there what --cache_limit allows", str(self.folder))
        for _, size, entry in sorted(entries):
            if total + needed <= min(self.limit - pending, disk):
                break
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


@dataclass
class PendingEntry:
    """An entry whose files are reserved and not yet complete.

    The process that made it calls `keep` or `discard`; all processes of the machine may write values into `folder`.
    """

    folder: Path
    _target: Path
    _lock: int | None  # held while this process lives

    def keep(self) -> None:
        """Make it an entry, whole or not at all.

        Raises:
            OSError: a file cannot be written, or the folder cannot be renamed.
        """
        for file in self.folder.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        with suppress(FileNotFoundError):
            shutil.rmtree(self._target)  # damaged, or just made by another run
        try:
            self.folder.rename(self._target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # then another run has just made the same
                raise
        self.discard()

    def discard(self) -> None:
        """Remove it, unless it was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_values(path: Path, first: int, values: np.ndarray) -> None:
    """Write values into a reserved file, from its value number `first` on.

    Raises:
        OSError: the disk is full, or the file was removed.
    """
    # Not through a memory map, where a full disk would kill the process.
    with path.open("rb+", buffering=0) as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.seek(first * values.itemsize, os.SEEK_CUR)
        left = _bytes_of(values)
        while left:
            left = left[file.write(left) :]
    os.utime(path.parent)  # so that it is not taken for stale


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _pending_prefix() -> str:
    return f"{_PENDING}{platform.node()}-"


def _is_abandoned(entry: Path) -> bool:
    """Return whether no process writes a pending entry any more."""
    if time.time() - entry.stat().st_mtime > _SECONDS_UNTIL_STALE:
        return True
    if not entry.name.startswith(_pending_prefix()):  # locks of other machines may not be visible here
        return False
    try:
        descriptor = lock(entry)
    except BlockingIOError:
        return False
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def _is_entry(path: Path) -> bool:
    """Return whether a path is an entry, pending or not, and not something of the user's in the same folder."""
    return (
        path.parent.name in KINDS
        and bool(_ENTRY_NAME.fullmatch(path.name))
        and path.is_dir()
        and all(file.suffix == ".npy" and file.is_file() for file in path.iterdir())
    )
