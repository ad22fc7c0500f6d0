"""A web server on this machine that serves files correctly, or with the fault that a test asks for."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request to `site`."""

    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self.site.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        answer = self.site.answers.pop(0) if self.site.answers else correct
        self.close_connection = True
        answer(self)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def content(self) -> bytes | None:
        return self.site.files.get(self.path.partition("?")[0])

    def head(self, status: int, length: int | None, **headers: str) -> None:
        """Send status and headers; _ in a header's name stands for -."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()

    def send(self, content: bytes) -> None:
        if self.command == "GET":
            self.wfile.write(content)
            self.wfile.flush()


class Site:
    """The server. files: by path. answers: to the next requests, instead of correct ones. requests: as received."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.release = threading.Event()  # ends the answers that stall
        handler = type("BoundHandler", (Handler,), {"site": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up is no fault
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def address(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self._server.server_address[1]}{path}"

    def put(self, path: str, content: bytes) -> str:
        """Serve content at a path; return its address."""
        self.files[path] = content
        return self.address(path)

    @property
    def ranges(self) -> list[str | None]:
        """The Range headers of the requests."""
        return [headers.get("range") for _, headers in self.requests]

    def close(self) -> None:
        """End the server; connections are refused from then on."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def etag_of(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def correct(handler: Handler) -> None:
    """Answer with ranges, ETags and conditions as HTTP defines them."""
    content = handler.content
    if content is None:
        handler.head(404, 0)
        return
    etag, wanted = etag_of(content), handler.headers.get("Range")
    if handler.headers.get("If-None-Match") == etag:
        handler.head(304, None, ETag=etag)
    elif wanted is not None and handler.headers.get("If-Range", etag) == etag:
        begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        part = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        handler.head(206, len(content) - begin, ETag=etag, Content_Range=part)
        handler.send(content[begin:])
    else:
        handler.head(200, len(content), ETag=etag, Accept_Ranges="bytes")
        handler.send(content)


def breaks_off(after: int) -> Answer:
    """Send the whole file's headers, and close the connection after so many bytes."""

    def answer(handler: Handler) -> None:
        content = handler.content or b""
        handler.head(200, len(content), ETag=etag_of(content))
        handler.send(content[:after])

    return answer


def stalls(after: int | None = None) -> Answer:
    """Send the whole file's headers and so many bytes, or nothing at all, and keep the connection open."""

    def answer(handler: Handler) -> None:
        if after is not None:
            breaks_off(after)(handler)
        handler.site.release.wait(20)

    return answer


def sends(status: int, length: int | None = 0, content: bytes = b"", **headers: str) -> Answer:
    """Send this status, these headers and this content, true or not."""

    def answer(handler: Handler) -> None:
        handler.head(status, length, **headers)
        handler.send(content)

    return answer


def sends_chunks(complete: bool = True) -> Answer:
    """Send the file without its length, as two chunks; if not complete only the first one."""

    def answer(handler: Handler) -> None:
        content = handler.content or b""
        handler.head(200, None, ETag=etag_of(content), Transfer_Encoding="chunked")
        middle = len(content) // 2
        for piece in (content[:middle], content[middle:])[: 2 if complete else 1]:
            handler.send(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if complete:
            handler.send(b"0\r\n\r\n")

    return answer
