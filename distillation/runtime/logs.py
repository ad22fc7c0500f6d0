"""A run's output for people and programs: messages, progress with time left, speed, and the files in output/.

For a run named train_full_1p_1 the files are `train_full_1p_1.txt` (FPS and accuracy every --output_txt_step steps),
`metrics.jsonl` (the same and more, for programs) and `debug_layer_loss.log` (every message). All are appended to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_processing.files import open_own
from distillation.runtime.console import MessageFormatter
from distillation.runtime.device import Process, synchronize
from distillation.runtime.files import (
    AppendedFile,
    check_can_append,
    check_can_make,
    check_is_in_place,
    locked,
    make_folder,
)
from transformer.errors import UserError

logger = logging.getLogger(__name__)

_METRICS_NAME, _MESSAGES_NAME = "metrics.jsonl", "debug_layer_loss.log"
_SECONDS_BETWEEN_VALUES = 1.0  # on a progress bar: reading them synchronizes the device
_WARM_UP_STEPS = 10


def text_line(label: str, epoch: int, step: int, fps: float, acc: float | None = None) -> str:
    """Return a line of the FPS log: `[NPU:0]  epoch 0 step99 FPS94.54 acc0.9085`, without acc where it is None."""
    line = f"[{label}]  epoch {epoch} step{step} FPS{fps:.2f} "
    return line if acc is None else f"{line}acc{acc:.4f}"


def log_files(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the paths of the FPS log and of metrics.jsonl for a run of this name."""
    return folder / f"{name}.txt", folder / _METRICS_NAME


def check_logs(folder: Path, name: str) -> None:
    """Check that the logs of a run of this name can be written; make nothing.

    Raises:
        UserError: the folder cannot be made, or a file cannot be appended to.
    """
    check_can_make(folder, "--fps_acc_dir")
    for path in (*log_files(folder, name), folder / _MESSAGES_NAME):
        check_can_append(path)


class _MessageFile(logging.FileHandler):
    """A file of messages; a failed write ends the run, and so does the removal of the file."""

    def _open(self) -> TextIOWrapper:
        descriptor = open_own(Path(self.baseFilename), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        return TextIOWrapper(os.fdopen(descriptor, "ab"), encoding=self.encoding)

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is not None:
            check_is_in_place(self.stream.fileno(), Path(self.baseFilename))
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise UserError(f"{self.baseFilename}: the log cannot be written ({error.strerror})") from None
        super().handleError(record)


class RunLog:
    """The log files of one run. Only the main process writes; elsewhere every call does nothing.

    Args:
        folder: of the files; made where it is missing.
        name: of the run.
        process: this process.
        run_id: written into each line of metrics.jsonl, so that `roll_back` knows the run's lines.
    """

    def __init__(self, folder: Path, name: str, process: Process, run_id: str | None = None) -> None:
        self._label, self._name = process.label, name
        self._run = {"run": name} if run_id is None else {"run": name, "id": run_id}
        self._files: list[AppendedFile] = []
        self._handler: logging.Handler | None = None
        if process.is_main:
            make_folder(folder, "--fps_acc_dir")
            self._text, self._metrics = (AppendedFile(path) for path in log_files(folder, name))
            try:
                self._handler = _MessageFile(folder / _MESSAGES_NAME, encoding="utf-8")
            except OSError as error:
                raise UserError(f"{error.filename}: the log cannot be written ({error.strerror})") from None
            self._files = [self._text, self._metrics]
            self._handler.setFormatter(MessageFormatter("%(asctime)s %(message)s"))
            logging.getLogger().addHandler(self._handler)

    def line(self, epoch: int, step: int, fps: float, acc: float | None = None) -> None:
        """Append a line to the FPS log."""
        if self._files:
            self._text.write(text_line(self._label, epoch, step, fps, acc) + "\n")

    def record(self, event: str, **values: Any) -> None:
        """Append an object to metrics.jsonl; inf and NaN, which JSON lacks, become null."""
        if self._files:
            entry = {"time": round(time.time(), 3), **self._run, "event": event, **values}
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
            self._metrics.write(json.dumps(finite) + "\n")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            with contextlib.suppress(OSError):  # the failed write has been reported
                self._handler.close()
        for file in self._files:
            file.close()


def sync(paths: Iterable[Path]) -> None:
    """Wait until the content of these files, of those that exist, is on the disk.

    Raises:
        UserError: a file cannot be written.
    """
    for path in paths:
        try:
            descriptor = open_own(path, os.O_RDWR)
        except OSError:  # removed, or another user's by now: the run appends nothing to it any more
            continue
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise UserError(f"{path}: the log cannot be written ({error.strerror})") from None
        finally:
            os.close(descriptor)


def roll_back(sizes: Mapping[Path, int], run_id: str) -> list[Path]:
    """Remove what a run has appended to its logs since they had these sizes.

    metrics.jsonl keeps the lines of other runs. An FPS log is left as it is if another run of the same name wrote into
    it, which metrics.jsonl shows. A file that is shorter by now is another one, and stays.

    Returns:
        The files that were left.

    Raises:
        UserError: a file cannot be written.
    """
    left = []
    for path, size in sizes.items():
        try:
            if path.name == _METRICS_NAME:
                _rewrite(path, size, lambda lines: [line for line in lines if _run_of(line)[1] not in (run_id, None)])
            elif path.suffix == ".txt" and _other_run_wrote(path, sizes, run_id):
                left.append(path)
            else:
                _rewrite(path, size, lambda lines: [])
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return left


def _rewrite(path: Path, size: int, choose: Callable[[list[bytes]], list[bytes]]) -> None:
    """Replace the lines behind the first `size` bytes of a file by those that `choose` returns."""
    with open(open_own(path, os.O_RDWR), "rb+") as file, locked(file.fileno()):
        if os.fstat(file.fileno()).st_size <= size:
            return
        if size:  # mostly behind a line break; not if another run has removed lines of its own before it
            file.seek(size - 1)
            file.readline()
        begin = file.tell()
        kept = b"".join(choose(file.read().splitlines(keepends=True)))
        file.seek(begin)
        # The kept lines first: a kill in between leaves a line twice rather than losing one.
        file.write(kept)
        file.truncate(begin + len(kept))


def _run_of(line: bytes) -> tuple[str | None, str | None]:
    """Return the name and the id of the run that wrote a line of metrics.jsonl; None where it is cut off."""
    try:
        entry = json.loads(line)
        return str(entry["run"]), str(entry.get("id", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, None


def _other_run_wrote(path: Path, sizes: Mapping[Path, int], run_id: str) -> bool:
    """Return whether metrics.jsonl beside an FPS log has newer lines of another run of the same name."""
    metrics = path.with_name(_METRICS_NAME)
    if metrics not in sizes or not metrics.exists():
        return False
    with metrics.open("rb") as file:
        file.seek(sizes[metrics])
        runs = [_run_of(line) for line in file]
    return any(name == path.stem and other != run_id for name, other in runs)


class FpsMeter:
    """Examples trained by all processes per second of wall time, loading of data included.

    Evaluation and saving pause it; their seconds are counted apart. The first steps of a run, and those after it is
    resumed, do not count: they warm caches and allocators.

    Attributes:
        examples: of the steps that count.
        paused: seconds by reason.
    """

    def __init__(self, process: Process) -> None:
        self.examples = 0
        self.paused: dict[str, float] = {}
        self._device = process.device
        self._warm_up = self._steps = 0
        self._seconds = self._earlier = 0.0
        self._since = self._now()

    def start(self, steps: int) -> None:
        """Start the clock before the first of so many steps."""
        self._warm_up = min(_WARM_UP_STEPS, steps // 10)
        self._since = self._now()

    def resume(self, examples: int, seconds: float, paused: Mapping[str, float]) -> None:
        """Add what the run counted before it was stopped; called before `start`."""
        self.examples, self._earlier, self.paused = examples, seconds, dict(paused)

    def count(self, examples: int) -> None:
        """Count a step with so many examples, over all processes."""
        self._steps += 1
        if self._steps > self._warm_up:
            self.examples += examples
        elif self._steps == self._warm_up:
            self._seconds, self._since = 0.0, self._now()

    def seconds(self) -> float:
        """Return the seconds of the steps that count; not to be called in a pause."""
        counts = self._steps > self._warm_up
        return self._earlier + (self._seconds + self._now() - self._since if counts else 0.0)

    def fps(self) -> float:
        """Return the examples per second so far; 0 before the first step that counts."""
        return self.examples / self.seconds() if self.examples else 0.0

    @contextlib.contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Count the time of the context for `reason`, not as training."""
        begin = self._now()
        self._seconds += begin - self._since
        try:
            yield
        finally:
            self._since = self._now()
            self.paused[reason] = self.paused.get(reason, 0.0) + self._since - begin

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()


class Progress:
    """Steps done and time left: a bar on a terminal, elsewhere a line every ten seconds.

    Args:
        done: the steps before this begins.
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
        """Count a step; `values` is called only when its result is shown."""
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
            parts += [f"{name} {value}" for name, value in values().items()]
            logger.info("%s: %s", self._title, ", ".join(parts))

    def close(self) -> None:
        """Remove or finish the bar."""
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """Return seconds as people read them: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
