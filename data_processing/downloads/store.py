"""Keep downloads in the cache folder, by address: a version that is there is not fetched again.

CACHE/downloads/KEY/ belongs to one address. `kept.json` names the current version, unpacked in the folder of its
digest, which is used as long as the server has no other or cannot be reached. A lock admits one process at a time.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_processing.downloads.addresses import Address
from data_processing.downloads.archives import BeyondLimits, Limits, is_archive, unpack
from data_processing.downloads.transfer import RetryPolicy, Transfer, drop_part, read_json, read_part, write_json
from data_processing.files import file_digest
from transformer.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class Downloads:
    """The downloads in a cache folder.

    Args:
        cache: the cache folder; created when needed.
        limits: of a download and of an archive's content.
        policy: of timeouts and retries.
    """

    def __init__(self, cache: Path, limits: Limits | None = None, policy: RetryPolicy | None = None) -> None:
        self.folder, self.limits, self.policy = cache / "downloads", limits or Limits(), policy or RetryPolicy()

    def get(self, address: Address, refresh: bool = True) -> Path:
        """Return the folder with an address's content: what an archive holds, or the file alone.

        Args:
            address: of the file.
            refresh: whether to look on the server for a newer version.

        Raises:
            UserError: it cannot be fetched, is not what was expected, or cannot be written.
        """
        entry = self.folder / address.key
        try:
            entry.mkdir(parents=True, exist_ok=True)
            with _locked(entry, address):
                for pattern in (".unpacking-*", "part.????????"):  # left by a process that was killed
                    for left in entry.glob(pattern):
                        shutil.rmtree(left) if left.is_dir() else left.unlink()
                return entry / self._current(entry, address, refresh)[:32]
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full; the next attempt resumes" if full else error.strerror or error
            raise UserError(f"{address.redacted}: cannot be kept in {entry} ({reason})") from None

    def _current(self, entry: Path, address: Address, refresh: bool) -> str:
        """Return the digest of the newest version; where the server fails, that of the copy in the cache."""
        kept, validator = _read_kept(entry)
        if kept is not None and (address.sha256 == kept or (address.sha256 is None and not refresh)):
            return kept
        if address.sha256 is not None:
            kept = validator = None
        try:
            changed = Transfer(entry, address, validator, self.limits, self.policy).run()
        except UserError as error:
            if kept is None or isinstance(error, BeyondLimits):
                raise
            reason = str(error).removeprefix(f"{address.redacted}: ")
            logger.warning("%s: %s; the copy in the cache is used", address.redacted, reason)
            return kept
        if changed or kept is None:
            return self._keep(entry, address)
        logger.info("%s: is there already, and the server has no other version", address.redacted)
        return kept

    def _keep(self, entry: Path, address: Address) -> str:
        """Check and unpack what has been received, and make it the current version. Returns its digest."""
        sha256 = file_digest(entry / "part")
        if address.sha256 not in (None, sha256):
            drop_part(entry)
            raise UserError(f"{address.redacted}: has the sha256 {sha256}, expected {address.sha256}; nothing was kept")
        validator = read_part(entry)[0] or ""
        folder = entry / sha256[:32]
        if not folder.is_dir():
            self._unpack(entry / "part", folder, address)
        os.utime(folder)
        write_json(entry / "kept.json", {"validator": validator, "sha256": sha256, "address": address.redacted})
        drop_part(entry)
        versions = [path for path in entry.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]
        for old in sorted(versions, key=lambda path: path.stat().st_mtime_ns)[:-2]:  # a run may still read the last one
            shutil.rmtree(old, ignore_errors=True)
        return sha256

    def _unpack(self, part: Path, folder: Path, address: Address) -> None:
        if not is_archive(part):
            temporary = folder.parent / ".unpacking-file"
            temporary.mkdir()
            os.rename(part, temporary / address.name)
            os.rename(temporary, folder)
            return
        logger.info("%s: unpacking", address.redacted)
        try:
            unpack(part, folder, self.limits, address.redacted)
        except BeyondLimits:  # with other limits, or more space, it need not be fetched again
            raise
        except UserError:
            drop_part(folder.parent)
            raise


@contextmanager
def _locked(entry: Path, address: Address) -> Iterator[None]:
    """Wait until no other process, here or on another machine that shares the disk, works on an address."""
    with (entry / "lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: another process fetches it; waiting", address.redacted)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_kept(entry: Path) -> tuple[str | None, str | None]:
    """Return the digest and the validator of the current version; None, None where there is none."""
    values = read_json(entry / "kept.json")
    validator, sha256 = values.get("validator"), str(values.get("sha256"))
    valid = isinstance(validator, str) and re.fullmatch("[0-9a-f]{64}", sha256) and (entry / sha256[:32]).is_dir()
    return (sha256, validator) if valid else (None, None)
