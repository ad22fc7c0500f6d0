"""Fetches one file by its address, over as many requests as that takes.

A folder holds what has arrived so far: `part`, and in `part.json` of which version. A download that broke off goes on
where it was, if the server still has the same version. What becomes of the whole file is for `cached_download.py`.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_processing.downloads.addresses import Address
from data_processing.downloads.archives import BeyondLimits, Limits
from data_processing.downloads.transports import Reply, Unreachable, request
from transformer.errors import UserError

logger = logging.getLogger(__name__)

_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that another try may not meet
_ROOM_CHECKED_EVERY = 64 * 2**20  # bytes, where the size is not known beforehand
_WORTH_ANOTHER_TRY = 2**20  # bytes that have arrived since, and the tries are counted anew
_SLOWEST = 1000  # bytes a second, over as long as the server may be silent
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Patience:
    """How long a server may take, in seconds, and how often it is asked before a download is given up.

    pause: before the second try; each further one waits twice as long, up to longest_pause. longest_asked: how long a
    server may ask to be left alone (Retry-After).
    """

    connect: float = 10.0
    silent: float = 60.0
    tries: int = 8
    pause: float = 1.0
    longest_pause: float = 60.0
    longest_asked: float = 600.0


@dataclass(frozen=True)
class Version:
    """What a server says of a file's version; size is None where it does not say it."""

    etag: str | None = None
    modified: str | None = None
    size: int | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str], size: int | None) -> Version:
        """The version that a reply's headers tell."""
        return cls(headers.get("etag"), headers.get("last-modified"), size)

    @property
    def range_condition(self) -> str | None:
        """What goes with Range, so that no two versions are mixed: a strong ETag, or the date; None without either."""
        return self.etag if self.etag is not None and not self.etag.startswith("W/") else self.modified

    def conditions(self) -> dict[str, str]:
        """The headers that ask for another version only."""
        if self.etag is not None:
            return {"If-None-Match": self.etag}
        return {"If-Modified-Since": self.modified} if self.modified is not None else {}

    def equals(self, other: Version) -> bool:
        """Whether both are the same for certain, or for all that can be known: by ETag, else by date and size."""
        if self.etag is not None or other.etag is not None:
            return self.etag == other.etag
        return self.size is not None and (self.modified, self.size) == (other.modified, other.size)


class _Again(Unreachable):
    """What has arrived cannot be gone on with, and is dropped."""


class Fetch:
    """One download.

    Args:
        folder: where `part` is; no other process works there.
        address: what is fetched.
        kept: the version that is there already, of which no other copy is wanted.
        limits: of its size. patience: with the server.
    """

    def __init__(
        self, folder: Path, address: Address, kept: Version | None, limits: Limits, patience: Patience
    ) -> None:
        self.folder, self.address, self.kept = folder, address, kept
        self.limits, self.patience = limits, patience
        self.part = folder / "part"
        self.said = False

    def run(self) -> Version | None:
        """Brings `part` to its whole length.

        Returns:
            The version that arrived; None where the server has none but that which is kept.

        Raises:
            Unreachable: all tries have failed; what has arrived stays.
            UserError: no further try would help.
            OSError: the disk is full, or may not be written.
        """
        known = read_version(self.folder)
        if known is not None and known.size is not None and self._have() == known.size:
            return known
        tries = 2 if self.kept is not None and not self._have() else self.patience.tries
        failed = 0
        while True:
            before = self._have()
            try:
                with self._asked() as reply:
                    return self._take(reply)
            except Unreachable as error:
                failed = 1 if self._have() - before >= _WORTH_ANOTHER_TRY else failed + 1
                if failed >= tries:
                    raise
                pause = min(self.patience.longest_pause, self.patience.pause * 2 ** (failed - 1))
                pause = max(error.asked_seconds, pause * random.uniform(0.5, 1.0))
                logger.info("%s: %s; another try in %.0f s", self.address.shown, error, pause)
            time.sleep(pause)

    def _have(self) -> int:
        """How many bytes have arrived of a version that is known."""
        try:
            return self.part.stat().st_size
        except FileNotFoundError:
            return 0

    @contextmanager
    def _asked(self) -> Iterator[Reply]:
        have, version = self._have(), read_version(self.folder)
        condition = version.range_condition if version is not None else None
        if have and condition is None:
            drop_part(self.folder)
            have = 0
        if have:
            assert condition is not None
            headers = {"Range": f"bytes={have}-", "If-Range": condition}
        else:
            headers = self.kept.conditions() if self.kept is not None else {}
        with request(self.address, headers, self.patience.connect, self.patience.silent) as reply:
            yield reply

    def _take(self, reply: Reply) -> Version | None:
        """What a reply comes to, as `run` returns and raises it."""
        have = self._have()
        if reply.status == 304 and self.kept is not None and not have:
            return None
        if reply.status == 206 and have:
            return self._go_on(reply, have)
        if reply.status == 416 and have:
            known = read_version(self.folder)
            if known is not None and _range_total(reply.headers.get("content-range", "")) == have:
                return known
            drop_part(self.folder)
            raise _Again("what has arrived is no part of what the server has now")
        if reply.status == 412 and have:  # of S3: the content has changed
            drop_part(self.folder)
            raise _Again("what has arrived is no part of what the server has now")
        if reply.status == 200:
            return self._begin(reply, have)
        raise self._refusal(reply)

    def _begin(self, reply: Reply, have: int) -> Version | None:
        encoding = reply.headers.get("content-encoding", "identity").lower()
        packed = encoding not in ("", "identity")
        version = Version.of(reply.headers, _whole_number(reply.headers.get("content-length")))
        if packed and not self.address.name.endswith((".gz", ".tgz")):
            raise UserError(f"{self.address.shown}: the server sends it in another encoding ({encoding[:40]!r})")
        if self.kept is not None and not have and version.equals(self.kept):
            return None  # a server that heeds no conditions
        if have:
            logger.info("%s: cannot go on where it broke off; begins anew", self.address.shown)
            drop_part(self.folder)
        write_json(self.folder / "part.json", asdict(version))
        return self._receive(reply, 0, version)

    def _go_on(self, reply: Reply, have: int) -> Version:
        known = read_version(self.folder)
        found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", reply.headers.get("content-range", ""))
        etag = reply.headers.get("etag")
        total = _range_total(reply.headers.get("content-range", ""))
        if (
            known is None
            or found is None
            or int(found[1]) != have
            or (etag is not None and known.etag is not None and etag != known.etag)
            or (total is not None and known.size is not None and total != known.size)
        ):
            drop_part(self.folder)
            raise _Again("what has arrived is no part of what the server has now")
        version = known if known.size is not None else replace(known, size=total)
        return self._receive(reply, have, version)

    def _receive(self, reply: Reply, have: int, version: Version) -> Version:
        total = version.size
        self._check_room((total or 0) - have, total or 0)
        if not self.said:
            size = "size unknown" if total is None else f"{total / 1e6:.1f} MB"
            going_on = f", goes on at {have / 1e6:.1f} MB" if have else ""
            logger.info("%s: %s%s, to %s", self.address.shown, size, going_on, self.folder)
            self.said = True
        progress = _Progress(self.address.name, have, total)
        done = checked = have
        began, at_begin = time.monotonic(), have
        try:
            with self.part.open("ab") as file:
                for piece in reply.pieces:
                    done += len(piece)
                    if total is not None and done > total:
                        raise _Overlong
                    file.write(piece)
                    progress.show(done)
                    if done - checked >= _ROOM_CHECKED_EVERY:
                        checked = done
                        self._check_room(0, done)
                    now = time.monotonic()
                    if now - began > self.patience.silent:
                        if done - at_begin < _SLOWEST * (now - began):
                            raise Unreachable(f"the server sends less than {_SLOWEST} bytes a second")
                        began, at_begin = now, done
                file.flush()
                os.fsync(file.fileno())
        except _Overlong:
            drop_part(self.folder)
            raise Unreachable("the server sends more than it said") from None
        finally:
            progress.close()
        if total is not None and done < total:
            raise Unreachable(f"the connection broke off at {done} of {total} bytes")
        return version

    def _check_room(self, more: int, total: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if total > self.limits.bytes:
            raise BeyondLimits(
                f"{self.address.shown}: has more than {self.limits.gigabytes:g} GB, which is what is allowed "
                "(--most_gigabytes)"
            )
        if more > free or free < 2**20:
            raise BeyondLimits(
                f"{self.address.shown}: needs {more / 1e9:.3g} GB more, there are {free / 1e9:.3g} GB free "
                f"on the disk of {self.folder}"
            )

    def _refusal(self, reply: Reply) -> Exception:
        status = reply.status
        if status in _PASSING:
            asked = _seconds(reply.headers.get("retry-after", ""))
            if asked > self.patience.longest_asked:
                return UserError(
                    f"{self.address.shown}: the server answers {status}, and asks to come back in {asked:.0f} s"
                )
            return Unreachable(f"the server answers {status}", asked)
        hints = {
            401: "it wants a user's name and password",
            403: "it may need credentials, or is not for everyone",
            404: "there is no such file; is the address right?",
            407: "the proxy wants a user's name and password",
            410: "the file is no longer there",
        }
        hint = f" ({hints[status]})" if status in hints else ""
        return UserError(f"{self.address.shown}: the server answers {status}{hint}")


class _Overlong(Exception):
    """More has arrived than there should be."""


class _Progress:
    """Bytes that have arrived and time left: a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, title: str, done: int, total: int | None) -> None:
        self._title, self._total = title, total
        self._began, self._first = time.monotonic(), done
        self._shown = self._began
        settings: dict[str, Any] = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "leave": False}
        self._bar = tqdm(desc=title, initial=done, total=total, **settings) if sys.stderr.isatty() else None

    def show(self, done: int) -> None:
        """So many bytes are there."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._shown < _SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        rate = (done - self._first) / (now - self._began)
        if self._total is None:
            logger.info("%s: %.1f MB, %.2f MB a second", self._title, done / 1e6, rate / 1e6)
        else:
            logger.info(
                "%s: %.1f of %.1f MB (%d %%), %.0f s left",
                self._title,
                done / 1e6,
                self._total / 1e6,
                100 * done // self._total,
                (self._total - done) / max(rate, 1.0),
            )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def drop_part(folder: Path) -> None:
    """Removes what has arrived."""
    for name in ("part", "part.json"):
        (folder / name).unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a small file, whole or not at all."""
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object of a small file; empty where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}


def version_of(values: Any) -> Version | None:
    """A version as it was written; None of anything else."""
    if not isinstance(values, dict) or not values:
        return None
    etag, modified, size = (values.get(name) for name in ("etag", "modified", "size"))
    sound = isinstance(etag, str | None) and isinstance(modified, str | None) and isinstance(size, int | None)
    return Version(etag, modified, size) if sound else None


def read_version(folder: Path) -> Version | None:
    """Of what has arrived."""
    return version_of(read_json(folder / "part.json"))


def _whole_number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,18}", text.strip(), re.ASCII) else None


def _range_total(content_range: str) -> int | None:
    return _whole_number(content_range.rpartition("/")[2])


def _seconds(retry_after: str) -> float:
    """How long a Retry-After header asks to wait: a number of seconds, or a date; 0 where it says neither."""
    number = _whole_number(retry_after)
    if number is not None:
        return float(number)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
