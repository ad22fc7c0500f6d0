"""Keeps what was fetched by its address: a version that is there is not fetched again.

CACHE/downloads/KEY/ belongs to one address. `kept.json` names the version that is there, unpacked, in the folder of its
digest. It is used as long as the server has no other, or cannot be asked. One process at a time works there.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_processing.cache import file_digest
from data_processing.downloads.addresses import Address
from data_processing.downloads.archives import BeyondLimits, Limits, is_archive, unpack
from data_processing.downloads.transfer import Fetch, Patience, Version, drop_part, read_json, version_of, write_json
from data_processing.downloads.transports import Unreachable
from transformer.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

DOWNLOADS = "downloads"  # the folder's name in --cache_dir


@dataclass(frozen=True)
class _Kept:
    """What kept.json says: the version, the digest of the file as it arrived, the version before, the address."""

    version: Version
    sha256: str
    before: str = ""
    address: str = ""

    @property
    def name(self) -> str:
        return self.sha256[:32]


class Downloads:
    """The folder of what was fetched.

    Args:
        folder: CACHE/downloads; made when first needed.
        limits: of a download and of an archive's content.
        patience: with servers.
    """

    def __init__(self, folder: Path, limits: Limits | None = None, patience: Patience | None = None) -> None:
        self.folder, self.limits, self.patience = folder, limits or Limits(), patience or Patience()

    def get(self, address: Address, ask: bool = True) -> Path:
        """The folder with what is at an address: an archive's content, or the file alone.

        Args:
            address: what is wanted.
            ask: whether the server is asked for a newer version of what is there.

        Raises:
            UserError: it cannot be had.
        """
        entry = self.folder / address.key
        try:
            entry.mkdir(parents=True, exist_ok=True)
            with _locked(entry, address):
                return self._get(entry, address, ask)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full; what has arrived is kept for another try" if full else error.strerror or error
            raise UserError(f"{address.shown}: cannot be kept in {entry} ({reason})") from None

    def _get(self, entry: Path, address: Address, ask: bool) -> Path:
        for left in entry.glob(".unpacking-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        kept = _read_kept(entry)
        if kept is not None and address.sha256 is not None:
            if kept.sha256 == address.sha256:
                logger.info("%s: is there already, with this sha256", address.shown)
                return entry / kept.name
            kept = None
        if kept is not None and not ask:
            return entry / kept.name
        fetch = Fetch(entry, address, None if kept is None else kept.version, self.limits, self.patience)
        resumes = fetch.part.exists()
        while True:
            try:
                version = fetch.run()
            except (Unreachable, UserError) as error:
                if kept is None or isinstance(error, BeyondLimits):
                    if isinstance(error, UserError):
                        raise
                    raise UserError(f"{address.shown}: cannot be fetched: {error}") from None
                reason = str(error).removeprefix(f"{address.shown}: ")
                logger.warning("%s: %s; the copy that is there is used", address.shown, reason)
                return entry / kept.name
            if version is None:
                assert kept is not None
                logger.info("%s: is there already, and the server has no other", address.shown)
                return entry / kept.name
            sha256 = file_digest(fetch.part)
            if address.sha256 in (None, sha256):
                return self._keep(entry, address, version, sha256, kept)
            drop_part(entry)
            if not resumes:
                raise UserError(
                    f"{address.shown}: has the sha256 {sha256}, expected {address.sha256}; "
                    "it is not what it should be, and was not kept"
                )
            resumes = False
            logger.info("%s: has another sha256 than expected; begins anew", address.shown)

    def _keep(self, entry: Path, address: Address, version: Version, sha256: str, before: _Kept | None) -> Path:
        """Unpacks what has arrived and makes it the version that is there."""
        part = entry / "part"
        older = before.name if before is not None and before.name != sha256[:32] else ""
        kept = _Kept(replace(version, size=part.stat().st_size), sha256, older, address.shown)
        folder = entry / kept.name
        if not folder.is_dir():
            self._unpack(entry, address, part, folder)
        write_json(entry / "kept.json", asdict(kept))
        drop_part(entry)
        for other in entry.iterdir():  # the version before stays, for runs that still read it
            if other.is_dir() and re.fullmatch("[0-9a-f]{32}", other.name) and other.name not in (kept.name, older):
                shutil.rmtree(other, ignore_errors=True)
        return folder

    def _unpack(self, entry: Path, address: Address, part: Path, folder: Path) -> None:
        if not is_archive(part):
            temporary = entry / ".unpacking-file"
            temporary.mkdir()
            os.rename(part, temporary / address.name)
            os.rename(temporary, folder)
            return
        logger.info("%s: is being unpacked", address.shown)
        try:
            unpack(part, folder, self.limits, address.shown)
        except BeyondLimits:  # what has arrived may be unpacked with other limits, or more room
            raise
        except UserError:
            drop_part(entry)
            raise


@contextmanager
def _locked(entry: Path, address: Address) -> Iterator[None]:
    """Waits until no other process works on this address, here or on another machine that shares the disk."""
    descriptor = os.open(entry / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                logger.info("%s: another process is fetching it; waits for that", address.shown)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_kept(entry: Path) -> _Kept | None:
    """What is there, whole; None where nothing is."""
    values = read_json(entry / "kept.json")
    version, sha256 = version_of(values.get("version")), values.get("sha256")
    if version is None or not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        return None
    kept = _Kept(version, sha256, str(values.get("before", "")))
    return kept if (entry / kept.name).is_dir() else None
