"""Standard output and standard error of a command: they never fail, and messages appear above a progress bar."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
from typing import Any, TextIO

from tqdm import tqdm

from transformer.errors import printable

tqdm.set_lock(threading.RLock())  # its own lock is a semaphore of multiprocessing, which a process that is ended leaks


def prepare_streams() -> None:
    """Make standard output and standard error usable, however the command was started.

    A closed stream is opened on the null device. A character that the terminal's encoding lacks is escaped. After a
    failed write (a closed pipe, a full disk, a closed terminal) the rest of the output is dropped; the run continues.
    """
    while True:  # a file that is opened while a standard descriptor is free would receive the messages
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
        os.set_inheritable(descriptor, True)
    sys.stdout = _prepared(sys.stdout, 1)
    sys.stderr = _prepared(sys.stderr, 2)


class _LastingFile(io.FileIO):
    """A descriptor that is redirected to the null device after a failed write."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return memoryview(data).nbytes


def _prepared(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return the stream with failures handled; a stream that is not the process's own is returned unchanged."""
    encoding, at_once = "utf-8", True
    if stream is not None:
        if type(stream) is not io.TextIOWrapper or isinstance(getattr(stream.buffer, "raw", None), _LastingFile):
            return stream  # a test's, or prepared already
        encoding, at_once = stream.encoding, stream.line_buffering or stream.write_through
        with contextlib.suppress(OSError):
            stream.flush()
    file = io.BufferedWriter(_LastingFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(file, encoding, errors="backslashreplace", line_buffering=at_once)


class MessageFormatter(logging.Formatter):
    """Format a message as one line in which nothing that it quotes controls a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class _AboveBar(logging.StreamHandler):
    """Writes each message on a line of its own, above the progress bars of a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


def show_messages(enabled: bool = True) -> None:
    """Print this project's messages to standard output, a plain line each; where not enabled, only errors."""
    prepare_streams()
    handler = _AboveBar(sys.stdout if enabled else sys.stderr)
    handler.setFormatter(MessageFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO if enabled else logging.ERROR, handlers=[handler], force=True)
