"""Parse the addresses that a user may give in place of a folder: http://, https:// and s3://.

An address may hold credentials: in front of its host, or in its query. They are sent to the server, and never shown or
stored: messages show `redacted`, and the cache folder is named by `key`, a hash. This module opens no connection.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit, urlunsplit

from transformer.errors import UserError, printable

SCHEMES = ("http", "https", "s3")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ADDRESS_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
# Query parameters of signed addresses, which differ from one request for a file to the next. Those of the second
# pattern are ignored only beside one of the first: alone, `key=` or `sp=` may name the file.
_SIGNATURE = re.compile(r"sig|signature|q-signature|x-(amz|goog|obs|oss|cos)-signature", re.IGNORECASE)
_SIGNED_WITH = re.compile(
    r"x-(amz|goog|obs|oss|cos)-(algorithm|credential|date|expires|signed-?headers|security-token|signature-version)"
    r"|expires|policy|key-pair-id|security-token|(aws|oss)?accesskeyid|googleaccessid"
    r"|q-(sign-algorithm|ak|sign-time|key-time|header-list|url-param-list)"
    r"|s[eprtv]|sip|spr|sk[estv]|skoid|sktid",
    re.IGNORECASE,
)
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Address:
    """The address of a file.

    url: with credentials, for the request only. sha256: the file's expected digest in hexadecimal, or None.
    """

    url: str = field(repr=False)
    sha256: str | None = None

    @property
    def scheme(self) -> str:
        """One of SCHEMES."""
        return urlsplit(self.url).scheme.lower()

    @property
    def redacted(self) -> str:
        """The address without credentials, for messages and files."""
        return _redact_url(self.url)

    @property
    def name(self) -> str:
        """A file name without path, derived from the address."""
        last = printable(unquote(urlsplit(self.url).path).rstrip("/").rsplit("/", 1)[-1])
        safe = re.sub(r'[\\/:*?"<>|\s]', "_", last).lstrip(".").encode()[:120].decode(errors="ignore")
        return safe or "download"

    @property
    def key(self) -> str:
        """A hash of the address without its password and without a signature that expires."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2].lower()
        named = [(unquote(part.partition("=")[0]), part) for part in parts.query.split("&")]
        if any(_SIGNATURE.fullmatch(name) for name, _ in named):
            named = [pair for pair in named if not (_SIGNATURE.fullmatch(pair[0]) or _SIGNED_WITH.fullmatch(pair[0]))]
        plain = urlunsplit((self.scheme, host, parts.path, "&".join(part for _, part in named), ""))
        return hashlib.sha256(plain.encode(errors="surrogateescape")).hexdigest()[:32]


def is_address(text: str) -> bool:
    """Return whether a text is an address rather than the name of a folder."""
    return bool(_ADDRESS.match(text))


def parse_address(text: str, sha256: str | None = None) -> Address:
    """Parse an address such as `https://host/path/file.zip#sha256=…`, the end being optional.

    Args:
        text: the address.
        sha256: the file's digest, where it is given elsewhere.

    Raises:
        UserError: the text is no address of a known scheme, or the digest is malformed.
    """
    url, _, fragment = text.partition("#")
    shown = _redact_url(url)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port checks it
    except ValueError:
        raise UserError(f"{shown}: is no address; expected one such as https://host/path/file.zip") from None
    if parts.scheme.lower() not in SCHEMES:
        raise UserError(f"{shown}: only {', '.join(f'{scheme}://' for scheme in SCHEMES)} can be fetched")
    if not host or not parts.path.strip("/") or re.search(r"[\0-\x20\x7f\ud800-\udfff]", url):
        raise UserError(f"{shown}: names no file on a host; expected an address such as https://host/path/file.zip")
    if fragment:
        kind, _, value = fragment.partition("=")
        if kind != "sha256" or sha256 is not None:
            raise UserError(f"{shown}: the part after # is not understood; expected #sha256=…, once")
        sha256 = value
    if sha256 is not None and not _SHA256.fullmatch(sha256.lower()):
        raise UserError(f"{shown}: its sha256 is {sha256[:80]!r}, expected 64 hexadecimal digits")
    return Address(url, sha256.lower() if sha256 is not None else None)


def redact(text: str) -> str:
    """Return a text, such as a command line, without the credentials of the addresses in it."""
    return _ADDRESS_IN_TEXT.sub(lambda found: _redact_url(found[0]), text)


def _redact_url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    place, question, query = rest.partition("?")
    _, at, host = place.rpartition("@")
    if not at and "@" in query and ":" in place.partition("/")[0]:  # perhaps a password with a question mark in it
        return f"{scheme}://…"
    return f"{scheme}://{'…@' if at else ''}{host}{'?…' if question else ''}"
