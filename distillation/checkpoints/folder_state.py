"""The runs that an output folder holds: the checkpoint of a stopped one, and the run.json of a finished one.

A checkpoint is one file as torch saves it, with its SHA-256 behind it. Reading executes no code in it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from distillation.checkpoints.outputs import check_copy, check_output_dir, check_results
from distillation.checkpoints.run_record import is_run, read_run
from distillation.models import RUN_NAME
from distillation.options import Options
from distillation.runtime.files import check_can_make
from distillation.runtime.logs import check_logs
from transformer.errors import UserError
from transformer.file_utils import MODEL_FILES, HashingWriter, save_tensors, temporary_files, write_atomically

CHECKPOINT_NAME = "training_state.bin"
OUTPUT_FILES = (*MODEL_FILES, RUN_NAME, CHECKPOINT_NAME)
FROM_SCRATCH = "--overwrite_output_dir without --resume (with the scripts: without RESUME=1) begins from scratch"
_FORM = 3  # raise it when the content changes its meaning
_DIGITS = 64  # of the SHA-256 at the end of the file
_NUMBER, _NONE = (int, float), type(None)
_CONTENT = {"run": dict, "model": dict, "logs": dict, "teacher": str, "trainer": (dict, _NONE)}
_TRAINER = {
    **{"step": int, "best": _NUMBER, "best_step": int, "metric": (*_NUMBER, _NONE), "unevaluated": (list, _NONE)},
    **{"examples": int, "seconds": _NUMBER, "paused": dict, "precision": dict, "random": list},
    **{"weights": dict, "optimizer": dict},
}


@dataclass(frozen=True)
class FolderState:
    """The runs that an output folder holds.

    stopped: the record of a run that can be resumed. finished: that of a run that has ended. At most one is not None.
    damaged: why the checkpoint of a stopped run cannot be read.
    is_empty: whether there is nothing to lose: no files, or only those that a kill left before a run's first save.
    """

    stopped: dict[str, Any] | None
    finished: dict[str, Any] | None
    damaged: str | None
    is_empty: bool

    @property
    def can_resume(self) -> bool:
        """Whether --resume finds a run, stopped or finished."""
        return self.stopped is not None or self.finished is not None


def inspect_folder(folder: Path) -> FolderState:
    """Return what an output folder holds; it need not exist.

    Raises:
        UserError: the user may not read it, or a link or no regular file is in place of a run's state.
    """
    stopped, has_state, damaged = None, False, None
    try:
        entries = set(folder.iterdir()) if folder.is_dir() else set()
    except OSError as error:
        raise UserError(f"{folder}: --output_dir cannot be read ({error.strerror})") from None
    for path in (folder / CHECKPOINT_NAME, folder / RUN_NAME):
        if path in entries and (path.is_symlink() or not path.is_file()):
            raise UserError(f"{path}: is a link or no regular file; no run made it, so remove it")
    path, finished = folder / CHECKPOINT_NAME, read_run(folder)
    if finished is not None and finished.get("finished") is None:
        finished = None
    if path in entries:
        try:
            content = read_checkpoint(path)
            stopped, has_state = content["run"], content["trainer"] is not None
        except UserError as error:
            damaged = str(error)
    if stopped is not None and finished is not None and finished.get("id") == stopped["id"]:
        stopped = None  # the run was killed after it had written run.json
    elif stopped is not None or damaged is not None:
        finished = None  # its model is being replaced
    if not (has_state or damaged):
        entries.discard(path)
    return FolderState(stopped, finished, damaged, entries <= set(temporary_files(folder, OUTPUT_FILES)))


def check_writable(options: Options, world_size: int) -> FolderState:
    """Check that a training run may write where its flags say, and make nothing; return what --output_dir holds.

    Raises:
        UserError: it may not.
    """
    found = inspect_folder(options.output_dir)
    if options.resume and found.finished is not None:  # only the copy will be written
        check_copy(options, is_finished=True)
        return found
    hint = ""
    if options.resume:
        hint = "; it holds no stopped run that --resume could continue"
        if found.damaged is not None:
            hint = f"; --resume cannot continue the run there: {found.damaged}"
    elif found.stopped is not None:
        hint = "; --resume (with the scripts: RESUME=1) continues the run that was stopped there"
    may_write = options.overwrite_output_dir or found.is_empty or (options.resume and found.can_resume)
    check_output_dir(
        options.output_dir, may_write, (options.teacher_model, options.student_model, options.data_dir), hint
    )
    check_can_make(options.output_dir, "--output_dir")
    check_results(options.output_dir, options.task)
    check_copy(options)
    check_logs(options.fps_acc_dir, options.log_name(world_size))
    return found


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a checkpoint; `content` has the entries that `read_checkpoint` returns.

    Raises:
        UserError: it cannot be written; an older one is untouched.
    """

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        save_tensors({"form": _FORM, **content}, HashingWriter(file, digest))  # type: ignore[arg-type]
        file.write(digest.hexdigest().encode())

    try:
        write_atomically(path, write)
    except OSError as error:
        before = "; the one before it is untouched" if path.exists() else ""
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){before}") from None


def read_checkpoint(path: Path, verify: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; no code in it is run.

    Args:
        path: of the file.
        verify: compare its SHA-256: torch reads a file with flipped bits without an error. Otherwise the tensors are
            only mapped into memory.

    Returns:
        run: the run's record. model: the SHA-256 of the saved model's files. logs: the sizes of the run's
        logs; a relative path is one in the folder. teacher: a digest of the teacher's cached outputs. trainer: the
        state of the `Trainer`, None before the first save.

    Raises:
        UserError: it is damaged, or another version of this project, or another program, wrote it.
    """
    with reading_checkpoint(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error names what is wrong
        if verify:
            _check_digest(path)
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is not a whole checkpoint")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not verify)
        if not isinstance(content, dict) or content.get("form") != _FORM:
            raise ValueError("another version of this project, or another program, wrote it")
        if not (is_run(content.get("run")) and isinstance(content["run"].get("id"), str)):
            raise ValueError("it has no record of the run")
        _check_types(content, _CONTENT)
        _check_types(content["model"], dict.fromkeys(content["model"], str))
        _check_types(content["logs"], dict.fromkeys(content["logs"], int))
        if content["trainer"] is not None:
            _check_types(content["trainer"], _TRAINER)
    return {name: content[name] for name in _CONTENT}


@contextmanager
def reading_checkpoint(path: Path) -> Iterator[None]:
    """Report errors of the context as a UserError that names the checkpoint and what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a broken or changed file can raise any exception
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        reason = reason.splitlines()[0].rstrip(".")
        raise UserError(f"{path}: cannot be resumed from ({reason}); {FROM_SCRATCH}") from None


def _check_types(values: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, types in expected.items():
        if not isinstance(values[name], types):
            raise ValueError(f"{name} is a {type(values[name]).__name__}")


def _check_digest(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - _DIGITS
        while left > 0 and (piece := file.read(min(left, 2**20))):
            digest.update(piece)
            left -= len(piece)
        if left or file.read() != digest.hexdigest().encode():
            raise ValueError("it is not what was saved: its SHA-256 differs")
