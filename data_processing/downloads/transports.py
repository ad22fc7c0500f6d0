"""One request to a server: http and https through `requests`, s3 through `boto3`. Both give the same kind of reply.

Whatever a library raises becomes one of two: `Unreachable`, which may pass, or a UserError, which will not. Their
own messages are not shown, since they quote addresses with all credentials. Trying again is for `fetching.py`.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from data_processing.downloads.addresses import Address, hidden
from transformer.errors import UserError

_PIECE = 2**17
_WHOLE_PIECE = 2**15  # where a library gives a piece only when all of it is there
_MOST_WAITING = 8  # pieces that have arrived and are not yet taken
_SECONDS_BETWEEN_LOOKS = 0.1
_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_USER_AGENT = "tinybert-download"


class Unreachable(Exception):
    """The server could not be reached, or fell silent, or broke off: another try may go better.

    asked_seconds: how long it asks to be left alone.
    """

    def __init__(self, message: str, asked_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.asked_seconds = asked_seconds


@dataclass(frozen=True)
class Reply:
    """What a server answered: its status, its headers by lower-case names, and the content, piece by piece."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]


@contextmanager
def request(
    address: Address, headers: Mapping[str, str], connect_seconds: float, read_seconds: float
) -> Iterator[Reply]:
    """Asks for an address's content.

    Args:
        address: what is asked for.
        headers: further ones: Range and If-Range, If-None-Match or If-Modified-Since.
        connect_seconds, read_seconds: how long the server may take to be reached, and to send anything. Both together
            are what its whole answer up to the content may take.

    Raises:
        Unreachable: here, or while pieces are read.
        UserError: the address cannot be used as it is.
    """
    for library in ("urllib3", "botocore"):  # they log whole addresses
        logging.getLogger(library).setLevel(logging.CRITICAL)
    opened = _http if address.scheme in ("http", "https") else _s3
    arriving = _Arriving(opened(address, headers, (connect_seconds, read_seconds)))
    try:
        yield arriving.reply(connect_seconds + read_seconds, read_seconds)
    finally:
        arriving.leave()


class _Arriving:
    """A reply that a thread reads, so that no wait for it is longer than is allowed.

    The libraries limit each wait for some bytes, not that for a whole header or piece: of a server that sends a byte a
    second they would wait for days. A thread that is left waits on, which harms nobody, until its server ends.
    """

    def __init__(self, opened: AbstractContextManager[Reply]) -> None:
        # Replies, pieces, and in the end None or an error.
        self._items: queue.Queue[Any] = queue.Queue(_MOST_WAITING)
        self._left = threading.Event()
        threading.Thread(target=self._read, args=(opened,), name="download", daemon=True).start()

    def reply(self, seconds: float, seconds_between: float) -> Reply:
        """The reply, whose pieces may be read.

        Args:
            seconds: until its content begins. seconds_between: until the first piece, and between two.
        """
        reply = self._next(seconds, f"the server's answer takes longer than {seconds:g} s")
        return Reply(reply.status, reply.headers, self._pieces(seconds_between))

    def leave(self) -> None:
        """Nothing more is wanted."""
        self._left.set()

    def _pieces(self, seconds: float) -> Iterator[bytes]:
        while (piece := self._next(seconds, "the server fell silent")) is not None:
            yield piece

    def _next(self, seconds: float, otherwise: str) -> Any:
        try:
            item = self._items.get(timeout=seconds)
        except queue.Empty:
            raise Unreachable(otherwise) from None
        if isinstance(item, BaseException):
            raise item
        return item

    def _read(self, opened: AbstractContextManager[Reply]) -> None:
        try:
            with opened as reply:
                self._give(reply)
                for piece in reply.pieces:
                    self._give(piece)
                    if self._left.is_set():
                        return
            self._give(None)
        except BaseException as error:  # whoever waits raises it
            self._give(error)

    def _give(self, item: Any) -> None:
        while not self._left.is_set():
            try:
                self._items.put(item, timeout=_SECONDS_BETWEEN_LOOKS)
                return
            except queue.Full:
                continue


def _http(address: Address, headers: Mapping[str, str], seconds: tuple[float, float]) -> AbstractContextManager[Reply]:
    import requests  # some tenths of a second, which only a download is to take, and which no server is to blame for

    return _answered(requests, address, headers, seconds)


@contextmanager
def _answered(
    requests: ModuleType, address: Address, headers: Mapping[str, str], seconds: tuple[float, float]
) -> Iterator[Reply]:
    parts = urlsplit(address.url)
    auth = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
    first = url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    sent = {"Accept-Encoding": "identity", "User-Agent": _USER_AGENT, **headers}
    with requests.Session() as session:  # which reads the proxies from the environment
        for _ in range(_MOST_REDIRECTS + 1):
            same_server = urlsplit(url)[:2] == urlsplit(first)[:2]
            try:
                response = session.get(
                    url,
                    headers=sent,
                    auth=auth if same_server else None,
                    stream=True,
                    timeout=seconds,
                    allow_redirects=False,
                )
            except Exception as error:  # of requests, of urllib3, of sockets: all are told here
                raise _told(error, address) from None
            with response:
                target = response.headers.get("Location")
                if response.status_code not in _REDIRECTS or not target:
                    plain = {name.lower(): value for name, value in response.headers.items()}
                    yield Reply(
                        response.status_code, plain, _pieces(partial(response.raw.read1, _PIECE, False), address)
                    )
                    return
            url = _redirected(url, target, address)
    raise UserError(
        f"{address.shown}: the server sends from one address to the next, more than {_MOST_REDIRECTS} times"
    )


def _redirected(url: str, target: str, address: Address) -> str:
    """Where a reply sends to. Raises UserError where that is no place for a download to go."""
    try:
        there = urljoin(url, target)
        scheme = urlsplit(there).scheme.lower()
        named = bool(urlsplit(there).hostname)
    except ValueError:
        scheme, named = "", False
    if scheme not in ("http", "https") or not named:
        raise UserError(f"{address.shown}: the server sends to {hidden(target)[:200]!r}, which is no http address")
    if scheme == "http" and urlsplit(url).scheme.lower() == "https":
        raise UserError(
            f"{address.shown}: the server sends from https to http ({hidden(there)[:200]}), which is not safe"
        )
    return there


def _pieces(read: Callable[[], bytes], address: Address) -> Iterator[bytes]:
    while True:
        try:
            piece = read()
        except Exception as error:
            raise _told(error, address) from None
        if not piece:
            return
        yield piece


def _told(error: Exception, address: Address) -> Exception:
    """An error of a library in our words: an Unreachable, or a UserError; our own faults as they are."""
    import requests
    import urllib3

    text = str(error)
    if "CERTIFICATE" in text.upper():
        return UserError(f"{address.shown}: the server's certificate cannot be trusted")
    if isinstance(error, (ValueError, urllib3.exceptions.LocationValueError)):  # the libraries' for all bad addresses
        return UserError(
            f"{address.shown}: this address, the one it leads to, or the proxy's in the environment is none "
            f"({_kind(error)})"
        )
    if isinstance(error, requests.exceptions.ProxyError):
        return Unreachable("the proxy cannot be reached")
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return Unreachable("the server does not answer")
    if isinstance(error, (requests.exceptions.ReadTimeout, urllib3.exceptions.ReadTimeoutError, TimeoutError)):
        return Unreachable("the server fell silent")
    if "Name or service not known" in text or "NameResolution" in text or "getaddrinfo" in text:
        return Unreachable("there is no such host, or no network")
    if "refused" in text:
        return Unreachable("the server refuses connections")
    if isinstance(error, (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError)):
        return Unreachable("the connection broke off")
    return error


def _kind(error: Exception) -> str:
    return type(error).__name__


def _s3(address: Address, headers: Mapping[str, str], seconds: tuple[float, float]) -> AbstractContextManager[Reply]:
    boto3, botocore = _library("boto3", address), _library("botocore.config", address)
    exceptions = importlib.import_module("botocore.exceptions")
    with _told_of_s3(address, exceptions):
        session = boto3.Session()
        settings = {"connect_timeout": seconds[0], "read_timeout": seconds[1], "retries": {"total_max_attempts": 1}}
        if session.get_credentials() is None:  # then only what is public can be read
            settings["signature_version"] = importlib.import_module("botocore").UNSIGNED
        client = session.client("s3", config=botocore.Config(**settings))
    return _s3_answered(client, exceptions, address, headers)


@contextmanager
def _s3_answered(client: Any, exceptions: ModuleType, address: Address, headers: Mapping[str, str]) -> Iterator[Reply]:
    parts = urlsplit(address.url)
    # S3 knows no If-Range; with If-Match it answers 412 where the content has changed.
    names = {"Range": "Range", "If-Range": "IfMatch", "If-None-Match": "IfNoneMatch"}
    asked = {names[name]: value for name, value in headers.items() if name in names}
    try:
        with _told_of_s3(address, exceptions):
            # Without checksums, which a part of a file has none of.
            bucket, key = parts.netloc.rpartition("@")[2], unquote(parts.path.lstrip("/"))
            found = client.get_object(Bucket=bucket, Key=key, **asked)
    except exceptions.ClientError as error:
        meta = error.response.get("ResponseMetadata", {})
        yield Reply(meta.get("HTTPStatusCode", 500), _lower(meta.get("HTTPHeaders", {})), iter(()))
        return
    meta = found["ResponseMetadata"]
    body = found["Body"]
    try:
        yield Reply(meta["HTTPStatusCode"], _lower(meta["HTTPHeaders"]), _s3_pieces(body, exceptions))
    finally:
        body.close()


@contextmanager
def _told_of_s3(address: Address, exceptions: ModuleType) -> Iterator[None]:
    """Tells boto3's errors, but those that are a server's answer, in our words."""
    try:
        yield
    except exceptions.ClientError:
        raise
    except (exceptions.ParamValidationError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound) as error:
        raise UserError(f"{address.shown}: this address, or AWS's settings, cannot be used ({_kind(error)})") from None
    except exceptions.BotoCoreError as error:
        raise Unreachable(f"the server cannot be reached ({_kind(error)})") from None
    except ValueError:  # an endpoint in the environment that is none
        raise UserError(f"{address.shown}: the endpoint in AWS's settings is no address") from None


def _s3_pieces(body: Any, exceptions: ModuleType) -> Iterator[bytes]:
    while True:
        try:
            piece = body.read(_WHOLE_PIECE)
        except (exceptions.BotoCoreError, HTTPException, OSError) as error:
            silent = isinstance(error, (exceptions.ReadTimeoutError, TimeoutError))
            raise Unreachable("the server fell silent" if silent else "the connection broke off") from None
        if not piece:
            return
        yield piece


def _lower(headers: Mapping[str, Any]) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _library(name: str, address: Address) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{address.shown}: s3:// addresses need boto3; pip install -r requirements-s3.txt") from None
