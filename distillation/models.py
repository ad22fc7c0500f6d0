"""From the user's folders to a teacher and a student that fit each other and the task, or one clear error.

Nothing here trains. What a checkpoint may lack depends on its part: a teacher is whole, a student
may get a new classifier or projection, and a line says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_processing.tasks import Task
from distillation.labels import in_task_order, names_the_task
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import WEIGHTS_NAME, read_weights
from transformer.heads import TinyBertForSequenceClassification
from transformer.loading import (
    NoNewWeights,
    check_weights,
    has_layer_projections,
    num_labels_of,
    projection_size,
    summarise,
    with_encoder_prefix,
)
from transformer.saving import MANIFEST_NAME, changed_files, has_changed_content, settle_to_read
from transformer.tokenization import BertTokenizer
from transformer.vocabulary import TOKENIZER_CONFIG_NAME, stated_case, vocabulary_path

logger = logging.getLogger(__name__)

_PROJECTIONS = ("fit_dense.", "fit_denses.")


@dataclass(frozen=True)
class LoadedModel:
    """A classifier with the tokenizer of its folder."""

    model: TinyBertForSequenceClassification
    tokenizer: BertTokenizer
    folder: Path


def choose_case(asked: bool | None, folders: Sequence[Path | None]) -> bool:
    """Whether the run's models read lower-cased text.

    Args:
        asked: what the flags or the task file say; None leaves it to the folders.
        folders: of the models, which say it in their files or show it in their vocabularies; None is no model.

    Returns:
        Where neither flag nor folder tells, False, as in the original.

    Raises:
        UserError: the folders say otherwise than what is asked, or than each other.
    """
    there = [folder for folder in folders if folder is not None and os.path.isfile(vocabulary_path(folder))]
    stated = [(folder, case) for folder in there if (case := stated_case(folder)) is not None]
    words = {True: "uncased", False: "cased"}
    for folder, case in stated:
        if asked is not None and case.lower != asked:
            how = "leave out --do_lower_case (with the scripts: DO_LOWER_CASE=0)" if asked else "set lower_case to true"
            raise UserError(f"{folder}: this model is {words[case.lower]} ({case.evidence}); {how}")
    if asked is not None or not stated:
        return bool(asked)
    (folder, first), *rest = stated
    for other, case in rest:
        if case.lower != first.lower:
            raise UserError(
                f"{folder} and {other}: one model is {words[first.lower]} ({first.evidence}), "
                f"the other {words[case.lower]} ({case.evidence})"
            )
    if first.lower and not first.evidence.startswith(TOKENIZER_CONFIG_NAME):  # which is plain enough
        logger.info("%s: an uncased model (%s): its text is lower-cased, as by --do_lower_case", folder, first.evidence)
    return first.lower


def load_complete(
    folder: Path, task: Task, do_lower_case: bool, head: str | None = None, use: str = "the model"
) -> LoadedModel:
    """Loads a classifier that is used as it stands: a teacher, or a model to be evaluated.

    Args:
        folder: config.json, weights and vocab.txt.
        task: its labels are what the classifier must tell apart.
        do_lower_case: whether the tokenizer lower-cases.
        head: `relu` or `linear` where the config is not to be believed about the classifier's form.
        use: what the model is in this run, for messages.

    Raises:
        UserError: a file is missing or broken, or the model has no classifier for this task.
    """
    config, weights, tokenizer = _read(folder, do_lower_case)
    labels = num_labels_of(weights)
    if labels is None:
        raise UserError(
            f"{folder}: {use} has no classifier, it is a raw BERT; "
            "fine-tune it on the task first (--do_finetune, or test/train_teacher_1p.sh, test/pipeline.sh)"
        )
    if labels != task.outputs:
        raise UserError(f"{folder}: the classifier of {use} {_mismatch(labels, task)}")
    model = _build(folder, config, weights, labels, 0, False)
    report = model.load(in_task_order(weights, config, task, folder), folder)
    if report.missing:
        raise UserError(f"{folder}: the weights lack {summarise(report.missing)}, which {use} needs")
    _say_unused(folder, [key for key in report.unexpected if not key.startswith(_PROJECTIONS)])
    model.set_labels(label_names(task), config.relu_head if head is None else head == "relu")
    return LoadedModel(model.eval(), tokenizer, folder)


def load_learner(
    folder: Path,
    task: Task,
    do_lower_case: bool,
    teacher_size: int = 0,
    transfer_learning: bool = False,
    head: str | None = None,
) -> LoadedModel:
    """Loads a model that is to be trained: a student, or an encoder that becomes a teacher.

    A classifier or a projection that the checkpoint lacks begins anew. So does a projection to
    another teacher's hidden size and, with `transfer_learning`, a classifier of another number of
    labels.

    Args:
        folder, task, do_lower_case, head: as for `load_complete`.
        teacher_size: the hidden size that its states are projected to; 0 keeps the checkpoint's.
        transfer_learning: whether a classifier of another number of labels may be given up.

    Raises:
        UserError: a file is missing or broken, part of the encoder is missing, or the classifier is
            of another number of labels.
    """
    config, weights, tokenizer = _read(folder, do_lower_case)
    anew = []
    labels = num_labels_of(weights)
    if labels is not None and labels != task.outputs:
        if not transfer_learning:
            raise UserError(f"{folder}: the classifier {_mismatch(labels, task)}; --transfer_learning begins it anew")
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith("classifier.")}
    if teacher_size and projection_size(weights) not in (0, teacher_size):
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith(_PROJECTIONS)}
    fit_size = teacher_size or projection_size(weights)
    model = _build(folder, config, weights, task.outputs, fit_size, has_layer_projections(weights))
    if labels == task.outputs and names_the_task(config, task):  # of another task it is only where to start from
        weights = in_task_order(weights, config, task, folder)
    report = model.load(weights, folder)
    anew = sorted({key.rsplit(".", 1)[0] for key in report.missing})
    if anew:
        logger.info("%s: not in the checkpoint, begun anew: %s", folder, ", ".join(anew))
    _say_unused(folder, report.unexpected)
    model.set_labels(label_names(task), config.relu_head if head is None else head == "relu")
    return LoadedModel(model, tokenizer, folder)


def _read(folder: Path, do_lower_case: bool) -> tuple[BertConfig, dict, BertTokenizer]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a model's folder with config.json, weights and vocab.txt")
    settle_to_read(folder)
    for name in changed_files(folder, hash_weights=False):
        _warn_of_change(folder / name)
    config = BertConfig.from_pretrained(folder)
    tokenizer = BertTokenizer.from_pretrained(folder, do_lower_case)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{folder}: the vocabulary has {len(tokenizer)} tokens, config.json says vocab_size {config.vocab_size}"
        )
    return config, with_encoder_prefix(read_weights(folder)), tokenizer


def warn_of_changed_weights(folder: Path, digests: Mapping[str, str]) -> None:
    """Warns of weights whose bits are not those that were saved; of another size reading them has told.

    Args:
        digests: the SHA-256 of files by their paths, where they are known: hashing takes a second a gigabyte.
    """
    path = folder / WEIGHTS_NAME
    known = digests.get(str(path))
    if known is not None and has_changed_content(path, known):
        _warn_of_change(path)


def _warn_of_change(path: Path) -> None:
    # No error: whoever edits a model's files by hand knows what for.
    logger.warning(
        "%s: is not the file that was saved with this model (%s), and is used as it is; unless it was changed on "
        "purpose it is damaged or of another model: copy the whole folder again",
        path,
        MANIFEST_NAME,
    )


def _build(
    folder: Path, config: BertConfig, weights: dict, labels: int, fit_size: int, per_layer: bool
) -> TinyBertForSequenceClassification:
    """Builds the model that config.json describes; sizes that its weights do not have are refused first.

    Only where the checkpoint lacks some of its weights are new ones drawn.
    """
    with torch.device("meta"), NoNewWeights():
        missing = check_weights(TinyBertForSequenceClassification(config, labels, fit_size, per_layer), weights, folder)
    with contextlib.nullcontext() if missing else NoNewWeights():
        return TinyBertForSequenceClassification(config, labels, fit_size, per_layer)


def label_names(task: Task) -> tuple[str, ...]:
    """How a model of this task names its outputs in config.json: in words where there are any."""
    return task.meanings or task.labels or ("score",)


def _mismatch(labels: int, task: Task) -> str:
    if task.is_regression:
        return f"tells {labels} labels apart, {task.name} is a regression: it needs one output"
    return f"tells {labels} labels apart, {task.name} has {len(task.labels)}"


def _say_unused(folder: Path, keys: Sequence[str]) -> None:
    if keys:
        logger.info("%s: in the checkpoint, not used: %s", folder, summarise(keys))


def check_lengths(config: BertConfig, folder: Path, task: Task, max_seq_length: int) -> None:
    """Checks that the model can read the task's texts.

    Raises:
        UserError: it has too few positions, or one segment only where the task has two texts.
    """
    if max_seq_length > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {max_seq_length}: the model in {folder} has only "
            f"{config.max_position_embeddings} positions"
        )
    if len(task.text_columns) > config.type_vocab_size:
        raise UserError(f"{folder}: the model has {config.type_vocab_size} segment, {task.name} has two texts")


def check_same_vocabulary(teacher: LoadedModel, student: LoadedModel) -> None:
    """Checks that teacher and student read the same ids.

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
        "a student learns only from a teacher that reads the same vocab.txt"
    )


def check_same_heads(teacher: LoadedModel, student: LoadedModel) -> None:
    """Checks that attention scores can be compared, head by head.

    Raises:
        UserError: the numbers of heads differ.
    """
    ours, theirs = student.model.config.num_attention_heads, teacher.model.config.num_attention_heads
    if ours != theirs:
        raise UserError(
            f"{teacher.folder} and {student.folder}: the teacher has {theirs} attention heads and the student {ours}; "
            "attention scores can be learned only from a teacher with as many heads"
        )
