"""What several packages need of files: a digest of their content, and locks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    result = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(2**20):
            result.update(piece)
    return result.hexdigest()


def try_lock(path: Path) -> int | None:
    """Lock a file or folder until the returned descriptor is closed or this process ends.

    Returns:
        The descriptor; None if another process holds the lock, or the system has no such locks.

    Raises:
        OSError: the path cannot be opened.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
