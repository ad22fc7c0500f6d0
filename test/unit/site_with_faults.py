"""A web server on this machine that serves files well, or with whatever fault a test asks for, over real sockets."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request; `site` is what it is answered from."""

    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self.site.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        answer = self.site.answers.pop(0) if self.site.answers else well
        self.close_connection = True
        answer(self)

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def content(self) -> bytes | None:
        return self.site.files.get(self.path.partition("?")[0])

    def head(self, status: int, length: int | None, **headers: str) -> None:
        """Status and headers; of a name, _ stands for -."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()

    def say(self, content: bytes) -> None:
        self.wfile.write(content)
        self.wfile.flush()


class Site:
    """The server: `files` by path, `answers` for the next requests instead of good ones, `requests` as they came.

    outwaited: how many slow answers were waited for to their end.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.outwaited = 0
        self.release = threading.Event()  # what a silent answer waits for
        handler = type("BoundHandler", (Handler,), {"site": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who hangs up is no fault here
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def address(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://{self.host}{path}"

    def put(self, path: str, content: bytes) -> str:
        """Serves content at a path; returns its address."""
        self.files[path] = content
        return self.address(path)

    def close(self) -> None:
        """Ends the server; connections are refused from then on."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def etag_of(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def well(handler: Handler) -> None:
    """Answers as a good server does: ranges, ETags and conditions."""
    content = handler.content
    if content is None:
        handler.head(404, 0)
        return
    etag, wanted = etag_of(content), handler.headers.get("Range")
    if handler.headers.get("If-None-Match") == etag:
        handler.head(304, None, ETag=etag)
        return
    if wanted is not None and handler.headers.get("If-Range", etag) == etag:
        begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if begin >= len(content):
            handler.head(416, 0, Content_Range=f"bytes */{len(content)}")
            return
        whole = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        handler.head(206, len(content) - begin, ETag=etag, Content_Range=whole)
        handler.say(content[begin:])
        return
    handler.head(200, len(content), ETag=etag, Accept_Ranges="bytes")
    handler.say(content)


def breaks_off(after: int) -> Answer:
    """Answers with the whole file's headers, and closes the connection after so many bytes."""

    def answer(handler: Handler) -> None:
        content = handler.content or b""
        handler.head(200, len(content), ETag=etag_of(content))
        handler.say(content[:after])

    return answer


def falls_silent(after: int) -> Answer:
    """The same, and keeps the connection open."""

    def answer(handler: Handler) -> None:
        breaks_off(after)(handler)
        handler.site.release.wait(20)

    return answer


def says_nothing(handler: Handler) -> None:
    """Keeps the connection open."""
    handler.site.release.wait(20)


def says(status: int, length: int | None = 0, content: bytes = b"", **headers: str) -> Answer:
    """Answers with this status, these headers and this content, true or not."""

    def answer(handler: Handler) -> None:
        handler.head(status, length, **headers)
        handler.say(content)

    return answer


def in_chunks(ends: bool = True) -> Answer:
    """Answers without telling the length."""

    def answer(handler: Handler) -> None:
        content = handler.content or b""
        handler.head(200, None, ETag=etag_of(content), Transfer_Encoding="chunked")
        middle = len(content) // 2
        for piece in (content[:middle], content[middle:])[: 2 if ends else 1]:
            handler.say(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if ends:
            handler.say(b"0\r\n\r\n")

    return answer


def trickles(before: bytes, without_end: bytes) -> Answer:
    """Answers with these bytes, and then byte by byte, so slowly that it takes 15 seconds, with the others."""

    def answer(handler: Handler) -> None:
        handler.say(before)
        for _ in range(300):
            handler.say(without_end)
            if handler.site.release.wait(0.05):
                return
        handler.site.outwaited += 1

    return answer
