"""The files that say what a model is worth and what it predicts, and their copies elsewhere."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from filecmp import cmp
from functools import partial
from pathlib import Path, PurePath
from typing import BinaryIO

from data_processing.tasks import Task
from distillation.checkpoints.journal import Appended, Journal
from distillation.checkpoints.outputs import check_can_make, make_folder
from distillation.evaluation import EvaluationResult
from distillation.flags import path as path_of
from distillation.options import Options
from transformer.errors import UserError
from transformer.file_utils import write_together
from transformer.saving import MANIFEST_NAME, MODEL_FILES, leftovers, read_manifest, write_atomically, write_model

_STAGED = re.compile(rf"\.({'|'.join(map(re.escape, MODEL_FILES))})\.[0-9a-f]{{16}}\.new")  # `settle` would use it


def _beside(folder: Path, task: Task) -> dict[str, Path]:
    """For each dev file the folder that its metrics are in: FOLDER, and of MNLI's second file FOLDER-MM."""
    folder = folder.resolve()  # "." has no name that could be added to
    return {file: folder.parent / (folder.name + s) for file, s in zip(task.dev_files, task.dev_suffixes, strict=True)}


def results_files(output_dir: Path, task: Task) -> dict[str, Path]:
    """For each dev file the file of its metrics."""
    return {file: folder / "eval_results.txt" for file, folder in _beside(output_dir, task).items()}


def check_results(output_dir: Path, task: Task) -> None:
    """Checks, and makes nothing, that the metrics can be written.

    Raises:
        UserError: a folder cannot be made, or a file cannot be appended to.
    """
    if not output_dir.resolve().name:
        raise UserError(f"{output_dir}: --output_dir cannot be the root of all folders")
    for path in results_files(output_dir, task).values():
        path_of(str(path))
        check_can_make(path.parent, "--output_dir")
        if path.is_dir():
            raise UserError(f"{path}: is a folder where the metrics are to be written")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{path}: cannot be written (it is another user's, or read-only)")


def write_results(
    output_dir: Path, task: Task, results: Mapping[str, EvaluationResult], journal: Journal | None = None, **also: int
) -> None:
    """Appends the metrics of each dev file to its eval_results.txt.

    Args:
        journal: notes the lines of a run that may be resumed.

    Raises:
        UserError: a file cannot be written.
    """
    for name, path in results_files(output_dir, task).items():
        values = {**results[name].metrics, **also}
        make_folder(path.parent, "--output_dir")
        file = Appended(path, journal)
        try:
            file.write("".join(f"{key} = {values[key]}\n" for key in sorted(values)))
        finally:
            file.close()


def prediction_names(task: Task, file: str | None) -> dict[str, str]:
    """The files to predict, and for each the name of its predictions: those that GLUE takes for its test files.

    Raises:
        UserError: no file is given and the task has no test file.
    """
    submissions = dict(zip(task.test_files, task.submissions, strict=True))
    if file is not None:
        return {file: submissions.get(file, f"{task.name}-{PurePath(file).stem}.tsv")}
    if not submissions:
        raise UserError(f"{task.name} names no test file; give the file to predict by --predict_file")
    return submissions


def check_predictions(output_dir: Path, names: Iterable[str], overwrite: bool) -> None:
    """Checks, and makes nothing, that predictions can be written.

    Raises:
        UserError: one of the files is there already and may not be replaced.
    """
    for name in names:
        path = output_dir / name
        if path.is_dir():
            raise UserError(f"{path}: is a folder where the predictions are to be written")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: is there already; give another --output_dir, or --overwrite_output_dir")


def write_predictions(output_dir: Path, predicted: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> None:
    """Writes files in the form of a submission to GLUE: a row of names, then index and prediction, split by a tab.

    Args:
        predicted: for each file's name the rows' ids and what is predicted for them.

    Raises:
        UserError: a file cannot be written; none of them is then.
    """

    def writer(ids: Sequence[str], values: Sequence[str]) -> Callable[[BinaryIO], object]:
        # An id of CSV may hold what ends a column or a row here.
        rows = [
            "index\tprediction",
            *(f"{' '.join(index.split())}\t{value}" for index, value in zip(ids, values, strict=True)),
        ]
        return lambda file: file.write(("\n".join(rows) + "\n").encode("utf-8"))

    make_folder(output_dir, "--output_dir")
    try:
        write_together(output_dir, {name: writer(*rows) for name, rows in predicted.items()})
    except OSError as error:
        raise UserError(f"{output_dir}: the predictions cannot be written ({error.strerror})") from None


def check_copy(options: Options, has_ended: bool = False) -> None:
    """Checks, and makes nothing, that what is made can be copied to --data_url.

    Args:
        has_ended: whether all is made already; then what an earlier copying has left there may be replaced.

    Raises:
        UserError: it is no folder that may be written, one that the run reads or writes, or it holds something already.
    """
    if not options.data_url:
        return
    if "://" in options.data_url:
        raise UserError(f"--data_url {options.data_url}: outputs are copied to folders only, mounted ones too")
    target = path_of(options.data_url)
    if options.output_dir.resolve() in (target.resolve(), *target.resolve().parents):
        raise UserError(f"--data_url {target}: is --output_dir itself, or a folder in it")
    for source in (options.teacher_model, options.student_model, options.data_dir):
        if source is not None and source.resolve() == target.resolve():
            raise UserError(f"--data_url {target}: is a folder that this run reads from; give another one")
    sources = _beside(options.output_dir, options.task)
    for file, folder in _beside(target, options.task).items():
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--data_url {folder}: is a file, a folder is needed")
        check_can_make(folder, "--data_url")
        may_replace = options.overwrite_output_dir or (has_ended and _is_copy(sources[file], folder))
        if not may_replace and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--data_url {folder}: is not empty; give another folder, or --overwrite_output_dir")


def _is_copy(source: Path, target: Path) -> bool:
    """Whether a folder holds nothing but what copying another one, to its end or not, has left there."""
    if not target.is_dir():
        return False
    left = set(leftovers(target, [path.name for path in (*source.glob("*"), source / MANIFEST_NAME)]))
    return all(
        path in left
        or path.name == MANIFEST_NAME  # each copying makes its own
        or _STAGED.fullmatch(path.name) is not None
        or (path.is_dir() and _is_copy(source / path.name, path))
        or (path.is_file() and (source / path.name).is_file() and cmp(path, source / path.name, shallow=False))
        for path in target.iterdir()
    )


def copy_outputs(output_dir: Path, target: str, task: Task) -> None:
    """Copies all that is in the output folder into another folder; OUTPUT-MM, where there is one, beside it.

    Each file is there whole or not at all, and the files of the model all or none.

    Raises:
        UserError: it cannot be written; what is in the output folder stays.
    """
    targets = _beside(Path(target), task)
    try:
        for file, source in _beside(output_dir, task).items():
            if source.is_dir():
                _copy_folder(source, targets[file])
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--data_url {target}: cannot be written ({reason}); all is in {output_dir}") from None


def _copy_folder(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(source)
    model = set(manifest["files"]) | {MANIFEST_NAME} if manifest else set()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _copy_folder(path, target / path.name)
        elif path.name not in model:
            with path.open("rb") as file:
                write_atomically(target / path.name, partial(shutil.copyfileobj, file))
    if model:
        names = [name for name in MODEL_FILES if name in model]
        write_model(target, {name: partial(_copy_file, source / name) for name in names})


def _copy_file(source: Path, target: BinaryIO) -> None:
    with source.open("rb") as file:
        shutil.copyfileobj(file, target)
