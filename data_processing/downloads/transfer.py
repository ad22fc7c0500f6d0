"""Transfer one file over HTTP(S) or from S3 into a folder, with retries; over HTTP a later attempt resumes.

The folder holds `part`, the bytes received so far, and `part.json`, the server's version of the file that they are of.
Messages of the libraries are not shown: they quote addresses with their credentials.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from tqdm import tqdm

from data_processing.downloads.addresses import Address
from data_processing.downloads.archives import BeyondLimits, Limits
from transformer.errors import UserError

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal
_PIECE = 2**17
_LONGEST_WAIT = 600.0  # seconds that a server may ask to wait for
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # statuses that another attempt may not meet
_PROGRESS = 2**20  # bytes; an attempt that gains as much does not count as failed
_CREDENTIALS = " (it may need credentials, or is not public)"
_HINTS = {401: _CREDENTIALS, 403: _CREDENTIALS, 404: " (there is no such file; check the address)"}


@dataclass(frozen=True)
class RetryPolicy:
    """Timeouts and retries.

    timeout: in seconds, of connecting and of each wait for bytes. attempts: without progress in between.
    backoff: factor of the waits between attempts in seconds, which double each time.
    """

    timeout: tuple[float, float] = (10.0, 60.0)
    attempts: int = 8
    backoff: float = 1.0


class TransientError(Exception):
    """A server did not send what it should have; another attempt may succeed."""


class Transfer:
    """The transfer of one file.

    Args:
        folder: where `part` is; no other process works there.
        address: of the file.
        kept: the validator (ETag or date) of the version in the cache, "" where it has none; None without a version.
        limits: of its size.
        policy: of timeouts and retries.
    """

    def __init__(self, folder: Path, address: Address, kept: str | None, limits: Limits, policy: RetryPolicy) -> None:
        self.folder, self.address, self.kept, self.limits, self.policy = folder, address, kept, limits, policy
        self.part = folder / "part"

    def run(self) -> bool:
        """Complete `part`; return False where the server has no other version than the kept one.

        Raises:
            UserError: the file cannot be fetched; what has been received stays.
            OSError: the disk is full or not writable.
        """
        for library in ("urllib3", "botocore", "boto3", "s3transfer"):  # they log whole addresses
            logging.getLogger(library).setLevel(logging.CRITICAL)
        if self._received() and self._received() == read_part(self.folder)[1]:
            return True
        return self._from_s3() if self.address.scheme == "s3" else self._from_http()

    def _from_http(self) -> bool:
        attempts = 2 if self.kept is not None and not self._received() else self.policy.attempts
        fresh = retry = urllib3.Retry(attempts - 1, backoff_factor=self.policy.backoff)
        most = self._received()
        with requests.Session() as session:  # takes proxies from the environment
            session.max_redirects = 5
            if self.address.scheme == "https":
                session.adapters.pop("http://")  # no redirect may lead from https to http
            while True:
                wait = 0.0
                try:
                    with self._request(session) as response:
                        if response.status_code not in _TRANSIENT:
                            return self._receive(response)
                        reason = f"the server answers {response.status_code}"
                        with suppress(urllib3.exceptions.InvalidHeader):
                            wait = retry.get_retry_after(response.raw) or 0.0
                except (requests.RequestException, urllib3.exceptions.HTTPError, TransientError, ValueError) as error:
                    reason = self._reason(error)
                if self._received() - most >= _PROGRESS:
                    most, retry = self._received(), fresh
                try:
                    retry = retry.increment()
                except urllib3.exceptions.MaxRetryError:
                    raise self._error(f"cannot be fetched: {reason}") from None
                wait = max(wait, retry.get_backoff_time())
                if wait > _LONGEST_WAIT:
                    raise self._error(f"{reason}, and asks to wait {wait:.0f} s")
                logger.info("%s: %s; another attempt in %.0f s", self.address.redacted, reason, wait)
                time.sleep(wait)

    def _request(self, session: requests.Session) -> requests.Response:
        headers = {"Accept-Encoding": "identity", "User-Agent": "tinybert-download"}
        validator = read_part(self.folder)[0]
        if validator is None or validator.startswith("W/"):
            drop_part(self.folder)
        if self._received():
            headers |= {"Range": f"bytes={self._received()}-", "If-Range": validator or ""}
        elif self.kept:
            headers["If-None-Match" if '"' in self.kept else "If-Modified-Since"] = self.kept
        parts = urlsplit(self.address.url)
        auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        return session.get(self.address.url, headers=headers, auth=auth, stream=True, timeout=self.policy.timeout)

    def _receive(self, response: requests.Response) -> bool:
        """Write a response's content to `part`. Returns and raises as `run`, and TransientError."""
        status, headers, have = response.status_code, response.headers, self._received()
        etag, date = headers.get("ETag", ""), headers.get("Last-Modified")
        validator = date if date and etag.startswith("W/") else etag or date  # with a weak ETag none can resume
        if self.kept and not have and (status == 304 or (status == 200 and validator == self.kept)):
            return False
        if status == 200:
            drop_part(self.folder)
            length = headers.get("Content-Length", "")
            have, size = 0, int(length) if re.fullmatch(r"\d{1,18}", length, re.ASCII) else None
            write_json(self.folder / "part.json", {"validator": validator, "size": size})
        elif status in (206, 412, 416) and have:
            started, size = read_part(self.folder)
            found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", headers.get("Content-Range", ""), re.ASCII)
            total = int(found[2]) if found is not None and int(found[1]) == have else None
            if status != 206 or total is None or size not in (None, total) or validator not in (None, started):
                drop_part(self.folder)
                raise TransientError("the server has another version of the file")
            size = total
        else:
            raise self._error(f"the server answers {status}{_HINTS.get(status, '')}")
        self._check_size(size, have)
        with self.part.open("ab") as file, self._progress(have, size) as bar:
            for piece in iter(partial(response.raw.read1, _PIECE, False), b""):
                file.write(piece)
                have += len(piece)
                bar.update(len(piece))
                if have > self.limits.bytes:
                    self._check_size(have, have)
            file.flush()
            os.fsync(file.fileno())
        if size not in (None, have):
            drop_part(self.folder)
            raise TransientError(f"the server sends {have} bytes, not {size}")
        return True

    def _from_s3(self) -> bool:
        try:
            import boto3
            from boto3.exceptions import Boto3Error
            from botocore import UNSIGNED
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError:
            raise self._error("s3:// addresses need boto3; pip install -r requirements-s3.txt") from None
        parts, (connect, read) = urlsplit(self.address.url), self.policy.timeout
        place = {"Bucket": parts.netloc.rpartition("@")[2], "Key": unquote(parts.path.lstrip("/"))}
        config = Config(
            connect_timeout=connect,
            read_timeout=read,
            retries={"mode": "standard", "total_max_attempts": self.policy.attempts},
        )
        try:
            session = boto3.Session()
            if session.get_credentials() is None:  # public files need none
                config = config.merge(Config(signature_version=UNSIGNED))
            client = session.client("s3", config=config)
            head = client.head_object(**place)
            if head["ETag"] == self.kept:
                return False
            self._check_size(head["ContentLength"], 0)
            with self._progress(0, head["ContentLength"]) as bar:
                client.download_file(**place, Filename=str(self.part), Callback=bar.update)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            raise self._error(f"the server answers {status}{_HINTS.get(status, '')}") from None
        except (BotoCoreError, Boto3Error, ValueError) as error:  # ValueError: an endpoint that is no address
            raise self._error(f"cannot be fetched from S3 ({type(error).__name__})") from None
        write_json(self.folder / "part.json", {"validator": head["ETag"], "size": head["ContentLength"]})
        return True

    def _received(self) -> int:
        """Return the number of bytes in `part`."""
        return self.part.stat().st_size if self.part.exists() else 0

    def _check_size(self, size: int | None, have: int) -> None:
        """Log the size of the whole file. Raises BeyondLimits where the limits or the disk do not allow it."""
        limit, more, free = self.limits.bytes, (size or 0) - have, shutil.disk_usage(self.folder).free
        if size is not None and size > limit:
            raise BeyondLimits(f"{self.address.redacted}: is larger than {limit / 1e9:g} GB (--most_gigabytes)")
        if more > free:
            needed = f"needs {more / 1e9:.3g} GB more, the disk of {self.folder} has {free / 1e9:.3g} GB free"
            raise BeyondLimits(f"{self.address.redacted}: {needed}")
        known = "size unknown" if size is None else f"{size / 1e6:.1f} MB"
        resumed = f", resumed at {have / 1e6:.1f} MB" if have else ""
        logger.info("%s: %s%s, to %s", self.address.redacted, known, resumed, self.folder)

    def _progress(self, have: int, total: int | None) -> tqdm:
        """Return a bar on a terminal, and elsewhere a line in the log every ten seconds."""
        settings: dict[str, Any] = {"dynamic_ncols": True}
        if not sys.stderr.isatty():
            every = SECONDS_BETWEEN_LINES
            settings = {"file": _LogLines(), "ncols": 0, "mininterval": every, "delay": every}
        settings |= {"desc": self.address.name, "unit": "B", "unit_scale": True, "leave": False}
        return tqdm(initial=have, total=total, **settings)

    def _reason(self, error: Exception) -> str:
        """Return a description of a failed attempt. Raises UserError where no other attempt can succeed."""
        text = str(error)
        if isinstance(error, TransientError):
            return text
        if "CERTIFICATE" in text.upper():
            raise self._error("the server's certificate cannot be trusted")
        if isinstance(error, (ValueError, requests.TooManyRedirects)):  # ValueError: of all libraries for addresses
            kind = type(error).__name__
            raise self._error(f"the address, its redirect or the environment's proxy is invalid or not safe ({kind})")
        if isinstance(error, requests.exceptions.ProxyError):
            return "the proxy cannot be reached"
        if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError)):
            return "the server does not respond in time"
        if "NameResolution" in text or "NewConnection" in text:
            return "the server cannot be reached; check the address and the network"
        return "the connection broke off"

    def _error(self, text: str) -> UserError:
        return UserError(f"{self.address.redacted}: {text}")


class _LogLines:
    """A file for tqdm that writes its lines to the log."""

    def write(self, text: str) -> None:
        if text.strip():
            logger.info("%s", text.strip())

    def flush(self) -> None:
        pass


def read_part(folder: Path) -> tuple[str | None, int | None]:
    """Return the validator and the size of the file that `part` belongs to; None where they are unknown."""
    values = read_json(folder / "part.json")
    validator, size = values.get("validator"), values.get("size")
    return validator if isinstance(validator, str) else None, size if isinstance(size, int) else None


def drop_part(folder: Path) -> None:
    """Remove what has been received."""
    for name in ("part", "part.json"):
        (folder / name).unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a small file. Where a process is killed meanwhile, `read_json` takes it for an absent one."""
    path.write_text(json.dumps(values), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a small file holds; an empty one where the file is absent or broken."""
    with suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}
