"""Save a training run so that it can be stopped at any moment and resumed.

The checkpoint (`folder_state.py`) is made when a run begins, replaced by each save, and removed when run.json has the
end of the run. A resumed run cuts off what it logged after the save and loads the state of the `Trainer`; it
then equals a run that was never stopped.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from distillation.checkpoints.folder_state import (
    CHECKPOINT_NAME,
    FROM_SCRATCH,
    OUTPUT_FILES,
    check_writable,
    read_checkpoint,
    write_checkpoint,
)
from distillation.checkpoints.outputs import results_files, save_model
from distillation.checkpoints.run_record import changed_settings, changed_surroundings, now, write_run
from distillation.models import LoadedModel
from distillation.options import Options
from distillation.runtime.device import Process
from distillation.runtime.files import lock_folder, make_folder
from distillation.runtime.logs import log_files, roll_back, sync
from distillation.runtime.signals import Signals
from transformer.errors import UserError
from transformer.file_utils import SAFETENSORS_NAME, WEIGHTS_NAME, remove_temporary_files

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_SAVES = 60.0
# To agree on a save each process waits for its accelerator.
_STEPS_BETWEEN_AGREEMENTS = 20


class Checkpointer:
    """Own a training run's output folder: load a stopped run, save checkpoints and models, record the end.

    Only the main process writes. As a context it holds the folder's lock; a run that fails before its first save
    leaves nothing to resume.

    Args:
        record: the content of run.json; in the main process.

    Attributes:
        state: of the `Trainer`, where a stopped run is resumed; otherwise None.
        is_finished: --resume found that the run has ended; there is nothing to train.
        run_id: identifies the run's lines in metrics.jsonl.
    """

    def __init__(self, options: Options, process: Process, signals: Signals, record: Mapping[str, Any]) -> None:
        self.folder, self.options, self.process, self.signals = options.output_dir, options, process, signals
        self.state: dict[str, Any] | None = None
        self.is_finished = False
        self.run_id = ""
        self._record = dict(record)
        self._model: dict[str, str] = {}  # the SHA-256 of each file of the saved model
        self._teacher = ""
        self._lock: int | None = None
        self._logs: dict[str, int] = {}  # the size of each log at the last save; names as `_log_names` returns
        self._has_saved = False  # a checkpoint or a model
        self._saved_at = time.monotonic()

    def __enter__(self) -> Checkpointer:
        try:
            with self.process.raise_on_all_ranks():
                if self.process.is_main:
                    make_folder(self.folder, "--output_dir")
                    self._lock = lock_folder(self.folder)
                    self._open()
            self.state, self.is_finished, self.run_id = self.process.broadcast(
                (self.state, self.is_finished, self.run_id)
            )
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self.run_id and not self._has_saved and self.process.is_main and self._is_own():
            if not isinstance(error, UserError):  # after a mistake the lines may show what went wrong
                with suppress(UserError):  # the first error is the one to report
                    self._roll_back(self._logs)
            self._remove_results()
            (self.folder / CHECKPOINT_NAME).unlink(missing_ok=True)
        self._unlock()

    def _remove_results(self) -> None:
        """Remove the files of results that this run has made, because of which the folder would count as used."""
        results = results_files(self.folder, self.options.task).values()
        for name, path in zip(self._log_names()[-len(results) :], results, strict=True):
            if self._logs.get(name) == 0 and not path.is_symlink():
                path.unlink(missing_ok=True)

    def check_teacher(self, digest: str) -> None:
        """Save a digest of the teacher's cached outputs with the run; warn if a resumed run began with others."""
        if self.state is not None and self.process.is_main and self._teacher != digest:
            logger.warning(
                "the teacher's cached outputs differ from those that this run began with; its weights may differ from "
                "those of a run that was not stopped"
            )
        self._teacher = digest

    def is_due(self, step: int, pauses: bool) -> tuple[bool, int]:
        """Return whether to save a checkpoint after a step, and the signal that ends the run, or 0.

        All processes get the same answer. A checkpoint is due every --save_steps steps; without that flag when an
        evaluation or an epoch has ended (`pauses`), at most once a minute.
        """
        if self.options.save_steps is not None:
            due = step % self.options.save_steps == 0
        else:
            due = pauses and time.monotonic() - self._saved_at > _SECONDS_BETWEEN_SAVES
        if self.process.world_size == 1:
            return due, self.signals.received
        agrees = self.process.device.type == "cpu" or pauses or step % _STEPS_BETWEEN_AGREEMENTS == 0
        if not (agrees or (due and self.options.save_steps is not None)):
            return False, 0
        wanted = torch.tensor([due, self.signals.received], device=self.process.device)
        distributed.all_reduce(wanted, distributed.ReduceOp.MAX)
        due, signal = wanted.tolist()
        return bool(due), signal

    def was_signalled(self) -> bool:
        """Return whether this process received a signal."""
        return bool(self.signals.received)

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a checkpoint with the state of the `Trainer`; all processes call this.

        Raises:
            UserError: it cannot be written; the one before it is untouched.
        """
        with self.process.raise_on_all_ranks():
            if self.process.is_main:
                self.check_is_own()
                sync(map(self.folder.joinpath, self._logs))  # no line before the saved sizes may be lost
                logs = self._sizes(self._logs)
                self._write(state, logs)
                self._logs, self._has_saved = logs, True
        self._saved_at = time.monotonic()

    def save_model(self, loaded: LoadedModel, weights: Mapping[str, Tensor], **results: Any) -> None:
        """Save the model and run.json, with the results so far; only the main process calls this.

        Raises:
            UserError: a file cannot be written, or the folder was removed or replaced.
        """
        self.check_is_own()
        self._model = save_model(self.folder, loaded.model.config, weights, loaded.tokenizer)
        self._has_saved = True
        self._record |= results
        write_run(self.folder, self._record, self._model)

    def finish(self, **results: Any) -> None:
        """Record in run.json that the run has ended, and remove its checkpoint.

        Raises:
            UserError: run.json cannot be written, or the folder was removed or replaced.
        """
        with self.process.raise_on_all_ranks():
            if self.process.is_main:
                self.check_is_own()
                self._record |= {"finished": now(), **results}
                write_run(self.folder, self._record, self._model)
                (self.folder / CHECKPOINT_NAME).unlink(missing_ok=True)

    def check_is_own(self) -> None:
        """Check that the folder is still the one that this run has locked.

        Raises:
            UserError: it was removed or replaced; another run may write in a folder of its name.
        """
        if not self._is_own():
            raise UserError(f"{self.folder}: was removed or moved while the run wrote there; the run ends")

    def _open(self) -> None:
        """Resume the run in the folder, or begin one."""
        # Again, under the lock: another run may have begun or ended meanwhile.
        found = check_writable(self.options, self.process.world_size)
        known = found.stopped or found.finished
        if self.options.resume and known is not None:
            changed = changed_settings(known, self._record)
            if changed:
                raise UserError(
                    f"{self.folder}: --resume continues with the settings that the run there began with: "
                    f"{'; '.join(changed)}; {FROM_SCRATCH}"
                )
        remove_temporary_files(self.folder, OUTPUT_FILES)
        if self.options.resume and found.stopped is not None:
            self._has_saved = not found.is_empty
            self._resume(found.stopped)
        elif self.options.resume and found.finished is not None:
            if found.finished.get("model"):
                _check_has_model(self.folder)
            self.is_finished = True
            (self.folder / CHECKPOINT_NAME).unlink(missing_ok=True)  # of a run that was killed in its last moment
        else:
            if self.options.resume:
                logger.info("%s: there is no run to resume, so it begins from scratch", self.folder)
            self._begin()

    def _begin(self) -> None:
        self.run_id = secrets.token_hex(8)
        self._record = {"id": self.run_id, **self._record}
        self._logs = self._sizes(self._log_names())
        self._write(None, self._logs)

    def _resume(self, stopped: Mapping[str, Any]) -> None:
        content = read_checkpoint(self.folder / CHECKPOINT_NAME, verify=True)
        self.state = content["trainer"]
        if self.state is None:
            logger.info("%s: the run there was stopped before its first save, and begins from scratch", self.folder)
        else:
            if self.state["best_step"]:
                _check_has_model(self.folder)
            logger.info("%s: resuming after step %d", self.folder, self.state["step"])
        surroundings = changed_surroundings(stopped, self._record)
        if surroundings:
            logger.info("the weights may differ in their last bits: %s", ", ".join(surroundings))
        self._record = {**stopped, "resumed": [*stopped.get("resumed", []), now()]}
        self.run_id, self._teacher, self._model = stopped["id"], content["teacher"], content["model"]
        # Only logs that this run appends to are changed, whatever files a checkpoint names.
        own = self._log_names()
        before = {name: size for name, size in content["logs"].items() if name in own}
        self._roll_back(before)
        self._logs = self._sizes(own)
        if any(size < before.get(name, size + 1) for name, size in self._logs.items()):
            # A log is another one than before; the next resumed run must know its size.
            self._write(self.state, self._logs)

    def _log_names(self) -> list[str]:
        """Return the files that this run appends lines to; those in the output folder relative to it: it may move."""
        logs = log_files(self.options.fps_acc_dir, self.options.log_name(self.process.world_size))
        files = (*logs, *results_files(self.folder, self.options.task).values())
        paths = [path.parent.resolve() / path.name for path in files]  # a link in place of a file is not followed
        folder = self.folder.resolve()
        return [str(path.relative_to(folder) if folder in path.parents else path) for path in paths]

    def _sizes(self, names: Iterable[str]) -> dict[str, int]:
        return {name: _size(self.folder / name) for name in names}

    def _roll_back(self, sizes: Mapping[str, int]) -> None:
        for path in roll_back({self.folder / name: size for name, size in sizes.items()}, self.run_id):
            logger.warning("%s: another run has written there since the last save, so its lines stay", path)

    def _write(self, state: Mapping[str, Any] | None, logs: Mapping[str, int]) -> None:
        content = {
            "run": self._record,
            "model": self._model,
            "logs": logs,
            "teacher": self._teacher,
            "trainer": state,
        }
        write_checkpoint(self.folder / CHECKPOINT_NAME, content)

    def _is_own(self) -> bool:
        if self._lock is None:  # the file system has no locks
            return True
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # the next write reports it
            return True

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _check_has_model(folder: Path) -> None:
    """Raise a UserError if the folder has no weights; other weights are the user's own choice."""
    if not ((folder / WEIGHTS_NAME).is_file() or (folder / SAFETENSORS_NAME).is_file()):
        raise UserError(f"{folder}: the model of the run there is gone; {FROM_SCRATCH}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
