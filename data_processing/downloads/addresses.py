"""Addresses that the user gives in place of a folder: http://, https:// and s3://, with what they are called here.

An address may hold credentials, in front of its host or behind its `?`. They are sent and never shown or stored:
`shown` is for messages, and `key`, a hash, names the folder of what was fetched. Nothing here opens an address.
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
# What signs an address for a while: the same file is asked for with others each time. The rest count only beside one
# of the first kind: by itself `key=` or `sp=` may say which file is meant.
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
    """Where a file is.

    url: with credentials, for the request alone. sha256: of its content, in hexadecimal digits, where it is known.
    """

    url: str = field(repr=False)
    sha256: str | None = None

    @property
    def scheme(self) -> str:
        """http, https or s3."""
        return urlsplit(self.url).scheme.lower()

    @property
    def shown(self) -> str:
        """The address without credentials, for messages and files."""
        return _shown(self.url)

    @property
    def name(self) -> str:
        """What a file from there is called on this disk."""
        last = printable(unquote(urlsplit(self.url).path).rstrip("/").rsplit("/", 1)[-1])
        safe = re.sub(r'[\\/:*?"<>|\s]', "_", last).lstrip(".").encode()[:120].decode(errors="ignore")
        return safe or "download"

    @property
    def key(self) -> str:
        """A name for what is fetched from there: the same with another password, or another signature that expires.

        Of all else in the address it holds a hash, so two files never share a name.
        """
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2].lower()
        named = [(unquote(part.partition("=")[0]), part) for part in parts.query.split("&")]
        if any(_SIGNATURE.fullmatch(name) for name, _ in named):
            named = [pair for pair in named if not (_SIGNATURE.fullmatch(pair[0]) or _SIGNED_WITH.fullmatch(pair[0]))]
        plain = urlunsplit((self.scheme, host, parts.path, "&".join(part for _, part in named), ""))
        return hashlib.sha256(plain.encode(errors="surrogateescape")).hexdigest()[:32]


def is_address(text: str) -> bool:
    """Whether a text is an address and no folder's name."""
    return bool(_ADDRESS.match(text))


def parse_address(text: str, sha256: str | None = None) -> Address:
    """The address in a text, as a user gives it: `https://host/path/file.zip#sha256=…`, the end being optional.

    Args:
        text: the address. sha256: of its content, where it is given elsewhere.

    Raises:
        UserError: it is no address that can be fetched, or its sha256 is none.
    """
    url, _, fragment = text.partition("#")
    shown = _shown(url)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # the port is checked where it is read
    except ValueError:
        raise UserError(f"{shown}: is no address; expected one such as https://host/path/file.zip") from None
    if parts.scheme.lower() not in SCHEMES:
        raise UserError(f"{shown}: only {', '.join(f'{scheme}://' for scheme in SCHEMES)} can be fetched")
    if not host or not parts.path.strip("/") or re.search(r"[\0-\x20\x7f\ud800-\udfff]", url):
        raise UserError(f"{shown}: names no file on a host; expected an address such as https://host/path/file.zip")
    if fragment:
        kind, _, value = fragment.partition("=")
        if kind != "sha256" or sha256 is not None:
            raise UserError(f"{shown}: what follows # is not understood; expected #sha256=…, once")
        sha256 = value
    if sha256 is not None and not _SHA256.fullmatch(sha256.lower()):
        raise UserError(f"{shown}: its sha256 is {sha256[:80]!r}, expected 64 hexadecimal digits")
    return Address(url, sha256.lower() if sha256 is not None else None)


def _shown(url: str) -> str:
    """An address, all of the text, without what may be a credential."""
    scheme, _, rest = url.partition("://")
    place, question, query = rest.partition("?")
    _, at, host = place.rpartition("@")
    if not at and "@" in query and ":" in place.partition("/")[0]:  # perhaps a password that holds a question mark
        return f"{scheme}://…"
    return f"{scheme}://{'…@' if at else ''}{host}{'?…' if question else ''}"


def hidden(text: str) -> str:
    """A text, such as a command line, in which no address shows what may be a credential."""
    return _ADDRESS_IN_TEXT.sub(lambda found: _shown(found[0]), text)
