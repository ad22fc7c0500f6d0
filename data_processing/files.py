"""What several packages need of files: a digest of their content, locks, and opening what a run made itself."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
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


def lock(path: Path) -> int | None:
    """Lock a file or folder until the returned descriptor is closed or this process ends.

    Returns:
        The descriptor; None where the system, or the file system, has no such locks.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the path cannot be opened.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # NFS locks no folder, for example
        os.close(descriptor)
        return None
    return descriptor


def open_own(path: Path, flags: int) -> int:
    """Open a file that only runs write, such as a log, and return its descriptor.

    Others may have put a link to a file of the user's in its place, or a pipe, which would make a run wait.

    Raises:
        OSError: it cannot be opened, is a link, or is no regular file.
    """
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link, which is not followed", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor
