"""What a run tells: lines on the screen, progress with time left, and the files in output/.

For a run named train_full_1p_1 these are `train_full_1p_1.txt` (a line of FPS and accuracy each
--output_txt_step steps), `metrics.jsonl` (the same and more, for programs) and
`debug_layer_loss.log` (every message). All are appended to, and made when first written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from distillation.checkpoints.journal import Appended, Journal
from distillation.checkpoints.outputs import check_can_make, make_folder
from distillation.runtime.device import Process, synchronize
from transformer.errors import UserError, printable

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_VALUES = 1.0  # on a bar: to read them a device must be waited for


class MessageFormatter(logging.Formatter):
    """Shows a message as one line in which nothing that it quotes acts on a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def show_messages(enabled: bool = True) -> None:
    """Lets this project's messages appear on standard output, one plain line each; or only warnings, elsewhere."""
    if not enabled:
        logging.basicConfig(level=logging.ERROR, force=True)
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(MessageFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def text_line(label: str, epoch: int, step: int, fps: float, acc: float | None = None) -> str:
    """A line of the fps log: `[NPU:0]  epoch 0 step99 FPS94.54 acc0.9085`, the last only where it is known."""
    line = f"[{label}]  epoch {epoch} step{step} FPS{fps:.2f} "
    return line if acc is None else f"{line}acc{acc:.4f}"


_METRICS_NAME, _MESSAGES_NAME = "metrics.jsonl", "debug_layer_loss.log"


def log_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The files of the fps log and of the metrics of a run of this name."""
    return folder / f"{name}.txt", folder / _METRICS_NAME


def check_logs(folder: Path, name: str) -> None:
    """Checks, and makes nothing, that the log of a run of this name can be written.

    Raises:
        UserError: the folder cannot be made, or one of its files cannot be appended to.
    """
    check_can_make(folder, "--fps_acc_dir")
    for path in (*log_files(folder, name), folder / _MESSAGES_NAME):
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise UserError(f"{path}: the log cannot be written (it is a folder, or another user's)")


class _MessageFile(logging.FileHandler):
    """A file of messages whose failing ends the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise UserError(f"{self.baseFilename}: the log cannot be written ({error.strerror})") from None
        super().handleError(record)


class RunLog:
    """The files of one run. Only the main process writes; elsewhere every call does nothing.

    Args:
        folder, name: of the files.
        process: this one.
        journal: notes the lines of a run that may be resumed; the messages' file is not among them.
    """

    def __init__(self, folder: Path, name: str, process: Process, journal: Journal | None = None) -> None:
        self._label = process.label
        self._name = name
        self._files: list[Appended] = []
        self._handler: logging.Handler | None = None
        if process.is_main:
            make_folder(folder, "--fps_acc_dir")
            self._text, self._metrics = (Appended(path, journal) for path in log_files(folder, name))
            try:
                self._handler = _MessageFile(folder / _MESSAGES_NAME, encoding="utf-8")
            except OSError as error:
                raise UserError(f"{error.filename}: the log cannot be written ({error.strerror})") from None
            self._files = [self._text, self._metrics]
            self._handler.setFormatter(MessageFormatter("%(asctime)s %(message)s"))
            logging.getLogger().addHandler(self._handler)

    def line(self, epoch: int, step: int, fps: float, acc: float | None = None) -> None:
        """Adds a line to the fps log."""
        if self._files:
            self._text.write(text_line(self._label, epoch, step, fps, acc) + "\n")

    def record(self, event: str, **values: Any) -> None:
        """Adds an object to metrics.jsonl; numbers that JSON has no word for become null."""
        if self._files:
            entry = {"time": round(time.time(), 3), "run": self._name, "event": event, **values}
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
            self._metrics.write(json.dumps(finite) + "\n")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            with contextlib.suppress(OSError):  # told when the message was written
                self._handler.close()
        for file in self._files:
            file.close()


class FpsMeter:
    """Examples trained by all processes per second of wall time, loading of data included.

    Evaluation and saving are paused for, and their seconds kept apart. The first steps are left out:
    they warm caches and allocators, after a run is resumed again. `examples` are those of the other steps.
    """

    def __init__(self, process: Process, total_steps: int) -> None:
        self._device = process.device
        self._skipped = min(10, total_steps // 10)
        self._steps = 0
        self.examples = 0
        self._seconds = self._earlier = 0.0
        self._since = self._now()
        self.paused: dict[str, float] = {}

    def go_on_from(self, examples: int, seconds: float, paused: Mapping[str, float]) -> None:
        """Adds what the run has counted before it was resumed; before the first step."""
        self.examples, self._earlier, self.paused = examples, seconds, dict(paused)

    def seconds(self) -> float:
        """The time that the counted steps took; not to be asked in a pause."""
        counts = self._steps > self._skipped
        return self._earlier + (self._seconds + self._now() - self._since if counts else 0.0)

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()

    def count(self, examples: int) -> None:
        """A step is done that trained this many examples, over all processes."""
        self._steps += 1
        if self._steps > self._skipped:
            self.examples += examples
        elif self._steps == self._skipped:
            self._seconds, self._since = 0.0, self._now()

    def fps(self) -> float:
        """Examples per second so far; 0 before the first step that counts."""
        return self.examples / self.seconds() if self.examples else 0.0

    def pause(self, reason: str) -> _Pause:
        """A context whose time is counted for `reason` and not as training."""
        return _Pause(self, reason)


class _Pause:
    def __init__(self, meter: FpsMeter, reason: str) -> None:
        self._meter, self._reason = meter, reason

    def __enter__(self) -> None:
        meter = self._meter
        self._begin = meter._now()
        meter._seconds += self._begin - meter._since

    def __exit__(self, *_: object) -> None:
        meter = self._meter
        meter._since = meter._now()
        meter.paused[self._reason] = meter.paused.get(self._reason, 0.0) + meter._since - self._begin


class Progress:
    """Steps done and time left: a bar on a terminal, elsewhere a line every ten seconds.

    Args:
        done: how many there were before this began.
    """

    def __init__(
        self, title: str, total: int, enabled: bool = True, every: float = 10.0, unit: str = "step", done: int = 0
    ) -> None:
        self._title, self._total, self._every, self._unit = title, total, every, unit
        self._done = self._first = done
        self._begin = self._shown = time.monotonic()
        self._enabled = enabled
        self._bar = (
            tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True, leave=unit == "step", initial=done)
            if sys.stderr.isatty() and enabled
            else None
        )

    def advance(self, values: Callable[[], dict[str, str]] = dict) -> None:
        """One more step is done; the values are shown beside it, and asked for only when they are."""
        self._done += 1
        now = time.monotonic()
        if self._bar is not None:
            if now - self._shown >= _SECONDS_BETWEEN_VALUES:
                self._shown = now
                self._bar.set_postfix(values(), refresh=False)
            self._bar.update()
            return
        if self._enabled and now - self._shown >= self._every and self._done < self._total:
            self._shown = now
            left = (now - self._begin) / (self._done - self._first) * (self._total - self._done)
            percent = 100 * self._done // self._total
            parts = [f"{self._unit} {self._done} of {self._total} ({percent} %)", f"{clock(left)} left"]
            logger.info(
                "%s: %s", self._title, ", ".join(parts + [f"{name} {value}" for name, value in values().items()])
            )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """Seconds as people read them: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
