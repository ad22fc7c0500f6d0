"""Output folders: the checks before a run, and the writes after it: models, results, predictions, copies.

Checks make nothing. Each write leaves the old file or the new one, whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from filecmp import cmp
from functools import partial
from pathlib import Path, PurePath
from typing import BinaryIO

from torch import Tensor

from data_processing.tasks import Task
from distillation.evaluation import EvaluationResult
from distillation.flags import path as path_of
from distillation.options import Options
from distillation.runtime.files import AppendedFile, check_can_append, check_can_make, make_folder
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import (
    CONFIG_NAME,
    MODEL_FILES,
    SAFETENSORS_NAME,
    TOKENIZER_CONFIG_NAME,
    VOCAB_NAME,
    WEIGHTS_NAME,
    temporary_files,
    write_atomically,
    write_model,
    write_together,
    write_weights,
)
from transformer.tokenization import BertTokenizer
from transformer.vocabulary import tokenizer_config


def check_output_dir(output_dir: Path, overwrite: bool, sources: Iterable[Path | None], hint: str = "") -> None:
    """Check that a model may be written to a folder.

    Args:
        overwrite: whether the folder may hold files.
        sources: the folders that are read.
        hint: the end of the message about a folder that is not empty.

    Raises:
        UserError: it is a file, is not empty, or is one of the sources or holds one.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir}: is a file, --output_dir needs a folder")
    for source in sources:
        if source is not None and source.resolve() == output_dir.resolve():
            raise UserError(f"{output_dir}: --output_dir is a folder that this run reads from; give another one")
        if source is not None and output_dir.resolve() in source.resolve().parents and output_dir.is_dir():
            raise UserError(f"{output_dir}: --output_dir holds {source}, which this run reads; give another one")
    for name in (*MODEL_FILES, SAFETENSORS_NAME):
        if (output_dir / name).is_dir():
            raise UserError(f"{output_dir / name}: is a folder where the model's file is to be written")
    if not overwrite and output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(
            f"{output_dir}: --output_dir is not empty; give another folder, or --overwrite_output_dir "
            f"(with the scripts: OVERWRITE_OUTPUT_DIR=1) to replace the model in it{hint}"
        )


def save_model(
    folder: Path, config: BertConfig, weights: Mapping[str, Tensor], tokenizer: BertTokenizer
) -> dict[str, str]:
    """Write vocab.txt, tokenizer_config.json (the case), config.json and pytorch_model.bin.

    Returns:
        The SHA-256 of each file by its name.

    Raises:
        UserError: a file cannot be written.
    """
    others = {
        VOCAB_NAME: tokenizer.vocabulary_file,
        TOKENIZER_CONFIG_NAME: tokenizer_config(tokenizer.do_lower_case),
        CONFIG_NAME: config.to_json(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write_weights(folder, weights, others)
    except OSError as error:
        raise UserError(f"{folder}: the model cannot be saved ({error.strerror or error})") from None


def results_files(output_dir: Path, task: Task) -> dict[str, Path]:
    """Return, for each dev file, the file that its metrics are appended to."""
    return {file: folder / "eval_results.txt" for file, folder in _results_folders(output_dir, task).items()}


def check_results(output_dir: Path, task: Task) -> None:
    """Check that the metrics can be written.

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
        check_can_append(path)


def write_results(output_dir: Path, task: Task, results: Mapping[str, EvaluationResult], **more: int) -> None:
    """Append the metrics of each dev file, and `more`, to its eval_results.txt.

    Raises:
        UserError: a file cannot be written.
    """
    for name, path in results_files(output_dir, task).items():
        values = {**results[name].metrics, **more}
        make_folder(path.parent, "--output_dir")
        with AppendedFile(path) as file:
            file.write("".join(f"{key} = {values[key]}\n" for key in sorted(values)))


def prediction_names(task: Task, file: str | None) -> dict[str, str]:
    """Return the files to predict, and for each the name of its predictions: GLUE's for the task's test files.

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
    """Check that predictions can be written.

    Raises:
        UserError: one of the files exists and may not be replaced.
    """
    for name in names:
        path = output_dir / name
        if path.is_dir():
            raise UserError(f"{path}: is a folder where the predictions are to be written")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: is there already; give another --output_dir, or --overwrite_output_dir")


def write_predictions(output_dir: Path, predicted: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> None:
    """Write files as GLUE takes them: a row of names, then index and prediction, separated by a tab.

    Args:
        predicted: by file name, the rows' ids and their predictions.

    Raises:
        UserError: a file cannot be written; then none of them is.
    """

    def writer(ids: Sequence[str], values: Sequence[str]) -> Callable[[BinaryIO], object]:
        # An id from a CSV file may hold a tab or a line break.
        rows = [f"{' '.join(index.split())}\t{value}\n" for index, value in zip(ids, values, strict=True)]
        return lambda file: file.write("".join(["index\tprediction\n", *rows]).encode("utf-8"))

    make_folder(output_dir, "--output_dir")
    try:
        write_together(output_dir, {name: writer(*rows) for name, rows in predicted.items()})
    except OSError as error:
        raise UserError(f"{output_dir}: the predictions cannot be written ({error.strerror})") from None


def check_copy(options: Options, is_finished: bool = False) -> None:
    """Check that the outputs can be copied to --data_url.

    Args:
        is_finished: whether the run has ended before; then an earlier copy of its outputs may be replaced.

    Raises:
        UserError: it is no folder that may be written, is one that the run reads or writes, or is not empty.
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
    sources = _results_folders(options.output_dir, options.task)
    for file, folder in _results_folders(target, options.task).items():
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--data_url {folder}: is a file, a folder is needed")
        check_can_make(folder, "--data_url")
        may_replace = options.overwrite_output_dir or (is_finished and _is_copy(sources[file], folder))
        if not may_replace and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--data_url {folder}: is not empty; give another folder, or --overwrite_output_dir")


def copy_outputs(output_dir: Path, target: str, task: Task) -> None:
    """Copy all files of the output folder, and of MNLI's second one where it exists, to --data_url.

    Raises:
        UserError: a file cannot be written; the output folder is untouched.
    """
    targets = _results_folders(Path(target), task)
    try:
        for file, source in _results_folders(output_dir, task).items():
            if source.is_dir():
                _copy_folder(source, targets[file])
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--data_url {target}: cannot be written ({reason}); all is in {output_dir}") from None


def _results_folders(folder: Path, task: Task) -> dict[str, Path]:
    """Return, for each dev file, the folder of its metrics: FOLDER, and FOLDER-MM for MNLI's second one."""
    folder = folder.resolve()  # "." has no name that a suffix could be added to
    return {file: folder.parent / (folder.name + s) for file, s in zip(task.dev_files, task.dev_suffixes, strict=True)}


def _is_copy(source: Path, target: Path) -> bool:
    """Return whether a folder holds only what copying another one, to its end or not, wrote there."""
    if not target.is_dir():
        return False
    temporary = set(temporary_files(target, [path.name for path in source.glob("*")]))
    return all(
        path in temporary
        or (path.is_dir() and _is_copy(source / path.name, path))
        or (path.is_file() and (source / path.name).is_file() and cmp(path, source / path.name, shallow=False))
        for path in target.iterdir()
    )


def _copy_folder(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    has_model = (source / WEIGHTS_NAME).is_file()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _copy_folder(path, target / path.name)
        elif not (has_model and path.name in MODEL_FILES):
            write_atomically(target / path.name, partial(_copy_content, path))
    if has_model:
        others = {name: (source / name).read_bytes() for name in MODEL_FILES[:-1] if (source / name).is_file()}
        write_model(target, partial(_copy_content, source / WEIGHTS_NAME), others)


def _copy_content(source: Path, target: BinaryIO) -> None:
    with source.open("rb") as file:
        shutil.copyfileobj(file, target)
