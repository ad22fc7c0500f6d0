"""What a training run keeps in its output folder so that it can be stopped at any moment and go on as if it had not.

    training_state.json   the run's settings, and how far its logs were when it began
    training_state.bin    its state (`training_state.py`), saved from time to time
    training_state.log    the lines that it has logged since (`journal.py`)

They are there while it runs, and when it was stopped; at its end they go, and run.json says that it ended. A run
goes on only with the settings that it began with: those that change its weights.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from distillation.checkpoints.journal import Journal, sizes_of, sync, take_back
from distillation.checkpoints.run_record import RUN_NAME, now, read_object, write_run
from distillation.checkpoints.run_settings import changes, differences
from distillation.checkpoints.state_file import read_checked, write_checked
from distillation.runtime.device import Process
from distillation.runtime.signals import Signals
from distillation.training.training_state import State
from transformer.errors import UserError
from transformer.saving import (
    MANIFEST_NAME,
    MODEL_FILES,
    SAFETENSORS_NAME,
    WEIGHTS_NAME,
    leftovers,
    write_atomically,
)

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_RECORD_NAME, _STATE_NAME, _JOURNAL_NAME = (f"training_state.{ending}" for ending in ("json", "bin", "log"))
_ANEW = "; --overwrite_output_dir without --resume begins anew"
_ANEW_SCRIPTS = "; --overwrite_output_dir without --resume (with the scripts: without RESUME=1) begins anew"
_FORM = 2  # raised when the state changes its meaning
_SECONDS_BETWEEN_SAVES = 60.0
# Processes on accelerators agree no more often than this: to do so each waits for its device.
_STEPS_BETWEEN_AGREEMENTS = 20


@dataclass(frozen=True)
class Found:
    """What an output folder holds of a run.

    record: what the run wrote when it began; None where there is no stopped run.
    finished: the run.json of a run that has ended; None where there is none.
    damaged: the record of a stopped run, where there is one that cannot be read.
    is_empty: whether it holds nothing but what a kill has left of files that never were, or of a run before its
        first saving.
    """

    folder: Path
    record: dict[str, Any] | None
    finished: dict[str, Any] | None
    damaged: Path | None
    is_empty: bool

    @classmethod
    def look(cls, folder: Path) -> Found:
        """Looks into a folder, which may not exist; changes nothing.

        Raises:
            UserError: the user may not look into it.
        """
        record = read_object(folder / _RECORD_NAME)
        ended = read_object(folder / RUN_NAME)
        if ended is not None and (ended.get("finished") is None or not _is_run(ended)):
            ended = None
        if record is not None and not _is_record(record):
            record = None
        is_damaged = record is None and (folder / _RECORD_NAME).exists()
        if record is not None and ended is not None and ended.get("id") == record["id"]:
            record = None  # it was killed when all was done
        elif record is not None:
            ended = None  # of the model that is being replaced
        try:
            left = {*_leftovers(folder), folder / _RECORD_NAME, folder / _JOURNAL_NAME} if folder.is_dir() else set()
            is_empty = not folder.is_dir() or all(path in left for path in folder.iterdir())
        except OSError as error:
            raise UserError(f"{folder}: --output_dir cannot be looked into ({error.strerror})") from None
        return cls(folder, record, ended, folder / _RECORD_NAME if is_damaged else None, is_empty)

    @property
    def has_run(self) -> bool:
        """Whether --resume finds here what it is for."""
        return self.record is not None or self.finished is not None

    def check(self, run: Mapping[str, Any]) -> None:
        """Checks that a run that was stopped, or has ended, is the one that is asked for.

        Args:
            run: what run.json would say of it.

        Raises:
            UserError: its settings were others; the message shows which. Or its model is gone.
        """
        known = self.record["run"] if self.record else self.finished
        if known is None:
            return
        changed = changes(known, json.loads(json.dumps(run)))
        if changed:
            raise UserError(
                f"{self.folder}: --resume goes on with the settings that the run there began with: "
                f"{'; '.join(changed)}{_ANEW_SCRIPTS}"
            )
        if self.finished is not None and self.finished.get("model"):
            _check_has_model(self.folder)


def _check_has_model(folder: Path) -> None:
    """Whether there is one, whichever: a user may have changed it. Raises UserError."""
    waiting = folder.glob(f".{WEIGHTS_NAME}.*.new")  # for `settle`
    if not ((folder / WEIGHTS_NAME).is_file() or (folder / SAFETENSORS_NAME).is_file() or any(waiting)):
        raise UserError(f"{folder}: the model of the run there is gone{_ANEW}")


def _is_record(record: Mapping[str, Any]) -> bool:
    return _is_run(record.get("run")) and isinstance(record.get("logs"), dict) and isinstance(record.get("id"), str)


def _is_run(run: Any) -> bool:
    return isinstance(run, dict) and all(isinstance(run.get(name), dict) for name in ("flags", "compared"))


def _leftovers(folder: Path) -> list[Path]:
    return leftovers(folder, (*MODEL_FILES, MANIFEST_NAME, RUN_NAME, _RECORD_NAME, _STATE_NAME))


@dataclass
class RunFolder:
    """The output folder of a run that trains. Only the main process writes; the others know what it knows.

    state: what the run goes on from; None where it begins.
    run: what run.json says of the run, beside its model; in the main process.
    teacher: a digest of what the teacher has said, where that is remembered.
    """

    folder: Path
    process: Process
    signals: Signals
    save_steps: int | None = None
    state: State | None = None
    run: dict[str, Any] = field(default_factory=dict)
    teacher: str = ""
    journal: Journal | None = None
    _save: int = 0
    _has_made: bool = False  # a state or a model
    _saved_at: float = field(default_factory=time.monotonic)
    _logs: dict[str, int] = field(default_factory=dict)
    _lock: int | None = None

    def begin(self, found: Found, goes_on: bool, run: Mapping[str, Any], logs: tuple[Path, ...]) -> list[str]:
        """Makes the folder this run's: takes up what a stopped run has left, or clears it away.

        Args:
            goes_on: whether that is wanted.
            run: what run.json says of this run.
            logs: the files that it will append to.

        Returns:
            What the user should know.

        Raises:
            UserError: another run is at work there, or was since it was looked at; or a file cannot be read or written.
        """
        self._lock = _locked(self.folder)
        meanwhile = Found.look(self.folder)
        if (meanwhile.record, meanwhile.finished) != (found.record, found.finished):
            raise UserError(f"{self.folder}: what it holds of a run has changed meanwhile; start again")
        for path in _leftovers(self.folder):
            path.unlink(missing_ok=True)
        words = []
        if goes_on and found.record is not None:
            record = found.record
            self._has_made = not found.is_empty
            words = self._take_up(record) + differences(record["run"], run)
            record["run"]["resumed"] = [*record["run"].get("resumed", []), now()]
        else:
            self.remove()
            sizes = sizes_of({str(path): 0 for path in logs})
            record = {"id": secrets.token_hex(8), "logs": sizes, "run": dict(run)}
        self.run = {"id": record["id"], **record["run"]}
        self._logs = {**record["logs"], **sizes_of({str(path): 0 for path in logs})}
        self._write(_RECORD_NAME, lambda file: file.write(json.dumps(record, indent=2).encode() + b"\n"))
        self.journal = Journal(self.folder / _JOURNAL_NAME, self._save, self.check_is_own)
        self.journal.begin(self._save)
        return words

    def _take_up(self, record: Mapping[str, Any]) -> list[str]:
        path, logs = self.folder / _STATE_NAME, record["logs"]
        if path.exists():
            self.state = _read_state(path, record["id"])
            if self.state["best_step"]:
                _check_has_model(self.folder)
            self._save, logs = self.state["save"], self.state["logs"]
            words = [f"{self.folder}: going on after step {self.state['step']}"]
        elif Journal(self.folder / _JOURNAL_NAME).saves():
            raise UserError(f"{path}: what the run there had saved is gone{_ANEW}")
        else:
            words = [f"{self.folder}: the run there was stopped before its first saving, and begins again"]
        mixed = take_back(Journal(self.folder / _JOURNAL_NAME, self._save), logs)
        return words + [f"{file}: another run has written there since; its lines stay" for file in mixed]

    def share(self) -> None:
        """Lets the other processes know what the main one has read; all call it."""
        self.state = self.process.broadcast(self.state)

    def wants(self, step: int, rests: bool) -> tuple[bool, int]:
        by_number = self.save_steps is not None and step % self.save_steps == 0
        by_time = self.save_steps is None and rests and time.monotonic() - self._saved_at > _SECONDS_BETWEEN_SAVES
        if self.process.world_size == 1:
            return by_number or by_time, self.signals.received
        on_cpu = self.process.device.type == "cpu"
        if not (on_cpu or rests or by_number or step % _STEPS_BETWEEN_AGREEMENTS == 0):
            return False, 0
        told = torch.tensor([by_number or by_time, self.signals.received], device=self.process.device)
        distributed.all_reduce(told, distributed.ReduceOp.MAX)
        saves, signal = told.tolist()
        return bool(saves), signal

    def save(self, state: State) -> None:
        with self.process.raise_on_all_ranks():
            if self.process.is_main:
                assert self.journal is not None  # the run has begun
                self.check_is_own()
                sync({*map(Path, self._logs), *self.journal.noted()})  # a state tells of no line that could still go
                content = {
                    **state,
                    "form": _FORM,
                    "id": self.run["id"],
                    "teacher": self.teacher,
                    "save": self._save + 1,
                    "logs": sizes_of(self._logs, self.journal),
                }
                self._write(_STATE_NAME, partial(write_checked, content))
                self._save, self._logs, self._has_made = content["save"], content["logs"], True
                self.journal.begin(self._save)
        self._saved_at = time.monotonic()

    def check_is_own(self) -> None:
        """Checks, of the main process, that the folder is still the one that this run has locked.

        Raises:
            UserError: it was removed or moved; another run may be at work by now in one of its name.
        """
        if not self._is_own():
            raise UserError(f"{self.folder}: was removed or moved while the run wrote there; the run ends")

    def _is_own(self) -> bool:
        if self._lock is None:  # it cannot be known
            return True
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # what is written next tells of it
            return True

    def write_run(self, **also: Any) -> None:
        """Writes run.json beside the model; of the main process.

        Raises:
            UserError: it cannot be written, or the folder is no longer this run's.
        """
        self.check_is_own()
        self._has_made = True
        self.run |= also
        write_run(self.folder, self.run)

    def end(self, **also: Any) -> None:
        """Tells in run.json that the run has ended, and takes away what it could have been resumed from."""
        self.write_run(finished=now(), **also)
        self.remove()

    def _write(self, name: str, write: Any) -> None:
        try:
            write_atomically(self.folder / name, write)
        except OSError as error:
            before = "; the one before it is whole" if (self.folder / name).exists() else ""
            raise UserError(f"{self.folder / name}: cannot be written ({error.strerror or error}){before}") from None

    def remove(self) -> None:
        """Takes away what a run is resumed from."""
        if self.process.is_main:
            for name in (_STATE_NAME, _JOURNAL_NAME, _RECORD_NAME):
                (self.folder / name).unlink(missing_ok=True)

    def forget_unless_saved(self, and_lines: bool) -> None:
        """Of a run that ended before it saved a state or a model nothing is kept.

        Args:
            and_lines: whether what it wrote into the logs goes too, which the same command would write there again.
        """
        if self.run and not self._has_made and self._is_own():
            if and_lines and self.journal is not None:
                with suppress(UserError):  # the error that ended the run is to be told
                    take_back(self.journal, self._logs)
            self.remove()

    def close(self) -> None:
        """Ends this process's hold on the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _read_state(path: Path, identity: str) -> State:
    try:
        state = read_checked(path)
        if state["form"] != _FORM:
            raise ValueError("it is of another version of this project")
        if state["id"] != identity:
            raise ValueError("it is of another run")
    except Exception as error:  # a broken file can raise any
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{path}: cannot be gone on from ({reason}){_ANEW}") from None
    return state


def _locked(folder: Path) -> int | None:
    """Locks a folder for as long as this process lives; None where there are no such locks.

    Raises:
        UserError: another process has locked it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another run is writing there") from None
    except OSError:  # a file system without them
        os.close(descriptor)
        return None
    return descriptor
