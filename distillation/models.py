"""Load the teacher and the student from their folders, and check that they fit each other and the task.

A teacher, or a model to evaluate, must be complete. A model to train may get a new classifier or projection, which is
logged.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_processing.files import file_digest
from data_processing.tasks import Task
from distillation.labels import in_task_order, names_the_task
from distillation.runtime.files import read_json_object
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import MODEL_FILES, SAFETENSORS_NAME, WEIGHTS_NAME, read_weights, weights_file
from transformer.heads import TinyBertForSequenceClassification
from transformer.loading import (
    ENCODER_PREFIX,
    NoNewWeights,
    check_weights,
    has_layer_projections,
    num_labels_of,
    projection_size,
    summarise,
    with_encoder_prefix,
)
from transformer.tokenization import BertTokenizer
from transformer.vocabulary import TOKENIZER_CONFIG_NAME, stated_case, vocabulary_path

logger = logging.getLogger(__name__)

RUN_NAME = "run.json"  # beside a model: the record of the run that made it
_PROJECTIONS = ("fit_dense.", "fit_denses.")


@dataclass(frozen=True)
class LoadedModel:
    """A classifier with the tokenizer of its folder."""

    model: TinyBertForSequenceClassification
    tokenizer: BertTokenizer
    folder: Path


def choose_case(required: bool | None, folders: Sequence[Path | None]) -> bool:
    """Return whether the tokenizers of a run lower-case their text.

    Args:
        required: the case that the flags or the task file require; None: the models' files decide.
        folders: the models' folders, whose tokenizer settings or vocabularies show the case; None: no model.

    Returns:
        False, as in the original, if nothing shows the case.

    Raises:
        UserError: a model has another case than required, or than the other model.
    """
    present = [folder for folder in folders if folder is not None and os.path.isfile(vocabulary_path(folder))]
    stated = [(folder, case) for folder in present if (case := stated_case(folder)) is not None]
    words = {True: "uncased", False: "cased"}
    for folder, case in stated:
        if required is not None and case.lower != required:
            leave_out = "leave out --do_lower_case (with the scripts: DO_LOWER_CASE=0)"
            advice = leave_out if required else "set lower_case to true"
            raise UserError(f"{folder}: this model is {words[case.lower]} ({case.evidence}); {advice}")
    if required is not None or not stated:
        return bool(required)
    (folder, first), *rest = stated
    for other, case in rest:
        if case.lower != first.lower:
            raise UserError(
                f"{folder} and {other}: one model is {words[first.lower]} ({first.evidence}), "
                f"the other {words[case.lower]} ({case.evidence})"
            )
    if first.lower and not first.evidence.startswith(TOKENIZER_CONFIG_NAME):  # inferred, so log it
        logger.info("%s: an uncased model (%s): text is lower-cased, as with --do_lower_case", folder, first.evidence)
    return first.lower


def load_complete(
    folder: Path, task: Task, do_lower_case: bool, head: str | None = None, use: str = "the model"
) -> LoadedModel:
    """Load a classifier that is not trained: a teacher, or a model to evaluate.

    Args:
        folder: the folder of config.json, weights, and vocab.txt or tokenizer.json.
        task: the task, whose labels the classifier must have.
        do_lower_case: whether the tokenizer lower-cases.
        head: `relu` or `linear`, the form of the classifier; None: according to config.json.
        use: the role of the model, for messages.

    Raises:
        UserError: a file is missing or damaged, or the model has no classifier for this task.
    """
    config, weights, tokenizer = _read(folder, do_lower_case)
    outputs = num_labels_of(weights)
    if outputs is None:
        raise UserError(
            f"{folder}: {use} has no classifier, it is a raw BERT{_other_heads(weights)}; "
            "fine-tune it on the task first (--do_finetune, or test/train_teacher_1p.sh, test/pipeline.sh)"
        )
    if _classifies_no_texts(config):
        raise UserError(f"{folder}: {use} is a {config.architectures[0]}, which does not classify texts")
    _check_problem_type(folder, config, task, use)
    if outputs != task.outputs:
        raise UserError(f"{folder}: the classifier of {use} {_mismatch(outputs, task)}")
    model = _build(folder, config, weights, outputs, 0, False)
    report = model.load(in_task_order(weights, config, task, folder), folder)
    if report.missing:
        raise UserError(f"{folder}: the weights lack {summarise(report.missing)}, which {use} needs")
    _log_unused(folder, [key for key in report.unexpected if not key.startswith(_PROJECTIONS)])
    model.set_labels(label_names(task), config.relu_head if head is None else head == "relu")
    return LoadedModel(model.eval(), tokenizer, folder)


def load_for_training(
    folder: Path,
    task: Task,
    do_lower_case: bool,
    teacher_size: int = 0,
    transfer_learning: bool = False,
    head: str | None = None,
) -> LoadedModel:
    """Load a model to train: a student, or an encoder to fine-tune as a teacher.

    New weights are drawn for a classifier or projection that the checkpoint lacks, for a projection to another hidden
    size than the teacher's and, with `transfer_learning`, for a classifier with another number of outputs.

    Args:
        folder, task, do_lower_case, head: as for `load_complete`.
        teacher_size: the teacher's hidden size, the output size of the projection; 0: the checkpoint's.
        transfer_learning: whether to replace a classifier with another number of outputs.

    Raises:
        UserError: a file is missing or damaged, part of the encoder is missing, or the classifier has another number
            of outputs.
    """
    config, weights, tokenizer = _read(folder, do_lower_case)
    if _classifies_no_texts(config):
        weights = _without(weights, "classifier.")
    outputs = num_labels_of(weights)
    if outputs is not None and outputs != task.outputs:
        if not transfer_learning:
            raise UserError(f"{folder}: the classifier {_mismatch(outputs, task)}; --transfer_learning replaces it")
        weights = _without(weights, "classifier.")
    if teacher_size and projection_size(weights) not in (0, teacher_size):
        weights = _without(weights, *_PROJECTIONS)
    fit_size = teacher_size or projection_size(weights)
    model = _build(folder, config, weights, task.outputs, fit_size, has_layer_projections(weights))
    if outputs == task.outputs and names_the_task(config, task):  # a classifier of another task has no label order
        weights = in_task_order(weights, config, task, folder)
    report = model.load(weights, folder)
    if report.missing:
        modules = sorted({key.rsplit(".", 1)[0] for key in report.missing})
        logger.info("%s: not in the checkpoint, newly initialized: %s", folder, ", ".join(modules))
    _log_unused(folder, report.unexpected)
    model.set_labels(label_names(task), config.relu_head if head is None else head == "relu")
    return LoadedModel(model, tokenizer, folder)


def _other_heads(weights: Mapping[str, Tensor]) -> str:
    unused = [key for key in weights if not key.startswith((ENCODER_PREFIX, *_PROJECTIONS))]
    return f" with keys that are not used ({summarise(unused)}; a classifier is named classifier)" if unused else ""


def _check_problem_type(folder: Path, config: BertConfig, task: Task, use: str) -> None:
    """Check that the classifier was trained for one label per text, or for a score, as the task needs it."""
    expected = "regression" if task.is_regression else "single_label_classification"
    given = config.extra.get("problem_type") or expected
    if given != expected:
        raise UserError(
            f"{folder}: config.json says problem_type {str(given)[:60]!r}, {task.name} needs {expected!r} of {use}; "
            "fine-tune it on the task first (--do_finetune)"
        )


def _classifies_no_texts(config: BertConfig) -> bool:
    """Return whether the checkpoint's classifier is one of tokens, or of several choices."""
    return bool({"BertForTokenClassification", "BertForMultipleChoice"} & set(config.architectures))


def _without(weights: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if not key.startswith(prefixes)}


def _read(folder: Path, do_lower_case: bool) -> tuple[BertConfig, dict[str, Tensor], BertTokenizer]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a model's folder with config.json, weights and vocab.txt")
    if any(folder.iterdir()):
        weights_file(folder)  # first: weights of another program come with another configuration
    config = BertConfig.from_pretrained(folder)
    tokenizer = BertTokenizer.from_pretrained(folder, do_lower_case)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{folder}: the vocabulary has {len(tokenizer)} tokens, config.json says vocab_size {config.vocab_size}"
        )
    _warn_of_changed_files(folder)  # after both were read, so that those that cannot be read are refused by name
    return config, with_encoder_prefix(read_weights(folder)), tokenizer


def warn_of_changed_weights(folder: Path, digests: Mapping[str, str]) -> None:
    """Warn if a model's weights are not those that its run.json records.

    Args:
        folder: of the model.
        digests: path -> SHA-256 of the files whose digest is known; hashing takes about a second per gigabyte.
    """
    path = folder / WEIGHTS_NAME
    saved, known = _saved_digests(folder).get(WEIGHTS_NAME), digests.get(str(path))
    if None not in (saved, known) and saved != known:
        _warn_of_change(path)


def _warn_of_changed_files(folder: Path) -> None:
    """Warn of each file but the weights that is not the one that run.json records."""
    saved = _saved_digests(folder)
    for name in MODEL_FILES:
        path = folder / name
        if name in saved and name != WEIGHTS_NAME and not (path.is_file() and file_digest(path) == saved[name]):
            _warn_of_change(path)
    # Read in place of the saved weights; alone it is the saved weights in another form.
    if WEIGHTS_NAME in saved and all((folder / name).is_file() for name in (WEIGHTS_NAME, SAFETENSORS_NAME)):
        _warn_of_change(folder / SAFETENSORS_NAME)


def _saved_digests(folder: Path) -> Mapping[str, object]:
    """Return the SHA-256 of the model's files that run.json records, by name; empty without one."""
    model = (read_json_object(folder / RUN_NAME) or {}).get("model")
    return model if isinstance(model, dict) else {}


def _warn_of_change(path: Path) -> None:
    # Not an error: users may edit a model's files on purpose.
    logger.warning(
        "%s: is not the file that was saved with this model (%s); it is used, but unless you changed it, it is damaged "
        "or belongs to another model: copy the whole folder again",
        path,
        RUN_NAME,
    )


def _build(
    folder: Path, config: BertConfig, weights: Mapping[str, Tensor], outputs: int, fit_size: int, per_layer: bool
) -> TinyBertForSequenceClassification:
    """Build the model that config.json describes, after checking its sizes against the weights.

    Random weights are drawn only if the checkpoint lacks some.
    """
    with torch.device("meta"), NoNewWeights():
        missing = check_weights(
            TinyBertForSequenceClassification(config, outputs, fit_size, per_layer), weights, folder
        )
    with contextlib.nullcontext() if missing else NoNewWeights():
        return TinyBertForSequenceClassification(config, outputs, fit_size, per_layer)


def label_names(task: Task) -> tuple[str, ...]:
    """Return the names of a model's outputs for config.json: words if the task has them, otherwise its labels."""
    return task.meanings or task.labels or ("score",)


def _mismatch(outputs: int, task: Task) -> str:
    if task.is_regression:
        return f"has {outputs} outputs, {task.name} is a regression task and needs one"
    return f"has {outputs} outputs, {task.name} has {len(task.labels)} labels"


def _log_unused(folder: Path, keys: Sequence[str]) -> None:
    if keys:
        logger.info("%s: in the checkpoint, not used: %s", folder, summarise(keys))


def check_lengths(config: BertConfig, folder: Path, task: Task, max_seq_length: int) -> None:
    """Check that the model can read the task's texts.

    Raises:
        UserError: it has too few positions, or one segment while the task has pairs of texts.
    """
    if max_seq_length > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {max_seq_length}: the model in {folder} has only "
            f"{config.max_position_embeddings} positions"
        )
    if len(task.text_columns) > config.type_vocab_size:
        raise UserError(f"{folder}: the model has {config.type_vocab_size} segment, {task.name} has two texts")


def check_same_vocabulary(teacher: LoadedModel, student: LoadedModel) -> None:
    """Check that teacher and student have the same vocabulary.

    Raises:
        UserError: their vocabularies differ.
    """
    ours, theirs = student.tokenizer.vocab, teacher.tokenizer.vocab
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        difference = f"{len(theirs)} and {len(ours)} tokens"
    else:
        token = min((t for t in theirs if ours.get(t) != theirs[t]), key=lambda t: theirs[t])
        difference = f"first at line {theirs[token] + 1}, where the teacher has {token!r}"
    raise UserError(
        f"{teacher.folder} and {student.folder}: teacher and student have different vocabularies ({difference}); "
        "distillation needs the same vocab.txt in both"
    )


def check_same_heads(teacher: LoadedModel, student: LoadedModel) -> None:
    """Check that teacher and student have as many attention heads, whose scores the attention loss compares.

    Raises:
        UserError: the numbers of heads differ.
    """
    ours, theirs = student.model.config.num_attention_heads, teacher.model.config.num_attention_heads
    if ours != theirs:
        raise UserError(
            f"{teacher.folder} and {student.folder}: the teacher has {theirs} attention heads and the student {ours}; "
            "the attention loss needs as many; leave it out (--losses hidden,embedding), or take another student"
        )
