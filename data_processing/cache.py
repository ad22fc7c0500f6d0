"""A folder of what need not be worked out twice: tokenized files, what a teacher has said of examples.

An entry is a few arrays under a key that is a digest of all that they depend on, so an entry is never
out of date: where anything changes there is another key. Entries are made whole or not at all, read by
mapping them into memory (one copy for all processes of a machine), and the ones not used for longest
go when the folder grows beyond its limit. Nothing here is needed: any failure means working it out again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

_SECONDS_UNTIL_STALE = 24 * 3600.0  # a temporary folder that nobody works on any more
_TEMPORARY = "making-"
KINDS = ("features", "teacher_logits")  # of entries: the folders that they lie in
_ENTRY_NAME = re.compile(f"[0-9a-f]{{32}}|{_TEMPORARY}.*")


def default_folder() -> Path | None:
    """XDG_CACHE_HOME/tinybert, or ~/.cache/tinybert; None where there is no home."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(home) / "tinybert"


def digest(**parts: Any) -> str:
    """A key for what depends on these values: JSON's own, or bytes."""
    plain = {
        name: hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else part for name, part in parts.items()
    }
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

    def _make_room(self, newest: Path) -> None:
        """Removes the entries that were not used for longest until the folder is within its limit."""
        assert self.folder is not None
        entries = []
        for entry in self.folder.glob("*/*"):
            with suppress(OSError):
                if not _is_ours(entry):
                    continue
                used = entry.stat().st_mtime
                if not entry.name.startswith(_TEMPORARY):
                    entries.append((used, entry, sum(file.stat().st_size for file in entry.iterdir())))
                elif time.time() - used > _SECONDS_UNTIL_STALE:
                    shutil.rmtree(entry, ignore_errors=True)
        total = sum(size for _, _, size in entries)
        for _, entry, size in sorted(entries, key=lambda found: found[0]):
            if total <= self.limit or entry == newest:
                break
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


def _is_ours(entry: Path) -> bool:
    """Whether it is an entry, or the beginning of one, and not something of the user's in the same folder."""
    return (
        entry.parent.name in KINDS
        and bool(_ENTRY_NAME.fullmatch(entry.name))
        and entry.is_dir()
        and all(file.suffix == ".npy" and file.is_file() for file in entry.iterdir())
    )
